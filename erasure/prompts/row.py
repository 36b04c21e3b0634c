"""One row of a prompt set: a prompt, its seed and its labels."""

from __future__ import annotations

from dataclasses import dataclass, field

REQUIRED = ("id", "prompt", "seed")
FIXED = (*REQUIRED, "guidance")


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt set, from which one image is drawn.

    Args:
        id: name of the row, unique in its set; images are stored under it.
        prompt: the text.
        seed: seed of the initial noise.
        guidance: classifier-free guidance scale, or None for the scale of the run.
        labels: what the image should show, by head of the judge (`object`, `style`), and other facts about the row,
            such as its `role`.
    """

    id: str
    prompt: str
    seed: int
    guidance: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
