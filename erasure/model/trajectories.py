"""Pools of partially denoised latents, together with the teacher's outputs that the sampler computed for them.

At every state (x_k, t_k) the sampler evaluates the base model for the concept's prompt and for the neutral prompt,
which is the pair of outputs that ESD's target needs. One trajectory of S steps therefore gives S training tuples for
2S forward passes. The published loop runs about S/2 steps for one tuple, and then evaluates the pair again.
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
from erasure.model.diffusion import count_metadata, count_stored, counting


@dataclass
class TrajectoryPool:
    """A pool of n training tuples that were recorded while the base model sampled.

    Args:
        x: latents, scaled as the sampler scales them for the UNet [n, c, h, w].
        t: the sampler's timesteps [n].
        pair: the index of the prompt pair that each tuple belongs to [n].
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
        """Return the tuples of one training step as a pool; arguments as for `draw`."""
        return self.take(self.draw(count, step, seed))

    def draw(self, count: int, step: int, seed: int) -> Tensor:
        """Return the indices [count] of the tuples of one training step.

        Steps read one random permutation of the pool after the other, so that every tuple is used equally often.

        Args:
            count: number of tuples in a step.
            step: the number of the step, from 0.
            seed: seed of the permutations.
        """
        return in_turn(len(self), count, step, seed)

    def take(self, index: Tensor) -> TrajectoryPool:
        """Return the tuples with the indices `index` [b] as a pool."""
        return TrajectoryPool(*(value[index] for value in vars(self).values()))

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the pool to a safetensors file with metadata, from which a resumed run reads it."""
        temporary = path.with_suffix(".tmp")
        save_file({key: value.contiguous() for key, value in vars(self).items()}, temporary, metadata)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> TrajectoryPool:
        """Read a pool from a file that `save` wrote."""
        return cls(**load_file(path))


def in_turn(total: int, count: int, step: int, seed: int) -> Tensor:
    """Return the indices [count] of one step, read from one random permutation of `total` after the other.

    Args:
        total: number of things to choose from.
        count: number of indices in a step.
        step: the number of the step, from 0.
        seed: seed of the permutations.
    """

    def order(epoch: int) -> Tensor:
        return torch.randperm(total, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))

    positions = torch.arange(step * count, (step + 1) * count)
    return torch.stack([order(int(i) // total)[int(i) % total] for i in positions])


@torch.no_grad()
def walk(
    base: Base,
    pairs: list[tuple[str, str]],
    *,
    seeds: list[int],
    steps: int,
    guidance: float,
    sampler: str | None = None,
    scale: float | tuple[float, float] = 1.0,
    stop: int | None = None,
    first: int | None = None,
    judged: bool = True,
    skip: int = 0,
) -> TrajectoryPool:
    """Sample one trajectory for each prompt pair with the network as it is, and record its states.

    Trajectories are guided from the empty prompt towards the concept.

    Args:
        base: the checkpoint.
        pairs: pairs (concept prompt, neutral prompt), one for each trajectory; all of them run as one batch.
        seeds: seeds of the initial noise, one for each trajectory.
        steps: number of steps of the sampler.
        guidance: scale of classifier-free guidance.
        sampler: as for `Base.sampler`.
        scale: size of the latents, as for `Base.latent_shape`.
        stop: index of the only state to record, at which sampling ends, as in the published loops; None records every
            state. The index after the last timestep means the clean latents, with t = 0. They have no output, so
            `judged` must then be off.
        first: record so many states from the start, without outputs, and end sampling with the last of them; `judged`
            must then be off. None records the whole trajectory, or the state `stop`.
        judged: also record the outputs at the state `stop`; if false, `neutral` and `concept` are empty.
        skip: number of timesteps to leave out at the start. The trajectory then starts later from the same noise (a
            quirk of the published code).

    Returns:
        A pool with one tuple for each recorded state of each trajectory.
    """
    base.check_guidance(guidance)
    shape = base.latent_shape(scale)
    schedule = base.schedule(sampler, steps, shape)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    x = torch.stack(noise).to(base.device, base.network.dtype) * schedule.init_noise_sigma
    concept, neutral, empty = (
        base.conditions([c for c, _ in pairs]),
        base.conditions([n for _, n in pairs]),
        base.conditions([""] * len(pairs)),
    )
    # The neutral prompt is mostly empty, as guidance's is, or not asked for: two forwards are then enough, and one if
    # the concept's prompt is empty too.
    same = not judged or all(n == "" for _, n in pairs)
    neutral = empty if same else neutral
    all_empty = same and all(c == "" for c, _ in pairs)
    conditions = concept if all_empty else Conditions.cat([concept, neutral] if same else [concept, neutral, empty])
    states: list[tuple[Tensor, ...]] = []
    n = len(pairs)
    for index, t in enumerate(schedule.timesteps[skip:]):
        scaled = schedule.scale_model_input(x, t)
        if (first is not None or index == stop) and not judged:
            states.append(_state(scaled, t))
            if first is None or index == first - 1:
                break
        out = base.predict(scaled.repeat(len(conditions) // n, 1, 1, 1), t, conditions)
        if first is None and (stop is None or index == stop):
            states.append(_state(scaled, t, out[:n] if all_empty else out[n : 2 * n], out[:n]))
        if index == stop:
            break
        x = schedule.step(base.guided(out[-n:], out[:n], guidance), t, x).prev_sample
    if not states and not judged:
        states.append(_state(x, 0.0))
    return TrajectoryPool(*(torch.cat(column) for column in zip(*states, strict=True)))


def _state(x: Tensor, t: Any, neutral: Tensor | None = None, concept: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return one recorded state as fields of a pool, on the CPU in fp32; missing outputs become empty."""
    n = len(x)
    outputs = (torch.empty(n, 0) if output is None else output.float().cpu() for output in (neutral, concept))
    return (x.float().cpu(), torch.full((n,), float(t)), torch.arange(n), *outputs)


