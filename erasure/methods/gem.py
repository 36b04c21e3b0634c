"""GEM: a prediction nearer to an anchor's than to the concept's (arXiv 2606.00140).

Trains a low-rank term so that for the concept's prompt c the network predicts what the base predicts for an anchor a,
at states z that the network itself reaches for c, and only as far as it is needed:

    L = gamma max(0, || e(z, c) - e_0(z, a) || - eta || e(z, c) - e_0(z, c) ||)
        + gamma lambda || e(x, k) - e_0(x, k) ||^2 / D

Norms are Euclidean, over all latents of a sample, and L is a mean over samples. With eta = 1 the first term is zero
once the prediction is nearer to the anchor's than to the concept's; with eta < 1 it is zero inside the ball around
a + (a - c) eta^2 / (1 - eta^2) of radius eta ||a - c|| / (1 - eta^2), with a and c for the two predictions. The terms
compare predictions at the same z, so they mean the same for noise, v and the velocity of rectified flow, up to a factor
that depends on the time alone.

The second term is ours: the authors retain nothing. k are prompts to keep, x states of the base's trajectories for
them, and D is the batch's mean || e_0(z, c) - e_0(z, a) ||, so that lambda has no unit: with 1, moving what is kept as
far as the concept has to go costs as much as the concept did at the start.

Cost: each update takes, for T trajectories of which the first S states are used, 2T(S-1) F for the trajectories, 2TS F
for the base's two predictions and TS F + TS B for the network's own; the retain term adds 1F + 1B per sample, and 2F
for each state of its pool.

Deviations from the official code: the retain term; no dropout in the low-rank term, no weight decay; the concept is led
to the nearest word of its kind unless it has an anchor (published: the empty prompt by default). Every layer of
attention that reads text trains (published: queries and keys of joint attention, `qk`, which the presets of SD3 and
FLUX take).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import all_anchored, kept_prompts
from erasure.config import setting
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.trajectories import TrajectoryPool, judge, kept_pool, walk
from erasure.training.adapters import LowRankTerm
from erasure.training.objective import Terms
from erasure.training.run import Run
from erasure.training.stopping import Stop

LEAST_GAP = 1e-6  # of D, for an anchor that is predicted like the concept


@dataclass(frozen=True)
class GEM(GradientMethod):
    """The settings of GEM, with the values tuned on glyph as defaults.

    Defaults that are not the published values (GEMConfig, for FLUX.1-dev):

    - variant, iterations: published `qk` and 25, which take back a tenth of the concept or less on glyph's UNet; ours
      `x` and 40.
    - sample_steps: published 28 (SD3: 40); ours 25, glyph's own.
    - retain_weight: published 0, there is no such term; ours 1.

    Args:
        variant: which modules get a low-rank term; see `erasure list models MODEL`.
        rank: rank of the term.
        alpha: scale of the term, times its rank; None: the rank, so that the scale is 1.
        guide: what a concept without an anchor is led to: the `nearest` word of its kind, or the `empty` prompt.
        eta: how much nearer to the anchor's prediction than to the concept's the network's must come: their distances
            have the ratio eta where the first term ends.
        gamma: weight of the whole loss.
        iterations: number of updates.
        learning_rate: Adam's learning rate.
        trajectories: trajectories of the present network per update.
        early_steps: states used of each trajectory, from the first on.
        sample_steps: steps of a whole trajectory.
        trajectory_guidance: classifier-free guidance scale of all trajectories.
        retain_weight: lambda, the weight of the retain term; 0 leaves it out.
        retain_trajectories: base trajectories of prompts to keep, each with a prompt of its own, neighbours first.
        retain_batch_size: states per update of the retain term.
        measure_every: updates between measurements of how much is erased and kept, on states held out of training
            (`training/curves.py`); the patch's header records them. 0 measures nothing.
        stop: `auto` ends the run when the concept is gone on those states and improves no longer, and goes back and
            lowers the learning rate when neighbours drift too far (`training/stopping.py`); `iterations` is then the
            largest number of updates.
    """

    method: ClassVar[str] = "gem"
    FORGET: ClassVar[str] = "erase"
    RETAIN: ClassVar[tuple[str, ...]] = ("retain",)
    NO_CURVATURE: ClassVar[str] = "its loss is a distance, which has no second derivative where nothing has changed yet"
    NETWORKS: ClassVar[tuple[str, ...]] = ("unet", "sd3", "flux", "pixart", "sana", "qwen-image")
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "retain_trajectories")

    variant: str = "x"
    rank: int = setting(16, at_least=1)
    alpha: float | None = None
    guide: Literal["nearest", "empty"] = "nearest"
    eta: float = setting(1.0, at_least=0)
    gamma: float = setting(100.0, above=0)
    iterations: int = setting(40, at_least=1)
    learning_rate: float = setting(1e-3, above=0, below=1)
    trajectories: int = setting(1, at_least=1)
    early_steps: int = setting(10, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    trajectory_guidance: float = 3.0
    retain_weight: float = setting(1.0, at_least=0)
    retain_trajectories: int = setting(16, at_least=1)
    retain_batch_size: int = setting(8, at_least=1)
    measure_every: int = setting(0, at_least=0)
    stop: Stop = "never"

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Choose anchors and prompts to keep, sample the pool of what is kept, and put the low-rank term in place.

        Raises:
            ErasureError: no word can be the anchor, nothing is left to keep, or no module fits the variant.
        """
        targets = base.targets(self.variant)
        led = all_anchored(base, concepts) if self.guide == "nearest" else concepts
        pairs = [pair for concept in led for pair in concept.prompt_pairs()]
        kept = kept_prompts(base, concepts, self.retain_trajectories, run.seed) if self.retain_weight else []
        pool = None
        if kept:
            pool = kept_pool(
                run.path("retain.safetensors"),
                base,
                [(text, "") for text in kept],
                trajectories=len(kept),
                seed=run.seed,
                steps=self.sample_steps,
                guidance=self.trajectory_guidance,
            )
        adapter = LowRankTerm(
            base.network,
            targets,
            rank=self.rank,
            alpha=self.alpha,
            generator=torch.Generator().manual_seed(run.seed),
            component=base.component,
        )
        return State(base, pairs, kept, pool, adapter, run.seed)

    def reached(self, state: State, step: int) -> TrajectoryPool:
        """Return the first states of this update's trajectories, with the base's predictions for anchor and concept."""
        draw = torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        first = step * self.trajectories
        chosen = [(first + i) % len(state.pairs) for i in range(self.trajectories)]
        states = walk(
            state.base,
            [state.pairs[i] for i in chosen],
            seeds=torch.randint(2**31, (self.trajectories,), generator=draw).tolist(),
            steps=self.sample_steps,
            guidance=self.trajectory_guidance,
            first=min(self.early_steps, self.sample_steps),
            judged=False,
        )
        states.pair = torch.tensor(chosen)[states.pair]
        with state.adapter.off():
            return judge(state.base, states, [state.pairs[int(i)] for i in states.pair])

    def loss(self, state: State, step: int) -> Terms:
        """Return the erasing and the retain term on the states of one update."""
        base, batch = state.base, self.reached(state, step)
        parts, texts = [batch], [state.pairs[int(i)][0] for i in batch.pair]
        if state.retain is not None:
            parts.append(state.retain.batch(self.retain_batch_size, step, state.seed))
            texts += [state.kept[int(i)] for i in parts[1].pair]
        x, t = (torch.cat([getattr(part, key) for part in parts]).to(base.device) for key in ("x", "t"))
        outputs = base.predict(x, t, base.conditions(texts)).float()
        anchor, concept = batch.neutral.to(base.device), batch.concept.to(base.device)
        output = outputs[: len(batch)]
        losses = self.gamma * margin(output, anchor, concept, self.eta)
        terms = {"erase": self.forgotten_states(base, losses, output, batch, self.trajectory_guidance)}
        if state.retain is not None:
            gap = distance(concept, anchor).mean().clamp_min(LEAST_GAP)
            moved = distance(outputs[len(batch) :], parts[1].concept.to(base.device), squared=True).mean()
            terms["retain"] = self.gamma * self.retain_weight * moved / gap
        return terms


def distance(one: Tensor, other: Tensor, *, squared: bool = False) -> Tensor:
    """Return the Euclidean distance of each sample [n] of two tensors [n, c, h, w], or its square."""
    difference = (one - other).flatten(1)
    return difference.square().sum(1) if squared else difference.norm(dim=1)


def margin(output: Tensor, anchor: Tensor, concept: Tensor, eta: float) -> Tensor:
    """Return max(0, || e - e_a || - eta || e - e_c ||) of each sample [n]; arguments [n, c, h, w]."""
    return (distance(output, anchor) - eta * distance(output, concept)).clamp_min(0)


@dataclass
class State:
    """The state of a run of GEM.

    Args:
        base: the checkpoint.
        pairs: (prompt of the concept, anchor).
        kept: prompts of the retain term; empty without it.
        retain: base states of these prompts; None without the term.
        adapter: the low-rank term.
        seed: of the run.
    """

    base: Base
    pairs: list[tuple[str, str]]
    kept: list[str]
    retain: TrajectoryPool | None
    adapter: LowRankTerm
    seed: int
