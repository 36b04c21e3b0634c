"""Building a patch from the tensors of a published file: whether they fit a base, and what they change in it."""

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
from erasure.formats.published_file import PublishedFile
from erasure.model.base import Base
from erasure.patch import Delta, LowRank, Patch, fingerprint
from erasure.patch.module_keys import COMPONENTS, NETWORKS, canonical, find_parameter
from erasure.patch.payload import Layer


@dataclass(frozen=True)
class ImportedPayload:
    """The content of a published file as the reader of its format understands it.

    Args:
        payload: the change of the weights.
        method: the method that made it, if the format implies one.
        concepts: names of the erased concepts, if the file records them.
        gate: settings of the gate, if the file has one; None stands for `always`.
    """

    payload: LowRank | Delta
    method: str = "unknown"
    concepts: Sequence[str] = ()
    gate: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TensorTarget:
    """A tensor of a file and the parameter of the base that it belongs to.

    Args:
        key: name of the tensor in the file.
        component: component of the parameter, or None if the key matches none.
        name: name of the parameter.
        shape: shape that the parameter must have.
    """

    key: str
    component: str | None
    name: str
    shape: tuple[int, ...]


def components(base: Base) -> dict[str, nn.Module]:
    """Return the components of a base that patches may change, by name.

    Args:
        base: the base; components that its pipeline lacks are left out.
    """
    modules = {name: getattr(base.pipe, name, None) for name in COMPONENTS}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Module)}


def check_fit(source: PublishedFile, base: Base, targets: Iterable[TensorTarget]) -> None:
    """Check that the base has a parameter of the right shape for every tensor of a file.

    Args:
        source: the file, for the message.
        base: the base.
        targets: the tensors and the parameters that they belong to.

    Raises:
        ErasureError: at least one tensor does not fit, or there is none. The message says how many fit and which one is
            the first that does not.
    """
    modules, misfits, count = components(base), [], 0
    for target in targets:
        count += 1
        parameter = find_parameter(modules[target.component], target.name) if target.component in modules else None
        if parameter is None:
            misfits.append(f"{target.key} matches no layer")
        elif tuple(parameter.shape) != target.shape:
            misfits.append(
                f"{target.key} has shape {list(target.shape)} in the file and {list(parameter.shape)} in the base"
            )
    if misfits or not count:
        raise ErasureError(
            f"{source.path}: {count - len(misfits)} of {count} layers fit the base {base.name}"
            + (f" (first misfit: {misfits[0]})" if misfits else "")
            + ". Is the file for another architecture? Choose its base with --model (model=). Nothing was written"
        )


def low_rank(source: PublishedFile, base: Base, layers: Mapping[str, Mapping[str, tuple[str, Layer]]]) -> LowRank:
    """Build a low-rank payload, and check that it fits the base.

    Args:
        source: the file, for messages.
        base: the base.
        layers: component ("" for keys that match none) -> module path -> (key in the file, factors).

    Raises:
        ErasureError: a layer does not fit the base.
    """
    check_fit(source, base, (_layer_target(*entry) for entry in _entries(layers)))
    return LowRank({name: {path: layer for path, (_, layer) in table.items()} for name, table in layers.items()})


def _entries(tables: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str, Any]]:
    return ((component, name, value) for component, table in tables.items() for name, value in table.items())


def _layer_target(component: str, path: str, entry: tuple[str, Layer]) -> TensorTarget:
    key, (down, up, _) = entry
    shape = (*up.shape[:1], *down.shape[1:]) if down.dim() == up.dim() else ()
    return TensorTarget(key, component or None, f"{path}.weight", shape)


