"""Approximating differences of weights at low rank by a truncated SVD (Eckart and Young 1936), and the error made."""

from __future__ import annotations

import math

from erasure.errors import ErasureError
from erasure.patch import Delta, LowRank
from erasure.patch.ops.resize import TABLES, Spectrum
from erasure.patch.payload import Layer


def low_rank(payload: Delta, rank: int) -> tuple[LowRank, float]:
    """Approximate the change of each weight by its `rank` largest singular values.

    Low-rank terms cannot hold changes of biases, norms and embedding tables: these are lost, and count as error.

    Args:
        payload: the differences: matrices [out, in], or convolutions [out, in, h, w] treated as [out, in h w].
        rank: rank of every layer; smaller layers keep their full rank.

    Returns:
        The factors, and the relative error |lost| / |change| over all tensors together (Frobenius norms).

    Raises:
        ErasureError: the rank is below 1, or the patch changes no weight of a linear layer or convolution.
    """
    if type(rank) is not int or rank < 1:
        raise ErasureError(f"rank must be a whole number of at least 1, not {rank!r}")
    layers: dict[str, dict[str, Layer]] = {}
    lost = total = 0.0
    for component in payload.components:
        for name in payload.names(component):
            change = payload.change(component, name)
            size = float(change.double().square().sum())
            total += size
            if change.dim() not in (2, 4) or not name.endswith(".weight") or name.endswith(TABLES):
                lost += size
            elif size:
                layer, remainder = _truncate(payload, component, name, rank)
                layers.setdefault(component, {})[name.removesuffix(".weight")] = layer
                lost += remainder
    if not layers:
        raise ErasureError("the patch changes no weight of a linear layer or convolution, so a LoRA cannot hold it")
    return LowRank(layers), math.sqrt(lost / total)


def _truncate(payload: Delta, component: str, name: str, rank: int) -> tuple[Layer, float]:
    """Return the factors of one weight, and the squared Frobenius norm of what they leave out."""
    spectrum, shape = Spectrum.of(payload, component, name), payload.shape(component, name)
    width = min(rank, len(spectrum.values))
    down, up = (factor.float() for factor in spectrum.factors(width))
    if len(shape) == 4:
        down, up = down.reshape(width, *shape[1:]), up[:, :, None, None]
    return (down, up, float(width)), spectrum.lost(width)
