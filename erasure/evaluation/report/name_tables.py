"""Tables of a report on several names: a row for each erased name, and one for each kept label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from erasure.evaluation.report.report import Report

MOST_ROWS = 200  # of a table on the page


@dataclass(frozen=True)
class LabelRow:
    """How many images of one label show it.

    Args:
        label: the label.
        before: of the base's images.
        after: of the patched pipeline's images.
        n: number of images, the same for both.
    """

    label: str
    before: int
    after: int
    n: int

    def to_json(self) -> dict[str, int]:
        """Return the counts as plain data."""
        return {"shown": self.after, "base": self.before, "n": self.n}


def erased_rows(report: Report) -> list[LabelRow]:
    """Return a row for each erased name, the least erased first: that with the greatest share of images showing it."""
    rows = [row for row in _rows(report) if row.label in report.concept]
    return sorted(rows, key=lambda row: (-row.after / row.n, -row.n, row.label))


def kept_rows(report: Report) -> list[LabelRow]:
    """Return a row for each other label of the same head, the most damaged first, by the share of images lost."""
    rows = [row for row in _rows(report) if row.label not in report.concept]
    return sorted(rows, key=lambda row: ((row.after - row.before) / row.n, -row.n, row.label))


def _rows(report: Report) -> list[LabelRow]:
    before = report.accuracies.get("base", {}).get(report.domain, {})
    after = report.accuracies.get("patched", {}).get(report.domain, {})
    return [LabelRow(label, before.get(label, (0, n))[0], count, n) for label, (count, n) in after.items() if n]


def name_tables(report: Report) -> str:
    """Return both tables as HTML, or nothing for a report on one name."""
    if len(report.concept) < 2:
        return ""
    return (
        "<h2>Each name, the least erased first</h2>"
        '<p class="soft">Images that ask for the name, by it or by another word for it, and show it.</p>'
        + _table("name", "still shown", erased_rows(report))
        + f"<h2>Each kept {escape(report.domain)}, the most damaged first</h2>"
        + _table(report.domain, "shown", kept_rows(report))
    )


def _table(first: str, shown: str, rows: Sequence[LabelRow]) -> str:
    lines = [
        f"<tr><td>{escape(row.label)}<td>{row.before}/{row.n}<td><b>{row.after}/{row.n}</b></tr>"
        for row in rows[:MOST_ROWS]
    ]
    more = f'<p class="soft">{len(rows) - MOST_ROWS} more rows.</p>' if len(rows) > MOST_ROWS else ""
    head = f"<tr><th>{escape(first)}<th>base<th>{escape(shown)}</tr>"
    return f'<table class="figures">{head}{"".join(lines)}</table>{more}'
