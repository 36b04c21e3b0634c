"""Conversion between payloads and the tensors of a patch file.

Low-rank factors have kohya keys, and those of patches on a transformer the keys of diffusers and peft, in which the
alpha is always the rank. Weight differences have the key `<component>.<parameter>`, the tensors of features
`features.<name>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from erasure.dtypes import DTYPES
from erasure.errors import ErasureError, unknown
from erasure.patch.features import TENSORS, Features
from erasure.patch.guard import Guard
from erasure.patch.module_keys import (
    ALPHA,
    COMPONENTS,
    DOWN,
    DOWN_PEFT,
    TRANSFORMER,
    UP,
    UP_PEFT,
    canonical,
    has_xl_blocks,
    kohya_prefix,
    nested,
)
from erasure.patch.payload import Delta, LowRank, Payload
from erasure.patch.sparse import MASK, VALUES, is_sparse, pack, unpack

Modules = dict[str, list[str]]  # component -> module paths, which cannot be recovered from kohya keys
Shapes = dict[str, list[int]]  # key of a sparse difference -> shape
FEATURES = "features."  # before the names of the tensors of features


def kohya_keys(payload: LowRank | Delta, diffusers_names: bool = False) -> Callable[[str, str], str]:
    """Return the function from a component and a module path to the kohya key under which a payload is written.

    The layers of an XL UNet go by Stability's original names, all of them: a file that mixes them with diffusers' names
    is refused by InvokeAI, and A1111 numbers XL's blocks wrongly when it converts diffusers' names.

    Args:
        payload: the payload.
        diffusers_names: use diffusers' names for XL too, as the SPM code does.
    """
    two = two_encoders(payload)
    layers = (name.rpartition(".")[0] for name in payload.names("unet")) if "unet" in payload.components else ()
    return partial(kohya_prefix, two_encoders=two, original=two and not diffusers_names and has_xl_blocks(layers))


def layer_keys(payload: LowRank | Delta, diffusers_names: bool = False) -> Callable[[str, str], str]:
    """Return the function from a component and a module path to what precedes the factors of that layer in a file.

    Args:
        payload: the payload.
        diffusers_names: use diffusers' names for XL too; see `kohya_keys`.
    """
    return _peft_prefix if TRANSFORMER in payload.components else kohya_keys(payload, diffusers_names)


def encode(payload: Payload, dtype: str, diffusers_names: bool = False) -> tuple[dict[str, Tensor], Modules, Shapes]:
    """Convert a payload to the tensors of a file.

    Args:
        payload: the payload of the patch.
        dtype: type of the tensors: fp32, bf16 or fp16.
        diffusers_names: write the keys of XL's UNet under diffusers' names, not under the original ones.

    Returns:
        The tensors by key, and two header fields: the module paths of each component (low-rank), and the shapes of the
        tensors that are stored sparsely (differences).

    Raises:
        ErasureError: the dtype is unknown, a value overflows in it, or two modules have the same kohya key.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if isinstance(payload, Guard):
        return {}, {}, {}
    if isinstance(payload, Features):
        return {f"{FEATURES}{name}": cast(name, getattr(payload, name), dtype) for name in TENSORS}, {}, {}
    if isinstance(payload, LowRank):
        tensors, modules = _encode_low_rank(payload, dtype, layer_keys(payload, diffusers_names))
        return tensors, modules, {}
    return _encode_delta(payload, dtype)


def _encode_low_rank(
    payload: LowRank, dtype: str, key_of: Callable[[str, str], str]
) -> tuple[dict[str, Tensor], Modules]:
    tensors: dict[str, Tensor] = {}
    for component, layers in payload.layers.items():
        for path, (down, up, alpha) in layers.items():
            peft = TRANSFORMER in payload.layers
            prefix = key_of(component, path)
            first, second = (DOWN_PEFT, UP_PEFT) if peft else (DOWN, UP)
            if prefix + first in tensors:
                raise ErasureError(f"{component}.{path}: another module has the same kohya key {prefix}")
            tensors[prefix + first] = cast(f"{component}.{path}", down, dtype)
            tensors[prefix + second] = cast(f"{component}.{path}", up, dtype)
            if not peft:
                tensors[prefix + ALPHA] = torch.tensor(alpha, dtype=torch.float32)
    return tensors, {component: list(layers) for component, layers in payload.layers.items()}


def _peft_prefix(component: str, path: str) -> str:
    """Return the key that precedes `.lora_A.weight` in files that diffusers writes."""
    return f"{component}.{nested(component, path)}"


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
    """Tell whether the base has two text encoders, as XL has, as far as the payload shows.

    The kohya keys of the first text encoder then begin with `lora_te1_` instead of `lora_te_`.
    """
    return "text_encoder_2" in payload.components or text_width(payload) == 2048


