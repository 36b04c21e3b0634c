"""UnGuide: LoRA-assisted guidance (Polowczyk et al. 2025, arXiv 2508.05755).

A rank-1 LoRA learns to lead the concept's prompt c beyond another one, c_ref:

    L = || e_L(x, c) - [ e_0(x, c_ref) - eta (e_0(x, c) - e_0(x, c_ref)) ] ||^2

When images are made, both networks answer and are combined, w e_0 + (1 - w) e_L. Which w is decided for each prompt
after the first steps (pipelines/latent.py): where the LoRA moves the prompt more than it moves the empty one, the
concept is there, and w = -1 leads away from it; elsewhere w = 1 is the base alone.

Cost: a pool of T trajectories of S states takes 3TS F, each update 1F + 1B a sample. The published script takes
54F + 1B an update, and 440F to decide on a prompt (10 repeats).

Deviations, undone by `parity=True`: base trajectories, all of their states, with the sampler's own t (published: a
walk with the LoRA on, t fed 39 to 58 too high); every linear layer but those of cross-attention (published so for
nudity; for objects keys and values of cross-attention, which on glyph move other prompts as much as the concept's); the
gate looks later, for styles earlier and along the prompt's own guidance (pipelines/latent.py), and its limit is set by
what the LoRA does to other prompts (published: 1); w = 1 where the concept is not there (published: 2, which leads
other prompts away from the LoRA); a paired sequential test stops the repeats (published: all of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import anchored, around, retain_prompts
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.diffusion import away
from erasure.model.trajectories import Measure, TrajectoryPool, judge, kept_pool, late_states, shifts
from erasure.training.adapters import LowRankTerm
from erasure.training.run import Run

OTHERS = 16  # prompts that the gate is set by
STYLED = 6  # of the concept's own, in styles
CALIBRATED = 3  # noises each
LEAST = 0.05  # of its guidance: a prompt that the LoRA leaves alone never opens the gate


@dataclass(frozen=True)
class UnGuide(GradientMethod):
    """Settings of UnGuide.

    Args:
        variant: which layers get a LoRA.
        rank: of the LoRA.
        scale: alpha; the LoRA's product is taken so many times, whatever its rank.
        negative_guidance: eta, how far beyond c_ref.
        iterations: updates.
        batch_size: samples an update.
        learning_rate: of Adam.
        trajectories: base trajectories in the pool.
        sample_steps: states of each.
        trajectory_guidance: classifier-free guidance of the trajectories.
        weight_on: w where the concept is there.
        weight_off: w elsewhere; the paper's is 2.
        decide_after: steps, of `decide_steps`, until a prompt is decided on.
        decide_steps: of the sampler that decides.
        decide_guidance: of the sampler that decides.
        measure: of how far the LoRA moves a prompt: norm, as published, or guidance (pipelines/latent.py).
        ratio: how many times more than the empty prompt the LoRA must move a prompt that names the concept, or how
            many times the prompt's own guidance it must take back; None: what tells the concept's prompts best from
            those of its neighbours and a sample of other words.
        repeats: noises to decide by, at most.
        early: stop the repeats when the decision is clear.
        parity: reproduce the official script: its defaults and its quirks.
    """

    method: ClassVar[str] = "unguide"
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "trajectories", "rank")
    PARITY: ClassVar[dict[str, Any]] = {
        "variant": "x-strict",
        "iterations": 200,
        "batch_size": 1,
        "learning_rate": 3e-5,
        "sample_steps": 50,
        "trajectory_guidance": 9.0,
        "weight_off": 2.0,
        "decide_steps": 50,
        "decide_guidance": 7.5,
        "early": False,
        "ratio": 1.0,
    }

    variant: str = "linear"
    rank: int = setting(1, at_least=1)
    scale: float = 8.0
    negative_guidance: float = 2.0
    iterations: int = setting(100, at_least=1)
    batch_size: int = setting(8, at_least=1)
    learning_rate: float = setting(3e-4, above=0, below=1)
    trajectories: int = setting(12, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    trajectory_guidance: float = 3.0
    weight_on: float = -1.0
    weight_off: float = 1.0
    decide_after: int = 10
    decide_steps: int = 25
    decide_guidance: float = 3.0
    measure: Measure = "norm"
    ratio: float | None = None
    repeats: int = setting(10, at_least=1)
    early: bool = True
    parity: bool = False

    def __post_init__(self) -> None:
        """Check every setting, and that the decision falls before the last step; raises ErasureError."""
        super().__post_init__()
        if not 0 < self.decide_after < self.decide_steps:
            raise ErasureError(f"decide_after={self.decide_after}: expected 1 to {self.decide_steps - 1} steps")

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Prompts with what they are led to, the pool, the LoRA.

        Raises:
            ErasureError: the gate could not decide on what is to be trained.
        """
        targets = base.targets(self.variant)
        if self.measure == "norm" and base.still(targets):
            raise ErasureError(
                f"variant={self.variant}: cross-attention alone cannot move the empty prompt of {base.name}, which is "
                "all zeros, so the gate has no unit for measure=norm and could not decide on a prompt. Set "
                "measure=guidance, or a variant with other layers (linear). Nothing was trained"
            )
        pairs = [pair for one in concepts for pair in anchored(base, one, concepts).prompt_pairs()]
        pool = None
        if not self.parity:
            pool = kept_pool(
                run.path("pool.safetensors"),
                base,
                pairs,
                trajectories=max(self.trajectories, len(pairs)),
                seed=run.seed,
                steps=self.sample_steps,
                guidance=self.trajectory_guidance,
            )
        adapter = LowRankTerm(
            base.unet,
            targets,
            rank=self.rank,
            alpha=self.scale * self.rank,
            generator=torch.Generator().manual_seed(run.seed),
            normal=True,
        )
        others = self.others(base, concepts, run.seed)
        return State(base, pairs, self.named(concepts, others), others, pool, adapter, run.seed)

    @staticmethod
    def others(base: Base, concepts: list[Concept], seed: int) -> list[str]:
        """OTHERS prompts that do not name the concepts: half of them words, neighbours first, half words in styles."""
        near = around(base, concepts)
        found = retain_prompts(base, concepts, 1_000, seed=seed)
        words = list(dict.fromkeys([*near[: OTHERS // 4], *(text for text in found if " in " not in text)]))
        styled = [text for text in found if " in " in text]
        return [*words[: OTHERS // 2], *styled[: OTHERS // 2]]

    @staticmethod
    def named(concepts: list[Concept], others: list[str]) -> list[str]:
        """The concepts' prompts; styles stand beside objects there already, here objects in the others' styles too."""
        looks = [text.split(" in ", 1)[1] for text in others if " in " in text][:STYLED]
        found = [prompt for one in concepts for prompt, _ in one.prompt_pairs()]
        found += [f"a {one.name} in {look}" for one in concepts if one.kind != "style" for look in looks]
        return list(dict.fromkeys(found))

    def loss(self, state: State, step: int) -> dict[str, Tensor]:
        """The objective on one batch."""
        batch, device = self.tuples(state, step), state.base.device
        asked = state.base.conditions([state.pairs[int(i)][0] for i in batch.pair])
        made = state.base.predict(batch.x.to(device), batch.t.to(device), asked).float()
        wanted = away(batch.neutral.to(device), batch.concept.to(device), self.negative_guidance)
        return {"lead": F.mse_loss(made, wanted)}

    def tuples(self, state: State, step: int) -> TrajectoryPool:
        """The batch of states of a step; in parity mode a walk with the LoRA on, t relabelled as published."""
        if state.pool is not None:
            return state.pool.batch(self.batch_size, step, state.seed)
        draw = torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        chosen = torch.randint(len(state.pairs), (self.batch_size,), generator=draw).tolist()
        pairs = [state.pairs[i] for i in chosen]
        found = late_states(state.base, pairs, draw, steps=self.sample_steps, guidance=self.trajectory_guidance)
        found.pair = torch.tensor(chosen)
        with state.adapter.off():
            return judge(state.base, found, pairs)

    def gate(self, state: State) -> dict[str, Any]:
        """The latent gate: its weights and how it decides."""
        ways = {
            "after": self.decide_after,
            "steps": self.decide_steps,
            "guidance": self.decide_guidance,
            "measure": self.measure,
        }
        ratio = self.ratio if self.ratio is not None else self.calibrated(state, ways)
        return {
            "kind": "latent",
            "on": self.weight_on,
            "off": self.weight_off,
            **ways,
            "repeats": self.repeats,
            "early": self.early,
            "ratio": ratio,
        }

    def calibrated(self, state: State, ways: dict[str, Any]) -> float:
        """The cut between named and other prompts; by norm in units of the empty prompt's move, at least 1."""
        base, seeds = state.base, range(CALIBRATED)

        def moved(prompt: str) -> float:
            return sum(shifts(base, prompt, seeds, state.adapter.on, **ways)) / len(seeds)

        with state.adapter.off():
            unit = moved("") if self.measure == "norm" else 1.0
            named, other = ([moved(prompt) for prompt in texts] for texts in (state.named, state.others))
        if not other or unit <= 0:
            return 1.0
        found = cut(named, other) / unit
        return round(max(1.0 if self.measure == "norm" else LEAST, found), 3)


def cut(above: list[float], below: list[float]) -> float:
    """The number that parts two samples with the best balanced accuracy; of several, the middle of the widest gap."""
    values = sorted({*above, *below})

    def merit(pair: tuple[float, float]) -> tuple[float, float]:
        right = sum(x >= pair[1] for x in above) / len(above) + sum(x <= pair[0] for x in below) / len(below)
        return right, pair[1] - pair[0]

    low, high = max(zip(values, values[1:], strict=False), key=merit, default=(values[0], values[0]))
    return (low + high) / 2


@dataclass
class State:
    """What a run of UnGuide holds."""

    base: Base
    pairs: list[tuple[str, str]]
    named: list[str]
    others: list[str]
    pool: TrajectoryPool | None
    adapter: LowRankTerm
    seed: int
