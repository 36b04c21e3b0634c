"""From the terms of a loss to gradients: plain, with weights of forget samples, or with gradient surgery.

A method says which of its terms retain (`RETAIN`); all others forget, and one of them (`FORGET`) may come sample by
sample (`reweighting.Samples`). The training loop and the forecast both descend by `Objective`, so every option costs in
the forecast what it costs in the run.

Surgery (gradient surgery; first-order form of UNO, arXiv 2506.04712): where the gradient g_f of the terms that forget
points against the gradient g_r of those that retain, its part along g_r is taken out, so that to first order an update
no longer hurts what is retained:

    g = g_r + g_f - min(0, <g_f, g_r>) / ||g_r||^2 g_r

The products are over all trained tensors together. It takes a second backward pass, so 1B more for each sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from erasure.config import setting
from erasure.errors import ErasureError
from erasure.training.reweighting import MEMORY, Reweighting, Samples

# A retain gradient so many times shorter is rounding: where nothing has changed yet, nothing is there to protect.
ROUNDING = 1e-4

Terms = Mapping[str, Tensor | Samples]


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Settings that every method which trains has.

    Args:
        reweight: weight the forget samples by how hard they are to forget (LoReUn, `training/reweighting.py`): `static`
            by the original model's loss, `dynamic` by the present model's.
        reweight_temperature: tau of these weights; greater values make them more alike.
        surgery: `first` takes out of the forgetting gradient what, to first order, would raise the loss of what is
            retained (`training/objective.py`); `doco` is the published code of DoCo with its defects.
    """

    reweight: Literal["none", "static", "dynamic"] = "none"
    reweight_temperature: float = setting(1.0, above=0)
    surgery: Literal["none", "first", "doco"] = "none"


class Optioned(Protocol):
    """The part of a gradient method that decides the objective."""

    @property
    def reweight(self) -> str:
        """Return "none", "static" or "dynamic"."""

    @property
    def reweight_temperature(self) -> float:
        """Return tau of the weights."""

    @property
    def surgery(self) -> str:
        """Return "none", "first" for surgery of first order, or "doco" for DoCo's published one."""

    @property
    def RETAIN(self) -> tuple[str, ...]:  # noqa: N802 (a class variable of methods)
        """Return the names of the terms that retain."""


class Objective:
    """The objective of a run.

    Args:
        method: its options, and which of its terms retain.
        timesteps: number of timesteps of the checkpoint's noise schedule.

    Attributes:
        figures: of the latest update, for trackers: the cosine of both gradients, the largest weight.
    """

    def __init__(self, method: Optioned, timesteps: int) -> None:
        self.retain, self.surgery = method.RETAIN, method.surgery
        self.figures: dict[str, float] = {}
        self.reweighting: Reweighting | None = None
        if method.reweight != "none":
            memory = MEMORY if method.reweight == "dynamic" else None
            self.reweighting = Reweighting(method.reweight_temperature, timesteps, memory)

    def reduce(self, terms: Terms) -> dict[str, Tensor]:
        """Return the terms as numbers: of one that comes sample by sample, the weighted mean."""
        return {name: self._mean(term) if isinstance(term, Samples) else term for name, term in terms.items()}

    def _mean(self, samples: Samples) -> Tensor:
        if self.reweighting is None:
            return samples.losses.mean()
        weights = self.reweighting.weights(samples)
        self.figures["reweight/largest"] = float(weights.max())
        return (weights * samples.losses).mean()

    def backward(
        self, terms: Mapping[str, Tensor], params: Mapping[str, nn.Parameter], scaler: torch.amp.GradScaler
    ) -> None:
        """Give the trained tensors the gradient of an update; gradients that they had are dropped.

        Args:
            terms: numbers, as `reduce` returns them.
            params: the trained tensors.
            scaler: scales the loss; does nothing except in fp16.

        Raises:
            ErasureError: surgery, and the settings leave no term that retains.
        """
        _clear(params)
        if self.surgery == "none":
            scaler.scale(torch.stack(list(terms.values())).sum()).backward()
            return
        parts: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, term in terms.items():
            parts[name in self.retain].append(term)
        if not parts[True]:
            raise ErasureError(
                f"surgery={self.surgery}: with these settings nothing is retained, so there is no gradient to protect. "
                "Leave surgery out, or give the retain term a weight; no patch was written"
            )
        scaler.scale(torch.stack(parts[False]).sum()).backward(retain_graph=True)
        forget = {name: param.grad for name, param in params.items() if param.grad is not None}
        _clear(params)
        scaler.scale(torch.stack(parts[True]).sum()).backward()
        retain = {name: param.grad for name, param in params.items() if param.grad is not None}
        self.figures["surgery/cosine"] = cosine(forget, retain)
        if self.surgery == "doco":
            unscaled = 1 / scaler.get_scale()
            _clear(params)
            for name, gradient in published(forget, retain, unscaled).items():
                params[name].grad = gradient
            return
        forget = kept_from_hurting(forget, retain)
        for name, gradient in forget.items():
            own = params[name].grad
            params[name].grad = gradient if own is None else own + gradient

    def tensors(self) -> dict[str, Tensor]:
        """Return what changes from step to step, for a checkpoint."""
        return {} if self.reweighting is None else self.reweighting.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned, when a run is resumed."""
        if self.reweighting is not None:
            self.reweighting.restore(tensors)


def kept_from_hurting(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a gradient without what points against another one, over all tensors together.

    Args:
        forget: the gradient that is changed, by tensor.
        retain: the gradient that it must not point against, by tensor; tensors that either one lacks are zero in it.

    Returns:
        `forget`, minus its component along `retain` if that is negative, so that their product is 0; unchanged if
        `retain` is nothing but rounding.
    """
    product, length = dot(forget, retain), dot(retain, retain)
    if product >= 0 or length <= ROUNDING**2 * dot(forget, forget):
        return dict(forget)
    share = product / length
    absent = {name: -share * gradient for name, gradient in retain.items() if name not in forget}
    return absent | {
        name: gradient - share * retain[name] if name in retain else gradient for name, gradient in forget.items()
    }


def published(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    """Return the gradient of DoCo's published code (arXiv 2405.15304), with its defects.

    The forgetting gradient is clipped to a length of 1. Then, in each tensor where both point against each other, their
    cosine times the unit retain gradient is subtracted: the component would be that times the gradient's own length,
    which is far below 1 in a single tensor. The retain gradient itself is not added.

    Args:
        forget: the gradient of the terms that forget, by tensor.
        retain: that of the terms that retain.
        factor: what undoes the scale of the loss.
    """
    clip = min(1.0, 1 / max(float(dot(forget, forget).sqrt()) * factor, 1e-12))
    found = {}
    for name, gradient in forget.items():
        found[name] = clip * gradient
        angle = cosine({name: gradient}, {name: retain[name]}) if name in retain else 0.0
        if angle < 0:
            found[name] = found[name] - angle / factor * retain[name] / retain[name].norm()
    return found


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the cosine of two gradients over all tensors together; 0 if one of them is zero."""
    lengths = dot(one, one) * dot(other, other)
    return float(dot(one, other) / lengths.sqrt()) if lengths > 0 else 0.0


def dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product of two gradients over all tensors together, in float64."""
    products = [(one[name].double() * other[name].double()).sum() for name in one if name in other]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)


def _clear(params: Mapping[str, nn.Parameter]) -> None:
    for param in params.values():
        param.grad = None
