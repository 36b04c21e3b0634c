"""A file or folder that somebody else wrote, opened so that nothing in it runs."""

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

# How a pickle starts: torch's zip archive, or the bare protocol mark of older files.
PICKLES = (b"PK\x03\x04", b"\x80")
# Where a component's folder keeps its weights, best first.
STEMS = ("diffusion_pytorch_model", "model")
DEEP = 6  # levels of nested tables in a pickle; published ones have at most two


@dataclass(frozen=True)
class Source:
    """A published file: its keys are known, its tensors are read on demand.

    Args:
        path: file or folder.
        kind: safetensors, pickle, folder (of one model) or checkpoint (a diffusers pipeline's folder).
        keys: of the tensors; none for a checkpoint, whose components `part` opens.
        metadata: header strings of a safetensors file.
        config: `config.json` or `model_index.json` of a folder.
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
    def open(cls, path: str | os.PathLike[str], allow_pickle: bool = False) -> Source:
        """Look into a file or folder.

        Raises:
            ErasureError: nothing is there, it is damaged, or it is a pickle and `allow_pickle` is off.
        """
        where = Path(path).expanduser()
        if where.is_dir():
            return _folder(where, allow_pickle)
        if _is_pickle(where):
            tensors = _unpickle(where, allow_pickle)
            return cls(where, "pickle", tuple(tensors), allow_pickle=allow_pickle, _loaded=tensors)
        layout = read_layout(where)
        return cls(where, "safetensors", tuple(layout.entries), layout.metadata, _layouts=(layout,))

    def read(self) -> dict[str, Tensor]:
        """All tensors by key, in the dtype of the file."""
        tensors = dict(self._loaded)
        for layout in self._layouts:
            tensors |= layout.read()
        return tensors

    def part(self, name: str) -> Source | None:
        """A component of a checkpoint; None where there is no folder of that name."""
        folder = self.path / name
        return _folder(folder, self.allow_pickle) if folder.is_dir() else None


def _is_pickle(path: Path) -> bool:
    with reading(path) as handle:
        # A safetensors file may start with 0x80 too: the low byte of its header's length.
        return path.suffix != ".safetensors" and handle.read(4).startswith(PICKLES)


def _unpickle(path: Path, allowed: bool) -> dict[str, Tensor]:
    if not allowed:
        raise ErasureError(
            f"{path}: a pickle. It is read as data only, nothing in it is run, and only where you ask for it: "
            "--allow-pickle (allow_pickle=True). Nothing was read"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as fault:
        first = str(fault).strip().splitlines()[-1] if str(fault).strip() else "no reason given"
        raise ErasureError(f"{path}: refused, it holds more than tensors, and that could be code ({first})") from None
    except Exception as fault:  # torch.load has no narrower error
        raise ErasureError(f"{path}: cannot be read as a pickle of tensors: {fault}") from None
    tensors = dict(_flat(found, ""))
    if not tensors:
        raise ErasureError(f"{path}: no table of tensors, but {type(found).__name__}")
    return tensors


def _flat(value: Any, prefix: str, depth: int = 0) -> list[tuple[str, Tensor]]:
    """Tensors of nested tables, their names joined by dots; `state_dict` around it all is left out."""
    if isinstance(value, Tensor):
        return [(prefix, value.detach())]
    if not isinstance(value, Mapping) or depth > DEEP:
        return []
    found = []
    for key, inner in value.items():
        name = prefix if key == "state_dict" and depth == 0 else f"{prefix}.{key}" if prefix else str(key)
        found += _flat(inner, name, depth + 1)
    return found


def _folder(path: Path, allow_pickle: bool) -> Source:
    if (path / "model_index.json").is_file():
        return Source(path, "checkpoint", config=_json(path / "model_index.json"), allow_pickle=allow_pickle)
    if not (path / "config.json").is_file():
        raise ErasureError(f"{path}: a folder without model_index.json (a pipeline) or config.json (a model)")
    config = _json(path / "config.json")
    for stem in STEMS:
        for variant in ("", ".fp16"):
            whole = path / f"{stem}{variant}.safetensors"
            files = [whole] if whole.is_file() else sorted(path.glob(f"{stem}{variant}-0*-of-*.safetensors"))
            if files:
                layouts = tuple(read_layout(file) for file in files)
                keys = tuple(key for layout in layouts for key in layout.entries)
                return Source(path, "folder", keys, config=config, _layouts=layouts)
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        if (path / name).is_file():
            tensors = _unpickle(path / name, allow_pickle)
            return Source(path, "folder", tuple(tensors), config=config, _loaded=tensors)
    raise ErasureError(f"{path}: holds no weights ({', '.join(f'{stem}.safetensors' for stem in STEMS)})")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise ErasureError(f"{path}: cannot be read as JSON: {fault}") from None
    if not isinstance(found, dict):
        raise ErasureError(f"{path}: not a JSON object")
    return found
