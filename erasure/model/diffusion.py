"""The formulas of diffusion: noise schedules, predictions, guidance, and the counting of UNet calls.

Symbols: x latents [n, c, h, w], t timesteps, eps noise, a = alphas_cumprod[t].
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

COSTS = "erasure.costs"  # key of a safetensors file's metadata


@dataclass
class Counts:
    """The cost of a run. Forward and backward passes do not depend on the machine; seconds do.

    Args:
        forward: F, samples that passed forward through the UNet.
        backward: B, samples that passed backward through it.
        seconds: elapsed time.
    """

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Return the costs as plain data with the keys F, B and seconds, for headers and reports."""
        return {"F": self.forward, "B": self.backward, "seconds": round(self.seconds, 4)}


# The contexts of `counting` that are open, each with its network; `count_stored` adds to their counts.
_OPEN: list[tuple[nn.Module, Counts]] = []


@contextmanager
def counting(unet: nn.Module, counts: Counts | None = None) -> Iterator[Counts]:
    """Count the samples that pass forward and backward through a UNet inside the context.

    A pass backward through the graph of another (a second derivative) counts like that one.

    Args:
        unet: the network to count for.
        counts: counts to add to; None starts from zero.
    """
    counts = counts or Counts()

    def back(gradient: Tensor) -> None:
        counts.backward += gradient.shape[0]
        if gradient.requires_grad:  # a pass through the graph of this pass ends here
            gradient.register_hook(back)

    def forward(_: nn.Module, __: Any, output: Any) -> None:
        sample = output[0] if isinstance(output, tuple) else output.sample
        counts.forward += sample.shape[0]
        if sample.requires_grad:
            sample.register_hook(back)

    handle, begun = unet.register_forward_hook(forward), time.perf_counter()
    _OPEN.append(entry := (unet, counts))
    try:
        yield counts
    finally:
        _OPEN[:] = [other for other in _OPEN if other is not entry]
        handle.remove()
        counts.seconds += time.perf_counter() - begun


def count_metadata(counts: Counts) -> dict[str, str]:
    """Return the costs of the tensors in a safetensors file as its metadata, from which `count_stored` reads them."""
    return {COSTS: json.dumps([counts.forward, counts.backward, counts.seconds])}


def count_stored(unet: nn.Module, path: Path) -> None:
    """Add the costs of a file that an interrupted run wrote to the open contexts of `counting` of a network.

    A run that reads a file instead of calling the UNet then reports the same costs as one that was not interrupted.

    Args:
        unet: the network.
        path: a safetensors file; one without costs counts nothing.
    """
    with safe_open(path, "pt") as file:
        forward, backward, seconds = json.loads((file.metadata() or {}).get(COSTS, "[0, 0, 0.0]"))
    for network, counts in _OPEN:
        if network is unet:
            counts.forward, counts.backward = counts.forward + forward, counts.backward + backward
            counts.seconds += seconds


def signal_and_noise(scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(a) and sqrt(1 - a) at integer timesteps t [n], each with the shape [n, 1, 1, 1]."""
    a = scheduler.alphas_cumprod.to(t.device, torch.float32)[t.long()].view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def add_noise(scheduler: Any, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return x_t = sqrt(a) x_0 + sqrt(1 - a) eps (Ho et al. 2020, arXiv 2006.11239, eq. 4)."""
    signal, noise = signal_and_noise(scheduler, t)
    return signal * x0 + noise * eps


def to_eps(scheduler: Any, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Convert the UNet's output for x_t to the noise that it predicts.

    Args:
        scheduler: the checkpoint's scheduler, for its prediction type (epsilon, v_prediction or sample) and its noise
            schedule.
        output: the UNet's output [n, c, h, w].
        x: the latents x_t [n, c, h, w].
        t: integer timesteps [n].
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return output
    signal, noise = signal_and_noise(scheduler, t)
    if kind == "v_prediction":  # v = sqrt(a) eps - sqrt(1 - a) x0 (arXiv 2202.00512)
        return signal * output + noise * x
    return (x - signal * output) / noise


def to_x0(scheduler: Any, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Convert the UNet's output for x_t to the clean latents that it predicts; arguments as for `to_eps`."""
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
    """Return a prediction guided away from a concept, e(n) - eta (e(c) - e(n)).

    This is the training target of ESD (arXiv 2303.07345, eq. 7) and SPM (arXiv 2312.16145, eq. 5).

    Args:
        neutral: e(n), the prediction for the neutral prompt [n, c, h, w].
        concept: e(c), the prediction for the concept's prompt [n, c, h, w].
        eta: strength of the guidance.
    """
    return neutral - eta * (concept - neutral)


@contextmanager
def wide(vae: Any) -> Iterator[None]:
    """Run an fp16 autoencoder in fp32 inside the context if its configuration requires it.

    XL's does, because its activations overflow in fp16. The fp16 weights are restored exactly at the end.
    """
    dtype = vae.dtype
    narrow = dtype == torch.float16 and vae.config.get("force_upcast", False)
    try:
        if narrow:
            vae.to(torch.float32)
        yield
    finally:
        if narrow:
            vae.to(dtype)
