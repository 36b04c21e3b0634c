"""The copy of a tensor that a payload keeps: in fp32 on the CPU, without NaN and infinity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError


def checked_copy(label: str, tensor: Any) -> Tensor:
    """Return a contiguous copy of a tensor in fp32 on the CPU.

    It is always copied, so that a patch does not change when training continues with its own tensors.

    Args:
        label: what the tensor is, for the message.
        tensor: the tensor.

    Raises:
        ErasureError: it is no tensor of floating-point numbers, is empty, or contains NaN or infinity.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise ErasureError(f"{label}: must be a tensor of floating-point numbers")
    if tensor.numel() == 0:
        raise ErasureError(f"{label}: the tensor of shape {list(tensor.shape)} is empty")
    value = tensor.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    # A sum is finite only if every value is, and is quicker; finite values may overflow in it.
    if not math.isfinite(value.sum().item()) and not torch.isfinite(value).all():
        raise ErasureError(f"{label}: contains NaN or infinity")
    return value
