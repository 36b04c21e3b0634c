"""The nearest low rank of a difference (Eckart and Young), and what it loses."""

from __future__ import annotations

import math

from erasure.errors import ErasureError
from erasure.patch import Delta, LowRank
from erasure.patch.ops.resize import TABLES, Spectrum
from erasure.patch.payload import Layer


def low_rank(payload: Delta, rank: int) -> tuple[LowRank, float]:
    """Each weight's change cut after its `rank` largest singular values.

    Biases, norms and embedding tables cannot be held by low-rank terms: their changes are lost.

    Args:
        payload: the differences; a matrix [out, in], or a convolution [out, in, h, w] taken as [out, in h w].
        rank: of every layer, or less where the layer is smaller.

    Returns:
        The factors, and the relative error |lost| / |change| over all tensors together (Frobenius norms).

    Raises:
        ErasureError: a rank below 1, or a patch with no weight of a linear layer or convolution.
    """
    if type(rank) is not int or rank < 1:
        raise ErasureError(f"rank={rank!r}: expected a whole number of at least 1")
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
                layer, missed = _cut(payload, component, name, rank)
                layers.setdefault(component, {})[name.removesuffix(".weight")] = layer
                lost += missed
    if not layers:
        raise ErasureError("the patch changes no weight of a linear layer or convolution: no LoRA can hold it")
    return LowRank(layers), math.sqrt(lost / total)


def _cut(payload: Delta, component: str, name: str, rank: int) -> tuple[Layer, float]:
    """Factors of one weight, of fewer columns where the layer is smaller, and the squared norm of what they lack."""
    spectrum, shape = Spectrum.of(payload, component, name), payload.shape(component, name)
    kept = min(rank, len(spectrum.values))
    down, up = (factor.float() for factor in spectrum.factors(kept))
    if len(shape) == 4:
        down, up = down.reshape(kept, *shape[1:]), up[:, :, None, None]
    return (down, up, float(kept)), spectrum.lost(kept)
