"""Saliency masks: the weights that matter most, ranked over all tensors (SalUn, Fan et al. 2024, arXiv 2310.12508)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure.errors import ErasureError
from erasure.model.original_keys import compvis_names
from erasure.patch.sparse import pack, unpack

BINS = 1 << 16


def top(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Return boolean masks of the floor(density * N) largest of all N scores, in one ranking over all tensors.

    Nothing is sorted: non-negative floats are ordered like their bits, so two histograms, of the upper and of the lower
    16 bits, give the exact threshold. Of equal scores, the first in the order of tensors and entries are marked.

    Args:
        scores: non-negative tensors in fp32, by name.
        density: share of all scores to mark.

    Raises:
        ErasureError: a density outside (0, 1] or too small to mark anything, NaN, or scores that are all zero.
    """
    if not 0 < density <= 1:
        raise ErasureError(f"density={density}: must be above 0 and at most 1")
    total = sum(score.numel() for score in scores.values())
    wanted = int(total * density)
    if wanted < 1:
        raise ErasureError(f"density={density} of {total} weights marks none; give a larger share")
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ErasureError(f"{name}: a saliency is NaN or infinite")
    if not any(score.any() for score in scores.values()):
        raise ErasureError("every saliency is zero: the forget images have no gradient")
    bits = {name: score.detach().float().contiguous().view(torch.int32) for name, score in scores.items()}
    upper, rest = _bin((b >> 16 for b in bits.values()), wanted)
    lower, ties = _bin(((b & 0xFFFF)[(b >> 16) == upper] for b in bits.values()), rest)
    threshold = (upper << 16) | lower
    masks = {}
    for name, b in bits.items():
        mask, equal = b > threshold, (b == threshold).flatten()
        if ties > 0 and equal.any():
            taken = equal & (equal.cumsum(0) <= ties)
            ties -= int(taken.sum())
            mask = mask | taken.view(mask.shape)
        masks[name] = mask
    return masks


def _bin(parts: Iterable[Tensor], wanted: int) -> tuple[int, int]:
    """Return the bin that holds the `wanted`-th largest of all values, and how many of that bin are needed."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    for part in parts:
        counts += torch.bincount(part.flatten(), minlength=BINS).cpu()  # on the scores' device: only counts are copied
    above = counts.flip(0).cumsum(0).flip(0) - counts  # number of values in higher bins
    at = int(((above < wanted) & (above + counts >= wanted)).nonzero()[0])
    return at, wanted - int(above[at])


def write_mask(
    masks: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    names: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write masks as safetensors, with one bit per weight.

    The published file is a pickle with eight bytes per weight. It can be read but not written, because opening a pickle
    runs code. A safetensors file with the published names holds the same.

    Args:
        masks: boolean tensors by parameter name.
        path: of the file.
        names: other names for the parameters, such as `compvis_names` gives.
        metadata: further metadata of the file, such as the costs of the masks.

    Raises:
        ErasureError: the file cannot be written.
    """
    target = Path(path)
    tensors = {(names or {}).get(name, name): pack(mask.cpu())[0] for name, mask in masks.items()}
    shapes = {(names or {}).get(name, name): ",".join(map(str, mask.shape)) for name, mask in masks.items()}
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"erasure.mask": "1", **(metadata or {}), **shapes})
        os.replace(temporary, target)
    except (OSError, SafetensorError) as fault:
        with suppress(OSError):
            temporary.unlink()
        raise ErasureError(f"{target}: the mask cannot be written: {fault}") from None


def read_mask(path: str | os.PathLike[str], unet: Any) -> dict[str, Tensor]:
    """Read boolean masks for the parameters of a UNet, by name.

    The file is one of `write_mask`, with diffusers' or the published CompVis names, or the published pickle of a dict
    of 0/1 tensors, which is read as data only, without running any code.

    Raises:
        ErasureError: the file cannot be read, or does not fit the UNet.
    """
    source = Path(path)
    try:
        if source.suffix in (".pt", ".pth", ".bin"):
            raw = torch.load(source, map_location="cpu", weights_only=True)
            if not isinstance(raw, dict) or not all(isinstance(value, Tensor) for value in raw.values()):
                raise ErasureError(f"{source}: expected a dict of tensors")
            masks = {name: value.bool() for name, value in raw.items()}
        else:
            masks = _unpacked(source)
    except ErasureError:
        raise
    except Exception as fault:  # torch.load has no narrower error
        raise ErasureError(f"{source}: cannot be read as a mask: {fault}") from None
    params = dict(unet.named_parameters())
    other = compvis_names(unet) if hasattr(unet.config, "down_block_types") else {}  # transformers have no such names
    diffusers_names = {theirs: ours for ours, theirs in other.items()}
    masks = {diffusers_names.get(name, name): mask for name, mask in masks.items()}
    for name, mask in masks.items():
        if name not in params:
            raise ErasureError(f"{source}: this UNet has no parameter {name}; is the mask for another architecture?")
        if mask.shape != params[name].shape:
            raise ErasureError(
                f"{source}: {name} has shape {list(mask.shape)}, and {list(params[name].shape)} in this UNet"
            )
    return masks


def _unpacked(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
        packed = load_file(path)
    except (OSError, SafetensorError) as fault:
        raise ErasureError(f"{path}: cannot be read as a mask: {fault}") from None
    if "erasure.mask" not in notes:
        raise ErasureError(f"{path} is not a mask: its header lacks erasure.mask")
    masks = {}
    for name, bits in packed.items():
        shape = [int(side) for side in notes[name].split(",") if side]
        marked = int(numpy.unpackbits(bits.numpy()).sum())
        masks[name] = unpack(bits, torch.ones(marked, dtype=torch.uint8), shape).bool()
    return masks
