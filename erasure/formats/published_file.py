"""Files and folders that other programs published, opened without running any code in them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.patch.safetensors_io import Layout, read_layout, reading

# The first bytes of a pickle: torch's zip archive, or the bare protocol mark of older files.
PICKLES = (b"PK\x03\x04", b"\x80")
# File names of the weights in the folder of a component, in order of preference.
STEMS = ("diffusion_pytorch_model", "model")
MAX_DEPTH = 6  # levels of nested tables that are read from a pickle; published files have at most two


@dataclass(frozen=True)
class PublishedFile:
    """A published file or folder whose keys have been read; its tensors are read on demand.

    Args:
        path: file or folder.
        kind: `safetensors`, `pickle`, `folder` (of one model) or `checkpoint` (the folder of a diffusers pipeline).
        keys: names of the tensors; empty for a checkpoint, whose components `part` opens.
        metadata: header strings of a safetensors file.
        config: content of `config.json` or `model_index.json` in a folder.
        allow_pickle: whether pickles may be read, as data only.
    """

    path: Path
    kind: str
    keys: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    allow_pickle: bool = False
    _layouts: tuple[Layout, ...] = ()
    _loaded: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str], allow_pickle: bool = False) -> PublishedFile:
        """Open a file or folder, and read the names of its tensors.

        Args:
            path: file or folder; `~` is expanded.
            allow_pickle: whether to read pickles, as data only.

        Raises:
            ErasureError: the path does not exist, the file is damaged, or it is a pickle and `allow_pickle` is false.
        """
        location = Path(path).expanduser()
        if location.is_dir():
            return _open_folder(location, allow_pickle)
        if _is_pickle(location):
            tensors = _unpickle(location, allow_pickle)
            return cls(location, "pickle", tuple(tensors), allow_pickle=allow_pickle, _loaded=tensors)
        layout = read_layout(location)
        return cls(location, "safetensors", tuple(layout.entries), layout.metadata, _layouts=(layout,))

    def read(self) -> dict[str, Tensor]:
        """Return all tensors by key, on the CPU and in the dtype of the file."""
        tensors = dict(self._loaded)
        for layout in self._layouts:
            tensors |= layout.read()
        return tensors

    def part(self, name: str) -> PublishedFile | None:
        """Open one component of a checkpoint.

        Args:
            name: name of the component, such as `unet`.

        Returns:
            The component, or None if the checkpoint has no folder of that name.

        Raises:
            ErasureError: the folder holds no weights, or they cannot be read.
        """
        folder = self.path / name
        return _open_folder(folder, self.allow_pickle) if folder.is_dir() else None


def _is_pickle(path: Path) -> bool:
    with reading(path) as handle:
        # A safetensors file may also start with 0x80: the low byte of the length of its header.
        return path.suffix != ".safetensors" and handle.read(4).startswith(PICKLES)


def _unpickle(path: Path, allowed: bool) -> dict[str, Tensor]:
    if not allowed:
        raise ErasureError(
            f"{path} is a pickle, and pickles are only read on request: --allow-pickle (allow_pickle=True) reads it as "
            "data, without running any code in it. Nothing was read"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as fault:
        reason = str(fault).strip().splitlines()[-1] if str(fault).strip() else "no reason given"
        raise ErasureError(
            f"{path} was refused, because it holds more than tensors, which could be code ({reason})"
        ) from None
    except Exception as fault:  # torch.load has no narrower error
        raise ErasureError(f"{path} cannot be read as a pickle of tensors: {fault}") from None
    tensors = dict(_flatten(content, ""))
    if not tensors:
        raise ErasureError(f"{path} holds no table of tensors but a {type(content).__name__}")
    return tensors


def _flatten(value: Any, prefix: str, depth: int = 0) -> list[tuple[str, Tensor]]:
    """Return the tensors of nested tables, with their names joined by dots and without an outer `state_dict`."""
    if isinstance(value, Tensor):
        return [(prefix, value.detach())]
    if not isinstance(value, Mapping) or depth > MAX_DEPTH:
        return []
    tensors = []
    for key, inner in value.items():
        name = prefix if key == "state_dict" and depth == 0 else f"{prefix}.{key}" if prefix else str(key)
        tensors += _flatten(inner, name, depth + 1)
    return tensors


def _open_folder(path: Path, allow_pickle: bool) -> PublishedFile:
    if (path / "model_index.json").is_file():
        config = _read_json(path / "model_index.json")
        return PublishedFile(path, "checkpoint", config=config, allow_pickle=allow_pickle)
    if not (path / "config.json").is_file():
        raise ErasureError(
            f"{path} is a folder without model_index.json (of a pipeline) or config.json (of a model), so it is no "
            "checkpoint"
        )
    config = _read_json(path / "config.json")
    for stem in STEMS:
        for variant in ("", ".fp16"):
            whole = path / f"{stem}{variant}.safetensors"
            files = [whole] if whole.is_file() else sorted(path.glob(f"{stem}{variant}-0*-of-*.safetensors"))
            if files:
                layouts = tuple(read_layout(file) for file in files)
                keys = tuple(key for layout in layouts for key in layout.entries)
                return PublishedFile(path, "folder", keys, config=config, _layouts=layouts)
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        if (path / name).is_file():
            tensors = _unpickle(path / name, allow_pickle)
            return PublishedFile(path, "folder", tuple(tensors), config=config, _loaded=tensors)
    raise ErasureError(f"{path} holds no weights (expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)})")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise ErasureError(f"{path} cannot be read as JSON: {fault}") from None
    if not isinstance(table, dict):
        raise ErasureError(f"{path} is not a JSON object but a {type(table).__name__}")
    return table
