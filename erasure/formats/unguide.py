"""UnGuide's `lora.pth` (Polowczyk et al. 2025, arXiv 2508.05755).

It is a pickle with `<CompVis module>.lora.A` [in, r] and `.lora.B` [r, out]; the change of a weight is 8 (A B)^T.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from erasure.errors import ErasureError
from erasure.formats.patch_builder import ImportedPayload, low_rank, put
from erasure.formats.published_file import PublishedFile
from erasure.model.base import Base
from erasure.model.original_keys import compvis_names
from erasure.patch.payload import Layer

SCALE = 8.0  # default of the published code, which records the scale in train_config.json alone
PREFIXES = ("model.", "diffusion_model.")
A, B = ".lora.A", ".lora.B"


def read_unguide(source: PublishedFile, base: Base) -> ImportedPayload:
    """Read a LoRA of the UNet; the published files do not hold the gate, so the patch acts on every prompt.

    The scale is `lora_alpha` of `train_config.json` in the same folder, if there is one.

    Args:
        source: the file.
        base: the base that it must fit.

    Raises:
        ErasureError: the base is not Stable Diffusion 1 or 2, a tensor is not a factor, or a layer does not fit.
    """
    try:
        diffusers_name = {original: diffusers for diffusers, original in compvis_names(base.unet).items()}
    except (ValueError, IndexError, TypeError, KeyError):
        raise ErasureError(
            f"{source.path} has the layer names of Stable Diffusion 1 and 2, which the base {base.name} does not have"
        ) from None
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read().items():
        end = next((suffix for suffix in (A, B) if key.endswith(suffix)), None)
        if end is None or value.dim() != 2:
            raise ErasureError(f"{source.path}: {key} {list(value.shape)} is neither {A} [in, r] nor {B} [r, out]")
        factors.setdefault(key.removesuffix(end), {})[end] = value.float()
    scale = _scale(source.path.with_name("train_config.json"))
    layers: dict[str, dict[str, tuple[str, Layer]]] = {}
    for key, parts in factors.items():
        if missing := [end for end in (A, B) if end not in parts]:
            raise ErasureError(f"{source.path}: the layer {key} lacks its {missing[0]}")
        original = key
        for prefix in PREFIXES:
            original = original.removeprefix(prefix)
        name = diffusers_name.get(f"{original}.weight")
        down, up = parts[A].T, parts[B].T
        component, path = ("unet", name.removesuffix(".weight")) if name else ("", original)
        put(source, layers.setdefault(component, {}), path, key, (key, (down, up, scale * down.shape[0])))
    return ImportedPayload(low_rank(source, base, layers), method="unguide")


def _scale(config: Path) -> float:
    """Return `lora_alpha` of a train_config.json, or the published default if there is no such file."""
    if not config.is_file():
        return SCALE
    try:
        return float(json.loads(config.read_text(encoding="utf-8")).get("lora_alpha", SCALE))
    except (OSError, ValueError, TypeError, AttributeError) as fault:
        raise ErasureError(f"lora_alpha cannot be read from {config}: {fault}") from None
