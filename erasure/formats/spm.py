"""SPM's published file: kohya's keys, metadata `prompts`, `rank`, `alpha`."""

from __future__ import annotations

from pathlib import Path

import torch

from erasure.errors import ErasureError
from erasure.formats.conversion import Found, need_low_rank, need_only
from erasure.formats.kohya import grouped, layers_of
from erasure.formats.source import Source
from erasure.model.base import Base
from erasure.patch import LowRank, Patch
from erasure.patch.module_keys import ALPHA, DOWN
from erasure.patch.safetensors_io import write_file
from erasure.patch.serialization import encode

# Linear layers of a transformer block, the same in every Stable Diffusion.
BLOCK = [f"attn{n}.to_{one}" for n in (1, 2) for one in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]


def read_spm(source: Source, base: Base) -> Found:
    """A file of the SPM code.

    Its code scales both factors by the gate, so gamma acts squared: the patch gets a text gate of power 2.
    """
    if "prompts" not in source.metadata:
        raise ErasureError(f"{source.path}: its header lacks `prompts`: no SPM file")
    names = [name.strip() for name in source.metadata["prompts"].split(",") if name.strip()]
    if not names:
        raise ErasureError(f"{source.path}: its header names no concept")
    rank, alpha = (_number(source, key) for key in ("rank", "alpha"))
    groups = grouped(source)
    for prefix, parts in groups.items():
        # The published code takes the scale from the header, other LoRA loaders from the tensors.
        if rank is not None and parts[DOWN].shape[:1] != (rank,):
            found = list(parts[DOWN].shape)[:1]
            raise ErasureError(f"{source.path}: its header says rank {rank:g}, {prefix} has {found}")
        own = parts.setdefault(ALPHA, torch.tensor(1.0 if alpha is None else alpha))
        if alpha is not None and float(own) != float(torch.tensor(alpha).to(own.dtype)):
            raise ErasureError(f"{source.path}: its header says alpha {alpha:g}, {prefix} {float(own):g}")
    gate = {"kind": "text", "texts": names, "power": 2.0}
    return Found(layers_of(source, base, groups), "spm", names, gate)


def check_spm(patch: Patch) -> tuple[LowRank, dict[str, str]]:
    """The factors and the header of a patch that the SPM code can read.

    That code wants a term on every layer of the transformer blocks, and stops at one that is missing.

    Raises:
        ErasureError: why it cannot.
    """
    payload = need_low_rank(patch)
    need_only(patch, "unet")
    if len(payload.ranks) != 1:
        raise ErasureError("holds one rank for all layers")
    if missing := _missing(set(payload.layers["unet"])):
        raise ErasureError(f"also wants a term on {missing[0]}")
    names = patch.gate.get("texts")
    if names is None:
        names = [name for one in patch.concepts for name in (one["name"], *one.get("aliases", ()))]
    if wrong := [name for name in names if "," in name]:
        raise ErasureError(f"separates concepts by commas, and one is {wrong[0]!r}")
    return payload, {"prompts": ",".join(names), "rank": str(payload.ranks[0]), "alpha": str(payload.alpha)}


def write_spm(patch: Patch, path: Path) -> list[str]:
    """Write a low-rank patch of the UNet as the SPM code reads it; its gate's power and threshold stay behind."""
    payload, header = check_spm(patch)
    tensors, _, _ = encode(payload, "fp32")
    write_file(path, tensors, header)
    return ["the SPM code gates it by its own rule, without our gate's power and threshold"]


def _missing(paths: set[str]) -> list[str]:
    """Layers that blocks of which `paths` touches a part have beside it, sorted."""
    wanted = set()
    for path in paths:
        start, found, inside = path.partition(".transformer_blocks.")
        if found:
            wanted |= {f"{start}.proj_in", f"{start}.proj_out"}
            wanted |= {f"{start}{found}{inside.split('.')[0]}.{leaf}" for leaf in BLOCK}
    return sorted(wanted - paths)


def _number(source: Source, key: str) -> float | None:
    """A number in the header, None where it stands not."""
    text = source.metadata.get(key)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ErasureError(f"{source.path}: its header's {key} is no number: {text[:40]!r}") from None
