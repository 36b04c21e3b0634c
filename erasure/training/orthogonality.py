"""Gradients that stand at right angles: the second-order term of UNO (Mandal and Gottwald 2025, arXiv 2506.04712).

UNO adds to a loss the squared cosine between the gradients of what is forgotten, g_f, and of what is retained, g_r:

    L = L_f + L_r + w c^2,    c = <g_f, g_r> / (|g_f| |g_r|), over all trained tensors together

First-order surgery corrects one update where both gradients conflict; this term moves the weights to where they do not.
With the Hessians H_f and H_r of both losses,

    grad c^2 = 2 c (H_f u_f + H_r u_r),   u_f = (g_r / |g_r| - c g_f / |g_f|) / |g_f|,  u_r likewise with f, r exchanged

No Hessian is formed: both products come exactly from one backward pass through the graphs of g_f and g_r with u_f and
u_r as its cotangents (Pearlmutter 1994). The sign of c has no part in it: gradients that agree are turned away, too.

Cost: g_f and g_r take 1B each for every sample that their loss depends on; the second pass goes through each of these
graphs (as many B again) and through the network (1B). So a sample of one loss takes 3B, and one that both losses depend
on 5B, instead of 1B; `plan` counts them, and the memory of the graphs. Fused attention has no second derivative:
`twice_differentiable` has it computed in parts.

Deviations from the published code (pinakm9/forget): there, L_f is the loss on the data to forget, and it is never
minimised, so that only the angle keeps it from falling; here the term that forgets is the method's own. UNO-S, which
takes the orthogonal part of g_r in every other update, is left out. Where one gradient is rounding next to the other,
there is no angle and no term: the published code divides by its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# A gradient so many times shorter than the other is rounding: where nothing has changed yet, nothing is retained.
ROUNDING = 1e-4


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Compute attention inside the context by operations that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def turn(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], weight: float) -> None:
    """Add the gradient of weight x c^2 to that of the tensors from which both gradients were computed.

    Args:
        forget: g_f by tensor, with its graph.
        retain: g_r by tensor, with its graph; tensors that either one lacks are zero in it.
        weight: w, times what the gradients' scale has to be undone by.
    """
    found = {"forget": cotangents(forget, retain, weight), "retain": cotangents(retain, forget, weight)}
    pairs = [
        (gradients[name], vector)
        for gradients, vectors in ((forget, found["forget"]), (retain, found["retain"]))
        for name, vector in vectors.items()
        if gradients[name].requires_grad
    ]
    if pairs:
        torch.autograd.backward([gradient for gradient, _ in pairs], [vector for _, vector in pairs])


@torch.no_grad()
def cotangents(own: Mapping[str, Tensor], other: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Return weight x 2 c u, the derivative of weight x c^2 by one of the gradients, by tensor; 0 where c is unknown.

    Args:
        own: the gradient by which it is derived.
        other: the other one.
        weight: w.
    """
    lengths, product = dot(own, own), dot(own, other)
    others = dot(other, other)
    if min(lengths, others) <= ROUNDING**2 * max(lengths, others):
        return {name: torch.zeros_like(gradient) for name, gradient in own.items()}
    towards, along = 2 * weight * product / (lengths * others), 2 * weight * product**2 / (lengths**2 * others)
    return {
        name: (towards * other[name] if name in other else 0.0) - along * gradient for name, gradient in own.items()
    }


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the cosine of two gradients over all tensors together; 0 if one of them is zero."""
    lengths = dot(one, one) * dot(other, other)
    return float(dot(one, other) / lengths.sqrt()) if lengths > 0 else 0.0


def dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product of two gradients over all tensors together, in float64."""
    products = [(one[name].detach().double() * other[name].detach().double()).sum() for name in one if name in other]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)
