"""Saliency masks: which weights matter most, over all tensors at once (SalUn, Fan et al. 2024, arXiv 2310.12508)."""

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
    """Boolean masks of the floor(density * N) largest of all N scores (>= 0, fp32), in one ranking over all tensors.

    Nothing is sorted: the order of non-negative floats is that of their bits, so two histograms, of the upper and of
    the lower 16 bits, give the exact threshold. Equal scores are taken in the order of names and places.

    Raises:
        ErasureError: a density outside (0, 1], NaN, or scores that are all zero.
    """
    if not 0 < density <= 1:
        raise ErasureError(f"density={density}: expected a share above 0 and at most 1")
    total = sum(score.numel() for score in scores.values())
    wanted = int(total * density)
    if wanted < 1:
        raise ErasureError(f"density={density} of {total} weights selects none")
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ErasureError(f"{name}: a saliency is NaN or infinite")
    if not any(score.any() for score in scores.values()):
        raise ErasureError("every saliency is zero: the forget images give no gradient")
    bits = {name: score.detach().float().contiguous().view(torch.int32) for name, score in scores.items()}
    upper, rest = _bin((b >> 16 for b in bits.values()), wanted)
    lower, ties = _bin(((b & 0xFFFF)[(b >> 16) == upper] for b in bits.values()), rest)
    threshold = (upper << 16) | lower
    found = {}
    for name, b in bits.items():
        mask, equal = b > threshold, (b == threshold).flatten()
        if ties > 0 and equal.any():
            taken = equal & (equal.cumsum(0) <= ties)
            ties -= int(taken.sum())
            mask = mask | taken.view(mask.shape)
        found[name] = mask
    return found


def _bin(parts: Iterable[Tensor], wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th largest of all values, and how many of that bin are needed."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    for part in parts:
        counts += torch.bincount(part.flatten(), minlength=BINS).cpu()  # where the scores lie: only counts travel
    above = counts.flip(0).cumsum(0).flip(0) - counts  # how many lie in higher bins
    at = int(((above < wanted) & (above + counts >= wanted)).nonzero()[0])
    return at, wanted - int(above[at])


def write_mask(
    masks: Mapping[str, Tensor], path: str | os.PathLike[str], names: Mapping[str, str] | None = None
) -> None:
    """Write masks as safetensors, a bit a weight; `names` renames them (`compvis_names` for the published names).

    The published file is a pickle with eight bytes a weight. It is read but not written: whoever opens a pickle runs
    what is in it. The published names in a safetensors file say the same.

    Raises:
        ErasureError: the file cannot be written.
    """
    target = Path(path)
    tensors = {(names or {}).get(name, name): pack(mask.cpu())[0] for name, mask in masks.items()}
    shapes = {(names or {}).get(name, name): ",".join(map(str, mask.shape)) for name, mask in masks.items()}
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"erasure.mask": "1", **shapes})
        os.replace(temporary, target)
    except (OSError, SafetensorError) as fault:
        with suppress(OSError):
            temporary.unlink()
        raise ErasureError(f"{target}: the mask cannot be written: {fault}") from None


def read_mask(path: str | os.PathLike[str], unet: Any) -> dict[str, Tensor]:
    """Boolean masks for the parameters of `unet`, by name.

    Reads what `write_mask` writes, under diffusers' names or the published CompVis ones, and the published file: a
    pickled dict of 0/1 tensors (read as data only, nothing in it is run).

    Raises:
        ErasureError: the file cannot be read, or does not fit the UNet.
    """
    source = Path(path)
    try:
        if source.suffix in (".pt", ".pth", ".bin"):
            raw = torch.load(source, map_location="cpu", weights_only=True)
            if not isinstance(raw, dict) or not all(isinstance(value, Tensor) for value in raw.values()):
                raise ErasureError(f"{source}: expected a dict of tensors")
            found = {name: value.bool() for name, value in raw.items()}
        else:
            found = _unpacked(source)
    except ErasureError:
        raise
    except Exception as fault:  # torch.load has no narrower error
        raise ErasureError(f"{source}: cannot be read as a mask: {fault}") from None
    params = dict(unet.named_parameters())
    back = {theirs: ours for ours, theirs in compvis_names(unet).items()}
    named = {back.get(name, name): mask for name, mask in found.items()}
    for name, mask in named.items():
        if name not in params:
            raise ErasureError(f"{source}: {name} is no parameter of this UNet; was it made for another architecture?")
        if mask.shape != params[name].shape:
            raise ErasureError(
                f"{source}: {name} is {list(params[name].shape)} here and {list(mask.shape)} in the mask"
            )
    return named


def _unpacked(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
        packed = load_file(path)
    except (OSError, SafetensorError) as fault:
        raise ErasureError(f"{path}: cannot be read as a mask: {fault}") from None
    if "erasure.mask" not in notes:
        raise ErasureError(f"{path}: no mask: its header lacks erasure.mask")
    found = {}
    for name, bits in packed.items():
        shape = [int(side) for side in notes[name].split(",") if side]
        marked = int(numpy.unpackbits(bits.numpy()).sum())
        found[name] = unpack(bits, torch.ones(marked, dtype=torch.uint8), shape).bool()
    return found
