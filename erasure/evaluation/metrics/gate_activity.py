"""The gate log of a run: on how many prompts each gated patch acted, and how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from erasure.evaluation.generate import Record
from erasure.evaluation.metrics.target import Target

ALWAYS = "always"  # the gate of a patch that acts on every prompt alike


@dataclass(frozen=True)
class GateActivity:
    """One gated patch on the prompts of one kind.

    Args:
        patch: its name on the pipeline.
        gate: its kind.
        prompts: "target" or "kept"; other words for the target count as the target.
        acts: prompts on which its strength was not 0.
        n: prompts.
        mean: strength over all of them, with the least and the most.
    """

    patch: str
    gate: str
    prompts: str
    acts: int
    n: int
    mean: float
    least: float
    most: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def gate_kinds(loaded: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name -> kind of gate, of those patches that have one."""
    return {name: patch["gate"] for name, patch in loaded.items() if patch.get("gate", ALWAYS) != ALWAYS}


def gate_activity(records: Sequence[Record], target: Target, kinds: Mapping[str, str]) -> list[GateActivity]:
    """What the records say of each gated patch, over all prompts."""
    found = []
    for name, kind in kinds.items():
        for prompts, hit in (("target", True), ("kept", False)):
            values = [r.gates[name] for r in records if name in r.gates and target.matches(r) == hit]
            if values:
                acts = sum(value != 0 for value in values)
                spread = (sum(values) / len(values), min(values), max(values))
                found.append(GateActivity(name, kind, prompts, acts, len(values), *spread))
    return found
