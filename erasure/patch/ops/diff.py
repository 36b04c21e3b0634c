"""Differences of checkpoints: the patch that turns one checkpoint into another, computed one weight at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError, unknown
from erasure.model import presets
from erasure.model.base import Base
from erasure.model.loading import resolve
from erasure.patch.fingerprint import fingerprint_tensors
from erasure.patch.module_keys import COMPONENTS, NESTED
from erasure.patch.patch import Patch
from erasure.patch.payload import Delta

Read = Callable[[], Tensor]
STEMS = ("diffusion_pytorch_model", "model")  # names of weight files in diffusers and in transformers


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint; those in a diffusers folder are read only when they are needed.

    Args:
        name: the checkpoint, as the user named it.
        parts: for each component, a function for each parameter name that reads the parameter.
    """

    name: str
    parts: dict[str, dict[str, Read]]

    @classmethod
    def open(cls, model: Any) -> Checkpoint:
        """Open the weights of a checkpoint.

        Args:
            model: a name, folder, file or pipeline. The weights of a pipeline are taken as they are, including any
                patches that are folded into them.

        Raises:
            ErasureError: there is no such model, or a component's folder has no safetensors files.
        """
        if isinstance(model, str | os.PathLike):
            name, folder = os.fspath(model), Path(resolve(model))
            if folder.is_dir():
                parts = {part: dict(_folder(folder / part)) for part in COMPONENTS if (folder / part).is_dir()}
                return cls(name, parts)
            model = Base.load(name, device="cpu")
        base = Base.of(model) if not hasattr(model, "unet") else model
        pipe = getattr(base, "pipe", base)
        name = getattr(base, "name", "") or str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
        modules = {part: getattr(pipe, part, None) for part in COMPONENTS}
        return cls(name, {part: _live(module) for part, module in modules.items() if isinstance(module, nn.Module)})

    @staticmethod
    def is_near(name: str) -> bool:
        """Tell whether `name` is a bundled checkpoint or a local folder, which open without loading or a network."""
        return name in presets.bundled() or (bool(name) and (Path(name).expanduser() / "model_index.json").is_file())

    def fingerprint(self, component: str, names: Iterable[str]) -> str:
        """Return the fingerprint of some parameters, as `erasure.patch.fingerprint` computes it.

        Args:
            component: the component.
            names: the names of the parameters.

        Raises:
            ErasureError: the checkpoint has no such component or parameter.
        """
        return fingerprint_tensors({name: self.read(component, name) for name in names})

    def read(self, component: str, name: str) -> Tensor:
        """Read one parameter in the dtype in which it is stored.

        Args:
            component: the component.
            name: the name of the parameter.

        Raises:
            ErasureError: the checkpoint has no such component or parameter.
        """
        part = self.parts.get(component)
        if part is None or name not in part:
            raise ErasureError(f"{self.name} has no {component if part is None else f'{component}.{name}'}")
        return part[name]()


def _folder(folder: Path) -> Iterator[tuple[str, Read]]:
    from safetensors import SafetensorError, safe_open

    for file in _files(folder):
        try:
            handle: Any = safe_open(file, framework="pt").__enter__()
        except (OSError, SafetensorError) as error:
            raise ErasureError(f"{file} cannot be read as safetensors ({error})") from error
        for key in handle.keys():
            yield key.removeprefix(NESTED), partial(handle.get_tensor, key)


