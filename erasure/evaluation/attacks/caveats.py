"""What to know of an attack's figures beside the figures: sentences for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from erasure.evaluation.metrics.gate_activity import gate_kinds


def gating(pipe: Any) -> list[str]:
    """What to know of the gates of patches that act."""
    listed: dict[str, Any] = getattr(pipe, "get_list_patches", dict)()
    return [
        f"{name} has a {kind} gate: it reads attacks by text as any prompt; embeddings it cannot read, so for attacks "
        "by embeddings, as for every search, the patch acts fully"
        for name, kind in gate_kinds({name: entry for name, entry in listed.items() if entry["strength"]}).items()
    ]


def idle(pipe: Any, attacks: Sequence[str]) -> list[str]:
    """What to know where nothing acts, or an attack has nothing to undo: its figures would look like proof."""
    listed: dict[str, Any] = getattr(pipe, "get_list_patches", dict)()
    acting = [entry for entry in listed.values() if entry["strength"]]
    if not acting:
        return ["No patch acts: this is the base, attacked"]
    touched = {name for entry in acting for name in entry["components"]}
    if "encoder" in attacks and not any(name.startswith("text_encoder") for name in touched):
        return ["encoder: the patches leave the text encoder as it is; putting the base's in its place undoes nothing"]
    return []
