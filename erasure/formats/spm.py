"""SPM's published file (Lyu et al. 2024, arXiv 2312.16145): kohya's keys, with `prompts`, `rank` and `alpha`."""

from __future__ import annotations

from pathlib import Path

import torch

from erasure.errors import ErasureError
from erasure.formats.kohya import grouped, layers_of
from erasure.formats.patch_builder import ImportedPayload
from erasure.formats.published_file import PublishedFile
from erasure.formats.requirements import need_low_rank, need_only
from erasure.model.base import Base
from erasure.patch import LowRank, Patch
from erasure.patch.header import family_keys
from erasure.patch.module_keys import ALPHA, DOWN
from erasure.patch.safetensors_io import write_file
from erasure.patch.serialization import encode

# The linear layers of a transformer block, the same in every Stable Diffusion.
BLOCK = [f"attn{n}.to_{leaf}" for n in (1, 2) for leaf in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]


def read_spm(source: PublishedFile, base: Base) -> ImportedPayload:
    """Read a file of the SPM code.

    That code scales both factors by the gate, so the similarity acts squared: the patch gets a text gate of power 2.

    Args:
        source: the file.
        base: the base that it must fit.

    Raises:
        ErasureError: the header is not SPM's or contradicts the tensors, or a layer does not fit the base.
    """
    if "prompts" not in source.metadata:
        raise ErasureError(f"{source.path} is not an SPM file: its header lacks `prompts`")
    names = [name.strip() for name in source.metadata["prompts"].split(",") if name.strip()]
    if not names:
        raise ErasureError(f"{source.path}: `prompts` in its header names no concept")
    rank, alpha = (_number(source, key) for key in ("rank", "alpha"))
    groups = grouped(source)
    for prefix, parts in groups.items():
        # The published code takes the scale from the header, other LoRA loaders from the tensors, so they must agree.
        if rank is not None and parts[DOWN].shape[:1] != (rank,):
            rows = list(parts[DOWN].shape)[:1]
            raise ErasureError(f"{source.path}: its header says rank {rank:g}, but {prefix} has {rows}")
        tensor = parts.setdefault(ALPHA, torch.tensor(1.0 if alpha is None else alpha))
        if alpha is not None and float(tensor) != float(torch.tensor(alpha).to(tensor.dtype)):
            raise ErasureError(f"{source.path}: its header says alpha {alpha:g}, but {prefix} has {float(tensor):g}")
    gate = {"kind": "text", "texts": names, "power": 2.0}
    return ImportedPayload(layers_of(source, base, groups), "spm", names, gate)


def check_spm(patch: Patch) -> tuple[LowRank, dict[str, str]]:
    """Check that the SPM code can load a patch: it refuses files without a term on every layer of its blocks.

    Args:
        patch: the patch.

    Returns:
        The factors, and the header of the file.

    Raises:
        ErasureError: the patch is not of low rank, changes more than the UNet, has several ranks, leaves out a layer of
            a transformer block, or erases a concept whose name has a comma.
    """
    payload = need_low_rank(patch)
    need_only(patch, "unet")
    if len(payload.ranks) != 1:
        ranks = ", ".join(map(str, payload.ranks))
        raise ErasureError(f"needs the same rank in all layers, but this patch has the ranks {ranks}")
    if missing := _missing_layers(set(payload.layers["unet"])):
        raise ErasureError(f"needs a term on every layer of a transformer block, but {missing[0]} has none")
    names = patch.gate.get("texts")
    if names is None:
        names = [name for concept in patch.concepts for name in (concept["name"], *concept.get("aliases", ()))]
    if wrong := [name for name in names if "," in name]:
        raise ErasureError(f"separates concepts by commas, so it cannot hold the name {wrong[0]!r}")
    return payload, {"prompts": ",".join(names), "rank": str(payload.ranks[0]), "alpha": str(payload.alpha)}


def write_spm(patch: Patch, path: Path) -> list[str]:
    """Write a low-rank patch of the UNet as a file that the SPM code loads.

    Args:
        patch: the patch.
        path: the file.

    Returns:
        A note that the power and threshold of the gate are left out.

    Raises:
        ErasureError: the patch is not one that the SPM code can load (see `check_spm`), or the file cannot be written.
    """
    payload, header = check_spm(patch)
    tensors, _, _ = encode(payload, "fp32", diffusers_names=True)  # the SPM code knows no others
    write_file(path, tensors, {**header, **family_keys(payload)})
    return ["the SPM code gates the file by its own rule: power and threshold of the gate are left out"]


def _missing_layers(paths: set[str]) -> list[str]:
    """Return the layers that are not in `paths` of the transformer blocks that are partly in it, sorted."""
    layers = set()
    for path in paths:
        start, separator, inside = path.partition(".transformer_blocks.")
        if separator:
            layers |= {f"{start}.proj_in", f"{start}.proj_out"}
            layers |= {f"{start}{separator}{inside.split('.')[0]}.{leaf}" for leaf in BLOCK}
    return sorted(layers - paths)


def _number(source: PublishedFile, key: str) -> float | None:
    """Return a number in the header, or None if the key is missing."""
    text = source.metadata.get(key)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ErasureError(f"{source.path}: {key} in its header must be a number, not {text[:40]!r}") from None
