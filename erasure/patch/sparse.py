"""Sparse storage: a tensor that is mostly zero, packed as a bit mask and its non-zero values."""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

from erasure.errors import ErasureError

MASK, VALUES = "::mask", "::values"


def is_sparse(tensor: Tensor) -> bool:
    """Tell whether less than half of a tensor is non-zero, so that packing makes it smaller."""
    return 2 * int(torch.count_nonzero(tensor)) < tensor.numel()


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a tensor of n numbers.

    Returns:
        The mask, uint8 [ceil(n / 8)], whose bits (the least significant first) mark the non-zero numbers in row-major
        order, and the k marked values [k] in the same order.
    """
    flat = tensor.reshape(-1)
    nonzero = flat != 0
    mask = torch.from_numpy(numpy.packbits(nonzero.numpy(), bitorder="little"))
    return mask, flat[nonzero]


def unpack(mask: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """Restore a tensor from `pack`'s mask and values.

    The size of the mask limits the memory that is allocated, to 8 numbers for each byte.

    Args:
        mask: uint8 [ceil(n / 8)].
        values: the non-zero values [k].
        shape: the shape of the tensor, with n numbers.

    Raises:
        ErasureError: mask, values and shape do not agree.
    """
    count = math.prod(shape)
    if mask.dim() != 1 or mask.dtype != torch.uint8 or mask.numel() != -(-count // 8):
        raise ErasureError(
            f"a mask of shape {list(mask.shape)} ({mask.dtype}) does not fit a tensor of {count} numbers"
        )
    bits = torch.from_numpy(numpy.unpackbits(mask.numpy(), bitorder="little")).bool()
    marked = int(bits.sum())
    if values.dim() != 1 or values.numel() != marked:
        raise ErasureError(f"the mask marks {marked} numbers, but the values have the shape {list(values.shape)}")
    if bits[count:].any():
        raise ErasureError("the mask marks numbers beyond the end of the tensor")
    flat = torch.zeros(count, dtype=values.dtype)
    flat[bits[:count]] = values
    return flat.reshape(shape)
