"""Results of attacks: success rates with intervals, a paired test against the control, and the report as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from erasure.evaluation.metrics.statistics import mcnemar, wilson

SCHEMA = 1
COLUMNS = 10  # cases that the grid of images shows


@dataclass(frozen=True)
class Outcome:
    """The result of one attack on n cases.

    Args:
        name: name of the attack.
        access: what the attacker needs, such as text or weights.
        source: the paper, or a short description.
        settings: the attack's settings, and what was derived from them.
        n: number of cases.
        plain: number of cases that the erased model shows for the unchanged prompt.
        won: id of a case -> number of the try that first showed the concept; cases counted in `plain` are left out.
        rounds: number of tries.
        curve: hits per round over all cases, for attacks that attempt every case in every round; otherwise None.
        control: as `won`, for equally many tries without the search; None if the attack is a control itself.
        control_curve: as `curve`, for the control.
        asked: id of a case -> the prompt, or a description, of its last try.
        costs: samples forward (F) and backward (B) through the UNet and seconds of the search, without the
            generation of images.
        base: as `won`, for the same tries on the base, if the attack is also run there; otherwise None.
        tries: "attack", "control" or "base" -> id of a case -> whether each of its tries showed the concept. Tries end
            with the first success, unless every case is attempted in every round.
        adapted: setting -> value of the full budget, for the settings in which the run differs from it.
        ceiling: for attacks that never query the erased model, the number of last tries for which the base model
            shows the concept; otherwise None.
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
    base: dict[str, int] | None = None
    adapted: dict[str, Any] = field(default_factory=dict)
    tries: dict[str, dict[str, list[bool]]] = field(default_factory=dict)

    def budget(self) -> str:
        """Return one sentence on how the budget was adapted, or nothing if it was the full one."""
        return budget_note(self.name, self.settings, self.adapted)

    def share(self, tries: int | None = None, control: bool = False) -> dict[str, float] | None:
        """Return the attack success rate with its 95 % Wilson interval, or None if there is no control.

        Cases that the unchanged prompt recovers count as successes.

        Args:
            tries: count successes within that many tries; None counts all tries.
            control: return the control's success rate.
        """
        won = self.control if control else self.won
        if won is None:
            return None
        return _rate(self.plain + sum(tries is None or number <= tries for number in won.values()), self.n)

    def to_json(self) -> dict[str, Any]:
        """Return plain data: the fields and the success rates derived from them.

        The rates are given before and after the attack, after each number of tries, and for the control, together
        with McNemar's exact test of the attack against its control.
        """
        data = {
            **asdict(self),
            "before": _rate(self.plain, self.n),
            "after": self.share(),
            "at": [self.share(tries) for tries in range(1, self.rounds + 1)],
            "control_after": self.share(control=True),
            "base_after": None if self.base is None else _rate(self.plain + len(self.base), self.n),
        }
        if self.control is not None:
            only = len(self.won.keys() - self.control.keys()), len(self.control.keys() - self.won.keys())
            data["paired"] = {"only_attack": only[0], "only_control": only[1], "p": mcnemar(*only)}
        return data


