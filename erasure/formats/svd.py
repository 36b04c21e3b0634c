"""The nearest low rank of a difference (Eckart and Young), and what it loses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.patch import Delta, LowRank
from erasure.patch.payload import Layer

# Tables that are looked up, not multiplied: no loader puts a low-rank term beside them.
TABLES = ("token_embedding.weight", "position_embedding.weight")


def low_rank(payload: Delta, rank: int) -> tuple[LowRank, float]:
    """Each weight's change cut after its `rank` largest singular values.

    Biases, norms and embedding tables cannot be held by low-rank terms: their changes are lost.

    Args:
        payload: the differences; a matrix [out, in], or a convolution [out, in, h, w] taken as [out, in h w].
        rank: of every layer, or less where the layer is smaller.

    Returns:
        The factors, with alpha = `rank` in every layer, and the relative error |lost| / |change| over all tensors
        together (Frobenius norms).

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
                layer, missed = _cut(change, rank)
                layers.setdefault(component, {})[name.removesuffix(".weight")] = layer
                lost += missed
    if not layers:
        raise ErasureError("the patch changes no weight of a linear layer or convolution: no LoRA can hold it")
    return LowRank(layers), math.sqrt(lost / total)


def _cut(change: Tensor, rank: int) -> tuple[Layer, float]:
    """Factors of one weight, each with the root of the singular values, and the squared norm of what they lack.

    A layer smaller than `rank` keeps fewer; alpha is `rank` all the same (loaders want one), and up makes good for it.
    """
    matrix = change.flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    down, up = root[:, None] * right[:kept], left[:, :kept] * root
    missed = float(values[kept:].double().square().sum())
    up = up * (kept / rank)
    if change.dim() == 4:
        down, up = down.reshape(kept, *change.shape[1:]), up[:, :, None, None]
    return (down, up, float(rank)), missed
