"""PEFT's LoRA as diffusers writes it: `unet.<path>.lora_A.weight` and `lora_B`, a text encoder's beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.formats.conversion import Found, low_rank, need_low_rank, put, rank_of, split
from erasure.formats.kohya import title
from erasure.formats.source import Source
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.patch.module_keys import COMPONENTS, canonical, nested
from erasure.patch.payload import Layer
from erasure.patch.safetensors_io import write_file

WRAPPED = "base_model.model."  # in front of everything that peft itself saves
CONFIG = "lora_adapter_metadata"  # in the header, where diffusers puts rank and alpha
# The factors' names: peft's, with an adapter's name or without, and those of older diffusers.
FACTOR = re.compile(r"(?P<path>.+?)\.(?:lora_(?P<new>[AB])(?:\.\w+)?|lora(?:_linear_layer)?\.(?P<old>down|up))\.weight")
DOWN = {"A", "down"}


def read_peft(source: Source, base: Base) -> Found:
    """A LoRA under diffusers' module paths.

    Alpha comes from `lora_adapter_metadata` in the header or from an `.alpha` tensor; without either it is the rank,
    as diffusers and peft take it.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read().items():
        named = FACTOR.fullmatch(key)
        if named:
            side = "down" if (named["new"] or named["old"]) in DOWN else "up"
            pairs.setdefault(named["path"], {})[side] = value.float()
        elif key.endswith(".alpha") and value.numel() == 1:
            pairs.setdefault(key.removesuffix(".alpha"), {})["alpha"] = value.float()
        else:
            raise ErasureError(f"{source.path}: {key} is no factor of a plain LoRA (DoRA, biases and others are not)")
    settings = _settings(source)
    layers: dict[str, dict[str, tuple[str, Layer]]] = {}
    for key, parts in pairs.items():
        if missing := [side for side in ("down", "up") if side not in parts]:
            raise ErasureError(f"{source.path}: {key} lacks its lora_{'A' if missing[0] == 'down' else 'B'}")
        component, path = split(key.removeprefix(WRAPPED), COMPONENTS)
        rank = rank_of(source, key, parts["down"])
        alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(settings, component, path, rank)
        entry = (key, (parts["down"], parts["up"], alpha))
        put(source, layers.setdefault(component, {}), canonical(component, path), key, entry)
    return Found(low_rank(source, base, layers))


def _settings(source: Source) -> dict[str, Any]:
    text = source.metadata.get(CONFIG)
    try:
        found = json.loads(text) if text is not None else {}
    except ValueError as fault:
        raise ErasureError(f"{source.path}: {CONFIG} in its header is not JSON: {fault}") from None
    if not isinstance(found, dict):
        raise ErasureError(f"{source.path}: {CONFIG} in its header is no table")
    if any(value for key, value in found.items() if key.rpartition(".")[2] == "use_dora"):
        raise ErasureError(f"{source.path}: DoRA, which is no sum of low rank")
    return found


def _alpha(settings: Mapping[str, Any], component: str, path: str, rank: int) -> float:
    """Alpha such that alpha / rank is the scale that peft makes of the settings.

    A pattern names the end of a path. peft takes it for a regular expression; diffusers writes plain names, and a
    file's expressions are not run here.
    """
    one = f"{component}."
    patterns = settings.get(one + "alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ErasureError(f"alpha_pattern of the {component} in {CONFIG} is no table")
    named = next((value for end, value in patterns.items() if f".{path}".endswith(f".{end}")), None)
    given = named if named is not None else settings.get(one + "lora_alpha")
    if given is None:
        return float(rank)
    try:
        alpha = float(given)
    except (TypeError, ValueError):
        raise ErasureError(f"an alpha of the {component} in {CONFIG} is no number: {str(given)[:40]!r}") from None
    return alpha * math.sqrt(rank) if settings.get(one + "use_rslora") else alpha


def write_peft(patch: Patch, path: Path) -> list[str]:
    """Write a low-rank patch with its scale folded into `lora_B` and all layers at one rank.

    So alpha equals the rank in every layer, which is what loaders assume where the header says nothing; and versions
    of diffusers that take the first layer's rank for everybody's alpha are right too. Smaller layers get zeros.
    """
    payload = need_low_rank(patch)
    rank = payload.ranks[-1]
    tensors: dict[str, Tensor] = {}
    for component, layers in payload.layers.items():
        for name, (down, up, alpha) in layers.items():
            scaled = up * (alpha / down.shape[0])
            # diffusers takes `text_model.` off where its encoder has none, and does not put it on where it has.
            key = f"{component}.{nested(component, name)}"
            tensors[f"{key}.lora_A.weight"] = _padded(down, rank, 0)
            tensors[f"{key}.lora_B.weight"] = _padded(scaled, rank, 1)
    write_file(path, tensors, {"format": "pt", "modelspec.title": title(patch)})
    return []


def _padded(factor: Tensor, rank: int, side: int) -> Tensor:
    shape = list(factor.shape)
    shape[side] = rank - shape[side]
    return torch.cat([factor, factor.new_zeros(shape)], side) if shape[side] else factor
