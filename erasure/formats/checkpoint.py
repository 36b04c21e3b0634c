"""Whole models: a pipeline with the patch in its weights, as diffusers' folder or as one file, or its text encoder."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.errors import ErasureError
from erasure.formats.conversion import Found, changes, components, need_only
from erasure.formats.single_file import save_single_file
from erasure.formats.source import Source
from erasure.formats.weights import TEXT, UNET, patched, text_weights
from erasure.model.base import Base
from erasure.patch import Patch


def read_checkpoint(source: Source, base: Base) -> Found:
    """A pipeline's folder against the base: what its UNet and text encoders changed; the VAE is not looked at."""
    weights: dict[str, dict[str, Tensor]] = {}
    for name in components(base):
        part = source.part(name)
        if part is None:
            raise ErasureError(f"{source.path}: has no {name}, and {base.name} has one. Another architecture?")
        weights[name] = part.read() if name == UNET else text_weights(part)
    return Found(changes(source, base, weights))


def write_checkpoint(patch: Patch, path: Path, base: Base) -> list[str]:
    """Write the whole pipeline, patched, as a folder that `from_pretrained` loads."""
    with patched(patch, base):
        # Past the erased pipeline's own: it would log what was asked for here.
        _whole(path, partial(DiffusionPipeline.save_pretrained, base.pipe))
    return []


def read_single_file(source: Source, base: Base) -> Found:
    """One file under the original names against the base, as `read_checkpoint`."""
    if source.kind == "pickle":
        raise ErasureError(f"{source.path}: whole checkpoints are only read as .safetensors files")
    other = components(Base.load(source.path, device="cpu"))
    if missing := sorted(set(components(base)) - set(other)):
        raise ErasureError(f"{source.path}: has no {missing[0]}, and {base.name} has one. Another architecture?")
    return Found(changes(source, base, {name: dict(other[name].named_parameters()) for name in components(base)}))


def write_single_file(patch: Patch, path: Path, base: Base) -> list[str]:
    """Write the whole pipeline, patched, as one checkpoint file under the original names."""
    with patched(patch, base):
        save_single_file(base.pipe, path)
    return []


def write_text_encoder(patch: Patch, path: Path, base: Base) -> list[str]:
    """Write the patched text encoder as a folder that `CLIPTextModel.from_pretrained` loads."""
    need_only(patch, TEXT)
    with patched(patch, base):
        _whole(path, base.pipe.text_encoder.save_pretrained)
    return []


def _whole(path: Path, save: Callable[[Any], Any]) -> None:
    """Let `save` fill a folder that takes its name at the end, so that it is there whole or not at all."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ErasureError(f"{path}: is there already; a whole model is only written into a new folder")
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        save(temporary)
        os.replace(temporary, path)
    except OSError as fault:
        raise ErasureError(f"{path}: cannot be written ({fault.strerror or fault})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
