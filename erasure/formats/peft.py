"""PEFT's LoRA as diffusers writes it: `unet.<path>.lora_A.weight` and `.lora_B.weight`, also for text encoders."""

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
from erasure.formats.kohya import title
from erasure.formats.patch_builder import ImportedPayload, low_rank, network_of, put, rank_of, split
from erasure.formats.published_file import PublishedFile
from erasure.formats.requirements import need_low_rank
from erasure.formats.transformer_lora import put_transformer_layer
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.patch.module_keys import COMPONENTS, TRANSFORMER, canonical, nested
from erasure.patch.payload import Layer
from erasure.patch.safetensors_io import write_file

WRAPPED = "base_model.model."  # prefix of everything that peft itself saves
CONFIG = "lora_adapter_metadata"  # the header key under which diffusers stores rank and alpha
# Names of the factors: peft's, with or without the name of the adapter, and those of older versions of diffusers.
FACTOR = re.compile(
    r"(?P<path>.+?)\.(?:lora_(?P<peft>[AB])(?:\.\w+)?|lora(?:_linear_layer)?\.(?P<diffusers>down|up))\.weight"
)
DOWN = {"A", "down"}


def read_peft(source: PublishedFile, base: Base) -> ImportedPayload:
    """Read a LoRA under diffusers' module paths.

    Alpha comes from `lora_adapter_metadata` in the header or from an `.alpha` tensor. Without either it is the rank, as
    in diffusers and peft.

    Args:
        source: the file.
        base: the base that it must fit.

    Raises:
        ErasureError: the file is not a plain LoRA, a factor is missing, or a layer does not fit the base.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read().items():
        match = FACTOR.fullmatch(key)
        if match:
            side = "down" if (match["peft"] or match["diffusers"]) in DOWN else "up"
            pairs.setdefault(match["path"], {})[side] = value.float()
        elif key.endswith(".alpha") and value.numel() == 1:
            pairs.setdefault(key.removesuffix(".alpha"), {})["alpha"] = value.float()
        else:
            raise ErasureError(
                f"{source.path} is not a plain LoRA: {key} is not a low-rank factor (DoRA, biases and other variants "
                "are not supported)"
            )
    settings = _settings(source)
    layers: dict[str, dict[str, tuple[str, Layer]]] = {}
    for key, parts in pairs.items():
        if missing := [side for side in ("down", "up") if side not in parts]:
            factor = "lora_A" if missing[0] == "down" else "lora_B"
            raise ErasureError(f"{source.path}: the layer {key} lacks its {factor}")
        component, path = split(key.removeprefix(WRAPPED), COMPONENTS, network_of(base))
        rank = rank_of(source, key, parts["down"])
        alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(settings, component, path, rank)
        if put_transformer_layer(source, base, layers, key.removeprefix(WRAPPED), (parts["down"], parts["up"], alpha)):
            continue
        entry = (key, (parts["down"], parts["up"], alpha))
        put(source, layers.setdefault(component, {}), canonical(component, path), key, entry)
    return ImportedPayload(low_rank(source, base, layers))


def _settings(source: PublishedFile) -> dict[str, Any]:
    text = source.metadata.get(CONFIG)
    try:
        table = json.loads(text) if text is not None else {}
    except ValueError as fault:
        raise ErasureError(f"{source.path}: {CONFIG} in its header is not JSON: {fault}") from None
    if not isinstance(table, dict):
        raise ErasureError(f"{source.path}: {CONFIG} in its header must be a JSON object")
    if any(value for key, value in table.items() if key.rpartition(".")[2] == "use_dora"):
        raise ErasureError(f"{source.path} is a DoRA, whose change is not of low rank")
    return table


def _alpha(settings: Mapping[str, Any], component: str, path: str, rank: int) -> float:
    """Return the alpha for which alpha / rank is the scale that peft derives from the settings.

    A key of `alpha_pattern` is compared with the end of the path. peft treats it as a regular expression, but diffusers
    writes plain names, and regular expressions from a file are not evaluated here.
    """
    prefix = f"{component}."
    patterns = settings.get(prefix + "alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ErasureError(f"alpha_pattern of the {component} in {CONFIG} must be a JSON object")
    by_pattern = next((value for end, value in patterns.items() if f".{path}".endswith(f".{end}")), None)
    value = by_pattern if by_pattern is not None else settings.get(prefix + "lora_alpha")
    if value is None:
        return float(rank)
    try:
        alpha = float(value)
    except (TypeError, ValueError):
        raise ErasureError(
            f"an alpha of the {component} in {CONFIG} must be a number, not {str(value)[:40]!r}"
        ) from None
    return alpha * math.sqrt(rank) if settings.get(prefix + "use_rslora") else alpha


def write_peft(patch: Patch, path: Path) -> list[str]:
    """Write a low-rank patch with its scale folded into `lora_B` and with the same rank in all layers.

    Alpha then equals the rank in every layer, which is what loaders assume if the header says nothing, and versions of
    diffusers that use the rank of the first layer as the alpha of all layers are right too. Layers of smaller rank are
    padded with zeros.

    Args:
        patch: the patch.
        path: the file.

    Returns:
        A note for UNets, because ComfyUI loads part of such a file and only logs what it leaves out.

    Raises:
        ErasureError: the patch is not of low rank, or the file cannot be written.
    """
    payload = need_low_rank(patch)
    rank = payload.ranks[-1]
    tensors: dict[str, Tensor] = {}
    for component, layers in payload.layers.items():
        for name, (down, up, alpha) in layers.items():
            scaled = up * (alpha / down.shape[0])
            # Written with `text_model.`: diffusers removes it for encoders without it, but never adds it.
            key = f"{component}.{nested(component, name)}"
            tensors[f"{key}.lora_A.weight"] = _padded(down, rank, 0)
            tensors[f"{key}.lora_B.weight"] = _padded(scaled, rank, 1)
    write_file(path, tensors, {"format": "pt", "modelspec.title": title(patch)})
    if TRANSFORMER in payload.components:
        return []
    return ["ComfyUI loads only part of a PEFT file, and says so in its log alone: use --format kohya for ComfyUI"]


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim) if shape[dim] else factor
