"""kohya's LoRA: `lora_unet_<path>.lora_down.weight|lora_up.weight|alpha`, read by diffusers, ComfyUI and A1111."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.formats.conversion import Found, components, low_rank, need_low_rank, put, rank_of
from erasure.formats.source import Source
from erasure.model.base import Base
from erasure.model.original_keys import compvis_names
from erasure.patch import LowRank, Patch
from erasure.patch.header import loader_keys
from erasure.patch.module_keys import ALPHA, DOWN, UP, kohya_prefix
from erasure.patch.safetensors_io import write_file
from erasure.patch.serialization import encode

Place = tuple[str, str]  # component, module path


def places(base: Base) -> dict[str, Place]:
    """Key in front of the dot -> component and module, in every spelling that is about.

    Those are: diffusers' paths (as SPM and kohya's SD 1 trainer write), the original paths (kohya's XL trainer), and
    for the first text encoder `lora_te_` and `lora_te1_`.
    """
    found: dict[str, Place] = {}
    modules = components(base)
    two = "text_encoder_2" in modules
    for component, root in modules.items():
        old = _original(root) if component == "unet" else {}
        for path, module in root.named_modules():
            if not isinstance(getattr(module, "weight", None), nn.Parameter):
                continue
            plain = path.removeprefix("text_model.") if component != "unet" else path
            spellings = [kohya_prefix(component, plain, both) for both in (two, not two)]
            if component == "unet":
                spellings += [f"lora_unet_{one.replace('.', '_')}" for one in (path, old.get(path, path))]
            for spelling in spellings:
                found.setdefault(spelling, (component, plain))
    return found


def _original(unet: nn.Module) -> dict[str, str]:
    """diffusers' module paths to those of the original code; empty for a UNet that has no original."""
    try:
        names = compvis_names(unet)
    except (ValueError, IndexError, TypeError, KeyError):
        return {}
    return {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in names.items()}


def grouped(source: Source) -> dict[str, dict[str, Tensor]]:
    """Key in front of the dot -> `.lora_down.weight`, `.lora_up.weight`, perhaps `.alpha` -> tensor.

    Raises:
        ErasureError: other tensors (DoRA, LoHa, LoKr), or a factor alone.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read().items():
        prefix, dot, rest = key.partition(".")
        if dot + rest not in (DOWN, UP, ALPHA):
            raise ErasureError(f"{source.path}: {key} is neither {DOWN}, {UP} nor {ALPHA}: no plain LoRA")
        found.setdefault(prefix, {})[dot + rest] = value
    for prefix, parts in found.items():
        if missing := [end for end in (DOWN, UP) if end not in parts]:
            raise ErasureError(f"{source.path}: {prefix} lacks its {missing[0]}")
        if ALPHA in parts and parts[ALPHA].numel() != 1:
            raise ErasureError(f"{source.path}: {prefix}{ALPHA} is not one number")
    return found


def layers_of(source: Source, base: Base, groups: Mapping[str, Mapping[str, Tensor]]) -> LowRank:
    """The groups as a payload; without alpha it is the rank, as every loader takes it."""
    known = places(base)
    layers: dict[str, dict[str, tuple[str, tuple[Tensor, Tensor, float]]]] = {}
    for prefix, parts in groups.items():
        component, path = known.get(prefix, ("", prefix))
        down, up = parts[DOWN].float(), parts[UP].float()
        alpha = float(parts[ALPHA]) if ALPHA in parts else float(rank_of(source, prefix, down))
        put(source, layers.setdefault(component, {}), path, prefix, (prefix, (down, up, alpha)))
    return low_rank(source, base, layers)


def read_kohya(source: Source, base: Base) -> Found:
    """A plain LoRA under kohya's keys."""
    return Found(layers_of(source, base, grouped(source)))


def write_kohya(patch: Patch, path: Path) -> list[str]:
    """Write a low-rank patch as a plain LoRA: the native form without our header, so without the gate."""
    payload = need_low_rank(patch)
    tensors, _, _ = encode(payload, "fp32")
    write_file(path, tensors, loader_keys(payload, title(patch)))
    return []


def title(patch: Patch) -> str:
    """What a file's header calls the patch."""
    return f"{', '.join(patch.names)} erased by {patch.method}"
