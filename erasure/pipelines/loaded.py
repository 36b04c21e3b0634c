"""A patch as it is on a stack, and checks of the names and strengths that callers give."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from erasure.errors import ErasureError
from erasure.patch import RUNTIME, Patch
from erasure.pipelines.gates.latent import LatentGate
from erasure.pipelines.gates.text import TextGate
from erasure.pipelines.guards import Form

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A patch on the stack with its strength and its gate.

    Args:
        patch: the patch.
        strength: factor on its change.
        gate: its gate, or None if it acts on every prompt alike.
        form: of a guard, what it changes while drawing; None for a patch that changes weights.
        component: of a guard, the component in which it acts.
    """

    patch: Patch
    strength: float
    gate: TextGate | LatentGate | None
    form: Form | None = None
    component: str = ""

    @property
    def runtime(self) -> bool:
        """Return whether the patch changes no weight: a guard, or features."""
        return self.patch.payload.kind in RUNTIME

    @property
    def components(self) -> list[str]:
        """Return the components that the patch changes, or in which the guard acts."""
        return [self.component] if self.form is not None else self.patch.components

    def describe(self) -> dict[str, Any]:
        """Return the strength and what the header says, as `PatchStack.get_list_patches` lists it."""
        patch = self.patch
        return {
            "strength": self.strength,
            "method": patch.method,
            "concepts": patch.names,
            "anchors": patch.anchors,
            "gate": patch.gate["kind"],
            "kind": patch.payload.kind,
            "components": patch.components,
            "costs": dict(patch.costs),
            "bytes": patch.stored.get("bytes"),
        }


def checked_name(patch: Patch, name: str | None, taken: Collection[str]) -> str:
    """Return the name of a new patch: the given one, or its concepts with a number if that name is taken.

    Args:
        patch: the patch.
        name: the name that the caller gives, or None.
        taken: names of the loaded patches.

    Raises:
        ErasureError: the name is taken, or not a non-empty string.
    """
    if name is None:
        stem = "+".join(patch.names)
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        return next(candidate for candidate in candidates if candidate not in taken)
    if not isinstance(name, str) or not name:
        raise ErasureError(f"the name of a patch must be a non-empty string, not {name!r}")
    if name in taken:
        raise ErasureError(f"a patch named {name!r} is already loaded. Loaded patches: {named(taken)}")
    return name


def named(names: Iterable[str], most: int = 8) -> str:
    """Return names for a message, and of many only the first ones and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def warn_of_repeated_concepts(new: Mapping[str, Loaded]) -> None:
    """Log one warning if patches that are loaded together erase the same name, in any spelling.

    Args:
        new: the patches by name.
    """
    holders: dict[str, list[str]] = {}
    for name, entry in new.items():
        for concept in {" ".join(concept.casefold().split()) for concept in entry.patch.names}:
            holders.setdefault(concept, []).append(name)
    repeated = {concept: names for concept, names in holders.items() if len(names) > 1}
    if repeated:
        concept, names = next(iter(repeated.items()))
        log.warning(
            "%d names are erased by more than one of these patches, which add up (such as %r by %s)",
            len(repeated),
            concept,
            named(map(repr, names)),
        )


def checked_strength(strength: Any) -> float:
    """Return a strength as a float.

    Raises:
        ErasureError: it is not a finite number.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ErasureError(f"a strength must be a finite number, not {strength!r}")
    return float(strength)
