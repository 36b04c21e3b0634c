"""Arithmetic of patches: scale, negate, add, subtract, merge. The header of the result records its parents.

A patch is a change D of the weights, so a sum with weights w_i is the change sum_i w_i D_i. Low-rank terms
D_i = s_i U_i V_i (s = alpha / rank) stay low rank: [w_1 s_1 U_1, w_2 s_2 U_2, ..] times [V_1; V_2; ..], of rank
r_1 + r_2 + .. and with an equal alpha. If one of them holds differences, so does the sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.patch.ops.provenance import Part, fingerprints, history, say
from erasure.patch.patch import ALWAYS, Patch
from erasure.patch.payload import Delta, Layer, LowRank

LIBRARIES = ("torch", "safetensors")


def scale(patch: Patch, factor: float) -> Patch:
    """Return the patch with every change multiplied by `factor`; -1 strengthens the concept instead of erasing it.

    Raises:
        ErasureError: `factor` is not a finite number.
    """
    return _descend(patch.scale(factor), "scale", [(patch, factor)])


def negate(patch: Patch) -> Patch:
    """Return the patch that undoes `patch`."""
    return _descend(patch.scale(-1.0), "negate", [(patch, -1.0)])


def add(one: Patch, other: Patch, **options: Any) -> Patch:
    """Add two patches; `options` and errors are those of `merge`."""
    return _combine("add", [(one, 1.0), (other, 1.0)], **options)


def subtract(one: Patch, other: Patch, **options: Any) -> Patch:
    """Subtract the change of `other` from `one`; `options` and errors are those of `merge`."""
    return _combine("subtract", [(one, 1.0), (other, -1.0)], **options)


def merge(parts: Iterable[Part], *, base: Any = None, force: bool = False, drop_gate: bool = False) -> Patch:
    """Merge patches into one, which changes the weights by the weighted sum of all changes.

    A payload that is given twice counts once, with the sum of its weights, so that opposite weights cancel exactly.

    Args:
        parts: pairs (patch, weight), at least one.
        base: the checkpoint that the patches were made from (name, folder or pipeline). It is read only where the
            patches change different layers of a component, for the fingerprint of all of them together. None means
            the checkpoint that the patches name, where that is bundled or a folder.
        force: merge patches of different bases where all shapes agree; the result counts as made from `base`, or else
            from the first patch's base.
        drop_gate: make the result act on every prompt. Without it, patches with different gates are refused.

    Raises:
        ErasureError: no parts, a weight that is not a finite number, different bases, shapes or gates. A latent gate
            would decide on the merged change, which is not the decision of each patch alone.
    """
    return _combine("merge", list(parts), base, force, drop_gate)


def _descend(made: Patch, operation: str, parts: Sequence[Part]) -> Patch:
    return dataclasses.replace(made, config=history(operation, parts))


def _combine(
    operation: str, parts: list[Part], base: Any = None, force: bool = False, drop_gate: bool = False
) -> Patch:
    _check(parts)
    patches = [patch for patch, _ in parts]
    gate = dict(ALWAYS) if drop_gate else _gate(patches)
    payload = _sum(parts)
    prints = fingerprints(patches, payload, base, force)
    kept = [patch for patch, weight in parts if weight > 0] or patches
    concepts: dict[str, Any] = {}
    for patch in kept:
        for concept in patch.concepts:
            concepts.setdefault(str(concept.get("name")), concept)
    return Patch(
        payload=payload,
        method=operation,
        concepts=tuple(concepts.values()),
        base=next((patch.base for patch in patches if patch.base), ""),
        base_fingerprint=prints,
        config=history(operation, parts),
        gate=gate,
        versions={name: version(name) for name in LIBRARIES},
        costs=_costs(patches),
    )


def _check(parts: Any) -> None:
    if not parts:
        raise ErasureError("give at least one patch to merge")
    for part in parts:
        if not isinstance(part, tuple | list) or len(part) != 2 or not isinstance(part[0], Patch):
            raise ErasureError("merge takes pairs of a patch and its weight, such as [(one, 1.0), (other, 0.5)]")
        weight = part[1]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ErasureError(f"a weight is a finite number, not {weight!r}")


def _costs(patches: Sequence[Patch]) -> dict[str, float]:
    """Sum the costs that all patches record."""
    keys = ("F", "B", "seconds")
    return {key: sum(one.costs[key] for one in patches) for key in keys if all(key in one.costs for one in patches)}


def _gate(patches: Sequence[Patch]) -> dict[str, Any]:
    """Return the gate that all patches share.

    Raises:
        ErasureError: their gates differ.
    """
    first = _gate_of(patches[0])
    for patch in patches[1:]:
        if _gate_of(patch) != first:
            raise ErasureError(
                f"gates differ: {say(patches[0])} has {patches[0].gate}, {say(patch)} has {patch.gate}, and one patch "
                "has one gate. Load them side by side instead, each keeps its own; or drop_gate=True (--drop-gate) "
                "makes a patch that acts on every prompt"
            )
    return dict(patches[0].gate)


def _gate_of(patch: Patch) -> Mapping[str, Any]:
    # A text gate without texts compares with the concepts of its own header.
    lean = patch.gate["kind"] == "text" and patch.gate.get("texts") is None
    return {**patch.gate, "concepts": list(patch.concepts)} if lean else patch.gate


def _sum(parts: Sequence[Part]) -> LowRank | Delta:
    weights: dict[str, float] = {}
    for patch, weight in parts:
        weights[patch.payload.digest] = weights.get(patch.payload.digest, 0.0) + weight
    payloads = {patch.payload.digest: patch.payload for patch, _ in parts}
    terms = [(payloads[digest], weight) for digest, weight in weights.items()]
    if len(terms) == 1:
        return terms[0][0].scaled(terms[0][1])
    touched: dict[tuple[str, str], list[tuple[LowRank | Delta, float]]] = {}
    for payload, weight in terms:
        for component in payload.components:
            for name in payload.names(component):
                touched.setdefault((component, name), []).append((payload, weight))
    for (component, name), having in touched.items():
        shapes = {payload.shape(component, name) for payload, _ in having}
        if len(shapes) > 1:
            raise ErasureError(f"{component}.{name} has the shapes {sorted(shapes)}: patches of other architectures")
    low_rank = all(isinstance(payload, LowRank) for payload, _ in terms)
    table: dict[str, dict[str, Any]] = {}
    for (component, name), having in touched.items():
        if low_rank:
            table.setdefault(component, {})[name.removesuffix(".weight")] = _joined(component, name, having)
        else:
            table.setdefault(component, {})[name] = _added(component, name, having)
    return LowRank(table) if low_rank else Delta(table)


def _joined(component: str, name: str, having: Sequence[tuple[Any, float]]) -> Layer:
    layers = [(*payload.layers[component][name.removesuffix(".weight")], weight) for payload, weight in having]
    if len(layers) == 1:
        down, up, alpha, weight = layers[0]
        return down, up * weight, alpha
    downs = torch.cat([down for down, _, _, _ in layers])
    ups = torch.cat([up * (weight * alpha / down.shape[0]) for down, up, alpha, weight in layers], dim=1)
    return downs, ups, float(downs.shape[0])


def _added(component: str, name: str, having: Sequence[tuple[Any, float]]) -> Tensor:
    total = torch.zeros(having[0][0].shape(component, name), dtype=torch.float64)
    for payload, weight in having:
        total += weight * payload.change(component, name).double()
    return total.float()
