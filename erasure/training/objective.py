"""From the terms of a loss to gradients: plain, with weights of forget samples, with surgery, or with UNO's term.

A method says which of its terms retain (`RETAIN`); all others forget, and one of them (`FORGET`) may come sample by
sample (`reweighting.Samples`). The training loop and the forecast both descend by `Objective`, so every option costs in
the forecast what it costs in the run.

Surgery (gradient surgery; first-order form of UNO, arXiv 2506.04712): where the gradient g_f of the terms that forget
points against the gradient g_r of those that retain, its part along g_r is taken out, so that to first order an update
no longer hurts what is retained:

    g = g_r + g_f - min(0, <g_f, g_r>) / ||g_r||^2 g_r

The products are over all trained tensors together. It takes a second backward pass, so 1B more for each sample. The
second-order form, `surgery=uno`, is in `orthogonality.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from erasure.config import setting
from erasure.errors import ErasureError
from erasure.training.orthogonality import ROUNDING, cosine, dot, turn, twice_differentiable
from erasure.training.reweighting import MEMORY, Reweighting, Samples

Terms = Mapping[str, Tensor | Samples]


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Settings that every method which trains has.

    Args:
        reweight: weight the forget samples by how hard they are to forget (LoReUn, `training/reweighting.py`): `static`
            by the original model's loss, `dynamic` by the present model's.
        reweight_temperature: tau of these weights; greater values make them more alike.
        surgery: `first` takes out of the forgetting gradient what, to first order, would raise the loss of what is
            retained (`training/objective.py`); `uno` moves the weights to where both gradients stand at right angles,
            by a term of second order (`training/orthogonality.py`); `doco` is DoCo's published code with its defects.
        surgery_weight: w, the weight of the term of `uno`.
    """

    reweight: Literal["none", "static", "dynamic"] = "none"
    reweight_temperature: float = setting(1.0, above=0)
    surgery: Literal["none", "first", "uno", "doco"] = "none"
    surgery_weight: float = setting(0.01, above=0)


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
        """Return "none", "first" for surgery of first order, "uno" for UNO's term, or "doco" for DoCo's code."""

    @property
    def surgery_weight(self) -> float:
        """Return the weight of UNO's term."""

    @property
    def RETAIN(self) -> tuple[str, ...]:  # noqa: N802 (a class variable of methods)
        """Return the names of the terms that retain."""


def check_objective(options: Optioned, method: str, forget: str, no_curvature: str) -> None:
    """Refuse options that have no meaning for a method.

    Args:
        options: the method's.
        method: its name.
        forget: its term that comes sample by sample; empty if there is none.
        no_curvature: why its loss cannot be differentiated twice; empty where it can.

    Raises:
        ErasureError: naming the option and why it has no meaning.
    """
    if options.reweight != "none" and not forget:
        raise ErasureError(
            f"{method}: reweight={options.reweight} has no meaning here: no term of its loss says what it is "
            "sample by sample. Leave reweight out; nothing was changed"
        )
    if options.surgery != "none" and not options.RETAIN:
        raise ErasureError(
            f"{method}: surgery={options.surgery} has no meaning here: its loss has no term that retains, so "
            "there is no gradient to protect. Leave surgery out; nothing was changed"
        )
    if options.surgery == "uno" and no_curvature:
        raise ErasureError(
            f"{method}: surgery=uno has no meaning here: {no_curvature}. surgery=first works; nothing was changed"
        )


def kernels(method: Optioned) -> AbstractContextManager[None]:
    """Return the context in which a method's losses and their gradients are to be computed."""
    return twice_differentiable() if method.surgery == "uno" else nullcontext()


class Objective:
    """The objective of a run.

    Args:
        method: its options, and which of its terms retain.
        timesteps: number of timesteps of the checkpoint's noise schedule.

    Attributes:
        figures: of the latest update, for trackers: the cosine of both gradients, the largest weight.
    """

    def __init__(self, method: Optioned, timesteps: int) -> None:
        self.retain, self.surgery, self.weight = method.RETAIN, method.surgery, method.surgery_weight
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
        forget = self._gradient(scaler.scale(torch.stack(parts[False]).sum()), params, keep=True)
        retain = self._gradient(scaler.scale(torch.stack(parts[True]).sum()), params, keep=False)
        self.figures["surgery/cosine"] = cosine(forget, retain)
        if self.surgery == "doco":
            _add(params, published(forget, retain, 1 / scaler.get_scale()))
            return
        if self.surgery == "uno":
            turn(forget, retain, self.weight * scaler.get_scale())
        else:
            forget = kept_from_hurting(forget, retain)
        _add(params, forget)
        _add(params, retain)

    def _gradient(self, loss: Tensor, params: Mapping[str, nn.Parameter], keep: bool) -> dict[str, Tensor]:
        """Return the gradient of a loss, without the tensors that it does not depend on; of `uno`, with its graph.

        Args:
            loss: a number.
            params: the trained tensors, whose own gradients are none before and after.
            keep: whether the graph of the loss is needed again.
        """
        if self.surgery == "uno":
            able = {name: param for name, param in params.items() if param.requires_grad}
            found = torch.autograd.grad(loss, list(able.values()), create_graph=True, allow_unused=True)
            return {name: gradient for name, gradient in zip(able, found, strict=True) if gradient is not None}
        loss.backward(retain_graph=keep)
        gradients = {name: param.grad for name, param in params.items() if param.grad is not None}
        _clear(params)
        return gradients

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


def _clear(params: Mapping[str, nn.Parameter]) -> None:
    for param in params.values():
        param.grad = None


def _add(params: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        own = params[name].grad
        params[name].grad = gradient.detach() if own is None else own + gradient.detach()