@dataclass(frozen=True)
class AttackReport:
    """The results of all attacks on one concept.

    Args:
        concept: labels that count as the concept.
        domain: head of the judge that the labels belong to, such as object or style.
        cases: number of prompts for which the base model shows the concept, and which are attacked.
        tried: number of prompts that the base model was given to find the cases.
        plain: number of cases that the erased model shows for the unchanged prompt.
        outcomes: one result per attack.
        provenance: what the results depend on: pipeline, sampling settings, cases, judge and seed.
        faults: one message for each image that the judge failed on; such an image counts as showing the concept.
        notes: caveats for these figures, one sentence each.
        prompts: id of a case -> its prompt.
        plain_ids: ids of the cases counted in `plain`.
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
    plain_ids: tuple[str, ...] = ()

    def outcome(self, name: str) -> Outcome:
        """Return the result of the attack called `name`; raises StopIteration if it was not run."""
        return next(outcome for outcome in self.outcomes if outcome.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return plain data of schema 1, as described by evaluation/report/attack.schema.json."""
        return {
            "schema": SCHEMA,
            "concept": list(self.concept),
            "domain": self.domain,
            "cases": self.cases,
            "tried": self.tried,
            "attacks": {outcome.name: outcome.to_json() for outcome in self.outcomes},
            "provenance": self.provenance,
            "faults": self.faults,
            "notes": self.notes,
            "prompts": self.prompts,
            "plain_ids": list(self.plain_ids),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttackReport:
        """Return the report that `to_json` wrote; what is derived from the outcomes is derived again.

        Raises:
            KeyError: a field is missing.
        """
        names = [one.name for one in fields(Outcome)]
        outcomes = [Outcome(**{name: stored[name] for name in names}) for stored in data["attacks"].values()]
        own = {name: data[name] for name in ("domain", "cases", "tried", "provenance", "faults", "notes", "prompts")}
        plain_ids = tuple(data["plain_ids"])
        return cls(tuple(data["concept"]), plain=len(plain_ids), outcomes=outcomes, plain_ids=plain_ids, **own)

    def rows(self) -> list[list[str]]:
        """Return the cells of the table of attacks, its heading first."""
        rows = [["attack", "needs", "before", "after", "control", "tries", "F + B"]]
        for outcome in self.outcomes:
            costs = f"{outcome.costs['F']:,.0f} + {outcome.costs['B']:,.0f}"
            before = _rate(outcome.plain, outcome.n)
            shares = [_cell(before), _cell(outcome.share()), _cell(outcome.share(control=True))]
            rows.append([outcome.name, outcome.access, *shares, str(outcome.rounds), costs])
        return rows

    def text(self) -> str:
        """Return the report as plain text: the summary, the table, the caveats and the judge's faults."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [self.summary()]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += self.caveats()
        if self.faults:
            lines.append(
                f"{len(self.faults)} images could not be judged and count as showing the concept: {self.faults[0]}"
            )
        return "\n".join(lines)

    def caveats(self) -> list[str]:
        """Return the notes, how budgets were adapted, and what the base shows for blind attacks and probes."""
        adapted = [outcome.budget() for outcome in self.outcomes if outcome.adapted]
        blind = [
            f"{outcome.name}: the base model shows the concept for {outcome.ceiling} of the {len(outcome.asked)} "
            "prompts tried last. This attack never queries the erased model, which seldom shows what the base does not"
            for outcome in self.outcomes
            if outcome.ceiling is not None and outcome.asked
        ]
        on_base = [
            f"{outcome.name}: with the same tries, the base model shows the concept for "
            f"{outcome.plain + len(outcome.base)} of {outcome.n} prompts, and the erased model for "
            f"{outcome.plain + len(outcome.control or ())} with random prompts"
            for outcome in self.outcomes
            if outcome.base is not None
        ]
        return self.notes + adapted + blind + on_base

    def summary(self) -> str:
        """Return one sentence: how often the concept is shown without an attack and with the strongest one."""
        strongest = max(self.outcomes, key=lambda outcome: len(outcome.won), default=None)
        text = (
            f"{', '.join(self.concept)}: the erased model shows it for {self.plain} of {self.cases} prompts for which "
            "the base model does"
        )
        if strongest is not None:
            count = len(self.outcomes)
            rank = f"the strongest of {count} attacks" if count > 1 else "the only attack"
            text += f"; with {strongest.name}, {rank} tried, for {strongest.plain + len(strongest.won)}"
        return text


def _rate(hits: int, n: int) -> dict[str, float]:
    """Return a share of n cases with its 95 % Wilson interval."""
    low, high = wilson(hits, n)
    return {"value": hits / n, "low": low, "high": high, "n": n}


def budget_note(name: str, settings: Mapping[str, Any], adapted: Mapping[str, Any]) -> str:
    """Return one sentence on how the budget of an attack was adapted, or nothing if it was the full one.

    Args:
        name: name of the attack.
        settings: the settings that it ran with.
        adapted: setting -> value of the full budget, for the settings that differ from it.
    """
    changes = [f"{key} {_shown(settings[key])} (full: {_shown(value)})" for key, value in adapted.items()]
    return f"{name} ran an adapted budget: {', '.join(changes)}" if changes else ""


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_shown, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _cell(share: dict[str, float] | None) -> str:
    if share is None:
        return ""
    return f"{share['value']:.0%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
