"""The provenance of a patch that was derived from others: its parents, and the base that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from erasure.errors import ErasureError
from erasure.patch.fingerprint import same_base
from erasure.patch.ops.diff import Checkpoint
from erasure.patch.patch import Patch
from erasure.patch.payload import Payload

Part = tuple[Patch, float]  # a patch and its weight


def history(operation: str, parts: Sequence[Part], **details: Any) -> dict[str, Any]:
    """Return the config of a derived patch, which records how it was made.

    Args:
        operation: the name of the operation, such as `merge`.
        parts: the parents with their weights.
        details: further entries, such as the rank.

    Returns:
        "operation", the details, and "parents" with the method, concepts, payload digest, weight, seed and config of
        each.
    """
    parents = [
        {
            "method": patch.method,
            "concepts": patch.names,
            "digest": patch.payload.digest,
            "weight": float(weight),
            "seed": patch.seed,
            "config": dict(patch.config),
        }
        for patch, weight in parts
    ]
    return {"operation": operation, **details, "parents": parents}


def say(patch: Patch) -> str:
    """Return a patch's concepts and method as its name in messages."""
    return f"{'+'.join(patch.names)!r} ({patch.method})"


def fingerprints(patches: Sequence[Patch], payload: Payload, base: Any, force: bool) -> dict[str, str]:
    """Return the fingerprints of the base parameters that a derived payload changes, by component.

    If each patch changes the same parameters as the payload, the patches' own fingerprint is returned. Otherwise it is
    computed from the base checkpoint.

    Args:
        patches: the patches that the payload was made from.
        payload: the derived payload.
        base: the base checkpoint, or None for the one that the patches name.
        force: accept patches with different or missing fingerprints.

    Raises:
        ErasureError: the patches were made from different bases or do not record their base, or the base checkpoint is
            needed and was not given.
    """
    by_component = {}
    checkpoint: Checkpoint | None = None
    for component in payload.components:
        parents = [patch for patch in patches if component in patch.components]
        _check_recorded(parents, component, force)
        names = payload.names(component)
        if all(patch.payload.names(component) == names for patch in parents):
            fingerprint = parents[0].base_fingerprint.get(component)
            for patch in parents[1:]:
                if not same_base(fingerprint or "", patch.base_fingerprint.get(component, "")) and not force:
                    raise _other_base(component, parents[0], patch)
        else:
            checkpoint = checkpoint or _base(parents, base, force)
            fingerprint = _computed(checkpoint, parents, component, names, force) if checkpoint else None
        if fingerprint:
            by_component[component] = fingerprint
    return by_component


def _check_recorded(parents: Sequence[Patch], component: str, force: bool) -> None:
    for patch in parents:
        if component not in patch.base_fingerprint and not force:
            raise ErasureError(
                f"{say(patch)} does not record which {component} it was made from; to combine it anyway, use "
                "force=True (--force)"
            )


def _base(parents: Sequence[Patch], base: Any, force: bool) -> Checkpoint | None:
    named = base or next((patch.base for patch in parents if Checkpoint.is_near(patch.base)), None)
    if named is not None:
        return Checkpoint.open(named)
    if force:
        return None
    raise ErasureError(
        "the result changes other layers than each of its parents, so the fingerprint of its base must be computed "
        f"from the checkpoint: give base= (--model), such as {parents[0].base or 'the one they were made from'!r}"
    )


def _computed(
    checkpoint: Checkpoint, parents: Sequence[Patch], component: str, names: Sequence[str], force: bool
) -> str:
    """Return the fingerprint of parameters of a checkpoint, after comparing the parents' fingerprints with it."""
    for patch in parents:
        actual = checkpoint.fingerprint(component, patch.payload.names(component))
        if not same_base(patch.base_fingerprint.get(component, ""), actual) and not force:
            raise ErasureError(
                f"{say(patch)} was made from {patch.base or 'an unnamed base'}, whose {component} differs from that of "
                f"{checkpoint.name}; to combine them anyway, use force=True (--force)"
            )
    return checkpoint.fingerprint(component, names)


def _other_base(component: str, one: Patch, other: Patch) -> ErasureError:
    first, second = (
        f"{say(patch)} from {patch.base or 'an unnamed base'} "
        f"({patch.base_fingerprint.get(component, 'unrecorded')[:16]})"
        for patch in (one, other)
    )
    return ErasureError(
        f"the patches were made from different bases, {first} and {second}: their {component} differs. To combine them "
        "anyway, use force=True (--force)"
    )
