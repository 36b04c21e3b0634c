"""Attack success rates of several methods on several concepts: pooled, by number of tries, and compared in pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from erasure.benchmark.comparison import Comparison, compare, differences
from erasure.benchmark.row import Row
from erasure.errors import ErasureError
from erasure.evaluation.attacks.report import AttackReport, Outcome
from erasure.evaluation.metrics.metric import format_estimate, share_metric

Key = tuple[str, str]  # name of a method, name of a concept
WHICH = ("before", "after", "control")


@dataclass(frozen=True)
class AttackTable:
    """The attack reports of several methods, each on several concepts, all with the same attacks and budget.

    Args:
        reports: (method, concept) -> the report of the attacks on that patch.
        budget: `lite` or `full`.
    """

    reports: Mapping[Key, AttackReport]
    budget: str

    @classmethod
    def from_json(cls, path: Path, budget: str) -> AttackTable:
        """Return the table that an earlier run wrote as JSON.

        Raises:
            ErasureError: the file is not such a table, or has another budget.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            reports = {
                (method, concept): AttackReport.from_json(report)
                for key, report in data["reports"].items()
                for method, concept in [key.split("/", 1)]
            }
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise ErasureError(f"{path}: not a table of bench/attack.py (attack.json): {fault}") from None
        if data.get("budget") != budget:
            raise ErasureError(
                f"{path} was measured with the budget {data.get('budget')}, not {budget}: rates of both in one table "
                "would not be comparable"
            )
        return cls(reports, budget)

    @property
    def attacks(self) -> list[str]:
        """Return the names of the attacks, in the order of the reports."""
        return list(dict.fromkeys(outcome.name for report in self.reports.values() for outcome in report.outcomes))

    @property
    def methods(self) -> list[str]:
        """Return the names of the methods, in the order of the reports."""
        return list(dict.fromkeys(method for method, _ in self.reports))

    def rate(self, method: str, attack: str, which: str = "after", tries: int | None = None) -> dict[str, Any]:
        """Return an attack success rate over the prompts of all concepts, with its 95 % interval.

        Prompts that the unchanged text recovers count as recovered. The interval takes the pictures of one prompt as
        alike (`statistics.effective_size`).

        Args:
            method: name of the method.
            attack: name of the attack.
            which: `before` (the unchanged prompts), `after` (the attack) or `control` (as many tries without a search).
            tries: count successes within that many tries; None counts all tries.

        Returns:
            `value`, `low`, `high` and `n`; empty if nothing was measured.
        """
        found = [
            (concept, report.prompts[key], hit)
            for (name, concept), report in self.reports.items()
            for outcome in report.outcomes
            if (name, outcome.name) == (method, attack)
            for key, hit in recovered(report, outcome, which, tries).items()
        ]
        marks, groups = [hit for _, _, hit in found], [(concept, prompt) for concept, prompt, _ in found]
        metric = share_metric("ASR", marks, False, "", groups)
        if metric is None:
            return {}
        return {"value": metric.value, "low": metric.low, "high": metric.high, "n": metric.n}

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Return the methods compared in pairs on the prompts that both were attacked with, attack by attack."""
        rows = []
        for (method, concept), report in self.reports.items():
            outcomes = {one.name: recovered(report, one) for one in report.outcomes}
            rows.append(Row(method, concept, "object", False, {}, {}, 0, outcomes))
        prompts = {key: text for report in self.reports.values() for key, text in report.prompts.items()}
        return compare(rows, prompts, self.attacks, (), self.attacks)

    def markdown(self) -> str:
        """Return the note, the pooled table, the table by tries, the significant differences and a row each patch."""
        together = [["method", "attack", "concepts", "prompts", *WHICH]]
        by_tries = [["method", "attack", *(f"within {k}" for k in range(1, self._most + 1))]]
        for method in self.methods:
            for attack in self.attacks:
                if not (after := self.rate(method, attack)):
                    continue
                reports = [r for (name, _), r in self.reports.items() if name == method]
                outcomes = [one for report in reports for one in report.outcomes if one.name == attack]
                cells = [self._cell(method, attack, which) for which in WHICH]
                together.append([method, attack, str(len(outcomes)), str(after["n"]), *cells])
                rounds = max(one.rounds for one in outcomes)
                shares = [f"{self.rate(method, attack, tries=k)['value']:.0%}" for k in range(1, rounds + 1)]
                by_tries.append([method, attack, *shares, *[""] * (self._most - rounds)])
        head = next(iter(self.reports.values())).rows()[0]
        separate = [["method", "concept", *head]]
        separate += [[*key, *row] for key, report in self.reports.items() for row in report.rows()[1:]]
        note = (
            "Attack success rates over prompts for which the base model shows the concept, with 95 % intervals; "
            f"budget {self.budget}{', adapted to a CPU' if self.budget == 'lite' else ', as published'}."
        )
        parts = [note, _table(together), _table(by_tries), differences(self.comparisons), _table(separate)]
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return plain data: the budget, the rates by tries, the comparisons, and every report."""
        rates = [
            {"method": method, "attack": attack, "tries": k, **rate}
            for method in self.methods
            for attack in self.attacks
            for k in range(1, self._most + 1)
            if (rate := self.rate(method, attack, tries=k))
        ]
        return {
            "budget": self.budget,
            "rates": rates,
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "reports": {"/".join(key): report.to_json() for key, report in self.reports.items()},
        }

    @property
    def _most(self) -> int:
        return max(outcome.rounds for report in self.reports.values() for outcome in report.outcomes)

    def _cell(self, method: str, attack: str, which: str) -> str:
        rate = self.rate(method, attack, which)
        return format_estimate("ASR", rate["value"], rate["low"], rate["high"]) if rate else ""


def recovered(
    report: AttackReport, outcome: Outcome, which: str = "after", tries: int | None = None
) -> dict[str, bool]:
    """Return for each case whether the concept was recovered; empty if the attack has no control and it is asked for.

    Args:
        report: the report that holds the outcome.
        outcome: the result of one attack.
        which: `before`, `after` or `control`, as `AttackTable.rate` has them.
        tries: count successes within that many tries; None counts all tries.
    """
    won = {"before": {}, "after": outcome.won, "control": outcome.control}[which]
    if won is None:
        return {}
    within = {key for key, number in won.items() if tries is None or number <= tries}
    return {key: key in within or key in report.plain_ids for key in report.prompts}


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
