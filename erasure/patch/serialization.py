"""Convert payloads to file tensors and back: low-rank factors under kohya keys, differences as component.parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from erasure.dtypes import DTYPES
from erasure.errors import ErasureError, unknown
from erasure.patch.module_keys import ALPHA, COMPONENTS, DOWN, UP, canonical, kohya_prefix
from erasure.patch.payload import Delta, LowRank
from erasure.patch.sparse import MASK, VALUES, is_sparse, pack, unpack

Modules = dict[str, list[str]]  # component -> module paths, which kohya keys alone do not tell
Shapes = dict[str, list[int]]  # key of a sparse difference -> shape


def encode(payload: LowRank | Delta, dtype: str) -> tuple[dict[str, Tensor], Modules, Shapes]:
    """Return the tensors of the file by key, and the header fields that describe them.

    Raises:
        ErasureError: an unknown dtype; a value that overflows in it; two modules with one kohya key.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if isinstance(payload, LowRank):
        tensors, modules = _encode_low_rank(payload, dtype)
        return tensors, modules, {}
    return _encode_delta(payload, dtype)


def _encode_low_rank(payload: LowRank, dtype: str) -> tuple[dict[str, Tensor], Modules]:
    tensors: dict[str, Tensor] = {}
    for component, layers in payload.layers.items():
        for path, (down, up, alpha) in layers.items():
            prefix = kohya_prefix(component, path, two_encoders(payload))
            if prefix + DOWN in tensors:
                raise ErasureError(f"{component}.{path}: another module has the kohya key {prefix} too")
            tensors[prefix + DOWN] = cast(f"{component}.{path}", down, dtype)
            tensors[prefix + UP] = cast(f"{component}.{path}", up, dtype)
            tensors[prefix + ALPHA] = torch.tensor(alpha, dtype=torch.float32)
    return tensors, {component: list(layers) for component, layers in payload.layers.items()}


def _encode_delta(payload: Delta, dtype: str) -> tuple[dict[str, Tensor], Modules, Shapes]:
    tensors: dict[str, Tensor] = {}
    shapes: Shapes = {}
    for component, changes in payload.changes.items():
        for name, change in changes.items():
            key = f"{component}.{name}"
            value = cast(key, change, dtype)
            if is_sparse(value):
                tensors[key + MASK], tensors[key + VALUES] = pack(value)
                shapes[key] = list(value.shape)
            else:
                tensors[key] = value
    return tensors, {}, shapes


def two_encoders(payload: LowRank | Delta) -> bool:
    """Tell whether the base has two text encoders (the XL kind), as far as the payload shows: keys say `lora_te1_`."""
    return "text_encoder_2" in payload.components or text_width(payload) == 2048


def text_width(payload: LowRank | Delta) -> int | None:
    """Return the width of the text states that the touched cross-attention layers read; None where there are none."""
    ends = ("attn2.to_k", "attn2.to_v")
    if isinstance(payload, LowRank):
        layers = payload.layers.get("unet", {})
        return next((down.shape[1] for path, (down, _, _) in layers.items() if path.endswith(ends)), None)
    names = (name for name in payload.names("unet") if name.removesuffix(".weight").endswith(ends))
    return next((payload.shape("unet", name)[1] for name in names), None)


def cast(label: str, tensor: Tensor, dtype: str) -> Tensor:
    """Cast `tensor` to the data type of the file.

    Raises:
        ErasureError: a value is too large for it.
    """
    value = tensor.to(DTYPES[dtype])
    if not torch.isfinite(value).all():
        largest = float(tensor.abs().max())
        raise ErasureError(f"{label}: a value of {largest:.3g} overflows {dtype}; save as bf16 or fp32")
    return value


def cast_error(payload: LowRank | Delta, dtype: str) -> float:
    """Return the relative L2 error of the cast over all weight changes together, |cast - exact| / |exact|."""
    if dtype == "fp32":
        return 0.0
    wrong = total = 0.0
    for component in payload.components:
        for name in payload.names(component):
            exact = payload.change(component, name)
            error = _rounded(payload, component, name, dtype) - exact
            # Norms in float64: squares of small fp32 changes underflow.
            wrong += float(error.double().square().sum())
            total += float(exact.double().square().sum())
    return math.sqrt(wrong / total) if total else 0.0


def _rounded(payload: LowRank | Delta, component: str, name: str, dtype: str) -> Tensor:
    if isinstance(payload, Delta):
        return payload.change(component, name).to(DTYPES[dtype]).float()
    path = name.removesuffix(".weight")
    down, up, alpha = payload.layers[component][path]
    small = (down.to(DTYPES[dtype]).float(), up.to(DTYPES[dtype]).float(), alpha)
    return LowRank({component: {path: small}}).change(component, name)


def decode(tensors: dict[str, Tensor], kind: str, dtype: str, modules: Modules, shapes: Shapes) -> LowRank | Delta:
    """Return the payload that `encode` wrote.

    Raises:
        ErasureError: missing or unknown keys, dtypes other than the header's, shapes that do not agree, NaN.
    """
    rest = dict(tensors)
    payload = _decode_low_rank(rest, dtype, modules) if kind == LowRank.kind else _decode_delta(rest, dtype, shapes)
    if rest:
        raise ErasureError(f"unknown tensor {sorted(rest)[0]!r}")
    return payload


def _take(tensors: dict[str, Tensor], key: str, dtype: torch.dtype) -> Tensor:
    if key not in tensors:
        raise ErasureError(f"tensor {key!r} is missing")
    tensor = tensors.pop(key)
    if tensor.dtype != dtype:
        raise ErasureError(f"tensor {key!r} is {tensor.dtype}, expected {dtype}")
    return tensor


def _decode_low_rank(tensors: dict[str, Tensor], dtype: str, modules: Modules) -> LowRank:
    two = any(key.startswith(("lora_te1_", "lora_te2_")) for key in tensors)
    layers: dict[str, dict[str, tuple[Tensor, Tensor, Any]]] = {}
    for component, paths in modules.items():
        for path in paths:
            prefix = kohya_prefix(component, canonical(component, path), two)
            alpha = _take(tensors, prefix + ALPHA, torch.float32)
            if alpha.dim() != 0:
                raise ErasureError(f"tensor {prefix + ALPHA!r} is not one number")
            down, up = (_take(tensors, prefix + end, DTYPES[dtype]) for end in (DOWN, UP))
            layers.setdefault(component, {})[path] = (down, up, alpha)
    return LowRank(layers)


def _decode_delta(tensors: dict[str, Tensor], dtype: str, shapes: Shapes) -> Delta:
    changes: dict[str, dict[str, Tensor]] = {}
    for key in sorted(shapes):
        component, name = _split(key)
        mask, values = _take(tensors, key + MASK, torch.uint8), _take(tensors, key + VALUES, DTYPES[dtype])
        try:
            changes.setdefault(component, {})[name] = unpack(mask, values, shapes[key])
        except ErasureError as error:
            raise ErasureError(f"sparse tensor {key!r}: {error}") from error
    for key in sorted(tensors):
        component, name = _split(key)
        if name in changes.get(component, {}):
            raise ErasureError(f"tensor {key!r} stands there dense and sparse")
        changes.setdefault(component, {})[name] = _take(tensors, key, DTYPES[dtype])
    return Delta(changes)


def _split(key: str) -> tuple[str, str]:
    component, _, name = key.partition(".")
    if component not in COMPONENTS or not name:
        raise ErasureError(f"unknown tensor {key!r}")
    return component, canonical(component, name)
