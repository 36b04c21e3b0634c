"""The space that kept text states leave free: what a change that is confined to it cannot alter, and what it can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.text_columns import checked_names, states_of

SHOWN = 10  # names in a message
LEAST_ENERGY = 1e-8  # share of a name's state outside the kept space below which nothing can be edited in float64


def complement(keep: Tensor, share: float) -> Tensor:
    """Return an orthonormal basis [d, m] of the directions that kept states use least.

    Args:
        keep: kept states [n, d], float64; none leave the whole space.
        share: the other directions, the kept space, hold at least this share of the states' squared lengths. With 1 it
            is their span, up to float64's precision.

    Returns:
        The basis; m is the dimension of the free space.
    """
    values, vectors = torch.linalg.eigh(keep.T @ keep)  # ascending
    if len(keep) == 0 or float(values[-1]) <= 0:
        return vectors
    inside = values.clamp_min(0).flip(0).cumsum(0)
    total = float(inside[-1])
    if share < 1:
        count = int((inside < share * total).sum()) + 1
    else:
        count = int((values > len(values) * torch.finfo(values.dtype).eps * values[-1]).sum())
    return vectors[:, : len(values) - count]


def energies(states: Tensor, free: Tensor) -> Tensor:
    """Return the share of each state's squared length [n] that lies in the free space: how much can be edited."""
    return (states @ free).square().sum(1) / states.square().sum(1)


def check_free(base: Base, concepts: Sequence[Concept], free: Tensor) -> None:
    """Refuse concepts whose names lie in the kept space, so that no edit outside it can reach them.

    Args:
        base: the checkpoint, for its text encoders.
        concepts: all concepts that are erased together.
        free: a basis of the free space; see `complement`.

    Raises:
        ErasureError: naming these names.
    """
    names = [name for _, name in checked_names(base, concepts)]
    shares = energies(states_of(base, names, "last").cpu(), free).tolist()
    if lost := [name for name, share in zip(names, shares, strict=True) if share < LEAST_ENERGY]:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        shown = ", ".join(map(repr, lost[:SHOWN])) + more
        raise ErasureError(
            f"nothing can be edited for {shown}: the text encoder's states of what is kept span them "
            f"({free.shape[1]} of {len(free)} directions are free). Keep fewer words, or a smaller share of them. "
            "Nothing was changed"
        )
