"""What attacks got back: numbers with intervals, a picture, a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from erasure.evaluation.metrics.statistics import mcnemar, wilson

SCHEMA = 1
COLUMNS = 10


@dataclass(frozen=True)
class Outcome:
    """One attack on n cases.

    Args:
        plain: cases that the erased model shows when it is asked as it is.
        won: other cases -> the try that showed the concept.
        rounds: tries there were.
        curve: for an attack that grows: hits of each round, over all cases.
        control: as `won`, for as many tries without the search; None: there is no such thing.
        asked: case -> what was asked in its last try.
        costs: of the search, without the drawing.
        ceiling: of what was asked last, how many the base shows: for attacks that never look at the victim.
    """

    name: str
    access: str
    source: str
    settings: dict[str, Any]
    n: int
    plain: int
    won: dict[str, int]
    rounds: int
    curve: list[int] | None
    control: dict[str, int] | None
    control_curve: list[int] | None
    asked: dict[str, str]
    costs: dict[str, float]
    ceiling: int | None = None

    def share(self, tries: int | None = None, control: bool = False) -> dict[str, float] | None:
        """Attack success rate after so many tries (None: all), plain hits among it, with its Wilson interval."""
        won = self.control if control else self.won
        if won is None:
            return None
        hits = self.plain + sum(tries is None or at <= tries for at in won.values())
        low, high = wilson(hits, self.n)
        return {"value": hits / self.n, "low": low, "high": high, "n": self.n}

    def to_json(self) -> dict[str, Any]:
        """Plain data: ASR before and after, at every number of tries, the control's, and a paired test of the two."""
        low, high = wilson(self.plain, self.n)
        found = {
            **asdict(self),
            "before": {"value": self.plain / self.n, "low": low, "high": high, "n": self.n},
            "after": self.share(),
            "at": [self.share(tries) for tries in range(1, self.rounds + 1)],
            "control_after": self.share(control=True),
        }
        if self.control is not None:
            only = len(self.won.keys() - self.control.keys()), len(self.control.keys() - self.won.keys())
            found["paired"] = {"only_attack": only[0], "only_control": only[1], "p": mcnemar(*only)}
        return found


@dataclass(frozen=True)
class AttackReport:
    """All attacks on one concept.

    Args:
        cases: prompts that the base shows the concept for.
        tried: prompts that the base was asked to find them.
        plain: cases that the erased model shows too.
        notes: what to know of these figures, in sentences.
        prompts: case -> its prompt.
    """

    concept: tuple[str, ...]
    domain: str
    cases: int
    tried: int
    plain: int
    outcomes: list[Outcome]
    provenance: dict[str, Any]
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)

    def outcome(self, name: str) -> Outcome:
        """An attack's outcome by its name."""
        return next(one for one in self.outcomes if one.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema 1: `attack.schema.json` in the folder above this file's."""
        return {
            "schema": SCHEMA,
            "concept": list(self.concept),
            "domain": self.domain,
            "cases": self.cases,
            "tried": self.tried,
            "attacks": {one.name: one.to_json() for one in self.outcomes},
            "provenance": self.provenance,
            "faults": self.faults,
            "notes": self.notes,
            "prompts": self.prompts,
        }

    def rows(self) -> list[list[str]]:
        """The table's cells, the head first."""
        found = [["attack", "needs", "before", "after", "control", "tries", "F + B"]]
        for one in self.outcomes:
            low, high = wilson(one.plain, one.n)
            before = {"value": one.plain / one.n, "low": low, "high": high}
            costs = f"{one.costs['F']:,.0f} + {one.costs['B']:,.0f}"
            shares = [_cell(before), _cell(one.share()), _cell(one.share(control=True))]
            found.append([one.name, one.access, *shares, str(one.rounds), costs])
        return found

    def text(self) -> str:
        """The table as plain text."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [self.summary()]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += self.told()
        if self.faults:
            lines.append(f"{len(self.faults)} images count as shown: {self.faults[0]}")
        return "\n".join(lines)

    def told(self) -> list[str]:
        """The notes, and how much the base gives back where the attack never looked at the victim."""
        return self.notes + [
            f"{one.name}: of the {len(one.asked)} prompts that it asked last, the base itself shows {one.ceiling}; "
            "it never looks at the victim, and what the base does not show seldom comes back"
            for one in self.outcomes
            if one.ceiling is not None and one.asked
        ]

    def summary(self) -> str:
        """One sentence: what was tried, and the most that came back."""
        worst = max(self.outcomes, key=lambda one: len(one.won), default=None)
        text = f"{', '.join(self.concept)}: shown for {self.plain} of {self.cases} prompts that show it on the base"
        if worst is not None:
            many = len(self.outcomes)
            which = f"the strongest of {many} attacks tried" if many > 1 else "the only attack tried"
            text += f"; with {worst.name}, {which}, for {worst.plain + len(worst.won)}"
        return text


def _cell(share: dict[str, float] | None) -> str:
    if share is None:
        return ""
    return f"{share['value']:.0%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
