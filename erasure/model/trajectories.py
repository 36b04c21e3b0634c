"""Pools of partially denoised latents, with the teacher's outputs that were computed on the way.

The sampler evaluates the base at every state (x_k, t_k) for the concept and for the neutral prompt: exactly
the pair that ESD's target needs. One trajectory of S steps therefore gives S training tuples for 2S forwards,
whereas the published loop runs about S/2 steps for one tuple and then evaluates the pair again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure.model.base import Base
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import guide


@dataclass
class TrajectoryPool:
    """A pool of n training tuples, taken from the base's own sampling.

    Args:
        x: latents, scaled for the UNet as the sampler scales them [n, c, h, w].
        t: the sampler's own timesteps [n].
        pair: the index of each tuple's prompt pair [n].
        neutral: the base's output for the neutral prompt [n, c, h, w].
        concept: the base's output for the concept's prompt [n, c, h, w].
    """

    x: Tensor
    t: Tensor
    pair: Tensor
    neutral: Tensor
    concept: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def batch(self, count: int, step: int, seed: int) -> TrajectoryPool:
        """Return the tuples of training step `step` as a pool."""
        return self.take(self.draw(count, step, seed))

    def draw(self, count: int, step: int, seed: int) -> Tensor:
        """Return the indices of step `step`: consecutive permutations of the pool, so that no tuple is favoured."""
        at = torch.arange(step * count, (step + 1) * count)
        return torch.stack([self._order(int(i) // len(self), seed)[int(i) % len(self)] for i in at])

    def _order(self, epoch: int, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))

    def take(self, index: Tensor) -> TrajectoryPool:
        """Return the tuples at `index` [b] as a pool."""
        return TrajectoryPool(*(value[index] for value in vars(self).values()))

    def save(self, path: Path) -> None:
        """Write the pool to a file, for a resumed run to read."""
        temporary = path.with_suffix(".tmp")
        save_file({key: value.contiguous() for key, value in vars(self).items()}, temporary)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> TrajectoryPool:
        """Read a pool that `save` wrote."""
        return cls(**load_file(path))


@torch.no_grad()
def walk(
    base: Base,
    pairs: list[tuple[str, str]],
    *,
    seeds: list[int],
    steps: int,
    guidance: float,
    sampler: str = "ddim",
    scale: float | tuple[float, float] = 1.0,
    stop: int | None = None,
    judged: bool = True,
    skip: int = 0,
) -> TrajectoryPool:
    """Sample one trajectory for each prompt pair with the UNet in its present state, recording every state.

    Trajectories are guided from the empty prompt towards the concept.

    Args:
        pairs: (concept prompt, neutral prompt), one for each trajectory; all run as one batch.
        seeds: seeds of the initial noise, one for each trajectory.
        stop: record only the state with this index and end there, as the published loops do. The index one past the
            last timestep means the clean latents, which have no output: it needs `judged` off, and t is then 0.
        skip: leave out so many of the first timesteps; the trajectory starts later, from the same noise (a quirk of
            the published code).
        judged: also record the outputs at that state; if False, `neutral` and `concept` are empty.
    """
    schedule = base.sampler(sampler)
    schedule.set_timesteps(steps, device=base.device)
    shape = base.latent_shape(scale)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    x = torch.stack(noise).to(base.device, base.unet.dtype) * schedule.init_noise_sigma
    concept, neutral, empty = (
        base.conditions([c for c, _ in pairs]),
        base.conditions([n for _, n in pairs]),
        base.conditions([""] * len(pairs)),
    )
    # The neutral prompt is mostly the empty one: then two forwards a state are enough, and one where nothing is named.
    same = all(n == "" for _, n in pairs)
    nothing_named = same and all(c == "" for c, _ in pairs)
    asked = concept if nothing_named else Conditions.cat([concept, neutral] if same else [concept, neutral, empty])
    states: list[tuple[Tensor, ...]] = []
    n = len(pairs)
    for index, t in enumerate(schedule.timesteps[skip:]):
        scaled = schedule.scale_model_input(x, t)
        if index == stop and not judged:
            nothing = torch.empty(n, 0)
            states.append((scaled.float().cpu(), torch.full((n,), float(t)), torch.arange(n), nothing, nothing))
            break
        out = base.predict(scaled.repeat(len(asked) // n, 1, 1, 1), t, asked)
        if stop is None or index == stop:
            at = torch.full((n,), float(t))
            second = out[:n] if nothing_named else out[n : 2 * n]
            states.append((scaled.float().cpu(), at, torch.arange(n), second.float().cpu(), out[:n].float().cpu()))
        if index == stop:
            break
        x = schedule.step(guide(out[-n:], out[:n], guidance), t, x).prev_sample
    if not states and not judged:
        nothing = torch.empty(n, 0)
        states.append((x.float().cpu(), torch.zeros(n), torch.arange(n), nothing, nothing))
    parts = [torch.cat(column) for column in zip(*states, strict=True)]
    return TrajectoryPool(parts[0], parts[1], parts[2], parts[3], parts[4])


def build_pool(
    base: Base,
    pairs: list[tuple[str, str]],
    *,
    trajectories: int,
    seed: int,
    steps: int,
    guidance: float,
    batch: int = 8,
    sampler: str = "ddim",
) -> TrajectoryPool:
    """Build a pool of `trajectories` trajectories, dealt to the prompt pairs in turn and run in batches."""
    dealt = [i % len(pairs) for i in range(trajectories)]
    pools = []
    for start in range(0, trajectories, batch):
        part = dealt[start : start + batch]
        seeds = [seed * 10_007 + start + i for i in range(len(part))]
        pool = walk(base, [pairs[i] for i in part], seeds=seeds, steps=steps, guidance=guidance, sampler=sampler)
        pool.pair = torch.tensor(part)[pool.pair]
        pools.append(pool)
    return TrajectoryPool(*(torch.cat([getattr(pool, key) for pool in pools]) for key in vars(pools[0])))


def kept_pool(path: Path | None, base: Base, pairs: list[tuple[str, str]], **options: Any) -> TrajectoryPool:
    """Read the pool that an interrupted run left at `path`, or build it (`build_pool`) and write it there."""
    if path is not None and path.is_file():
        return TrajectoryPool.load(path)
    pool = build_pool(base, pairs, **options)
    if path is not None:
        pool.save(path)
    return pool


def late_states(
    base: Base, pairs: list[tuple[str, str]], draw: torch.Generator, *, steps: int, guidance: float
) -> TrajectoryPool:
    """Return one state for each pair as the CompVis-based scripts of ESD, AdvUnlearn and UnGuide sample it.

    Parity modes use this. The trajectory leaves out the first timestep and stops after `steps` - k of them, or at its
    end, with k uniform from 0; t is then drawn 39 to 58 above the latents' own, a quirk of those scripts. Outputs are
    empty.
    """
    k = int(torch.randint(steps, (1,), generator=draw))
    seeds = torch.randint(2**31, (len(pairs),), generator=draw).tolist()
    states = walk(
        base, pairs, seeds=seeds, steps=steps, guidance=guidance, stop=steps - max(k, 1), judged=False, skip=1
    )
    width = base.scheduler.config.num_train_timesteps // steps
    states.t = (width * k + torch.randint(width, (len(pairs),), generator=draw)).float()
    return states


@torch.no_grad()
def judge(base: Base, pool: TrajectoryPool, pairs: list[tuple[str, str]]) -> TrajectoryPool:
    """Fill in the outputs of a pool with one state for each pair, using the UNet in its present state."""
    asked = base.conditions([n for _, n in pairs] + [c for c, _ in pairs])
    x, t = pool.x.to(base.device), pool.t.to(base.device)
    pool.neutral, pool.concept = base.predict(x.repeat(2, 1, 1, 1), t.repeat(2), asked).float().cpu().chunk(2)
    return pool


Measure = Literal["norm", "guidance"]  # of how far a patch moves a prompt
MEASURES = get_args(Measure)


@torch.no_grad()
def shifts(
    base: Base,
    prompt: str,
    seeds: Sequence[int],
    patched: Callable[[], AbstractContextManager[Any]],
    *,
    after: int,
    steps: int,
    guidance: float,
    measure: str = "norm",
) -> list[float]:
    """Measure, for each seed, how far a patch moves the UNet's answer to a prompt.

    `patched` opens a context in which the UNet has the patch. x is the base's state after `after` of `steps` steps. By
    `norm`, the distance is || e_L(x, p) - e_0(x, p) ||_2 (UnGuide, section 3.2). By `guidance`, it is how many times
    the patch takes back the prompt's own guidance g = e_0(x, p) - e_0(x, ""),
    - <e_L(x, p) - e_0(x, p), g> / ||g||^2: a LoRA that has learnt to move p to e_0("") - eta g has 1 + eta there, and
    what it does to prompts whose guidance points elsewhere does not count.

    The cost is 2 F for each step (1 for the empty prompt) and 2 F for each seed, or 3 by `guidance`.
    """
    named, n = measure == "guidance", len(seeds)
    state = walk(base, [(prompt, "")] * n, seeds=list(seeds), steps=steps, guidance=guidance, stop=after, judged=named)
    x, t, conditions = state.x.to(base.device), state.t.to(base.device), base.conditions([prompt] * n)
    before = (state.concept.to(base.device) if named else base.predict(x, t, conditions)).float()
    with patched():
        moved = (base.predict(x, t, conditions).float() - before).flatten(1)
    if not named:
        return moved.norm(dim=1).tolist()
    own = (before - state.neutral.to(base.device).float()).flatten(1)
    return (-(moved * own).sum(1) / (own * own).sum(1).clamp_min(torch.finfo(own.dtype).tiny)).tolist()
