"""Other people's files: patches of published code read in, and ours written so that it reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from erasure.base import Base
from erasure.errors import ErasureError, unknown
from erasure.patch import LowRank, Patch, fingerprint
from erasure.patch.encode import encode
from erasure.patch.file import Layout, read_layout, write_file
from erasure.patch.keys import ALPHA, DOWN, UP

Source = str | os.PathLike[str]
# Linear layers of a transformer block, the same in every Stable Diffusion.
BLOCK = [f"attn{n}.to_{one}" for n in (1, 2) for one in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]


@dataclass(frozen=True)
class Format:
    """One published format: what it is, how it is read onto a base, how a patch is written in it."""

    about: str
    read: Callable[[Source, Base], Patch]
    write: Callable[[Patch, Source], Path]


def import_patch(path: Source, form: str, model: Base | str = "glyph") -> Patch:
    """A patch from a published file, made for `model`.

    Raises:
        ErasureError: an unknown format, a damaged file, or one that does not fit the model.
    """
    return _format(form).read(path, Base.of(model))


def export_patch(patch: Patch, path: Source, form: str) -> Path:
    """Write a patch as a published format.

    Raises:
        ErasureError: an unknown format, or a patch that it cannot hold.
    """
    return _format(form).write(patch, path)


def read_spm(path: Source, base: Base) -> Patch:
    """A file of the SPM code: kohya keys, metadata `prompts`, `rank`, `alpha`.

    Its code scales both factors by the gate, so gamma acts squared: the patch gets a text gate of power 2.
    """
    layout = read_layout(path)
    if "prompts" not in layout.metadata:
        raise ErasureError(f"{layout.path}: its header lacks `prompts`: no SPM file")
    names = [name.strip() for name in layout.metadata["prompts"].split(",") if name.strip()]
    if not names:
        raise ErasureError(f"{layout.path}: its header names no concept")
    modules = {
        f"lora_unet_{name.replace('.', '_')}": name
        for name, one in base.unet.named_modules()
        if isinstance(one, nn.Linear | nn.Conv2d)
    }
    rank, alpha = (_number(layout, key) for key in ("rank", "alpha"))
    tensors, layers = layout.read(), {}
    for key in tensors:
        prefix = next((key.removesuffix(end) for end in (DOWN, UP, ALPHA) if key.endswith(end)), None)
        if prefix not in modules:
            raise ErasureError(f"{layout.path}: {key} belongs to no layer of {base.name}; another architecture?")
        down, up, own = (tensors.get(prefix + end) for end in (DOWN, UP, ALPHA))
        if down is None or up is None:
            raise ErasureError(f"{layout.path}: {prefix} lacks its {DOWN if down is None else UP}")
        if own is not None and own.numel() != 1:
            raise ErasureError(f"{layout.path}: {prefix}{ALPHA} is not one number")
        # The published code takes the scale from the header, other LoRA loaders from the tensors.
        if rank is not None and down.shape[:1] != (rank,):
            raise ErasureError(f"{layout.path}: its header says rank {rank:g}, {prefix} has {list(down.shape)[:1]}")
        if own is not None and alpha is not None and float(own) != float(torch.tensor(alpha).to(own.dtype)):
            raise ErasureError(f"{layout.path}: its header says alpha {alpha:g}, {prefix} {float(own):g}")
        given = alpha if own is None else float(own)
        layers[modules[prefix]] = (down.float(), up.float(), 1.0 if given is None else given)
    payload = LowRank({"unet": layers})
    for name in payload.names("unet"):
        here, wanted = list(base.unet.get_parameter(name).shape), list(payload.shape("unet", name))
        if here != wanted:
            raise ErasureError(f"{layout.path}: {name} is {wanted} in the file and {here} in {base.name}")
    return Patch(
        payload=payload,
        method="spm",
        concepts=tuple({"name": name} for name in names),
        base=base.name,
        base_fingerprint={"unet": fingerprint(base.unet, payload.names("unet"))},
        config={"imported": Path(path).name},
        gate={"kind": "text", "texts": names, "power": 2.0},
        versions={"torch": version("torch")},
        seed=0,
        costs={},
    )


def write_spm(patch: Patch, path: Source) -> Path:
    """Write a low-rank patch of the UNet as the SPM code reads it; its gate's power and threshold stay behind.

    That code wants a term on every layer of the transformer blocks, and stops at one that is missing.
    """
    payload = patch.payload
    if not isinstance(payload, LowRank) or patch.components != ["unet"]:
        raise ErasureError("the SPM format holds low-rank patches of the unet alone; nothing was written")
    scales = {(down.shape[0], alpha) for down, _, alpha in payload.layers["unet"].values()}
    if len(scales) != 1:
        raise ErasureError("the SPM format holds one rank and one alpha for all layers; nothing was written")
    if missing := _missing(set(payload.layers["unet"])):
        raise ErasureError(f"the SPM code also wants a term on {missing[0]}; nothing was written")
    names = patch.gate.get("texts")
    if names is None:
        names = [name for one in patch.concepts for name in (one["name"], *one.get("aliases", ()))]
    if wrong := [name for name in names if "," in name]:
        raise ErasureError(f"{wrong[0]!r}: the SPM format separates concepts by commas; nothing was written")
    rank, alpha = scales.pop()
    tensors, _, _ = encode(payload, "fp32")
    return write_file(path, tensors, {"prompts": ",".join(names), "rank": str(rank), "alpha": str(alpha)}, True)


def _missing(paths: set[str]) -> list[str]:
    """Layers that blocks of which `paths` touches a part have beside it, sorted."""
    wanted = set()
    for path in paths:
        start, found, inside = path.partition(".transformer_blocks.")
        if found:
            wanted |= {f"{start}.proj_in", f"{start}.proj_out"}
            wanted |= {f"{start}{found}{inside.split('.')[0]}.{leaf}" for leaf in BLOCK}
    return sorted(wanted - paths)


def _number(layout: Layout, key: str) -> float | None:
    """A number in the header, None where it stands not."""
    text = layout.metadata.get(key)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ErasureError(f"{layout.path}: its header's {key} is no number: {text[:40]!r}") from None


FORMATS = {"spm": Format("SPM's published file (kohya keys with prompts, rank and alpha)", read_spm, write_spm)}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]
