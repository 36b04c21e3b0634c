"""On how many prompts of a run each gated patch acted, and how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from erasure.evaluation.generate import Record
from erasure.evaluation.metrics.target import Target

ALWAYS = "always"  # the gate of a patch that acts on every prompt alike


@dataclass(frozen=True)
class GateActivity:
    """How one gated patch acted on the prompts of one kind.

    Args:
        patch: name of the patch on the pipeline.
        gate: kind of the gate.
        prompts: "target" or "kept"; prompts with other words for the target count as target prompts.
        acts: number of prompts on which the patch's strength was not 0.
        n: number of prompts.
        mean: mean strength over all of them.
        least: smallest strength.
        most: largest strength.
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
        """Return the fields as plain data."""
        return asdict(self)


def gate_kinds(loaded: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the name and the kind of gate of every patch that has one.

    Args:
        loaded: name -> description of each patch, as `get_list_patches` returns it.
    """
    return {name: patch["gate"] for name, patch in loaded.items() if patch.get("gate", ALWAYS) != ALWAYS}


def gate_activity(records: Sequence[Record], target: Target, kinds: Mapping[str, str]) -> list[GateActivity]:
    """Summarise the gate strengths that the records of a run contain.

    Args:
        records: all records of the run.
        target: what should be erased.
        kinds: name -> kind of gate of each gated patch.

    Returns:
        One entry for each patch and kind of prompt that has records.
    """
    activities = []
    for name, kind in kinds.items():
        for prompts, hit in (("target", True), ("kept", False)):
            strengths = [r.gates[name] for r in records if name in r.gates and target.matches(r) == hit]
            if strengths:
                acts = sum(strength != 0 for strength in strengths)
                summary = (sum(strengths) / len(strengths), min(strengths), max(strengths))
                activities.append(GateActivity(name, kind, prompts, acts, len(strengths), *summary))
    return activities
