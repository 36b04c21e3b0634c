"""SPM: one-dimensional adapters, semi-permeable membranes (Lyu et al. 2024, arXiv 2312.16145).

A rank-1 term next to every layer of the transformer blocks learns (eq. 4 to 6 of the paper)

    L = || e_M(x, c) - [ e_0(x, n) - eta (e_0(x, c) - e_0(x, n)) ] ||^2 + lambda || e_M(x, a) - e_0(x, a) ||^2

e_M is the model with the membranes, e_0 the model without them, c the concept, n the neutral prompt, and a an anchor:
another text, drawn with a probability proportional to 1 - |cos(a, c)| (latent anchoring). When images are generated,
the text gate scales the membranes by the similarity of the prompt to the concept (facilitated transport,
pipelines/gates/text.py).

Cost: a pool of T trajectories of S states takes 2TS F, and 4TS F whenever it is sampled again (TS F more each where a
neutral prompt is not the empty one); each update takes 3F + 2B per sample (concept, anchor, anchor's teacher). The
published script takes 52F + 10B per update, of which the equations need 38F + 4B.

Deviations, all undone by `parity=True`: every state of a trajectory is used, with the sampler's own t, and trajectories
are sampled again with the membranes on every `refresh` updates (published: one state of one trajectory per update, with
a t that is 33 to 42 too high); anchors are texts, half of them near the concept (published: noise of the concept's
length, and the empty prompt half of the time); native resolution; the text gate scales once (published: both factors,
so gamma^2) and has a threshold; a style is erased from subjects in that style (published: the bare name, for every
kind); for nudity eta, lambda and the length are those of other objects (published: 3, 100 and five times as long, with
membranes at a fixed 2 instead of the text gate), and styles are gated like objects (published: gamma is doubled). Both
factors of a membrane are scaled, so parity's gates scale by 4. Parity mode leaves out the calls whose results the
script discards (unconditional halves at guidance 1). On XL the published trajectories also rescale guidance by 0.7;
these do not.

Concepts erased together share one set of membranes, whose gate uses the most similar of their names. The paper trains a
set for each and stacks them: to do the same, erase one at a time and load the patches together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import around, prompt_of, retained
from erasure.concepts.similarity import cosines, gate_encoder, similarities
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import away
from erasure.model.trajectories import TrajectoryPool, build_pool, judge, kept_pool, walk
from erasure.training.adapters import LowRankTerm
from erasure.training.objective import Terms
from erasure.training.reweighting import squared
from erasure.training.run import Run
from erasure.training.stopping import Stop

GRID = 1000  # timesteps of training
NEAR = 0.5  # share of the anchors that are neighbours or the empty prompt


@dataclass(frozen=True)
class SPM(GradientMethod):
    """The settings of SPM, with the values tuned on glyph as defaults.

    Defaults that are not the published values (train_spm.py with configs/snoopy):

    - anchor_weight: published 1000, on noise and the empty prompt; ours 10, on texts, half of them near the
      concept.
    - iterations, batch_size, learning_rate: published 3000 of 1 at 1e-4; ours 100 of 8 at 3e-3. iterations x rate is
      0.3 in both.
    - weight_decay, warm_up, cycles: published 0.01, 500 updates, 3 cycles; ours a constant rate without decay, since
      100 updates leave no room for a schedule.
    - sample_steps: published 30; ours 25, glyph's own.
    - gate_power, gate_threshold: published 2 and 0; ours 1 (the paper's) and halfway to the nearest neighbour, so that
      neighbours keep the base bit for bit.

    Args:
        variant: which layers get a membrane; see `erasure list models MODEL`.
        rank: rank of the membranes; 1 in the paper.
        negative_guidance: eta, how far beyond the neutral prediction the concept is pushed.
        anchor_weight: lambda, the weight of the anchor term.
        gate_power: exponent of the gate's similarity: 1 in the paper, 2 in the published code.
        gate_scale: strength of the membranes at a similarity of 1.
        gate_threshold: similarity below which the membranes do not act on a prompt; None: halfway between 1 and the
            largest similarity of a neighbour.
        iterations: number of updates.
        batch_size: samples per update.
        learning_rate: Adam's learning rate.
        trajectories: number of trajectories in the pool.
        refresh: updates until the pool is sampled again with the membranes on; 0 keeps the base's trajectories.
        sample_steps: states per trajectory.
        trajectory_guidance: classifier-free guidance scale of the trajectories.
        weight_decay: AdamW's weight decay.
        warm_up: updates in which the learning rate rises to its full value.
        cycles: cosine cycles of the learning rate after the warm-up; 0 keeps it constant.
        measure_every: updates between measurements of how much is erased and kept, on states held out of training
            (`training/curves.py`); the patch's header records them. 0 measures nothing.
        stop: `auto` ends the run when the concept is gone on those states and improves no longer, and goes back and
            lowers the learning rate when neighbours drift too far (`training/stopping.py`); `iterations` is then the
            largest number of updates.
        parity: reproduce the official script, with its defaults and its quirks.
    """

    method: ClassVar[str] = "spm"
    FORGET: ClassVar[str] = "erase"
    RETAIN: ClassVar[tuple[str, ...]] = ("anchor",)
    NETWORKS: ClassVar[tuple[str, ...]] = ("unet", "sd3", "flux", "pixart", "sana", "qwen-image")
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
    PARITY_KINDS: ClassVar[dict[str, dict[str, Any]]] = {
        "style": {"gate_scale": 4.0},  # `--facilitate_factor 2`, on both factors
        "content": {  # `--spm_multiplier 2`, on both factors and whatever the prompt
            "negative_guidance": 3.0,
            "anchor_weight": 100.0,
            "iterations": 15_000,
            "gate_power": 0.0,
            "gate_scale": 4.0,
        },
    }

    variant: str = "transformer"
    rank: int = setting(1, at_least=1)
    negative_guidance: float = 1.0
    anchor_weight: float = setting(10.0, at_least=0)
    gate_power: float = setting(1.0, at_least=0)
    gate_scale: float = setting(1.0, above=0)
    gate_threshold: float | None = setting(None, at_least=0, at_most=1)
    iterations: int = setting(100, at_least=1)
    batch_size: int = setting(8, at_least=1)
    learning_rate: float = setting(3e-3, above=0, below=1)
    trajectories: int = setting(8, at_least=1)
    refresh: int = setting(50, at_least=0)
    sample_steps: int = setting(25, at_least=2)
    trajectory_guidance: float = 3.0
    weight_decay: float = setting(0.0, at_least=0)
    warm_up: int = setting(0, at_least=0)
    cycles: int = setting(0, at_least=0)
    measure_every: int = setting(0, at_least=0)
    stop: Stop = "never"
    parity: bool = False

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Choose prompts and anchors, build the pool and put the membranes in place.

        Raises:
            ErasureError: no word is left to be an anchor, no module fits the variant, or no text encoder is loaded.
        """
        named = [concept.bare_pairs() if self.parity else concept.prompt_pairs() for concept in concepts]
        pairs = [pair for prompts in named for pair in prompts]
        targets = base.targets(self.variant)
        gate_encoder(base.pipe)  # refuses a pipeline without one before anything is trained
        near = around(base, concepts)
        texts = [prompt_of(kind, word) for kind, word in retained(base, concepts)]
        if not texts:
            raise ErasureError(
                "there are no anchors: every word of the vocabulary names the concept. Name words to keep with `keep` "
                "(--keep); nothing was changed"
            )
        odds = 1 - cosines(base, texts, [c for c, _ in pairs]).abs().amax(1)
        pool = None
        if not self.parity:
            # Membranes start at zero, so the first trajectories with the membranes on are the base's own.
            pool = kept_pool(run.path("pool.safetensors"), base, pairs, seed=run.seed, **self._trajectories(pairs))
        generator = torch.Generator().manual_seed(run.seed)
        options: dict[str, Any] = {"rank": self.rank, "alpha": float(self.rank), "component": base.component}
        adapter = LowRankTerm(base.network, targets, generator=generator, **options)
        return State(base, concepts, pairs, [*near, ""], texts, odds, pool, adapter, run.seed)

    def _trajectories(self, pairs: list[tuple[str, str]]) -> dict[str, Any]:
        """Return the options of a pool."""
        return {
            "trajectories": max(self.trajectories, len(pairs)),  # at least one for each prompt
            "steps": self.sample_steps,
            "guidance": self.trajectory_guidance,
        }

    def rate(self, step: int) -> float:
        """Return the factor of a linear warm-up, then a cosine with hard restarts; without cycles it stays 1."""
        if step < self.warm_up:
            return step / self.warm_up
        if not self.cycles:
            return 1.0
        done = (step - self.warm_up) / max(1, self.iterations - self.warm_up)
        return 0.5 * (1 + math.cos(math.pi * ((self.cycles * done) % 1.0)))

    def loss(self, state: State, step: int) -> Terms:
        """Return the erasing and the anchor term on one batch."""
        base, draw = state.base, torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        batch = self.tuples(state, draw, step)
        sources = base.conditions([state.pairs[int(i)][0] for i in batch.pair])
        anchors, weights = self.anchors(state, sources, draw)
        share = len(anchors) // len(batch)
        x, t = batch.x.to(base.device), batch.t.to(base.device)
        many_x, many_t = x.repeat(share, 1, 1, 1), t.repeat(share)
        with torch.no_grad(), state.adapter.off():
            before = base.predict(many_x, many_t, anchors).float()
        conditions = Conditions.cat([sources, anchors])
        outputs = base.predict(torch.cat([x, many_x]), torch.cat([t, many_t]), conditions).float()
        output, after = outputs[: len(x)], outputs[len(x) :]
        target = away(batch.neutral.to(base.device), batch.concept.to(base.device), self.negative_guidance)
        drift = ((after - before) ** 2).mean((1, 2, 3)) * weights.to(base.device)
        return {
            "erase": self.forgotten_states(base, squared(output, target), output, batch, self.trajectory_guidance),
            "anchor": self.anchor_weight * drift.sum() / len(x),
        }

    def anchors(self, state: State, sources: Conditions, draw: torch.Generator) -> tuple[Conditions, Tensor]:
        """Return the conditions of the anchors, and their weights, which sum to 1 per sample.

        Half of the anchors are neighbours or the empty prompt, half are drawn from the vocabulary as in the paper.
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
        """Return the batch of states for a step with the teacher's outputs; sample the pool again when due."""
        if state.pool is None:
            return self._published(state, draw)
        turn = step // self.refresh if self.refresh else 0
        if turn != state.turn:
            seed = state.seed + 1_000_003 * turn
            pool = build_pool(state.base, state.pairs, seed=seed, **self._trajectories(state.pairs))
            with state.adapter.off():
                for part in torch.arange(len(pool)).split(self.batch_size):
                    states = pool.take(part)
                    states = judge(state.base, states, [state.pairs[int(i)] for i in states.pair])
                    pool.neutral[part], pool.concept[part] = states.neutral, states.concept
            state.pool, state.turn = pool, turn
        return state.pool.batch(self.batch_size, step, state.seed)

    def _published(self, state: State, draw: torch.Generator) -> TrajectoryPool:
        """Return states reached with the membranes on, at a smaller size, with t as the published script sets it."""
        chosen = torch.randint(len(state.pairs), (self.batch_size,), generator=draw).tolist()
        k = int(torch.randint(1, self.sample_steps, (1,), generator=draw))
        # Sides of half the native size up to one step below it, in steps of 64 pixels (8 latents).
        side = state.base.latent_shape()[-1]
        sides = range(side // 2, side, max(1, min(8, side // 8)))
        height, width = (sides[int(i)] / side for i in torch.randint(len(sides), (2,), generator=draw))
        pairs = [state.pairs[i] for i in chosen]
        states = walk(
            state.base,
            pairs,
            seeds=torch.randint(2**31, (self.batch_size,), generator=draw).tolist(),
            steps=self.sample_steps,
            guidance=self.trajectory_guidance,
            scale=(height, width),
            stop=k,
            judged=False,
        )
        states.t = torch.full_like(states.t, GRID - 1 - GRID * k // self.sample_steps)
        states.pair = torch.tensor(chosen)
        with state.adapter.off():
            return judge(state.base, states, pairs)

    def snapshot(self, state: State) -> dict[str, Tensor]:
        """Return the pool, unless it is the first: later ones depend on weights that training has since changed."""
        if state.pool is None or not state.turn:
            return {}
        return {"turn": torch.tensor(state.turn), **vars(state.pool)}

    def restore(self, state: State, tensors: dict[str, Tensor]) -> None:
        """Restore the pool that training made."""
        if "turn" in tensors:
            state.turn = int(tensors["turn"])
            state.pool = TrajectoryPool(**{name: value for name, value in tensors.items() if name != "turn"})

    def gate(self, state: State) -> dict[str, Any]:
        """Return the text gate (facilitated transport) of the concepts' names."""
        texts = [name for concept in state.concepts for name in concept.names]
        threshold = self.gate_threshold
        if threshold is None:
            rows = similarities(state.base.pipe, [text for text in state.near if text], texts)
            threshold = round((1 + max((max(row) for row in rows), default=0.0)) / 2, 3)
        gate = {"kind": "text", "texts": texts, "power": self.gate_power, "threshold": threshold}
        return gate if self.gate_scale == 1 else {**gate, "scale": self.gate_scale}


def alike(sources: Tensor, draw: torch.Generator) -> Tensor:
    """Return the published anchors: noise [2n, ...] of 0.8 to 1.2 times the length of the sources [n, ...]."""
    noise = torch.randn((2 * len(sources), *sources.shape[1:]), generator=draw).to(sources.device, sources.dtype)
    size = (0.8 + 0.4 * torch.rand(len(noise), generator=draw)).to(noise)
    length = sources.flatten(1).norm(dim=1).repeat(2) * size
    return noise * (length / noise.flatten(1).norm(dim=1)).view(-1, *[1] * (noise.dim() - 1))


@dataclass
class State:
    """The state of a run of SPM.

    Args:
        base: the checkpoint.
        concepts: what is erased.
        pairs: (prompt of the concept, neutral prompt).
        near: anchors that are neighbours of the concepts, and the empty prompt.
        texts: anchors from the whole vocabulary.
        odds: unnormalised probability of each of `texts`.
        pool: states of the present trajectories; None in parity mode.
        adapter: the membranes.
        seed: of the run.
        turn: how often the pool has been sampled again.
    """

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
