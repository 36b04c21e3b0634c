"""Pack a mostly-zero tensor into a bit mask and the values where the mask is set."""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

from erasure.errors import ErasureError

MASK, VALUES = "::mask", "::values"


def is_sparse(tensor: Tensor) -> bool:
    """Tell whether under half of `tensor` is non-zero, so that mask and values take less space than the tensor."""
    return 2 * int(torch.count_nonzero(tensor)) < tensor.numel()


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask, uint8 [ceil(n / 8)] with the least significant bit first, and the non-zero values [k].

    Both are in row-major order.
    """
    flat = tensor.reshape(-1)
    nonzero = flat != 0
    mask = torch.from_numpy(numpy.packbits(nonzero.numpy(), bitorder="little"))
    return mask, flat[nonzero]


def unpack(mask: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """Rebuild the tensor that `pack` was given; the mask bounds what is allocated, 8 numbers for each byte.

    Raises:
        ErasureError: mask, values and shape do not agree.
    """
    count = math.prod(shape)
    if mask.dim() != 1 or mask.dtype != torch.uint8 or mask.numel() != -(-count // 8):
        raise ErasureError(f"a mask of shape {list(mask.shape)} ({mask.dtype}) for {count} numbers")
    bits = torch.from_numpy(numpy.unpackbits(mask.numpy(), bitorder="little")).bool()
    marked = int(bits.sum())
    if values.dim() != 1 or values.numel() != marked:
        raise ErasureError(f"the mask marks {marked} numbers, the values are {list(values.shape)}")
    if bits[count:].any():
        raise ErasureError("the mask marks numbers behind the end")
    flat = torch.zeros(count, dtype=values.dtype)
    flat[bits[:count]] = values
    return flat.reshape(shape)
