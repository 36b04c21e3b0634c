"""One row of a prompt set."""

from __future__ import annotations

from dataclasses import dataclass, field

REQUIRED = ("id", "prompt", "seed")
FIXED = (*REQUIRED, "guidance")


@dataclass(frozen=True)
class Prompt:
    """One row. `labels` say what the prompt names, such as object and style; `guidance` None is the run's own."""

    id: str
    prompt: str
    seed: int
    guidance: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
