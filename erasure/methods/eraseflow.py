"""EraseFlow: trajectories of an anchor made as likely for the concept's prompt (NeurIPS 2025).

Trains a low-rank term by the trajectory balance of generative flow networks (Malkin et al. 2022, arXiv 2201.13259),
without a reward: on a stochastic trajectory tau = (x_T, ..., x_0) that the base draws for an anchor a, the network's
transitions for the concept's prompt c should be as likely as the reference's, over some of its steps S (D is the number
of latents, beta a constant):

    r(tau) = 1/D sum_S [log p(x_s | x_t, c) - log ref(x_s | x_t)] - log beta,
    L = mean r^2 / G^2 + lambda mean KL_S(x, k) / G

Transitions are those of the base's sampler with noise (`model/stochastic.py`), which holds for noise prediction,
v-prediction and rectified flow alike. G is the batch's mean of the divergence between the base's own transitions for a
and c over S, so that both terms start near 1 and 0.

With reference=anchor, which is ours, ref is the base's transition for a, which drew the trajectory. Both sides are then
normalised densities, so beta is 1, and r = 0 exactly where the network for c is the base for a: there every
trajectory's gradient is zero. With reference=noising, as published, ref is q(x_t | x_s), which adds noise. That differs
from the base's own transition by log(nu_t / nu_s) on average, at S together by a constant of the noise schedule, which
log beta has to meet: if r is above 0 the anchor's trajectories are made less likely, whatever the concept is.

The second term is ours: the authors retain nothing. k are prompts to keep, on their own trajectories, and KL_S is the
divergence of the network's transition from the base's, per transition and in the unit of G: with lambda = 1, moving
what is kept as far as the concept has to go costs as much as the concept did at the start.

Cost: a pool of T trajectories of N steps takes 3TN F (2TN where the anchor is the empty prompt) and 2TN F for T kept
ones; each update takes (S + 1) F + (S + 1) B for each trajectory and kept state in it.

Deviations from the official code: the two points above; trajectories are the base's, sampled once (published: again for
each update with what has been trained, so that the anchor drifts along); the unconditional half of guidance is the
base's output (published: it trains, too); z, which is meant to learn log beta's counterpart, is left out (published: it
starts at -0.195, and 20 updates of 3e-4 move it by 0.006 at most, so z - log beta is -2.70 and log_beta=2.7 here); no
weight decay, no clipping of gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import all_anchored, kept_prompts
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.stochastic import Paths, Transition, clean, kept_paths, log_density, transitions
from erasure.model.trajectories import in_turn
from erasure.training.adapters import LowRankTerm
from erasure.training.objective import Terms
from erasure.training.run import Run
from erasure.training.stopping import Stop

LEAST_GAP = 1e-9  # of G, for an anchor that is predicted like the concept


@dataclass(frozen=True)
class EraseFlow(GradientMethod):
    """The settings of EraseFlow, with the values tuned on glyph as defaults.

    Defaults that are not the published values (train_ef.py):

    - reference, log_beta: published `noising` and 2.7; ours the exact balance (see above).
    - variant, iterations, learning_rate: published all attention, 20 and 3e-4, which move glyph little; ours `x`, 60
      and 5e-3.
    - sample_steps, last_steps, random_steps, trajectory_guidance: published 50, 10, 10, 5; ours 25, 4, 6, 3, glyph's
      own and as large a share.
    - retain_weight: published 0, there is no such term; ours 1.

    Args:
        variant: which modules get a low-rank term; see `erasure list models MODEL`.
        rank: rank of the term.
        alpha: scale of the term, times its rank; None: the rank, so that the scale is 1.
        guide: what a concept without an anchor is led to: the `nearest` word of its kind, or the `empty` prompt.
        reference: what the transitions are balanced against: the base's own for the `anchor`, or `noising`, as
            published.
        log_beta: logarithm of beta, per latent; 0 is exact for reference=anchor, and 2.7 published for noising.
        iterations: number of updates.
        batch_size: trajectories per update.
        learning_rate: Adam's learning rate.
        trajectories: number of base trajectories in the pool.
        sample_steps: steps of a trajectory.
        trajectory_guidance: classifier-free guidance scale of the trajectories, and of the transitions.
        last_steps: the last steps of every trajectory that are used.
        random_steps: steps before these that are used, drawn anew for each update.
        retain_weight: lambda, the weight of the retain term; 0 leaves it out.
        retain_trajectories: base trajectories of prompts to keep, each with a prompt of its own, neighbours first.
        retain_batch_size: transitions per update of the retain term.
        measure_every: updates between measurements of how much is erased and kept, on states held out of training
            (`training/curves.py`); the patch's header records them. 0 measures nothing.
        stop: `auto` ends the run when the concept is gone on those states and improves no longer, and goes back and
            lowers the learning rate when neighbours drift too far (`training/stopping.py`); `iterations` is then the
            largest number of updates.
    """

    method: ClassVar[str] = "eraseflow"
    RETAIN: ClassVar[tuple[str, ...]] = ("retain",)
    NETWORKS: ClassVar[tuple[str, ...]] = ("unet", "sd3", "flux", "pixart", "sana", "qwen-image")
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "trajectories", "retain_trajectories")

    variant: str = "x"
    rank: int = setting(4, at_least=1)
    alpha: float | None = None
    guide: Literal["nearest", "empty"] = "nearest"
    reference: Literal["anchor", "noising"] = "anchor"
    log_beta: float = 0.0
    iterations: int = setting(60, at_least=1)
    batch_size: int = setting(1, at_least=1)
    learning_rate: float = setting(5e-3, above=0, below=1)
    trajectories: int = setting(8, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    trajectory_guidance: float = 3.0
    last_steps: int = setting(4, at_least=0)
    random_steps: int = setting(6, at_least=0)
    retain_weight: float = setting(1.0, at_least=0)
    retain_trajectories: int = setting(16, at_least=1)
    retain_batch_size: int = setting(8, at_least=1)
    measure_every: int = setting(0, at_least=0)
    stop: Stop = "never"

    def __post_init__(self) -> None:
        """Check every setting, and that some steps are used; raises ErasureError."""
        super().__post_init__()
        if not self.last_steps + self.random_steps:
            raise ErasureError("last_steps=0 and random_steps=0: no step of the trajectories would be used")

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Choose anchors and prompts to keep, sample the base's trajectories, and put the low-rank term in place.

        Raises:
            ErasureError: the model's sampler takes no noise, no word can be the anchor, nothing is left to keep, or no
                module fits the variant.
        """
        preset = base.family().preset
        if preset is not None and (why := preset.without.get(self.method)):
            raise ErasureError(f"{self.method} cannot erase from {base.name}: {why}. Nothing was changed")
        targets = base.targets(self.variant)
        led = all_anchored(base, concepts) if self.guide == "nearest" else concepts
        pairs = [pair for concept in led for pair in concept.prompt_pairs()]
        kept = kept_prompts(base, concepts, self.retain_trajectories, run.seed) if self.retain_weight else []
        options: dict[str, Any] = {"steps": self.sample_steps, "guidance": self.trajectory_guidance}
        count = max(self.trajectories, len(pairs))  # at least one for each prompt
        paths = kept_paths(run.path("paths.safetensors"), base, pairs, count=count, seed=run.seed, **options)
        retain = None
        if kept:
            own = [(text, text) for text in kept]
            file = run.path("retain.safetensors")
            retain = kept_paths(file, base, own, count=len(own), seed=run.seed + 1, **options)
        adapter = LowRankTerm(
            base.network,
            targets,
            rank=self.rank,
            alpha=self.alpha,
            generator=torch.Generator().manual_seed(run.seed),
            component=base.component,
        )
        return State(base, pairs, kept, paths, retain, transitions(base, self.sample_steps), adapter, run.seed)

    def steps(self, state: State, draw: torch.Generator) -> list[int]:
        """Return the indices of the steps S of one update; a deterministic step has no density and is left out."""
        usable = [i for i, step in enumerate(state.steps) if step.deviation > 0]
        last = usable[max(0, len(usable) - self.last_steps) :]
        early = usable[: len(usable) - len(last)]
        chosen = torch.randperm(len(early), generator=draw)[: self.random_steps].tolist()
        return [early[i] for i in sorted(chosen)] + last

    def loss(self, state: State, step: int) -> Terms:
        """Return the balance and the retain term on the trajectories of one update."""
        draw = torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        used = self.steps(state, draw)
        rows = in_turn(len(state.paths), self.batch_size, step, state.seed)
        parts = [
            drawn(state, state.paths, rows.repeat_interleave(len(used)), torch.tensor(used).repeat(self.batch_size))
        ]
        texts = [state.pairs[int(i)][0] for i in parts[0].pair]
        if state.retain is not None:
            others = torch.randint(len(state.retain), (self.retain_batch_size,), generator=draw)
            at = torch.tensor(used)[torch.randint(len(used), (self.retain_batch_size,), generator=draw)]
            parts.append(drawn(state, state.retain, others, at))
            texts += [state.kept[int(i)] for i in parts[1].pair]
        x, t = torch.cat([part.x for part in parts]), torch.cat([part.t for part in parts])
        outputs = state.base.predict(x, t, state.base.conditions(texts)).float()
        batch, guidance = parts[0], self.trajectory_guidance
        mean = batch.mean(state, outputs[: len(batch.t)], guidance)
        anchor = batch.mean(state, batch.guide, guidance)
        reference = log_density(batch.after, anchor, batch.deviation)
        if self.reference == "noising":
            reference = log_density(batch.x, batch.ratio.view(-1, 1, 1, 1) * batch.after, batch.added)
        ratio = log_density(batch.after, mean, batch.deviation) - reference
        gap = divergence(batch.mean(state, batch.concept, guidance), anchor, batch.deviation)
        unit = gap.view(self.batch_size, -1).sum(1).mean().clamp_min(LEAST_GAP)
        terms = {"balance": (balance(ratio.view(self.batch_size, -1), self.log_beta) / unit).square().mean()}
        if state.retain is not None:
            other = parts[1]
            moved, still = (other.mean(state, out, guidance) for out in (outputs[len(batch.t) :], other.guide))
            terms["retain"] = self.retain_weight * len(used) * divergence(moved, still, other.deviation).mean() / unit
        return terms