def _files(folder: Path) -> list[Path]:
    """List the safetensors files that make up one component: a single file, its shards, or the only variant.

    Raises:
        ErasureError: there are no such files, or several variants (such as fp16) without a default one.
    """
    for stem in STEMS:
        if (whole := folder / f"{stem}.safetensors").is_file():
            return [whole]
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            return _shards(index)
    files = sorted(file for stem in STEMS for file in folder.glob(f"{stem}.*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise ErasureError(
            f"{folder} has several variants and no default one: {names}"
            if files
            else f"{folder} has no safetensors files, and pickles are not opened. Save it again as safetensors"
        )
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ErasureError(f"{index} is not an index of shards ({error})") from error
    if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ErasureError(f"{index} names {wrong[0]!r}, which is not a file in the same folder")
    return [index.parent / name for name in names]


def _live(module: nn.Module) -> dict[str, Read]:
    module = getattr(module, "_orig_mod", module)
    return {name.removeprefix(NESTED): partial(_cpu, value) for name, value in module.named_parameters()}


def _cpu(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().cpu()


def diff(
    base: Any, other: Any, concepts: Sequence[Any], *, components: Sequence[str] | None = None, method: str = "diff"
) -> Patch:
    """Return the patch that turns one checkpoint into another.

    It holds the differences of the tensors that changed. Tensors of different precision are compared in the lower
    precision, so that a cast alone is not a change. For two diffusers folders, only the changes and one pair of
    tensors are in memory at a time.

    Args:
        base: the original checkpoint: a name, folder, file or pipeline.
        other: the changed checkpoint; patches that are folded into the weights of a pipeline are included.
        concepts: the concepts that `other` has forgotten, as names or JSON objects, for the header.
        components: the components to compare; None compares unet, text_encoder and text_encoder_2 if there are any.
        method: the method that made `other`, for the header.

    Raises:
        ErasureError: a checkpoint cannot be read, one of them lacks a component or tensor, shapes differ, a value is
            not finite, or there is no difference at all.
    """
    for component in components or ():
        if component not in COMPONENTS:
            raise unknown("component", component, COMPONENTS)
    if isinstance(concepts, str):
        concepts = [concepts]
    old, new = Checkpoint.open(Base.of(base) if hasattr(base, "unet") else base), Checkpoint.open(other)
    chosen = list(components or (part for part in COMPONENTS if part in old.parts or part in new.parts))
    changes: dict[str, dict[str, Tensor]] = {}
    for component in chosen:
        for name in _shared(old, new, component):
            change = _changed(old, new, component, name)
            if change is not None:
                changes.setdefault(component, {})[name] = change
    if not changes:
        raise ErasureError(
            f"{new.name} and {old.name} have the same weights in {', '.join(chosen)}, so there is no patch"
        )
    named = [{"name": concept} if isinstance(concept, str) else concept for concept in concepts]
    return Patch(
        payload=Delta(changes),
        method=method,
        concepts=tuple(named),
        base=old.name,
        base_fingerprint={part: old.fingerprint(part, changes[part]) for part in changes},
        config={"operation": "diff", "other": new.name, "compared": chosen},
        versions={name: version(name) for name in ("torch", "safetensors")},
    )


def _shared(old: Checkpoint, new: Checkpoint, component: str) -> list[str]:
    """Return the names of the parameters of a component, which must be the same in both checkpoints."""
    for checkpoint, other in ((old, new), (new, old)):
        if component not in checkpoint.parts:
            raise ErasureError(
                f"{checkpoint.name} has no {component}, but {other.name} has one. Choose the components to compare, "
                "such as components=['unet'] (--component unet)"
            )
    unmatched = sorted(old.parts[component].keys() ^ new.parts[component].keys())
    # Older text encoders store their position ids 0, 1, 2 .., which are a constant and not a weight.
    unmatched = [name for name in unmatched if not name.endswith("position_ids")]
    if unmatched:
        owner = old if unmatched[0] in old.parts[component] else new
        raise ErasureError(
            f"only {owner.name} has {component}.{unmatched[0]}: the checkpoints have different architectures"
        )
    return sorted(old.parts[component].keys() & new.parts[component].keys())


def _changed(old: Checkpoint, new: Checkpoint, component: str, name: str) -> Tensor | None:
    """Return the fp32 difference of a parameter, or None if it did not change."""
    before, after = old.read(component, name), new.read(component, name)
    if before.shape != after.shape:
        raise ErasureError(
            f"{component}.{name} has the shape {list(before.shape)} in {old.name} and {list(after.shape)} in {new.name}"
        )
    if not before.is_floating_point():
        return None
    coarse = min(before.dtype, after.dtype, key=lambda dtype: dtype.itemsize)
    return None if torch.equal(before.to(coarse), after.to(coarse)) else after.float() - before.float()
