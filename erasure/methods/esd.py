"""ESD: Erased Stable Diffusion (Gandikota et al. 2023, arXiv 2303.07345).

Trains the UNet so that for the concept's prompt c it predicts what the base predicts when guided away from the concept
(eq. 7 of the paper):

    L = || e(x_t, c, t) - [ e_0(x_t, n, t) - eta (e_0(x_t, c, t) - e_0(x_t, n, t)) ] ||^2

e_0 is the base and n the neutral prompt (in the paper the empty one). The newer official scripts write the target as
e_0(c) - eta' (e_0(c) - e_0(n)), which is the same with eta' = eta + 1. In this form they also erase a concept from one
other prompt c_f alone ("hat" from "cowboy"), and keep the rest of it: on states of c_f,

    L = || e(x_t, c_f, t) - [ e_0(x_t, c_f, t) - (eta + 1) (e_0(x_t, c, t) - e_0(x_t, n, t)) ] ||^2

For v-prediction and for the velocity of rectified flow (SD3, FLUX) the target is formed of the raw outputs, because its
coefficients sum to 1: at a fixed x_t, noise, v and velocity are affine in each other.

Cost: a pool of T trajectories of S states takes 2TS F, with c_f 3TS F; each update takes 1F + 1B per sample. The
published loop takes about 52F + 1B per update.

Deviations from the official scripts, all undone by `parity=True` (which follows esd_sd.py): x_t, t and the teacher's
outputs come from all of the sampler's own states; native resolution; fp32; batches. A style is erased from subjects in
that style, towards the same subjects without it (published: the bare name, towards the empty prompt, for every kind).
The script leaves the choice of modules to its user; parity takes the paper's, `u` for objects and content, `x` for
styles and identities. Of several concepts, each update erases one drawn at random, as in the older official script.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from erasure.concepts.concept import Concept
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.model.base import Base
from erasure.model.conditioning import Conditions, text_encoders
from erasure.model.diffusion import away
from erasure.model.trajectories import TrajectoryPool, build_pool, kept_pool, walk
from erasure.training.adapters import Adapter, LowRankTerm, Weights
from erasure.training.objective import Terms
from erasure.training.reweighting import squared
from erasure.training.run import Run
from erasure.training.stopping import Stop


@dataclass(frozen=True)
class ESD(GradientMethod):
    """The settings of ESD, with the values tuned on glyph as defaults.

    Defaults that are not the published values (esd_sd.py; the paper where it differs):

    - variant: published `u` for objects and nudity; ours `x` for every kind: fewer weights, which suffice on glyph.
    - iterations, batch_size: published 200 of 1 (paper 1000 of 1); ours 75 of 8, which see 600 states.
    - learning_rate: published 5e-5 with bf16 weights (paper 1e-5, fp32); ours 1.35e-4, so that iterations x rate, which
      is how far Adam can move a weight, is 0.01 as in both.
    - sample_steps: published 50; ours 25: every state is used, not one of each trajectory.
    - sampler, resolution_scale, weight_rounding: published pndm, 2, bf16; ours ddim, 1, none: the sampler and the size
      that pictures are drawn with, and no update lost to rounding.

    Args:
        variant: which modules train; see `erasure list models MODEL`.
        rank: train a low-rank term of this rank instead of whole weights; None trains whole weights.
        alpha: scale of the low-rank term, times its rank; None: the rank, so that the scale is 1.
        negative_guidance: eta, how far beyond the neutral prediction the concept is pushed.
        erase_from: the prompt c_f that the concept is erased from; other prompts with the concept are left to
            themselves. None: the concept's own.
        iterations: number of updates.
        batch_size: samples per update.
        learning_rate: Adam's learning rate.
        trajectories: number of base trajectories in the pool.
        sample_steps: states per trajectory.
        trajectory_guidance: classifier-free guidance scale of the trajectories.
        sampler: sampler of the trajectories; models of rectified flow have euler alone.
        pool: train on every state of a pool; if false, on one fresh trajectory per update, stopped at a random state.
        resolution_scale: size of the trained images, as a multiple of the native size.
        weight_rounding: bf16 rounds the weights after every update, as training in pure bf16 does.
        measure_every: updates between measurements of how much is erased and kept, on states held out of training
            (`training/curves.py`); the patch's header records them. 0 measures nothing.
        stop: `auto` ends the run when the concept is gone on those states and improves no longer, and goes back and
            lowers the learning rate when neighbours drift too far (`training/stopping.py`); `iterations` is then the
            largest number of updates.
        parity: reproduce the official script, with its defaults and its quirks.
    """

    method: ClassVar[str] = "esd"
    FORGET: ClassVar[str] = "esd"
    NETWORKS: ClassVar[tuple[str, ...]] = ("unet", "sd3", "flux", "pixart", "sana", "qwen-image")
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("iterations", "trajectories")
    PARITY: ClassVar[dict[str, Any]] = {
        "iterations": 200,
        "batch_size": 1,
        "learning_rate": 5e-5,
        "sample_steps": 50,
        "sampler": "pndm",
        "pool": False,
        "resolution_scale": 2.0,
        "weight_rounding": "bf16",
    }
    PARITY_KINDS: ClassVar[dict[str, dict[str, Any]]] = {"object": {"variant": "u"}, "content": {"variant": "u"}}

    variant: str = "x"
    rank: int | None = setting(None, at_least=1)
    alpha: float | None = None
    negative_guidance: float = 1.0
    erase_from: str | None = None
    iterations: int = setting(75, at_least=1)
    batch_size: int = setting(8, at_least=1)
    # iterations x learning_rate is 0.01 in both official scripts (1000 x 1e-5, 200 x 5e-5): how far Adam can move.
    learning_rate: float = setting(1.35e-4, above=0, below=1)
    trajectories: int = setting(8, at_least=1)
    sample_steps: int = setting(25, at_least=1)
    trajectory_guidance: float = 3.0
    sampler: Literal["ddim", "pndm", "euler"] = "ddim"
    pool: bool = True
    resolution_scale: float = setting(1.0, above=0)
    weight_rounding: Literal["none", "bf16"] = "none"
    measure_every: int = setting(0, at_least=0)
    stop: Stop = "never"
    parity: bool = False

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> State:
        """Encode the prompts, build the pool and put the adapter in place.

        Raises:
            ErasureError: parity on XL, or no module fits the variant.
        """
        if self.parity and len(text_encoders(base.pipe)) > 1:
            raise ErasureError(
                "parity follows esd_sd.py, which trains Stable Diffusion 1 at twice its size. XL has a script of its "
                "own, with negative_guidance=0, learning_rate=2e-4, iterations=200, batch_size=1, "
                "trajectory_guidance=2, weight_rounding=bf16: use these settings without parity. Nothing was changed"
            )
        targets = base.targets(self.variant)
        bare = self.parity or self.erase_from is not None
        pairs = [pair for concept in concepts for pair in (concept.bare_pairs() if bare else concept.prompt_pairs())]
        sources = base.conditions([prompt for prompt, _ in self.walked(pairs)])
        pool = self._pool(base, pairs, run) if self.pool else None
        adapter: Adapter
        if self.rank is None:
            adapter = Weights(base.network, targets, base.component)
        else:
            generator = torch.Generator().manual_seed(run.seed)
            options: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "component": base.component}
            adapter = LowRankTerm(base.network, targets, generator=generator, **options)
        return State(base, pairs, sources, pool, adapter, run.seed)

    def walked(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the pairs (prompt, neutral prompt) that trajectories are sampled for: with c_f instead of c."""
        return [(self.erase_from or prompt, neutral) for prompt, neutral in pairs]

    def _pool(self, base: Base, pairs: list[tuple[str, str]], run: Run) -> TrajectoryPool:
        pool = kept_pool(
            run.path("pool.safetensors"),
            base,
            self.walked(pairs),
            trajectories=max(self.trajectories, len(pairs)),  # at least one for each prompt
            seed=run.seed,
            steps=self.sample_steps,
            guidance=self.trajectory_guidance,
            sampler=self.sampler,
        )
        return pool if self.erase_from is None else without(base, pool, [prompt for prompt, _ in pairs])

    def tuples(self, state: State, step: int) -> TrajectoryPool:
        """Return the batch of base states for a step."""
        if state.pool is not None:
            return state.pool.batch(self.batch_size, step, state.seed)
        draw = torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        chosen = torch.randint(len(state.pairs), (self.batch_size,), generator=draw).tolist()
        stop = int(torch.randint(self.sample_steps, (1,), generator=draw))
        seeds = torch.randint(2**15, (self.batch_size,), generator=draw).tolist()
        with state.adapter.off():
            states = walk(
                state.base,
                self.walked([state.pairs[i] for i in chosen]),
                seeds=seeds,
                steps=self.sample_steps,
                guidance=self.trajectory_guidance,
                sampler=self.sampler,
                scale=self.resolution_scale,
                stop=stop,
            )
            if self.erase_from is not None:
                states = without(state.base, states, [state.pairs[i][0] for i in chosen])
        states.pair = torch.tensor(chosen)
        return states

    def held_out(self, state: State, **options: Any) -> tuple[TrajectoryPool, list[str]]:
        """Return states to measure on: of c_f if there is one, with its target."""
        pairs = self.walked(state.pairs)
        pool = build_pool(state.base, pairs, **options)
        if self.erase_from is not None:
            pool = without(state.base, pool, [prompt for prompt, _ in state.pairs])
        return pool, [prompt for prompt, _ in pairs]

    def loss(self, state: State, step: int) -> Terms:
        """Return the objective on one batch."""
        batch, device = self.tuples(state, step), state.base.device
        output = state.base.predict(batch.x.to(device), batch.t.to(device), state.sources[batch.pair]).float()
        target = away(batch.neutral.to(device), batch.concept.to(device), self.negative_guidance)
        return {
            "esd": self.forgotten_states(state.base, squared(output, target), output, batch, self.trajectory_guidance)
        }


