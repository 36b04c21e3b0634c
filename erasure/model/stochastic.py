"""Stochastic trajectories of a sampler, and the density of each of their transitions.

With x_t = alpha_t x_0 + nu_t eps, the transition from t to a less noisy s that keeps the marginals is (DDIM with
eta = 1, Song et al. 2020, arXiv 2010.02502, eq. 12, for any alpha and nu)

    p(x_s | x_t) = N(alpha_s x0 + sqrt(nu_s^2 - d^2) (x_t - alpha_t x0) / nu_t, d^2)
    q(x_t | x_s) = N(k x_s, v),    k = alpha_t / alpha_s,    v = nu_t^2 - k^2 nu_s^2,    d = nu_s sqrt(v) / nu_t

where x0 is what the network's output says of the clean latents, and q adds noise. Models of noise prediction and
v-prediction have alpha^2 = a and nu^2 = 1 - a (`diffusion.py`); rectified flow has alpha = 1 - sigma and nu = sigma,
which makes an SDE of its ODE. Two means at the same x_t lie as far apart, in units of d, as their x0 times
sqrt(SNR_s - SNR_t), with SNR = alpha^2 / nu^2.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure.model.base import Base
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import count_metadata, count_stored, counting, to_x0


@dataclass(frozen=True)
class Transition:
    """The step of a sampler from t to s.

    Args:
        t: the sampler's timestep.
        signal: alpha_t.
        noise: nu_t.
        next_signal: alpha_s.
        next_noise: nu_s; at 0 the step is deterministic and has no density.
    """

    t: float
    signal: float
    noise: float
    next_signal: float
    next_noise: float

    @property
    def ratio(self) -> float:
        """Return k, the factor of the signal when noise is added."""
        return self.signal / self.next_signal

    @property
    def added(self) -> float:
        """Return the standard deviation sqrt(v) of the noise that is added from s to t."""
        return math.sqrt(max(0.0, self.noise**2 - (self.ratio * self.next_noise) ** 2))

    @property
    def deviation(self) -> float:
        """Return d, the standard deviation of x_s."""
        return self.next_noise * self.added / self.noise

    def mean(self, x: Tensor, clean: Tensor) -> Tensor:
        """Return the mean of x_s for states x_t and their predicted clean latents."""
        eps = (x - self.signal * clean) / self.noise
        return self.next_signal * clean + math.sqrt(max(0.0, self.next_noise**2 - self.deviation**2)) * eps


def transitions(base: Base, steps: int) -> list[Transition]:
    """Return the transitions of the base's own sampler, from noise to clean latents."""
    schedule = base.schedule(None, steps, base.latent_shape())
    times = [float(t) for t in schedule.timesteps]
    if base.architecture.flow:
        levels = [(1 - float(sigma), float(sigma)) for sigma in schedule.sigmas]
    else:
        width = schedule.config.num_train_timesteps // steps
        kept = [float(schedule.alphas_cumprod[int(t)]) for t in times]
        last = int(times[-1]) - width
        kept.append(float(schedule.alphas_cumprod[last] if last >= 0 else schedule.final_alpha_cumprod))
        levels = [(math.sqrt(a), math.sqrt(1 - a)) for a in kept]
    return [Transition(t, *levels[i], *levels[i + 1]) for i, t in enumerate(times)]


