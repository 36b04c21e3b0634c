"""How far erasing has come, without a picture: how much is erased and how much is kept, on states held out of training.

With e_0 the base's prediction, e the trained one, c the concept's prompt, T the target of the method's objective for
it, and k prompts to keep (neighbours of the concept, and the empty prompt), at each noise level

    erased = <e(x, c) - e_0(x, c), T - e_0(x, c)> / || T - e_0(x, c) ||^2
    drift  = || e(x, k) - e_0(x, k) || / || e_0(x, k) - e_0(x, "") ||    (root mean squares over k and x)

So `erased` is 0 for the base and 1 at the target, and `drift` is in units of how far the base's own predictions lie
apart. Gates are not applied: both are measured with the change at full strength. The calls are counted as the run's
cost only where a run stops by them (`stopping.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import around
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.conditioning import Conditions, encode_prompt
from erasure.model.diffusion import away
from erasure.model.trajectories import TrajectoryPool, build_pool
from erasure.training.adapters import Adapter
from erasure.training.stopping import due

LEVELS = 8  # noise levels: states of a trajectory
KEPT = 4  # prompts to keep, besides the empty one
LEAST, MOST = 4, 16  # trajectories of the concepts' prompts
SEED = 900_001  # added to the run's: states that no pool of a run has
BATCH = 16


class Measured(Protocol):
    """The part of a gradient method that is measured; see `erasure.method.GradientMethod`."""

    def held_out(self, state: Any, **options: Any) -> tuple[TrajectoryPool, list[str]]:
        """Return a pool whose outputs give the objective's target, and the prompt of each of its pairs."""


@dataclass
class Curves:
    """The two measures in the course of a run.

    Args:
        base: the checkpoint.
        adapter: what trains.
        every: updates between measurements; 0: as the stopping rule wants them.
        pool: held-out states of the concepts, with outputs from which `away` makes the target.
        prompts: the concept's prompt for each pair of the pool.
        eta: how far the objective leads away, for `away`.
        kept: held-out states of the prompts to keep; `neutral` is for the empty prompt.
        keep: the prompts to keep, one for each pair of `kept`.
        steps: number of updates at each measurement.
        erased: at each measurement, for each noise level.
        drift: at each measurement, for each noise level.
    """

    base: Base
    adapter: Adapter
    every: int
    pool: TrajectoryPool
    prompts: list[str]
    eta: float
    kept: TrajectoryPool
    keep: list[str]
    steps: list[int] = field(default_factory=list)
    erased: list[list[float]] = field(default_factory=list)
    drift: list[list[float]] = field(default_factory=list)

    @classmethod
    def start(
        cls, method: Measured, base: Base, concepts: Sequence[Concept], state: Any, every: int, seed: int
    ) -> Curves:
        """Sample the held-out states with the base, before anything has been trained or while it is switched off.

        Args:
            method: the method.
            base: the checkpoint.
            concepts: what is erased.
            state: the state of the run.
            every: updates between measurements; 0: as the stopping rule wants them.
            seed: of the run.

        Raises:
            ErasureError: there is no word to keep.
        """
        keep = around(base, list(concepts))[:KEPT]
        if not keep:
            raise ErasureError(
                "measure_every, stop=auto: there is no word to measure on what is kept. Name words to keep with `keep` "
                "(--keep), or set measure_every=0 and stop=never; nothing was trained"
            )
        options: dict[str, Any] = {"seed": seed + SEED, "steps": LEVELS, "guidance": 1.0 if base.distilled else 3.0}
        with state.adapter.off():
            count = min(max(LEAST, len(concepts)), MOST)
            pool, prompts = method.held_out(state, trajectories=count, **options)
            kept = build_pool(base, [(text, "") for text in keep], trajectories=len(keep), **options)
        eta = getattr(method, "negative_guidance", 0.0)  # without one, the target is the neutral prompt's prediction
        return cls(base, state.adapter, every, pool, prompts, eta, kept, keep)

    def due(self, step: int) -> bool:
        """Return whether a measurement is due after `step` updates."""
        return step % self.every == 0 if self.every else due(step)

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Measure the present state of what trains."""
        texts = [self.prompts[int(i)] for i in self.pool.pair]
        change = self._predict(self.pool, texts) - self.pool.concept
        way = away(self.pool.neutral, self.pool.concept, self.eta) - self.pool.concept
        along, length = (change * way).flatten(1).sum(1), (way * way).flatten(1).sum(1)
        texts = [self.keep[int(i)] for i in self.kept.pair]
        named = self._predict(self.kept, texts) - self.kept.concept
        empty = self._predict(self.kept, [""] * len(texts)) - self.kept.neutral
        moved = ((named**2).flatten(1).sum(1) + (empty**2).flatten(1).sum(1)) / 2
        apart = ((self.kept.concept - self.kept.neutral) ** 2).flatten(1).sum(1)
        self.steps.append(step)
        self.erased.append(self._by_level(self.pool.t, along, length))
        self.drift.append([value**0.5 for value in self._by_level(self.kept.t, moved, apart)])

    def _predict(self, pool: TrajectoryPool, texts: list[str]) -> Tensor:
        """Return the trained model's outputs at the states of a pool, on the CPU in fp32."""
        outputs = []
        conditions = self._conditions(texts)
        for part in torch.arange(len(pool)).split(BATCH):
            x, t = pool.x[part].to(self.base.device), pool.t[part].to(self.base.device)
            outputs.append(self.base.predict(x, t, conditions[part.to(conditions.states.device)]).float().cpu())
        return torch.cat(outputs)

    def _conditions(self, texts: list[str]) -> Conditions:
        if self.adapter.component == self.base.component:
            return self.base.conditions(texts)
        # The base keeps the states of texts; those of an encoder that trains are not these.
        states = {text: encode_prompt(self.base.pipe, text) for text in dict.fromkeys(texts)}
        return Conditions.cat([states[text] for text in texts])

    @staticmethod
    def _by_level(t: Tensor, above: Tensor, below: Tensor) -> list[float]:
        """Return the ratio of sums at each timestep, from the noisiest."""
        levels = sorted(set(t.tolist()), reverse=True)
        return [float(above[t == level].sum() / below[t == level].sum()) for level in levels]

    def tensors(self) -> dict[str, Tensor]:
        """Return the measurements for a checkpoint; empty before the first."""
        if not self.steps:
            return {}
        return {name: torch.tensor(getattr(self, name)) for name in ("steps", "erased", "drift")}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` returned, when a run is resumed."""
        for name, value in tensors.items():
            setattr(self, name, value.tolist())

    def to_json(self) -> dict[str, Any]:
        """Return the measurements as plain data, for the header of a patch: rows are updates, columns noise levels."""
        return {
            "steps": list(self.steps),
            "timesteps": sorted({round(t) for t in self.pool.t.tolist()}, reverse=True),
            "erased": [[round(value, 4) for value in row] for row in self.erased],
            "drift": [[round(value, 4) for value in row] for row in self.drift],
            "kept": [*self.keep, ""],
        }