@torch.no_grad()
def without(base: Base, pool: TrajectoryPool, concepts: list[str], batch: int = 16) -> TrajectoryPool:
    """Make the neutral prediction of states of c_f that of c_f without the concept: e(c_f) - (e(c) - e(n)).

    The formula for c then gives the target for c_f: away(e(c_f) - d, e(c_f), eta) = e(c_f) - (eta + 1) d.

    Args:
        base: the checkpoint; its UNet must be the base's.
        pool: states of c_f with e(n) and e(c_f); its `neutral` is replaced.
        concepts: the concept's prompt c for each pair of the pool.
        batch: number of states that the UNet sees at a time.

    Returns:
        The same pool.
    """
    for part in torch.arange(len(pool)).split(batch):
        conditions = base.conditions([concepts[int(i)] for i in pool.pair[part]])
        named = base.predict(pool.x[part].to(base.device), pool.t[part].to(base.device), conditions).float().cpu()
        pool.neutral[part] = pool.concept[part] - (named - pool.neutral[part])
    return pool


@dataclass
class State:
    """The state of a run of ESD.

    Args:
        base: the checkpoint.
        pairs: (prompt of the concept, neutral prompt).
        sources: conditions of the prompts that the concept is erased from, one for each pair: c_f, or else c.
        pool: base states; None in parity mode, which draws its own.
        adapter: what trains.
        seed: of the run.
    """

    base: Base
    pairs: list[tuple[str, str]]
    sources: Conditions
    pool: TrajectoryPool | None
    adapter: Adapter
    seed: int
