"""kohya's LoRA: `lora_unet_<path>.lora_down.weight|lora_up.weight|alpha`, read by diffusers, ComfyUI and A1111."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.formats.patch_builder import ImportedPayload, components, low_rank, put, rank_of
from erasure.formats.published_file import PublishedFile
from erasure.formats.requirements import need_low_rank
from erasure.formats.transformer_lora import (
    check_transformer,
    put_transformer_layer,
    transformer_notes,
    transformer_tensors,
)
from erasure.model.base import Base
from erasure.model.original_keys import compvis_names
from erasure.patch import LowRank, Patch
from erasure.patch.header import loader_keys
from erasure.patch.module_keys import ALPHA, DOWN, TRANSFORMER, UP, kohya_prefix
from erasure.patch.safetensors_io import write_file
from erasure.patch.serialization import encode, two_encoders

Place = tuple[str, str]  # component, module path
# Layers of XL for which kohya's scripts make no LoRA module (networks/lora.py), and which they therefore leave out.
IGNORED_BY_KOHYA = (
    *("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
    *("add_embedding.linear_1", "add_embedding.linear_2", "text_projection"),
)


def places(base: Base) -> dict[str, Place]:
    """Map key prefixes to the modules of a base, in every spelling that is in use.

    The spellings are diffusers' paths (as SPM and kohya's SD 1 trainer write them), the original paths (kohya's XL
    trainer), and for the first text encoder both `lora_te_` and `lora_te1_`.

    Args:
        base: the base.

    Returns:
        Part of the key before the first dot -> component and module path.
    """
    table: dict[str, Place] = {}
    modules = components(base)
    has_two_encoders = "text_encoder_2" in modules
    for component, root in modules.items():
        original_paths = _original_paths(root) if component == "unet" else {}
        for path, module in root.named_modules():
            if not isinstance(getattr(module, "weight", None), nn.Parameter):
                continue
            plain = path.removeprefix("text_model.") if component != "unet" else path
            spellings = [kohya_prefix(component, plain, two) for two in (has_two_encoders, not has_two_encoders)]
            if component == "unet":
                paths = (path, original_paths.get(path, path))
                spellings += [f"lora_unet_{spelling.replace('.', '_')}" for spelling in paths]
            for spelling in spellings:
                table.setdefault(spelling, (component, plain))
    return table


def _original_paths(unet: nn.Module) -> dict[str, str]:
    """Map diffusers' module paths to those of the original code; empty for a UNet that it does not have."""
    try:
        names = compvis_names(unet)
    except (ValueError, IndexError, TypeError, KeyError):
        return {}
    return {diffusers.rpartition(".")[0]: original.rpartition(".")[0] for diffusers, original in names.items()}


def grouped(source: PublishedFile) -> dict[str, dict[str, Tensor]]:
    """Group the tensors of a file by layer.

    Args:
        source: the file.

    Returns:
        Part of the key before the first dot -> `.lora_down.weight`, `.lora_up.weight` and perhaps `.alpha` -> tensor.

    Raises:
        ErasureError: there are other tensors (DoRA, LoHa, LoKr), or a factor is missing.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in source.read().items():
        prefix, dot, end = key.partition(".")
        if dot + end not in (DOWN, UP, ALPHA):
            raise ErasureError(
                f"{source.path} is not a plain LoRA: the key {key} ends neither in {DOWN}, {UP} nor {ALPHA}"
            )
        groups.setdefault(prefix, {})[dot + end] = value
    for prefix, parts in groups.items():
        if missing := [end for end in (DOWN, UP) if end not in parts]:
            raise ErasureError(f"{source.path}: the layer {prefix} lacks its {missing[0]}")
        if ALPHA in parts and parts[ALPHA].numel() != 1:
            raise ErasureError(f"{source.path}: {prefix}{ALPHA} must be a single number")
    return groups


def layers_of(source: PublishedFile, base: Base, groups: Mapping[str, Mapping[str, Tensor]]) -> LowRank:
    """Build the payload of grouped tensors; a layer without alpha gets its rank as alpha, as in every loader.

    Args:
        source: the file, for messages.
        base: the base that the layers must fit.
        groups: the tensors by layer, as from `grouped`.

    Raises:
        ErasureError: a layer does not fit the base, or is stored twice.
    """
    prefixes = places(base)
    layers: dict[str, dict[str, tuple[str, tuple[Tensor, Tensor, float]]]] = {}
    for prefix, parts in groups.items():
        component, path = prefixes.get(prefix, ("", prefix))
        down, up = parts[DOWN].float(), parts[UP].float()
        alpha = float(parts[ALPHA]) if ALPHA in parts else float(rank_of(source, prefix, down))
        if not component and put_transformer_layer(source, base, layers, prefix, (down, up, alpha)):
            continue
        put(source, layers.setdefault(component, {}), path, prefix, (prefix, (down, up, alpha)))
    return low_rank(source, base, layers)


def read_kohya(source: PublishedFile, base: Base) -> ImportedPayload:
    """Read a plain LoRA under kohya's keys.

    Args:
        source: the file.
        base: the base that it must fit.

    Raises:
        ErasureError: the file is not a plain LoRA, or does not fit the base.
    """
    return ImportedPayload(layers_of(source, base, grouped(source)))


def write_kohya(patch: Patch, path: Path) -> list[str]:
    """Write a low-rank patch as a plain LoRA: like the patch's own file, but without its header and gate.

    Args:
        patch: the patch.
        path: the file.

    Returns:
        A note, if kohya's scripts ignore some layers, or diffusers the whole file.

    Raises:
        ErasureError: the patch is not of low rank, or the file cannot be written.
    """
    payload = need_low_rank(patch)
    if TRANSFORMER in payload.components:
        check_transformer(payload)
        write_file(path, transformer_tensors(payload), {"modelspec.title": title(patch)})
        return transformer_notes(payload)
    tensors, _, _ = encode(payload, "fp32")
    write_file(path, tensors, loader_keys(payload, title(patch)))
    ignored = sorted(path for part in payload.components for path in payload.layers[part] if path in IGNORED_BY_KOHYA)
    if two_encoders(payload) and ignored:
        return [
            f"kohya's sd-scripts ignore {len(ignored)} layers of XL, for which they have no key: {', '.join(ignored)}"
        ]
    return []


def title(patch: Patch) -> str:
    """Return the title of a patch for the header of a file: its concepts and its method.

    Args:
        patch: the patch.
    """
    return f"{', '.join(patch.names)} erased by {patch.method}"