def build_pool(
    base: Base,
    pairs: list[tuple[str, str]],
    *,
    trajectories: int,
    seed: int,
    steps: int,
    guidance: float,
    batch: int = 8,
    sampler: str | None = None,
) -> TrajectoryPool:
    """Build a pool from several trajectories, which are assigned to the prompt pairs in turn.

    Args:
        base: the checkpoint.
        pairs: pairs (concept prompt, neutral prompt).
        trajectories: number of trajectories.
        seed: seed from which the seeds of their initial noise are derived.
        steps: number of steps of the sampler, and of states in a trajectory.
        guidance: scale of classifier-free guidance.
        batch: number of trajectories that run at a time.
        sampler: as for `Base.sampler`.
    """
    assigned = [i % len(pairs) for i in range(trajectories)]
    pools = []
    for start in range(0, trajectories, batch):
        part = assigned[start : start + batch]
        seeds = [seed * 10_007 + start + i for i in range(len(part))]
        pool = walk(base, [pairs[i] for i in part], seeds=seeds, steps=steps, guidance=guidance, sampler=sampler)
        pool.pair = torch.tensor(part)[pool.pair]
        pools.append(pool)
    return TrajectoryPool(*(torch.cat([getattr(pool, key) for pool in pools]) for key in vars(pools[0])))


def kept_pool(path: Path | None, base: Base, pairs: list[tuple[str, str]], **options: Any) -> TrajectoryPool:
    """Read the pool that an interrupted run wrote to `path`, or build it and write it there.

    Args:
        path: the file; None builds the pool without writing it.
        base: the checkpoint.
        pairs: pairs (concept prompt, neutral prompt).
        options: arguments of `build_pool`.
    """
    if path is not None and path.is_file():
        count_stored(base.network, path)
        return TrajectoryPool.load(path)
    with counting(base.network) as spent:
        pool = build_pool(base, pairs, **options)
    if path is not None:
        pool.save(path, count_metadata(spent))
    return pool


def late_states(
    base: Base, pairs: list[tuple[str, str]], draw: torch.Generator, *, steps: int, guidance: float
) -> TrajectoryPool:
    """Sample one state for each prompt pair as the CompVis-based scripts of ESD, AdvUnlearn and UnGuide do.

    Parity modes use this. The trajectory leaves out the first timestep and stops after `steps` - k timesteps, or at its
    end, with k uniform from 0 to `steps` - 1. A quirk of those scripts is reproduced: with 50 steps, the timestep t
    that they draw is 39 to 58 higher than that of the latents. All pairs share k and t.

    Args:
        base: the checkpoint.
        pairs: pairs (concept prompt, neutral prompt).
        draw: random generator for k, the seeds of the noise and t.
        steps: number of steps of the sampler.
        guidance: scale of classifier-free guidance.

    Returns:
        A pool with one tuple for each pair; its `neutral` and `concept` are empty (see `judge`).
    """
    k = int(torch.randint(steps, (1,), generator=draw))
    seeds = torch.randint(2**31, (len(pairs),), generator=draw).tolist()
    states = walk(
        base, pairs, seeds=seeds, steps=steps, guidance=guidance, stop=steps - max(k, 1), judged=False, skip=1
    )
    width = base.scheduler.config.num_train_timesteps // steps
    states.t = (width * k + torch.randint(width, (1,), generator=draw)).float().expand(len(pairs))
    return states


