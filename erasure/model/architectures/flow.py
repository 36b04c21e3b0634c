"""The sampler of rectified flow and its grid of sigmas, with the shift that suits the number of image tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from erasure.errors import ErasureError


class FlowSampler(FlowMatchEulerDiscreteScheduler):
    """Euler steps along the flow, with what samplers of noise prediction have besides: a start and an input scale."""

    init_noise_sigma = 1.0  # at sigma = 1 the latents are the noise itself

    def scale_model_input(self, x: Tensor, t: Any = None) -> Tensor:
        """Return the latents as they are: the network reads them unscaled."""
        return x


def flow_sampler(scheduler: Any, kind: str) -> FlowSampler:
    """Return an Euler sampler with the shift of a checkpoint's own scheduler.

    Args:
        scheduler: the checkpoint's scheduler, one of flow matching or a solver that is set to flow, as SANA's.
        kind: the kind that was asked for, `euler`.

    Raises:
        ErasureError: the scheduler is not one of rectified flow.
    """
    if scheduler.config.get("use_flow_sigmas") and scheduler.config.get("prediction_type") == "flow_prediction":
        return FlowSampler(scheduler.config.num_train_timesteps, shift=scheduler.config.flow_shift)
    if not any(parent.__name__.startswith("FlowMatch") for parent in type(scheduler).__mro__):
        raise ErasureError(
            f"the pipeline's scheduler is a {type(scheduler).__name__}, and this model is sampled by one of flow "
            f"matching ({kind}). Restore the scheduler that its folder names"
        )
    return FlowSampler.from_config(scheduler.config)


def flow_schedule(
    sampler: FlowSampler,
    steps: int,
    device: torch.device,
    tokens: int,
    *,
    plain_sigmas: bool = False,
    grid: np.ndarray | None = None,
) -> FlowSampler:
    """Set the timesteps of a sampler as the pipelines of SD3 and FLUX do, and return it.

    Where the shift depends on the size, mu rises linearly with the number of image tokens, between the two points that
    the scheduler names (0.5 at 256 and 1.15 at 4096 tokens by default).

    Args:
        sampler: the sampler.
        steps: number of steps.
        device: where the timesteps are needed.
        tokens: number of image tokens.
        plain_sigmas: start from sigmas 1, ..., 1/steps as FLUX's pipeline does; if false, from the scheduler's grid.
        grid: sigmas before the shift, to start from instead.
    """
    config, options = sampler.config, {}
    if config.get("use_dynamic_shifting"):
        share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
        options["mu"] = config.base_shift + (config.max_shift - config.base_shift) * share
    if grid is not None:
        sampler.set_timesteps(sigmas=grid, device=device, **options)
    elif plain_sigmas:
        sampler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, **options)
    else:
        sampler.set_timesteps(steps, device=device, **options)
    return sampler


def solver_grid(scheduler: Any, steps: int) -> np.ndarray | None:
    """Return the sigmas before the shift that a solver set to flow walks; None for a scheduler of flow matching."""
    if not scheduler.config.get("use_flow_sigmas"):
        return None
    return 1 - np.linspace(1 / scheduler.config.num_train_timesteps, 1, steps + 1)[:-1]
