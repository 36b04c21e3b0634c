"""Fingerprints of the base weights that a patch was made from: hashes of the tensors that it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.model.quantising import is_quantised
from erasure.patch.module_keys import NESTED, find_parameter

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
QUANTISED = "quantised"  # stands for the fingerprint of weights that do not tell which checkpoint they come from
PART = 16  # hex digits for each precision; 64 bits distinguish checkpoints but do not resist forgery


def fingerprint(module: nn.Module, names: Iterable[str]) -> str:
    """Hash the names, shapes and values of some parameters of a module.

    The device and the order of the names do not matter. A checkpoint that was loaded in half precision no longer has
    the fp32 values of the original, so the values are hashed in three precisions, and `same_base` accepts agreement in
    any of them.

    Args:
        module: the whole component (UNet or text encoder).
        names: parameter names as in `module.named_parameters()`, with or without a leading `text_model.`.

    Returns:
        48 hexadecimal digits: the first 16 of the sha256 of the values as fp32, as fp16 and as bf16. QUANTISED if some
        of the values are quantised: they no longer tell which checkpoint they come from.

    Raises:
        ErasureError: there are no names, or the module has no parameter of that name.
    """
    parameters = {}
    for name in names:
        parameter = find_parameter(module, name)
        if parameter is None:
            raise ErasureError(f"{type(module).__name__} has no parameter {name!r}, so it cannot be fingerprinted")
        parameters[name] = parameter
    if any(map(is_quantised, parameters.values())):
        return QUANTISED
    return fingerprint_tensors(parameters)


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the `fingerprint` of tensors that are given by their parameter names.

    Raises:
        ErasureError: there are no tensors.
    """
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
    """Tell whether two fingerprints agree in fp32, fp16 or bf16, so that the weights differ by a cast at most."""
    if len(one) != PART * len(PRECISIONS) or len(other) != len(one):
        return one == other
    return any(one[i : i + PART] == other[i : i + PART] for i in range(0, len(one), PART))


def weights_hash(module: nn.Module) -> tuple[str, str]:
    """Hash all weights of a module: names, shapes, types and values, in the order of the names.

    Unlike a fingerprint, the hash covers every weight, resists forgery, and changes with the precision in which the
    module was loaded.

    Args:
        module: the whole component.

    Returns:
        The sha256 in 64 hexadecimal digits, and the data type of the weights; several types are joined by `+`.

    Raises:
        ErasureError: the module's weights are not in memory, because they are offloaded.
    """
    total, types = hashlib.sha256(), set()
    for name, tensor in sorted((name.removeprefix(NESTED), tensor) for name, tensor in module.named_parameters()):
        if tensor.is_meta:
            raise ErasureError(f"{type(module).__name__} is offloaded, so its weights cannot be hashed: load it whole")
        types.add(str(tensor.dtype).removeprefix("torch."))
        total.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor_bytes(tensor.detach().to("cpu")))
    return total.hexdigest(), "+".join(sorted(types))
