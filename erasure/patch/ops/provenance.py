"""The provenance of a derived patch: its parents, and the base that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from erasure.errors import ErasureError
from erasure.patch.fingerprint import same_base
from erasure.patch.ops.diff import Checkpoint
from erasure.patch.patch import Patch
from erasure.patch.payload import Delta, LowRank

Part = tuple[Patch, float]


def history(operation: str, parts: Sequence[Part], **details: Any) -> dict[str, Any]:
    """Return the config of a derived patch: the operation, and its parents with their own settings."""
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
    """Name a patch for a message: its concepts and its method."""
    return f"{'+'.join(patch.names)!r} ({patch.method})"


def fingerprints(patches: Sequence[Patch], payload: LowRank | Delta, base: Any, force: bool) -> dict[str, str]:
    """Return, by component, the fingerprint of the base tensors that `payload`, made from `patches`, changes.

    Where the payload changes exactly the parameters that each patch changes, it is theirs; otherwise it is computed
    from the base.

    Raises:
        ErasureError: the patches were made from different bases, or do not record their base.
    """
    prints = {}
    checkpoint: Checkpoint | None = None
    for component in payload.components:
        having = [patch for patch in patches if component in patch.components]
        _all_recorded(having, component, force)
        wanted = payload.names(component)
        if all(patch.payload.names(component) == wanted for patch in having):
            found = having[0].base_fingerprint.get(component)
            for patch in having[1:]:
                if not same_base(found or "", patch.base_fingerprint.get(component, "")) and not force:
                    raise _other_base(component, having[0], patch)
        else:
            checkpoint = checkpoint or _base(having, base, force)
            found = _checked_against(checkpoint, having, component, wanted, force) if checkpoint else None
        if found:
            prints[component] = found
    return prints


def _all_recorded(having: Sequence[Patch], component: str, force: bool) -> None:
    for patch in having:
        if component not in patch.base_fingerprint and not force:
            raise ErasureError(
                f"{say(patch)} does not record which {component} it was made from; force=True (--force) trusts it"
            )


def _base(having: Sequence[Patch], base: Any, force: bool) -> Checkpoint | None:
    named = base or next((patch.base for patch in having if Checkpoint.is_near(patch.base)), None)
    if named is not None:
        return Checkpoint.open(named)
    if force:
        return None
    raise ErasureError(
        "the result touches other layers than each of its parents, so its base can be recorded only from the "
        "checkpoint itself: "
        f"give base= (--model), such as {having[0].base or 'the one they were made from'!r}"
    )


def _checked_against(
    checkpoint: Checkpoint, having: Sequence[Patch], component: str, wanted: Sequence[str], force: bool
) -> str:
    for patch in having:
        here = checkpoint.fingerprint(component, patch.payload.names(component))
        if not same_base(patch.base_fingerprint.get(component, ""), here) and not force:
            raise ErasureError(
                f"{say(patch)} was made from {patch.base or 'an unnamed base'}, whose {component} is not that of "
                f"{checkpoint.name}; force=True (--force) merges all the same"
            )
    return checkpoint.fingerprint(component, wanted)


def _other_base(component: str, one: Patch, other: Patch) -> ErasureError:
    first, second = (
        f"{say(patch)} from {patch.base or 'an unnamed base'} "
        f"({patch.base_fingerprint.get(component, 'unrecorded')[:16]})"
        for patch in (one, other)
    )
    return ErasureError(
        f"made from different bases: the {component} of {first}, of {second}; force=True (--force) merges all the same"
    )
