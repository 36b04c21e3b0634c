"""Compare two checkpoints, reading one weight at a time, and return the patch that turns one into the other."""

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
STEMS = ("diffusion_pytorch_model", "model")  # of the files of diffusers and of transformers


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint; those of a diffusers folder are read only when they are needed.

    Args:
        name: the name that the user gave.
        parts: component -> parameter name -> a function that reads the parameter.
    """

    name: str
    parts: dict[str, dict[str, Read]]

    @classmethod
    def open(cls, model: Any) -> Checkpoint:
        """Open the weights of a checkpoint (name, folder, file or pipeline) in their present state, with its patches.

        Raises:
            ErasureError: there is no such model, or its folder holds no safetensors files.
        """
        if isinstance(model, str | os.PathLike):
            name, where = os.fspath(model), Path(resolve(model))
            if where.is_dir():
                parts = {part: dict(_folder(where / part)) for part in COMPONENTS if (where / part).is_dir()}
                return cls(name, parts)
            model = Base.load(name, device="cpu")
        base = Base.of(model) if not hasattr(model, "unet") else model
        pipe = getattr(base, "pipe", base)
        name = getattr(base, "name", "") or str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
        modules = {part: getattr(pipe, part, None) for part in COMPONENTS}
        return cls(name, {part: _live(module) for part, module in modules.items() if isinstance(module, nn.Module)})

    @staticmethod
    def is_near(name: str) -> bool:
        """Tell whether a checkpoint can be opened by its name without loading it and without a network."""
        return name in presets.bundled() or (bool(name) and (Path(name).expanduser() / "model_index.json").is_file())

    def fingerprint(self, component: str, names: Iterable[str]) -> str:
        """Return the `erasure.patch.fingerprint` of some of these weights.

        Raises:
            ErasureError: the checkpoint has no parameter of that name.
        """
        return fingerprint_tensors({name: self.read(component, name) for name in names})

    def read(self, component: str, name: str) -> Tensor:
        """Read one parameter, in its own data type.

        Raises:
            ErasureError: the checkpoint has no such parameter.
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
            raise ErasureError(f"{file}: cannot be read ({error})") from error
        for key in handle.keys():
            yield key.removeprefix(NESTED), partial(handle.get_tensor, key)


def _files(folder: Path) -> list[Path]:
    """List the safetensors files that make up one component: a single file, shards, or the only variant.

    Raises:
        ErasureError: there are no such files, or several variants and none without a name.
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
            f"{folder}: several variants and none without a name: {names}"
            if files
            else f"{folder} holds no safetensors; pickles are not opened. Save it again with safe_serialization=True"
        )
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ErasureError(f"{index}: no index of shards ({error})") from error
    if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ErasureError(f"{index}: names a file elsewhere, {wrong[0]!r}")
    return [index.parent / name for name in names]


def _live(module: nn.Module) -> dict[str, Read]:
    module = getattr(module, "_orig_mod", module)
    return {name.removeprefix(NESTED): partial(_cpu, value) for name, value in module.named_parameters()}


def _cpu(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().cpu()


def diff(
    base: Any, other: Any, concepts: Sequence[Any], *, components: Sequence[str] | None = None, method: str = "diff"
) -> Patch:
    """Return the patch that turns one checkpoint into another: the differences of the tensors that changed.

    For two diffusers folders, two tensors and the changes so far are in memory at a time. Checkpoints of different
    precision are compared in the lower one, so that a cast alone is not a change.

    Args:
        base: the checkpoint to start from: a name, folder or pipeline.
        other: the checkpoint to arrive at; patches that are folded into a pipeline count.
        concepts: the concepts that `other` has forgotten, for the header: names or JSON objects.
        components: the components to compare; None means all that both can have.
        method: the method that made `other`, if it is known.

    Raises:
        ErasureError: a checkpoint that cannot be read, a component or tensor that one of them lacks, different
            shapes, values that are not finite, or no difference at all.
    """
    for component in components or ():
        if component not in COMPONENTS:
            raise unknown("component", component, COMPONENTS)
    if isinstance(concepts, str):
        concepts = [concepts]
    here, there = Checkpoint.open(Base.of(base) if hasattr(base, "unet") else base), Checkpoint.open(other)
    chosen = list(components or (part for part in COMPONENTS if part in here.parts or part in there.parts))
    changes: dict[str, dict[str, Tensor]] = {}
    for component in chosen:
        for name in _shared(here, there, component):
            change = _changed(here, there, component, name)
            if change is not None:
                changes.setdefault(component, {})[name] = change
    if not changes:
        raise ErasureError(f"{there.name} differs from {here.name} in no weight of {', '.join(chosen)}")
    named = [{"name": one} if isinstance(one, str) else one for one in concepts]
    return Patch(
        payload=Delta(changes),
        method=method,
        concepts=tuple(named),
        base=here.name,
        base_fingerprint={part: here.fingerprint(part, changes[part]) for part in changes},
        config={"operation": "diff", "other": there.name, "compared": chosen},
        versions={name: version(name) for name in ("torch", "safetensors")},
    )


def _shared(here: Checkpoint, there: Checkpoint, component: str) -> list[str]:
    for one, other in ((here, there), (there, here)):
        if component not in one.parts:
            raise ErasureError(
                f"{one.name} has no {component}, {other.name} has: name what to compare, such as "
                "components=['unet'] (--component unet)"
            )
    apart = sorted(here.parts[component].keys() ^ there.parts[component].keys())
    # Old text encoders carry a table of positions, 0, 1, 2 ..: a constant, not a weight.
    apart = [name for name in apart if not name.endswith("position_ids")]
    if apart:
        owner = here if apart[0] in here.parts[component] else there
        raise ErasureError(f"only {owner.name} has {component}.{apart[0]}: checkpoints of different architectures")
    return sorted(here.parts[component].keys() & there.parts[component].keys())


def _changed(here: Checkpoint, there: Checkpoint, component: str, name: str) -> Tensor | None:
    before, after = here.read(component, name), there.read(component, name)
    if before.shape != after.shape:
        raise ErasureError(
            f"{component}.{name} is {list(before.shape)} in {here.name} and {list(after.shape)} in {there.name}"
        )
    if not before.is_floating_point():
        return None
    coarse = min(before.dtype, after.dtype, key=lambda dtype: dtype.itemsize)
    return None if torch.equal(before.to(coarse), after.to(coarse)) else after.float() - before.float()
