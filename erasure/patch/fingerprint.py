"""Fingerprints of the base weights that a patch was made from: a hash over the tensors that it touches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.patch.module_keys import NESTED, find_parameter

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
PART = 16  # hex digits a precision: 64 bits tell checkpoints apart, they do not resist forgery


def fingerprint(module: nn.Module, names: Iterable[str]) -> str:
    """Hash the named parameters of `module`: names, shapes and values; device and order of `names` do not matter.

    The result is three sha256 digests of 16 hex digits one after the other, of the values as fp32, as fp16 and as
    bf16. A checkpoint loaded in half precision does not have the fp32 values of the original, so plain equality of
    fingerprints would call it another base; `same_base` accepts agreement in any one precision.

    Args:
        module: the whole component (unet or text encoder).
        names: parameter names as in `module.named_parameters()`; `text_model.` in front is optional.

    Returns:
        48 hexadecimal digits.

    Raises:
        ErasureError: no names, or a name that is no parameter of `module`.
    """
    parameters = {}
    for name in names:
        parameter = find_parameter(module, name)
        if parameter is None:
            raise ErasureError(f"{type(module).__name__} has no parameter {name!r} to take a fingerprint of")
        parameters[name] = parameter
    return fingerprint_tensors(parameters)


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the `fingerprint` of tensors that are given by parameter name."""
    if not tensors:
        raise ErasureError("a fingerprint needs at least one parameter name")
    digests = [hashlib.sha256() for _ in PRECISIONS]
    for name, tensor in sorted((name.removeprefix(NESTED), tensor) for name, tensor in tensors.items()):
        label = f"{name}{list(tensor.shape)}".encode()
        for digest, precision in zip(digests, PRECISIONS, strict=True):
            digest.update(label)
            digest.update(tensor_bytes(tensor.detach().to("cpu", precision)))
    return "".join(digest.hexdigest()[:PART] for digest in digests)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the raw bytes of a CPU tensor of any dtype, in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def same_base(one: str, other: str) -> bool:
    """Tell whether two fingerprints agree in fp32, fp16 or bf16, that is, differ by no more than a cast."""
    if len(one) != PART * len(PRECISIONS) or len(other) != len(one):
        return one == other
    return any(one[i : i + PART] == other[i : i + PART] for i in range(0, len(one), PART))
