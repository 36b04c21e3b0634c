"""Other people's files: patches of published code read in, and ours written so that it reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import nn

from erasure.base import Base
from erasure.errors import ErasureError, unknown
from erasure.patch import LowRank, Patch, fingerprint
from erasure.patch.encode import encode
from erasure.patch.file import read_layout, write_file
from erasure.patch.keys import ALPHA, DOWN, UP

Source = str | os.PathLike[str]


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
    tensors, layers = layout.read(), {}
    for key in tensors:
        prefix = next((key.removesuffix(end) for end in (DOWN, UP, ALPHA) if key.endswith(end)), None)
        if prefix not in modules:
            raise ErasureError(f"{layout.path}: {key} belongs to no layer of {base.name}; another architecture?")
        parts = [tensors.get(prefix + end) for end in (DOWN, UP, ALPHA)]
        if parts[0] is None or parts[1] is None:
            raise ErasureError(f"{layout.path}: {prefix} lacks its {DOWN if parts[0] is None else UP}")
        alpha = float(layout.metadata.get("alpha", 1.0)) if parts[2] is None else float(parts[2])
        layers[modules[prefix]] = (parts[0].float(), parts[1].float(), alpha)
    payload = LowRank({"unet": layers})
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
    """Write a low-rank patch of the UNet as the SPM code reads it; its gate's power and threshold stay behind."""
    payload = patch.payload
    if not isinstance(payload, LowRank) or patch.components != ["unet"]:
        raise ErasureError("the SPM format holds low-rank patches of the unet alone; nothing was written")
    scales = {(down.shape[0], alpha) for down, _, alpha in payload.layers["unet"].values()}
    if len(scales) != 1:
        raise ErasureError("the SPM format holds one rank and one alpha for all layers; nothing was written")
    names = patch.gate.get("texts") or patch.names
    if wrong := [name for name in names if "," in name]:
        raise ErasureError(f"{wrong[0]!r}: the SPM format separates concepts by commas; nothing was written")
    rank, alpha = scales.pop()
    tensors, _, _ = encode(payload, "fp32")
    return write_file(path, tensors, {"prompts": ",".join(names), "rank": str(rank), "alpha": str(alpha)}, True)


FORMATS = {"spm": Format("SPM's published file (kohya keys with prompts, rank and alpha)", read_spm, write_spm)}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]
