"""Caveats for the figures of an attack, as sentences for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from erasure.evaluation.metrics.gate_activity import gate_kinds
from erasure.patch import Guard


def gating(pipe: Any) -> list[str]:
    """Return one sentence for each active guard and each patch with a gate: what the attacks face of it."""
    patches: dict[str, Any] = getattr(pipe, "get_list_patches", dict)()
    active = {name: entry for name, entry in patches.items() if entry["strength"]}
    guards = [name for name, entry in active.items() if entry.get("kind") == Guard.kind]
    sentences = [
        f"{name} is a guard, which acts in calls of the pipeline alone. A search outside of them faces the model "
        "without it, and only the pictures of what it finds are drawn with it: a search with the guard may find more"
        for name in guards
    ]
    return sentences + [
        f"{name} has a {kind} gate, which reads the prompts of text attacks as it reads any prompt. It cannot read "
        "embeddings, so the patch acts at full strength during every search and in attacks that pass embeddings"
        for name, kind in gate_kinds(active).items()
        if name not in guards
    ]


def idle(pipe: Any, attacks: Sequence[str]) -> list[str]:
    """Return a sentence if no patch is active or an attack has nothing to undo.

    Without it, such figures would look like evidence for or against the erasure.

    Args:
        pipe: the pipeline under attack.
        attacks: names of the attacks that run.
    """
    patches: dict[str, Any] = getattr(pipe, "get_list_patches", dict)()
    active = [entry for entry in patches.values() if entry["strength"]]
    if not active:
        return ["No patch is active: these figures attack the base model"]
    components = {name for entry in active for name in entry["components"]}
    if "encoder" in attacks and not any(name.startswith("text_encoder") for name in components):
        return ["encoder: no active patch changes the text encoder, so swapping in the base's encoder undoes nothing"]
    return []
