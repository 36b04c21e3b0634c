"""Caveats for the figures of an attack, as sentences for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from erasure.evaluation.attacks.attack import Attack
from erasure.evaluation.metrics.gate_activity import gate_kinds
from erasure.patch import RUNTIME, Features, Guard
from erasure.pipelines.stack import patch_stack

KINDS = {Guard.kind: "is a guard", Features.kind: "holds features that are switched off"}


def gating(pipe: Any) -> list[str]:
    """Return one sentence for each active patch that changes no weight or has a gate: what the attacks face."""
    patches: dict[str, Any] = getattr(pipe, "get_list_patches", dict)()
    active = {name: entry for name, entry in patches.items() if entry["strength"]}
    guards = [name for name, entry in active.items() if entry.get("kind") in RUNTIME]
    sentences = [
        f"{name} {KINDS[active[name]['kind']]}: searches face it at full strength, and pictures as the pipeline draws "
        "them. Who holds the weights draws without it, which these figures say nothing of"
        for name in guards
    ]
    return sentences + [
        f"{name} has a {kind} gate, which reads the prompts of text attacks as it reads any prompt. It cannot read "
        "embeddings, so the patch acts at full strength during every search and in attacks that pass embeddings"
        for name, kind in gate_kinds(active).items()
        if name not in guards
    ]


def unsuited(pipe: Any, attack: type[Attack]) -> str:
    """Return why an attack has no meaning against the active patches; an empty string where it has.

    Args:
        pipe: the pipeline under attack.
        attack: the class of the attack.
    """
    patches: dict[str, Any] = getattr(pipe, "get_list_patches", dict)()
    active = {name: entry for name, entry in patches.items() if entry["strength"]}
    if attack.UNDOES and active and all(entry["kind"] in RUNTIME for entry in active.values()):
        return f"{attack.name} undoes a change of weights, and {', '.join(active)} changes none"
    readers = patch_stack(pipe).readers if active else []
    if attack.EMBEDS and readers:
        return (
            f"{attack.name} passes embeddings, and {', '.join(readers)} reads the words of the prompt: the pipeline "
            "refuses embeddings without them"
        )
    return ""


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
