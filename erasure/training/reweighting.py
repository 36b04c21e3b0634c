"""Weights of forget samples by their difficulty (LoReUn, Wang et al. 2025, arXiv 2507.22499).

A sample that the model fits well, so one with a small loss of its own, is harder to forget and gets a greater weight:

    w_i ~ exp(-z_i / tau), bounded to [1/4, 4], then divided by their mean, so that the weights of a batch have mean 1

The loss in question is that of the sample as training data, || e(x_t, c) - truth ||^2, not the term that forgets: a
target such as ESD's is reached by what is forgotten already, and weights by that term would point the other way. It is
taken of the present model (dynamic) or of the original one (static); no gradient passes through the weights.

In diffusion a loss depends on the noise level more than on the sample. So z is the loss in standard deviations from the
mean of its noise level, over LEVELS equal parts of the timesteps, with the samples seen so far: static with all of
them, dynamic with a memory of about MEMORY, because losses grow as the concept goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 10
MEMORY = 32  # samples of a noise level
BOUND = 4.0  # largest weight before the division by the mean, and one over the smallest


@dataclass(frozen=True)
class Samples:
    """A term of a loss that forgets, sample by sample.

    Args:
        losses: the objective [n], which is minimised.
        own: the loss [n] of each sample as training data, without a gradient; it decides the weights.
        t: timesteps [n].
    """

    losses: Tensor
    own: Tensor
    t: Tensor


def squared(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample [n] of two tensors [n, c, h, w]."""
    return ((output - target) ** 2).flatten(1).mean(1)


class Reweighting:
    """The weights of forget samples, with the means and variances of their losses by noise level.

    Args:
        temperature: tau; greater values make the weights more alike.
        timesteps: number of timesteps of the noise schedule.
        memory: samples of a noise level after which the oldest count no longer fully; None: all count alike.
    """

    def __init__(self, temperature: float, timesteps: int, memory: int | None) -> None:
        self.temperature, self.timesteps, self.memory = temperature, timesteps, memory
        self.seen = torch.zeros(LEVELS, dtype=torch.float64)
        self.mean = torch.zeros(LEVELS, dtype=torch.float64)
        self.variance = torch.zeros(LEVELS, dtype=torch.float64)

    @torch.no_grad()
    def weights(self, samples: Samples) -> Tensor:
        """Add the samples to what has been seen, and return their weights [n], whose mean is 1."""
        losses = samples.own.double().cpu()
        levels = (samples.t.double().cpu() * LEVELS / self.timesteps).long().clamp(0, LEVELS - 1)
        for level, loss in zip(levels.tolist(), losses.tolist(), strict=True):
            self._see(level, loss)
        spread = self.variance[levels].sqrt()
        z = torch.where(spread > 0, (losses - self.mean[levels]) / spread.clamp(min=1e-30), 0.0)
        weights = torch.exp(-z / self.temperature).clamp(1 / BOUND, BOUND)
        return (weights / weights.mean()).to(samples.losses)

    def _see(self, level: int, loss: float) -> None:
        """Update the mean and the variance of a noise level (West 1979)."""
        self.seen[level] += 1
        share = 1 / min(float(self.seen[level]), self.memory or float("inf"))
        apart = loss - self.mean[level]
        self.mean[level] += share * apart
        self.variance[level] = (1 - share) * (self.variance[level] + share * apart**2)

    def tensors(self) -> dict[str, Tensor]:
        """Return what has been seen, for a checkpoint."""
        return {"seen": self.seen, "mean": self.mean, "variance": self.variance}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned, when a run is resumed."""
        self.seen, self.mean, self.variance = tensors["seen"], tensors["mean"], tensors["variance"]