def balance(ratios: Tensor, log_beta: float) -> Tensor:
    """Return r of each trajectory [n] from the logarithms of its steps' ratios of densities [n, S]."""
    return ratios.sum(1) - log_beta


def divergence(one: Tensor, other: Tensor, deviation: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence per latent [n] of normals with the same deviation [n]."""
    return 0.5 * ((one - other) / deviation.view(-1, 1, 1, 1)).square().mean((1, 2, 3))


@dataclass
class Batch:
    """n transitions of the base's trajectories, on the base's device.

    Args:
        pair: the index of the pair of prompts of each [n].
        x: the state at t [n, c, h, w].
        after: the next state, at s.
        t: timesteps [n].
        neutral: the base's output for the empty prompt [n, c, h, w].
        guide: its output for the prompt that drew the trajectory.
        concept: its output for the concept's prompt.
        deviation: of the state at s [n].
        ratio: k of each [n].
        added: standard deviation of the noise that is added from s to t [n].
        steps: the transition of each.
    """

    pair: Tensor
    x: Tensor
    after: Tensor
    t: Tensor
    neutral: Tensor
    guide: Tensor
    concept: Tensor
    deviation: Tensor
    ratio: Tensor
    added: Tensor
    steps: list[Transition]

    def mean(self, state: State, output: Tensor, guidance: float) -> Tensor:
        """Return the mean of the state at s [n, c, h, w] for the network's outputs for a prompt, with guidance."""
        found = clean(state.base, state.base.guided(self.neutral, output, guidance), self.x, self.t)
        return torch.cat([step.mean(self.x[i : i + 1], found[i : i + 1]) for i, step in enumerate(self.steps)])


def drawn(state: State, paths: Paths, rows: Tensor, at: Tensor) -> Batch:
    """Return the transitions at the steps `at` [n] of the trajectories `rows` [n]."""
    steps, device = [state.steps[int(i)] for i in at], state.base.device

    def number(name: str) -> Tensor:
        return torch.tensor([getattr(step, name) for step in steps], device=device)

    return Batch(
        pair=paths.pair[rows],
        x=paths.x[rows, at].to(device),
        after=paths.x[rows, at + 1].to(device),
        t=number("t"),
        neutral=paths.neutral[rows, at].to(device),
        guide=paths.guide[rows, at].to(device),
        concept=paths.concept[rows, at].to(device),
        deviation=number("deviation"),
        ratio=number("ratio"),
        added=number("added"),
        steps=steps,
    )


@dataclass
class State:
    """The state of a run of EraseFlow.

    Args:
        base: the checkpoint.
        pairs: (prompt of the concept, anchor).
        kept: prompts of the retain term; empty without it.
        paths: trajectories of the base for the anchors.
        retain: its trajectories for the prompts to keep; None without the term.
        steps: the transitions of every trajectory.
        adapter: the low-rank term.
        seed: of the run.
    """

    base: Base
    pairs: list[tuple[str, str]]
    kept: list[str]
    paths: Paths
    retain: Paths | None
    steps: list[Transition]
    adapter: LowRankTerm
    seed: int
