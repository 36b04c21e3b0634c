"""Attacks that begin from a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim


@dataclass(frozen=True)
class FromImage(Attack):
    """img2img from the base's own picture of the concept: how much noise does the erasure need?

    A round a strength, from the highest. At low strengths any model gives the picture back, whatever it has
    forgotten: the control, the same without the concept's name, shows how much.
    """

    name: ClassVar[str] = "img2img"
    source: ClassVar[str] = "image-to-image"
    access: ClassVar[str] = "image"

    strengths: tuple[float, ...] = (0.9, 0.75, 0.6)
    named: bool = True

    def rounds(self, victim: Victim, cases: Sequence[Case], safe: set[int], seed: int) -> Iterator[dict[int, Attempt]]:
        """A strength a round."""
        for strength in self.strengths:
            yield {
                i: Attempt(
                    cases[i].prompt if self.named else f"{cases[i].before} {cases[i].after}".strip(), strength=strength
                )
                for i in sorted(safe)
            }

    def control(self, tries: int) -> Attack:
        """Without the name."""
        return FromImage(self.strengths[:tries], named=False)
