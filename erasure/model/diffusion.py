"""The formulas of diffusion: noise schedules, predictions, guidance, and the counting of UNet calls.

Symbols: x latents [n, c, h, w], t timesteps, eps noise, a = alphas_cumprod[t].
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Counts:
    """The cost of a run: F forward and B backward passes, counted in samples, which do not depend on the machine."""

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Return the costs as plain data, for headers and reports."""
        return {"F": self.forward, "B": self.backward, "seconds": round(self.seconds, 4)}


@contextmanager
def counting(unet: nn.Module, counts: Counts | None = None) -> Iterator[Counts]:
    """Count every sample that passes forward and backward through `unet` inside the block."""
    counts = counts or Counts()

    def back(gradient: Tensor) -> None:
        counts.backward += gradient.shape[0]

    def forward(_: nn.Module, __: Any, output: Any) -> None:
        sample = output[0] if isinstance(output, tuple) else output.sample
        counts.forward += sample.shape[0]
        if sample.requires_grad:
            sample.register_hook(back)

    handle, begun = unet.register_forward_hook(forward), time.perf_counter()
    try:
        yield counts
    finally:
        handle.remove()
        counts.seconds += time.perf_counter() - begun


def signal_and_noise(scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(a) and sqrt(1 - a) at integer timesteps t [n], each shaped [n, 1, 1, 1]."""
    a = scheduler.alphas_cumprod.to(t.device, torch.float32)[t.long()].view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def add_noise(scheduler: Any, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return x_t = sqrt(a) x_0 + sqrt(1 - a) eps (Ho et al. 2020, arXiv 2006.11239, eq. 4)."""
    signal, noise = signal_and_noise(scheduler, t)
    return signal * x0 + noise * eps


def to_eps(scheduler: Any, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Convert a UNet output to the noise it predicts, for epsilon-, v- and sample-prediction."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return output
    signal, noise = signal_and_noise(scheduler, t)
    if kind == "v_prediction":  # v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho 2022)
        return signal * output + noise * x
    return (x - signal * output) / noise


def to_x0(scheduler: Any, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Convert a UNet output to the clean latents it predicts."""
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return output
    signal, noise = signal_and_noise(scheduler, t)
    if kind == "v_prediction":
        return signal * x - noise * output
    return (x - noise * output) / signal


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Return classifier-free guidance, e_u + s (e_c - e_u) (Ho & Salimans 2022, arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def away(neutral: Tensor, concept: Tensor, eta: float) -> Tensor:
    """Return e(n) - eta (e(c) - e(n)) [n, c, h, w], guided away from a concept (ESD, eq. 7; SPM, eq. 5)."""
    return neutral - eta * (concept - neutral)


@contextmanager
def wide(vae: Any) -> Iterator[None]:
    """Run an autoencoder in fp32 where its configuration asks for it (XL's), as its activations overflow fp16.

    The weights are restored exactly when the context ends.
    """
    own = vae.dtype
    narrow = own == torch.float16 and vae.config.force_upcast
    try:
        if narrow:
            vae.to(torch.float32)
        yield
    finally:
        if narrow:
            vae.to(own)