def changes(source: PublishedFile, base: Base, weights: Mapping[str, Mapping[str, Tensor]]) -> Delta:
    """Convert full weights to differences from the base, without the parameters that do not change.

    A number counts as changed only if it differs by more than a cast of one dtype to the other does; otherwise a
    half-precision file of an fp32 base, or the reverse, would differ everywhere.

    Args:
        source: the file, for messages.
        base: the base that the weights are compared with.
        weights: component ("" for keys that match none) -> parameter -> its value in the file.

    Raises:
        ErasureError: a weight does not fit the base or is not floating point, or no weight changes.
    """
    targets = (TensorTarget(name, part or None, name, tuple(value.shape)) for part, name, value in _entries(weights))
    check_fit(source, base, targets)
    modules = components(base)
    deltas: dict[str, dict[str, Tensor]] = {}
    for part, name, value in _entries(weights):
        parameter = find_parameter(modules[part], name)
        if parameter is None or not value.is_floating_point():
            raise ErasureError(f"{source.path}: {name} has dtype {value.dtype}, not a floating-point one")
        difference = _difference(parameter.detach().cpu(), value)
        if torch.count_nonzero(difference):
            deltas.setdefault(part, {})[canonical(part, name)] = difference
    if not deltas:
        raise ErasureError(f"{source.path} has the same weights as the base {base.name}, so nothing was erased in it")
    return Delta(deltas)


def _difference(base: Tensor, value: Tensor) -> Tensor:
    same = (base.to(value.dtype) == value) | (value.to(base.dtype) == base)
    return torch.where(same, torch.zeros(()), value.float() - base.float())


def make_patch(
    imported: ImportedPayload, source: PublishedFile, base: Base, form: str, concepts: Sequence[str]
) -> Patch:
    """Build the patch of an imported payload, with the fingerprint of the base.

    Args:
        imported: what the reader returned.
        source: the file.
        base: the base that the payload was fitted to.
        form: name of the format, recorded in the config.
        concepts: names of the erased concepts; if empty, those that the file records, else the name of the file.
    """
    payload, modules = imported.payload, components(base)
    names = list(concepts) or list(imported.concepts) or [_concept_in_name(source.path.stem)]
    return Patch(
        payload=payload,
        method=imported.method,
        concepts=tuple({"name": name} for name in names),
        base=base.name,
        base_fingerprint={part: fingerprint(modules[part], payload.names(part)) for part in payload.components},
        config={"imported": source.path.name, "format": form},
        gate=dict(imported.gate or {"kind": "always"}),
        versions={"torch": version("torch")},
    )


def _concept_in_name(stem: str) -> str:
    """Return the concept in the name of a file, which ESD calls `esd-Van_Gogh-from-Van_Gogh-esdx`."""
    match = re.fullmatch(r"esd-(.+?)-from-.+", stem)
    return (match[1] if match else stem).replace("_", " ").strip() or "unknown"


def network_of(base: Base) -> str:
    """Return the component of a base that denoises: `unet` or `transformer`."""
    return next((name for name in NETWORKS if name in components(base)), NETWORKS[0])


def split(key: str, names: Iterable[str], network: str = NETWORKS[0]) -> tuple[str, str]:
    """Split a key into its component and the remainder.

    Args:
        key: key of a tensor, such as `text_encoder.encoder.layers.0`.
        names: names of the components.
        network: the component that a key without one belongs to.
    """
    head, _, remainder = key.partition(".")
    return (head, remainder) if head in names and remainder else (network, key)


def put(source: PublishedFile, table: dict[str, Any], name: str, key: str, value: Any) -> None:
    """Add the content of one key of a file to a table.

    Args:
        source: the file, for the message.
        table: the table that is added to.
        name: name in the table.
        key: key in the file.
        value: what the file holds under `key`.

    Raises:
        ErasureError: the table has the name already, so the file holds one layer under two keys.
    """
    if name in table:
        raise ErasureError(f"{source.path} holds {name} twice, the second time as {key}. Nothing was written")
    table[name] = value


def rank_of(source: PublishedFile, key: str, down: Tensor) -> int:
    """Return the rank of a layer: the number of rows of its down factor.

    Args:
        source: the file, for the message.
        key: key of the layer, for the message.
        down: the factor [rank, ...].

    Raises:
        ErasureError: the factor is a single number.
    """
    if down.dim() == 0:
        raise ErasureError(f"{source.path}: the down factor of {key} is a single number, not a matrix")
    return down.shape[0]


Reader = Callable[[PublishedFile, Base], ImportedPayload]
Writer = Callable[[Patch, Path], list[str]]
BaseWriter = Callable[[Patch, Path, Base], list[str]]
