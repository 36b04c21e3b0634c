"""SPM: one-dimensional adapters, semi-permeable membranes (Lyu et al. 2024, arXiv 2312.16145).

A rank-1 term beside every layer of the transformer blocks learns (eq. 4 to 6 of the paper)

    L = || e_M(x, c) - [ e_0(x, n) - eta (e_0(x, c) - e_0(x, n)) ] ||^2 + lambda || e_M(x, a) - e_0(x, a) ||^2

e_M is the model with the membranes, e_0 without, c the concept, n the neutral prompt, a an anchor: another text,
drawn with probability proportional to 1 - |cos(a, c)| (latent anchoring). When images are made, the text gate
scales the membranes by how near the prompt is to the concept (facilitated transport, pipelines/gates.py).

Cost: a pool of T trajectories of S states takes 2TS F, 4TS when it is walked anew (TS more each where a neutral prompt
is not the empty one), and each update 3F + 2B a sample (concept, anchor, anchor's teacher). The published script takes
52F + 10B an update, of which the maths needs 38F + 4B.

Deviations, all undone by `parity=True`: every state of a walk is used, with the sampler's own t, and the walks with the
membranes on are made anew every `refresh` updates (published: one state of one walk an update, whose t is fed 33 to 42
too high); anchors are texts, half of them near the concept (published: noise of the concept's length, and the empty
prompt half of the time); native resolution; the text gate scales once (published: both factors, so gamma^2) and has a
threshold. In parity mode the calls that the script makes and throws away (unconditional halves at guidance 1) are left
out. On XL the published walks also rescale guidance by 0.7; these do not.

Concepts given together share one set of membranes, whose gate takes the nearest of their names. The paper trains a set
each and stacks them: erase one at a time and load the patches together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import around, prompt_of, retained
from erasure.concepts.similarity import cosines, similarities
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import away
from erasure.model.trajectories import TrajectoryPool, build_pool, judge, kept_pool, walk
from erasure.training.adapters import LowRankTerm
from erasure.training.run import Run

GRID = 1000  # timesteps of training
NEAR = 0.5  # share of the anchors that are neighbours or the empty prompt


@dataclass(frozen=True)
class SPM(GradientMethod):
    """Settings of SPM.

    Args:
        variant: which layers get a membrane.
        rank: of the membranes; 1 in the paper.
        negative_guidance: eta, how far beyond the neutral prediction the concept is pushed.
        anchor_weight: lambda, weight of the anchors.
        gate_power: exponent of the gate's similarity: 1 in the paper, 2 in the published code.
        gate_threshold: similarity below which the membranes let a prompt pass; None: halfway between 1 and the
            largest similarity of a neighbour.
        iterations: updates.
        batch_size: samples an update.
        learning_rate: of Adam.
        trajectories: walks in the pool.
        refresh: updates until the pool is walked anew with the membranes on; 0: the base's walks serve to the end.
        sample_steps: states a trajectory.
        trajectory_guidance: classifier-free guidance of the trajectories.
        weight_decay: of AdamW.
        warm_up: updates until the full learning rate; cycles: cosine restarts after it (0: constant rate).
        cycles: see warm_up.
        parity: reproduce the official script: its defaults and its quirks.
    """

    method: ClassVar[str] = "spm"
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "trajectories", "refresh", "rank")
    PARITY: ClassVar[dict[str, Any]] = {
        "anchor_weight": 1000.0,
        "gate_power": 2.0,
        "gate_threshold": 0.0,
        "iterations": 3000,
        "batch_size": 1,
        "sample_steps": 30,
        "weight_decay": 0.01,
        "warm_up": 500,
        "cycles": 3,
        "learning_rate": 1e-4,
    }

    variant: str = "transformer"
    rank: int = setting(1, at_least=1)
    negative_guidance: float = 1.0
    anchor_weight: float = setting(10.0, at_least=0)
    gate_power: float = setting(1.0, at_least=0)
    gate_threshold: float | None = setting(None, at_least=0, at_most=1)
    iterations: int = setting(100, at_least=1)
    batch_size: int = setting(8, at_least=1)
    learning_rate: float = setting(3e-3, above=0, below=1)
    trajectories: int = setting(8, at_least=1)
    refresh: int = setting(50, at_least=0)
    sample_steps: int = setting(25, at_least=2)
    trajectory_guidance: float = 3.0
    weight_decay: float = 0.0
    warm_up: int = setting(0, at_least=0)
    cycles: int = setting(0, at_least=0)
    parity: bool = False

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Prompts, anchors, the pool, the membranes."""
        pairs = [pair for concept in concepts for pair in concept.prompt_pairs()]
        targets = base.targets(self.variant)
        near = around(base, concepts)
        texts = [prompt_of(kind, word) for kind, word in retained(base, concepts)]
        if not texts:
            raise ErasureError("no anchors: every word of the vocabulary is the concept; name neighbours with keep")
        odds = 1 - cosines(base, texts, [c for c, _ in pairs]).abs().amax(1)
        pool = None
        if not self.parity:
            # Membranes start at zero: the base's own walks are the first with the membranes on.
            pool = kept_pool(run.path("pool.safetensors"), base, pairs, seed=run.seed, **self._walks(pairs))
        generator = torch.Generator().manual_seed(run.seed)
        adapter = LowRankTerm(base.unet, targets, rank=self.rank, alpha=float(self.rank), generator=generator)
        return State(base, concepts, pairs, [*near, ""], texts, odds, pool, adapter, run.seed)

    def _walks(self, pairs: list[tuple[str, str]]) -> dict[str, Any]:
        return {
            "trajectories": max(self.trajectories, len(pairs)),  # joint erasure: at least one of each
            "steps": self.sample_steps,
            "guidance": self.trajectory_guidance,
        }

    def rate(self, step: int) -> float:
        """Linear warm-up, then cosine with hard restarts; constant without cycles."""
        if step < self.warm_up:
            return step / self.warm_up
        if not self.cycles:
            return 1.0
        done = (step - self.warm_up) / max(1, self.iterations - self.warm_up)
        return 0.5 * (1 + math.cos(math.pi * ((self.cycles * done) % 1.0)))

    def loss(self, state: State, step: int) -> dict[str, Tensor]:
        """Erasing and anchoring on one batch."""
        base, draw = state.base, torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        batch = self.tuples(state, draw, step)
        sources = base.conditions([state.pairs[int(i)][0] for i in batch.pair])
        anchors, weights = self.anchors(state, sources, draw)
        share = len(anchors) // len(batch)
        x, t = batch.x.to(base.device), batch.t.to(base.device)
        many_x, many_t = x.repeat(share, 1, 1, 1), t.repeat(share)
        with torch.no_grad(), state.adapter.off():
            still = base.predict(many_x, many_t, anchors).float()
        asked = Conditions.cat([sources, anchors])
        out = base.predict(torch.cat([x, many_x]), torch.cat([t, many_t]), asked).float()
        made, held = out[: len(x)], out[len(x) :]
        wanted = away(batch.neutral.to(base.device), batch.concept.to(base.device), self.negative_guidance)
        kept = ((held - still) ** 2).mean((1, 2, 3)) * weights.to(base.device)
        return {"erase": F.mse_loss(made, wanted), "anchor": self.anchor_weight * kept.sum() / len(x)}

    def anchors(self, state: State, sources: Conditions, draw: torch.Generator) -> tuple[Conditions, Tensor]:
        """Embeddings of the anchors and their weights, which sum to 1 a sample.

        Half of the texts are neighbours (or the empty prompt), half follow the paper's law over the vocabulary.
        """
        n = len(sources)
        if self.parity:
            pooled = None if sources.pooled is None else alike(sources.pooled, draw)
            noise = Conditions(alike(sources.states, draw), pooled)
            empty = state.base.conditions([""] * n)
            return Conditions.cat([empty, noise]), torch.tensor([0.5] * n + [0.25] * 2 * n)
        texts = []
        for _ in range(n):
            if torch.rand(1, generator=draw) < NEAR:
                texts.append(state.near[int(torch.randint(len(state.near), (1,), generator=draw))])
            else:
                texts.append(state.texts[int(torch.multinomial(state.odds, 1, generator=draw))])
        return state.base.conditions(texts), torch.ones(n)

    def tuples(self, state: State, draw: torch.Generator, step: int) -> TrajectoryPool:
        """The batch of states of a step, with the teacher's outputs; the pool is walked anew where it is due."""
        if state.pool is None:
            return self._published(state, draw)
        turn = step // self.refresh if self.refresh else 0
        if turn != state.turn:
            seed = state.seed + 1_000_003 * turn
            pool = build_pool(state.base, state.pairs, seed=seed, **self._walks(state.pairs))
            with state.adapter.off():
                for part in torch.arange(len(pool)).split(self.batch_size):
                    found = pool.take(part)
                    found = judge(state.base, found, [state.pairs[int(i)] for i in found.pair])
                    pool.neutral[part], pool.concept[part] = found.neutral, found.concept
            state.pool, state.turn = pool, turn
        return state.pool.batch(self.batch_size, step, state.seed)

    def _published(self, state: State, draw: torch.Generator) -> TrajectoryPool:
        """One state of a walk with the membranes on, at a smaller size, its t relabelled."""
        chosen = torch.randint(len(state.pairs), (self.batch_size,), generator=draw).tolist()
        k = int(torch.randint(1, self.sample_steps, (1,), generator=draw))
        # Sides of half the native size up to one step below it, in steps of 64 pixels (8 latents).
        side = state.base.latent_shape()[-1]
        sides = range(side // 2, side, max(1, min(8, side // 8)))
        height, width = (sides[int(i)] / side for i in torch.randint(len(sides), (2,), generator=draw))
        pairs = [state.pairs[i] for i in chosen]
        found = walk(
            state.base,
            pairs,
            seeds=torch.randint(2**31, (self.batch_size,), generator=draw).tolist(),
            steps=self.sample_steps,
            guidance=self.trajectory_guidance,
            scale=(height, width),
            stop=k,
            judged=False,
        )
        found.t = torch.full_like(found.t, GRID - 1 - GRID * k // self.sample_steps)
        found.pair = torch.tensor(chosen)
        with state.adapter.off():
            return judge(state.base, found, pairs)

    def snapshot(self, state: State) -> dict[str, Tensor]:
        """The pool, once it is not the first: its walks hang on weights that training has left behind."""
        if state.pool is None or not state.turn:
            return {}
        return {"turn": torch.tensor(state.turn), **vars(state.pool)}

    def restore(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Put the pool back."""
        if "turn" in tensors:
            state.turn = int(tensors["turn"])
            state.pool = TrajectoryPool(**{name: value for name, value in tensors.items() if name != "turn"})

    def gate(self, state: State) -> dict[str, Any]:
        """Facilitated transport towards the concepts' names."""
        texts = [name for concept in state.concepts for name in concept.names]
        threshold = self.gate_threshold
        if threshold is None:
            rows = similarities(state.base.pipe, [text for text in state.near if text], texts)
            threshold = round((1 + max((max(row) for row in rows), default=0.0)) / 2, 3)
        return {"kind": "text", "texts": texts, "power": self.gate_power, "threshold": threshold}


def alike(sources: Tensor, draw: torch.Generator) -> Tensor:
    """Noise [2n, ...] of 0.8 to 1.2 times the length of the sources [n, ...], twice over: the published anchors."""
    noise = torch.randn((2 * len(sources), *sources.shape[1:]), generator=draw).to(sources.device, sources.dtype)
    size = (0.8 + 0.4 * torch.rand(len(noise), generator=draw)).to(noise)
    length = sources.flatten(1).norm(dim=1).repeat(2) * size
    return noise * (length / noise.flatten(1).norm(dim=1)).view(-1, *[1] * (noise.dim() - 1))


@dataclass
class State:
    """What a run of SPM holds; `near` and `texts` are anchors, `odds` those of `texts`, `turn` counts the pools."""

    base: Base
    concepts: list[Concept]
    pairs: list[tuple[str, str]]
    near: list[str]
    texts: list[str]
    odds: Tensor
    pool: TrajectoryPool | None
    adapter: LowRankTerm
    seed: int
    turn: int = 0