def text_width(payload: LowRank | Delta) -> int | None:
    """Return the width of the base's text states, as far as the payload shows it.

    The cross-attention layers of the UNet read it; without those, the first text encoder shows its own width, by which
    Stable Diffusion 1 and 2 differ.

    Returns:
        The width, or None if the payload has neither.
    """
    ends = ("attn2.to_k", "attn2.to_v")
    for component, found in (("unet", ends), ("text_encoder", ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"))):
        if isinstance(payload, LowRank):
            layers = payload.layers.get(component, {})
            width = next((down.shape[1] for path, (down, _, _) in layers.items() if path.endswith(found)), None)
        elif component in payload.components:
            names = (name for name in payload.names(component) if name.removesuffix(".weight").endswith(found))
            width = next((payload.shape(component, name)[1] for name in names), None)
        else:
            width = None
        if width is not None:
            return width
    return None


def cast(label: str, tensor: Tensor, dtype: str) -> Tensor:
    """Cast a tensor to the type of the file.

    Args:
        label: the name of the tensor, for the message.
        tensor: the tensor.
        dtype: fp32, bf16 or fp16.

    Raises:
        ErasureError: a value is too large for that type.
    """
    value = tensor.to(DTYPES[dtype])
    if not torch.isfinite(value).all():
        largest = float(tensor.abs().max())
        raise ErasureError(f"{label}: the value {largest:.3g} overflows in {dtype}; save as bf16 or fp32")
    return value


def cast_error(payload: Payload, dtype: str) -> float:
    """Return the relative L2 error of a cast, |cast - exact| / |exact|, over all weight changes or features together.

    Args:
        payload: the payload of the patch.
        dtype: fp32, bf16 or fp16.
    """
    if dtype == "fp32" or isinstance(payload, Guard):
        return 0.0
    if isinstance(payload, Features):
        pairs = [(tensor.to(DTYPES[dtype]).double(), tensor.double()) for tensor in payload.tensors()]
        return math.sqrt(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))
    wrong = total = 0.0
    for component in payload.components:
        for name in payload.names(component):
            exact = payload.change(component, name)
            error = _rounded(payload, component, name, dtype) - exact
            # Norms are computed in float64, because squares of small changes underflow in fp32.
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
    """Convert the tensors of a file to a payload; this is the inverse of `encode`.

    Args:
        tensors: the tensors by key.
        kind: `low-rank` or `delta`, from the header.
        dtype: type of the tensors, from the header.
        modules: the module paths of each component, from the header (low-rank).
        shapes: the shapes of tensors that are stored sparsely, from the header (delta).

    Raises:
        ErasureError: a tensor is missing, unknown or of another type than the header states, shapes do not agree, or a
            value is NaN or infinite.
    """
    unread = dict(tensors)
    payload = _decode_low_rank(unread, dtype, modules) if kind == LowRank.kind else _decode_delta(unread, dtype, shapes)
    if unread:
        raise ErasureError(f"unknown tensor {sorted(unread)[0]!r}")
    return payload


def decode_features(tensors: dict[str, Tensor], dtype: str, described: Mapping[str, Any]) -> Features:
    """Convert the tensors of a file to features; this is the inverse of `encode`.

    Args:
        tensors: the tensors by key.
        dtype: type of the tensors, from the header.
        described: what the header says about the features.

    Raises:
        ErasureError: as for `decode`, or a value of the header is not allowed.
    """
    unread = dict(tensors)
    found = {name: _take(unread, f"{FEATURES}{name}", DTYPES[dtype]) for name in TENSORS}
    if unread:
        raise ErasureError(f"unknown tensor {sorted(unread)[0]!r}")
    return Features.from_json(described, found)


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
            if TRANSFORMER in modules:
                prefix = _peft_prefix(component, canonical(component, path))
                down, up = (_take(tensors, prefix + end, DTYPES[dtype]) for end in (DOWN_PEFT, UP_PEFT))
                layers.setdefault(component, {})[path] = (down, up, down.shape[0] if down.dim() else 1)
                continue
            plain = canonical(component, path)
            # Older versions wrote diffusers' names for XL.
            spellings = [kohya_prefix(component, plain, two, original) for original in (True, False)]
            prefix = next((key for key in spellings if key + ALPHA in tensors), spellings[-1])
            alpha = _take(tensors, prefix + ALPHA, torch.float32)
            if alpha.dim() != 0:
                raise ErasureError(f"tensor {prefix + ALPHA!r} must be a single number")
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
            raise ErasureError(f"tensor {key!r} is stored both dense and sparse")
        changes.setdefault(component, {})[name] = _take(tensors, key, DTYPES[dtype])
    return Delta(changes)


def _split(key: str) -> tuple[str, str]:
    component, _, name = key.partition(".")
    if component not in COMPONENTS or not name:
        raise ErasureError(f"unknown tensor {key!r}")
    return component, canonical(component, name)
