"""Arithmetic of patches: scale, negate, add, subtract, merge. The header of the result records its parents.

A patch is a change D of the weights, so the sum of patches with weights w_i is the change sum_i w_i D_i. A sum of
low-rank changes D_i = s_i U_i V_i (s = alpha / rank) is again low-rank: [w_1 s_1 U_1, w_2 s_2 U_2, ..] times
[V_1; V_2; ..], with rank and alpha equal to r_1 + r_2 + ... If one of the patches holds weight differences, so does
the sum.
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
from erasure.patch.payload import Delta, Layer, LowRank, Payload

LIBRARIES = ("torch", "safetensors")


def scale(patch: Patch, factor: float) -> Patch:
    """Return a patch with every change multiplied by a factor.

    Args:
        patch: the patch to scale.
        factor: any finite number; a negative factor strengthens the concept instead of erasing it.

    Raises:
        ErasureError: the factor is not a finite number.
    """
    return _descend(patch.scale(factor), "scale", [(patch, factor)])


def negate(patch: Patch) -> Patch:
    """Return the patch that undoes another patch."""
    return _descend(patch.scale(-1.0), "negate", [(patch, -1.0)])


def add(one: Patch, other: Patch, **options: Any) -> Patch:
    """Return the sum of two patches; `options` and errors are those of `merge`."""
    return _combine("add", [(one, 1.0), (other, 1.0)], **options)


def subtract(one: Patch, other: Patch, **options: Any) -> Patch:
    """Return `one` minus the change of `other`; `options` and errors are those of `merge`."""
    return _combine("subtract", [(one, 1.0), (other, -1.0)], **options)


def merge(parts: Iterable[Part], *, base: Any = None, force: bool = False, drop_gate: bool = False) -> Patch:
    """Return one patch that changes the weights by the weighted sum of the changes of several patches.

    If a payload occurs twice, its weights are added first, so that opposite weights cancel exactly.

    Args:
        parts: pairs (patch, weight), at least one.
        base: the checkpoint that the patches were made from (name, folder or pipeline). It is read only if the patches
            change different layers of a component, to compute the fingerprint of all of them. None means the
            checkpoint that the patches name, if it is bundled or a local folder.
        force: also merge patches that were made from different bases, if all shapes agree. The result is then recorded
            as made from `base`, or else from the base of the first patch.
        drop_gate: give the result no gate, so that it acts on every prompt. Otherwise all patches must have the same
            gate. (A latent gate then decides about the merged change, not about each patch by itself.)

    Raises:
        ErasureError: there are no parts, a weight is not a finite number, or bases, shapes or gates differ.
    """
    return _combine("merge", list(parts), base, force, drop_gate)


def _descend(patch: Patch, operation: str, parts: Sequence[Part]) -> Patch:
    return dataclasses.replace(patch, config=history(operation, parts))


def _combine(
    operation: str, parts: list[Part], base: Any = None, force: bool = False, drop_gate: bool = False
) -> Patch:
    _check(parts)
    patches = [patch for patch, _ in parts]
    gate = dict(ALWAYS) if drop_gate else _gate(patches)
    payload = _sum(parts)
    base_fingerprint = fingerprints(patches, payload, base, force)
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
        base_fingerprint=base_fingerprint,
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
            raise ErasureError("merge needs pairs of a patch and its weight, such as [(first, 1.0), (second, 0.5)]")
        weight = part[1]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ErasureError(f"a weight must be a finite number, not {weight!r}")


def _costs(patches: Sequence[Patch]) -> dict[str, float]:
    """Return the sums of those costs that every patch records."""
    keys = ("F", "B", "seconds")
    return {
        key: sum(patch.costs[key] for patch in patches) for key in keys if all(key in patch.costs for patch in patches)
    }


def _gate(patches: Sequence[Patch]) -> dict[str, Any]:
    """Return the gate that all patches share.

    Raises:
        ErasureError: their gates differ.
    """
    first = _gate_of(patches[0])
    for patch in patches[1:]:
        if _gate_of(patch) != first:
            raise ErasureError(
                f"the gates differ: {say(patches[0])} has {patches[0].gate} and {say(patch)} has {patch.gate}, but a "
                "patch has only one gate. Load the patches together instead, each with its own gate, or make a patch "
                "that acts on every prompt with drop_gate=True (--drop-gate)"
            )
    return dict(patches[0].gate)


def _gate_of(patch: Patch) -> Mapping[str, Any]:
    # A text gate without texts compares prompts with the concepts of the patch, so these are part of the gate.
    implicit = patch.gate["kind"] == "text" and patch.gate.get("texts") is None
    return {**patch.gate, "concepts": list(patch.concepts)} if implicit else patch.gate


def _sum(parts: Sequence[Part]) -> Payload:
    weights: dict[str, float] = {}
    for patch, weight in parts:
        weights[patch.payload.digest] = weights.get(patch.payload.digest, 0.0) + weight
    if len(weights) == 1:
        return parts[0][0].payload.scaled(weights[parts[0][0].payload.digest])
    payloads = {patch.payload.digest: patch.weights for patch, _ in parts}
    terms = [(payloads[digest], weight) for digest, weight in weights.items()]
    terms_of: dict[tuple[str, str], list[tuple[LowRank | Delta, float]]] = {}
    for payload, weight in terms:
        for component in payload.components:
            for name in payload.names(component):
                terms_of.setdefault((component, name), []).append((payload, weight))
    for (component, name), group in terms_of.items():
        shapes = {payload.shape(component, name) for payload, _ in group}
        if len(shapes) > 1:
            raise ErasureError(
                f"{component}.{name} has the shapes {sorted(shapes)}: the patches are for different architectures"
            )
    low_rank = all(isinstance(payload, LowRank) for payload, _ in terms)
    table: dict[str, dict[str, Any]] = {}
    for (component, name), group in terms_of.items():
        if low_rank:
            table.setdefault(component, {})[name.removesuffix(".weight")] = _concatenated(component, name, group)
        else:
            table.setdefault(component, {})[name] = _added(component, name, group)
    return LowRank(table) if low_rank else Delta(table)


def _concatenated(component: str, name: str, terms: Sequence[tuple[Any, float]]) -> Layer:
    layers = [(*payload.layers[component][name.removesuffix(".weight")], weight) for payload, weight in terms]
    if len(layers) == 1:
        down, up, alpha, weight = layers[0]
        return down, up * weight, alpha
    downs = torch.cat([down for down, _, _, _ in layers])
    ups = torch.cat([up * (weight * alpha / down.shape[0]) for down, up, alpha, weight in layers], dim=1)
    return downs, ups, float(downs.shape[0])


def _added(component: str, name: str, terms: Sequence[tuple[Any, float]]) -> Tensor:
    total = torch.zeros(terms[0][0].shape(component, name), dtype=torch.float64)
    for payload, weight in terms:
        total += weight * payload.change(component, name).double()
    return total.float()
