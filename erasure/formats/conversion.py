"""From tensors of a published file to a patch of a base: do they fit, what do they change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.formats.source import Source
from erasure.model.base import Base
from erasure.patch import Delta, LowRank, Patch, fingerprint
from erasure.patch.module_keys import COMPONENTS, canonical, find_parameter
from erasure.patch.payload import Layer


@dataclass(frozen=True)
class Found:
    """What a reader made of a file; the rest of the patch is the same for every format.

    Args:
        payload: the change.
        method: the method that made it, where the format says so.
        concepts: names of what it erases, where the file says so.
        gate: the gate, where the file has one.
    """

    payload: LowRank | Delta
    method: str = "unknown"
    concepts: Sequence[str] = ()
    gate: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Wanted:
    """A tensor of the file and the parameter it is for; `component` is None where the key names none."""

    key: str
    component: str | None
    name: str
    shape: tuple[int, ...]


def components(base: Base) -> dict[str, nn.Module]:
    """The components of a base that patches may touch, by name."""
    found = {name: getattr(base.pipe, name, None) for name in COMPONENTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def check_fit(source: Source, base: Base, wanted: Iterable[Wanted]) -> None:
    """Every tensor of the file must have its parameter in the base, of its shape.

    Raises:
        ErasureError: none fits, or only some: how many, and the first that does not.
    """
    modules, misfits, count = components(base), [], 0
    for one in wanted:
        count += 1
        here = find_parameter(modules[one.component], one.name) if one.component in modules else None
        if here is None:
            misfits.append(f"{one.key} belongs to no layer")
        elif tuple(here.shape) != one.shape:
            misfits.append(f"{one.key} is {list(one.shape)} in the file and {list(here.shape)} there")
    if misfits or not count:
        raise ErasureError(
            f"{source.path}: {count - len(misfits)} of its {count} layers fit {base.name}"
            + (f"; the first that does not: {misfits[0]}" if misfits else "")
            + ". Another architecture? --model (model=) names the base it is for. Nothing was written"
        )


def low_rank(source: Source, base: Base, layers: Mapping[str, Mapping[str, tuple[str, Layer]]]) -> LowRank:
    """Factors as a payload, checked against the base.

    Args:
        source: the file.
        base: what it must fit.
        layers: component ("" where a key names none) -> module path -> (key in the file, factors).
    """
    check_fit(source, base, (_factors(*item) for item in _items(layers)))
    return LowRank({name: {path: one[1] for path, one in table.items()} for name, table in layers.items()})


def _items(layers: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str, Any]]:
    return ((component, path, one) for component, table in layers.items() for path, one in table.items())


def _factors(component: str, path: str, one: tuple[str, Layer]) -> Wanted:
    key, (down, up, _) = one
    shape = (*up.shape[:1], *down.shape[1:]) if down.dim() == up.dim() else ()
    return Wanted(key, component or None, f"{path}.weight", shape)


def changes(source: Source, base: Base, weights: Mapping[str, Mapping[str, Tensor]]) -> Delta:
    """Full weights as differences from the base; parameters that do not change are left out.

    A number changes where it differs by more than a cast: a file in half precision of an fp32 base, or the other way
    about, would else differ everywhere.

    Args:
        source: the file.
        base: what it is compared with.
        weights: component ("" where a key names none) -> parameter -> its value in the file.

    Raises:
        ErasureError: the file does not fit, or changes nothing.
    """
    wanted = (Wanted(name, part or None, name, tuple(value.shape)) for part, name, value in _items(weights))
    check_fit(source, base, wanted)
    modules = components(base)
    found: dict[str, dict[str, Tensor]] = {}
    for part, table in weights.items():
        for name, value in table.items():
            parameter = find_parameter(modules[part], name)
            if parameter is None or not value.is_floating_point():
                raise ErasureError(f"{source.path}: {name} is {value.dtype}, not floating point")
            change = _change(parameter.detach().cpu(), value)
            if torch.count_nonzero(change):
                found.setdefault(part, {})[canonical(part, name)] = change
    if not found:
        raise ErasureError(f"{source.path}: the same weights as {base.name}'s: nothing in it was erased")
    return Delta(found)


def _change(here: Tensor, there: Tensor) -> Tensor:
    same = (here.to(there.dtype) == there) | (there.to(here.dtype) == here)
    return torch.where(same, torch.zeros(()), there.float() - here.float())


def make_patch(found: Found, source: Source, base: Base, form: str, concepts: Sequence[str]) -> Patch:
    """The patch of what a reader found, with the fingerprint of `base`.

    Args:
        found: payload and what the file says beside it.
        source: the file.
        base: what it was fitted to.
        form: the format's name, which goes into the config.
        concepts: what it erases, as the user says; else what the file says, else its name.
    """
    payload, modules = found.payload, components(base)
    names = list(concepts) or list(found.concepts) or [_stem(source.path.stem)]
    return Patch(
        payload=payload,
        method=found.method,
        concepts=tuple({"name": name} for name in names),
        base=base.name,
        base_fingerprint={part: fingerprint(modules[part], payload.names(part)) for part in payload.components},
        config={"imported": source.path.name, "format": form},
        gate=dict(found.gate or {"kind": "always"}),
        versions={"torch": version("torch")},
    )


def _stem(stem: str) -> str:
    """The concept in a file's name, as ESD writes it: `esd-Van_Gogh-from-Van_Gogh-esdx`."""
    named = re.fullmatch(r"esd-(.+?)-from-.+", stem)
    return (named[1] if named else stem).replace("_", " ").strip() or "unknown"


def split(key: str, known: Iterable[str]) -> tuple[str, str]:
    """Component and rest of a key, `unet` where none stands in front."""
    head, _, rest = key.partition(".")
    return (head, rest) if head in known and rest else ("unet", key)


def put(source: Source, table: dict[str, Any], name: str, key: str, value: Any) -> None:
    """Put what the file holds under `key` into a table.

    Raises:
        ErasureError: something is there already: the file holds one layer under two spellings.
    """
    if name in table:
        raise ErasureError(f"{source.path}: {name} stands twice, once as {key}. Nothing was written")
    table[name] = value


def rank_of(source: Source, key: str, down: Tensor) -> int:
    """The rank of a layer: rows of its down factor.

    Raises:
        ErasureError: it is a bare number.
    """
    if down.dim() == 0:
        raise ErasureError(f"{source.path}: the down factor of {key} is one number")
    return down.shape[0]


def need_low_rank(patch: Patch) -> LowRank:
    """The factors of a patch that has some.

    Raises:
        ErasureError: it holds differences.
    """
    if not isinstance(patch.payload, LowRank):
        raise ErasureError(
            "holds low-rank patches, and this one holds differences: --rank R (rank=R) cuts them to some"
        )
    return patch.payload


def need_only(patch: Patch, component: str) -> None:
    """Raise an ErasureError where a patch touches anything but one component."""
    if patch.components != [component]:
        raise ErasureError(
            f"holds changes of the {component} alone, and this patch touches {', '.join(patch.components)}"
        )


Reader = Callable[[Source, Base], Found]
Writer = Callable[[Patch, Path], list[str]]
BaseWriter = Callable[[Patch, Path, Base], list[str]]