def clean(base: Base, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return the clean latents [n, c, h, w] that an output of the network for x at timesteps t [n] says."""
    if base.architecture.flow:
        return x - (t / base.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1) * output
    return to_x0(base.scheduler, output, x, t)


@dataclass
class Paths:
    """n whole trajectories of the base for guides a, and its outputs at each of their S states.

    Args:
        x: all states, from noise to clean latents [n, S + 1, c, h, w].
        pair: the index of the pair of prompts that each trajectory belongs to [n].
        neutral: outputs for the empty prompt [n, S, c, h, w].
        guide: outputs for a [n, S, c, h, w].
        concept: outputs for the concept's prompt [n, S, c, h, w].
    """

    x: Tensor
    pair: Tensor
    neutral: Tensor
    guide: Tensor
    concept: Tensor

    def __len__(self) -> int:
        return len(self.pair)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the trajectories to a safetensors file, from which a resumed run reads them."""
        temporary = path.with_suffix(".tmp")
        save_file({key: value.contiguous() for key, value in vars(self).items()}, temporary, metadata)
        os.replace(temporary, path)


@torch.no_grad()
def sample(base: Base, pairs: list[tuple[str, str]], *, seeds: list[int], steps: int, guidance: float) -> Paths:
    """Sample one stochastic trajectory for the guide of each pair, with the network as it is.

    Each step takes 1F for the guide, and 1F each for the concept and, with guidance, the empty prompt where all of a
    call's are not the guide's own prompts.

    Args:
        base: the checkpoint.
        pairs: pairs (concept prompt, guide); all of them run as one batch.
        seeds: of the noise, one for each trajectory.
        steps: number of steps of the sampler.
        guidance: scale of classifier-free guidance.
    """
    base.check_guidance(guidance)
    shape, n = base.latent_shape(), len(pairs)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=draw) for draw in draws])

    guides = [guide for _, guide in pairs]
    columns = [guides]
    for other in ([concept for concept, _ in pairs], [""] * n):
        if other not in columns and (any(other) or guidance != 1):
            columns.append(other)
    conditions = Conditions.cat([base.conditions(column) for column in columns])
    at_concept = columns.index([concept for concept, _ in pairs])
    at_empty = columns.index([""] * n) if [""] * n in columns else 0
    x, states, outputs = noise(), [], []
    states.append(x)
    for step in transitions(base, steps):
        here = x.to(base.device, base.network.dtype)
        out = base.predict(here.repeat(len(columns), 1, 1, 1), step.t, conditions).float().cpu()
        parts = out.chunk(len(columns))
        outputs.append((parts[at_empty], parts[0], parts[at_concept]))
        found = clean(base, base.guided(parts[at_empty], parts[0], guidance), x, torch.full((n,), step.t))
        x = step.mean(x, found)
        if step.deviation:
            x = x + step.deviation * noise()
        states.append(x)
    recorded = (torch.stack(list(column), 1) for column in zip(*outputs, strict=True))
    return Paths(torch.stack(states, 1), torch.arange(n), *recorded)


def kept_paths(
    path: Path | None,
    base: Base,
    pairs: list[tuple[str, str]],
    *,
    count: int,
    seed: int,
    batch: int = 8,
    **options: Any,
) -> Paths:
    """Read the trajectories that an interrupted run wrote to `path`, or sample them and write them there.

    Args:
        path: the file; None writes none.
        base: the checkpoint.
        pairs: pairs (concept prompt, guide), to which the trajectories are assigned in turn.
        count: number of trajectories.
        seed: seed from which those of the trajectories are derived.
        batch: number of trajectories that run at a time.
        options: `steps` and `guidance`, as for `sample`.
    """
    if path is not None and path.is_file():
        count_stored(base.network, path)
        return Paths(**load_file(path))
    assigned, parts = [i % len(pairs) for i in range(count)], []
    with counting(base.network) as spent:
        for start in range(0, count, batch):
            part = assigned[start : start + batch]
            seeds = [seed * 10_007 + start + i for i in range(len(part))]
            found = sample(base, [pairs[i] for i in part], seeds=seeds, **options)
            found.pair = torch.tensor(part)
            parts.append(found)
    paths = Paths(*(torch.cat([getattr(part, key) for part in parts]) for key in vars(parts[0])))
    if path is not None:
        paths.save(path, count_metadata(spent))
    return paths


def log_density(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the logarithm of a normal density [n], as a mean over all dimensions of x [n, c, h, w].

    Args:
        x: where.
        mean: of each sample.
        deviation: standard deviation of each sample [n].
    """
    wide = deviation.view(-1, 1, 1, 1)
    return (-0.5 * ((x - mean) / wide) ** 2 - wide.log() - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))
