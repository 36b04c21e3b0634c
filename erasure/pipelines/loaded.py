"""A patch as it is on a stack, and checks of the names and strengths that callers give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from erasure.errors import ErasureError
from erasure.patch import Patch
from erasure.pipelines.gates.latent import LatentGate
from erasure.pipelines.gates.text import TextGate


@dataclass(frozen=True)
class Loaded:
    """A patch on the stack with its strength and its gate.

    Args:
        patch: the patch.
        strength: factor on its change.
        gate: its gate, or None if it acts on every prompt alike.
    """

    patch: Patch
    strength: float
    gate: TextGate | LatentGate | None

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
        raise ErasureError(f"a patch named {name!r} is already loaded. Loaded patches: {', '.join(taken)}")
    return name


def checked_strength(strength: Any) -> float:
    """Return a strength as a float.

    Raises:
        ErasureError: it is not a finite number.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ErasureError(f"a strength must be a finite number, not {strength!r}")
    return float(strength)
