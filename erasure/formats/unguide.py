"""UnGuide's `lora.pth`: a pickle of `<CompVis module>.lora.A` [in, r] and `.lora.B` [r, out], change 8 (A B)^T."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from erasure.errors import ErasureError
from erasure.formats.conversion import Found, low_rank, put
from erasure.formats.source import Source
from erasure.model.base import Base
from erasure.model.original_keys import compvis_names
from erasure.patch.payload import Layer

SCALE = 8.0  # the published code's, which stands in no file but train_config.json
PREFIXES = ("model.", "diffusion_model.")
A, B = ".lora.A", ".lora.B"


def read_unguide(source: Source, base: Base) -> Found:
    """A LoRA of the UNet. The gate's data is in no published file: the patch acts always."""
    try:
        back = {theirs: ours for ours, theirs in compvis_names(base.unet).items()}
    except (ValueError, IndexError, TypeError, KeyError):
        raise ErasureError(
            f"{source.path}: its names are those of Stable Diffusion 1 and 2; {base.name} is no such"
        ) from None
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read().items():
        end = next((one for one in (A, B) if key.endswith(one)), None)
        if end is None or value.dim() != 2:
            raise ErasureError(f"{source.path}: {key} {list(value.shape)} is neither {A} [in, r] nor {B} [r, out]")
        factors.setdefault(key.removesuffix(end), {})[end] = value.float()
    scale = _scale(source.path.with_name("train_config.json"))
    layers: dict[str, dict[str, tuple[str, Layer]]] = {}
    for key, parts in factors.items():
        if missing := [end for end in (A, B) if end not in parts]:
            raise ErasureError(f"{source.path}: {key} lacks its {missing[0]}")
        name = key
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        ours = back.get(f"{name}.weight")
        down, up = parts[A].T, parts[B].T
        component, path = ("unet", ours.removesuffix(".weight")) if ours else ("", name)
        put(source, layers.setdefault(component, {}), path, key, (key, (down, up, scale * down.shape[0])))
    return Found(low_rank(source, base, layers), method="unguide")


def _scale(config: Path) -> float:
    """`lora_alpha` of the train_config.json beside the file, else the published default."""
    if not config.is_file():
        return SCALE
    try:
        return float(json.loads(config.read_text(encoding="utf-8")).get("lora_alpha", SCALE))
    except (OSError, ValueError, TypeError, AttributeError) as fault:
        raise ErasureError(f"{config}: cannot be read for lora_alpha: {fault}") from None