@torch.no_grad()
def judge(base: Base, pool: TrajectoryPool, pairs: list[tuple[str, str]]) -> TrajectoryPool:
    """Compute the outputs of a pool that has one state for each prompt pair, with the UNet as it is.

    Args:
        base: the checkpoint.
        pool: a pool from `late_states`; its `neutral` and `concept` are set.
        pairs: pairs (concept prompt, neutral prompt), in the order of the pool.

    Returns:
        The same pool.
    """
    conditions = base.conditions([n for _, n in pairs] + [c for c, _ in pairs])
    x, t = pool.x.to(base.device), pool.t.to(base.device)
    pool.neutral, pool.concept = base.predict(x.repeat(2, 1, 1, 1), t.repeat(2), conditions).float().cpu().chunk(2)
    return pool


Measure = Literal["norm", "guidance"]  # measures of how much a patch changes the output for a prompt
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
    late: bool = False,
    made: dict[Any, tuple[Tensor, Tensor, Conditions, Tensor, Tensor]] | None = None,
) -> list[float]:
    """Measure, for each seed, how much a patch changes the UNet's output for a prompt p.

    x is the base model's state after `after` of `steps` steps, e_0 the base model's output and e_L the patched one's.
    The measure `norm` is || e_L(x, p) - e_0(x, p) ||_2 (UnGuide, section 3.2). The measure `guidance` is the change
    along the prompt's own guidance g = e_0(x, p) - e_0(x, ""), against it and in its units:
    - <e_L(x, p) - e_0(x, p), g> / ||g||^2. A LoRA trained to output e_0(x, "") - eta g has 1 + eta there, and what it
    does in other directions does not count.

    The cost for each seed is 2 F for each step (1 F if p is empty), and then 2 F, or 3 F with `guidance`. All but 1 F
    of it is the base's part.

    Args:
        base: the checkpoint.
        prompt: the prompt p.
        seeds: seeds of the initial noise.
        patched: function that returns a context in which the UNet has the patch.
        after: number of steps after which the outputs are compared.
        steps: number of steps of the sampler.
        guidance: scale of classifier-free guidance while sampling x.
        measure: `norm` or `guidance`.
        late: as the published script of UnGuide: the first timestep is left out, and the outputs are those at a
            timestep that is 39 to 58 higher than that of x, the same for all seeds.
        made: the base's parts that earlier calls have computed, which this call uses and adds to; other patches need
            not compute them again.

    Returns:
        The measure for each seed.
    """
    made = {} if made is None else made
    key = prompt, tuple(seeds), after, steps, guidance, measure, late
    if key not in made:
        made[key] = _base_part(base, prompt, seeds, after, steps, guidance, measure == "guidance", late)
    x, t, conditions, before, own = made[key]
    with patched():
        change = (base.predict(x, t, conditions).float() - before).flatten(1)
    if measure == "norm":
        return change.norm(dim=1).tolist()
    return (-(change * own).sum(1) / (own * own).sum(1).clamp_min(torch.finfo(own.dtype).tiny)).tolist()


def _base_part(
    base: Base, prompt: str, seeds: Sequence[int], after: int, steps: int, guidance: float, along: bool, late: bool
) -> tuple[Tensor, Tensor, Conditions, Tensor, Tensor]:
    """Return x, t, the conditions, e_0(x, p), and with `along` the guidance g, for `shifts`."""
    n = len(seeds)
    pairs = [(prompt, "")] * n
    if late:
        state = walk(base, pairs, seeds=list(seeds), steps=steps, guidance=guidance, stop=after, judged=False, skip=1)
        width = base.scheduler.config.num_train_timesteps // steps
        drawn = torch.randint(width, (1,), generator=torch.Generator().manual_seed(0))
        state.t = (width * (steps - after) + drawn).float().expand(n)
        state = judge(base, state, pairs) if along else state
    else:
        state = walk(base, pairs, seeds=list(seeds), steps=steps, guidance=guidance, stop=after, judged=along)
    x, t, conditions = state.x.to(base.device), state.t.to(base.device), base.conditions([prompt] * n)
    before = (state.concept.to(base.device) if along else base.predict(x, t, conditions)).float()
    neutral = state.neutral.to(base.device).float() if along else before
    return x, t, conditions, before, (before - neutral).flatten(1)
