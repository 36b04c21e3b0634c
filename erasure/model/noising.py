"""Noisy states of images, and what a network should predict there: noise, or the velocity of rectified flow.

For models of noise prediction and v-prediction x_t = sqrt(a) z + sqrt(1 - a) eps, and the truth is eps. For rectified
flow x = (1 - sigma) z + sigma eps at the timestep t = 1000 sigma, and the truth is eps - z (arXiv 2403.03206, section
2). Its timesteps are drawn from those of the sampler in as many steps as there are, so with the shift of the size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from erasure.model.base import Base
from erasure.model.diffusion import add_noise, to_eps


def draw_times(base: Base, count: int, draw: torch.Generator) -> Tensor:
    """Return n timesteps [n] drawn uniformly from those that a model is trained at, on the base's device."""
    steps = base.scheduler.config.num_train_timesteps
    index = torch.randint(steps, (count,), generator=draw)
    if not base.architecture.flow:
        return index.to(base.device)
    return base.schedule(None, steps, base.latent_shape()).timesteps[index.to(base.device)]


def noised(base: Base, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return the noisy latents [n, c, h, w] at timesteps t [n] for clean latents z and noise eps."""
    if not base.architecture.flow:
        return add_noise(base.scheduler, z, eps, t)
    sigma = (t / base.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
    return (1 - sigma) * z + sigma * eps


def truth(base: Base, z: Tensor, eps: Tensor) -> Tensor:
    """Return what a perfect network would predict, as `predicted` returns predictions [n, c, h, w]."""
    return eps - z if base.architecture.flow else eps


def predicted(base: Base, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return the network's output [n, c, h, w] as noise, or for rectified flow as it is, a velocity."""
    return output if base.architecture.flow else to_eps(base.scheduler, output, x, t)
