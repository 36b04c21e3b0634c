"""The table of methods and concepts: its rows, its means, and how it is written as text and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from erasure.evaluation.metrics.accuracy import HARMONIC_PARTS, harmonic_mean
from erasure.evaluation.metrics.metric import Metric, format_estimate, format_interval, format_value

SHOWN = ("UA", "leak", "IRA", "neighbours", "CRA", "H", "CLIP_kept", "KID")
BETTER = {"leak": "↓", "KID": "↓"}
SCORES = ("CLIP_kept", "KID")  # no shares
COSTS = ("F", "B", "seconds")
JOINT, STACK = "+", "&"  # between names: erased together by one patch; one patch each, stacked


def members(concept: str) -> list[str]:
    """The names in "a", "a+b" or "a&b"."""
    return concept.split(STACK if STACK in concept else JOINT)


@dataclass(frozen=True)
class Cell:
    """One metric of one run, the base's beside it."""

    value: float
    low: float
    high: float
    n: int
    base: float


@dataclass(frozen=True)
class Row:
    """One method on one concept, or on several that are erased together."""

    method: str
    concept: str
    kind: str
    tuned: bool
    cells: dict[str, Cell]
    costs: dict[str, float]
    bytes: int

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """What `asdict` made of a row."""
        return cls(**{**data, "cells": {name: Cell(**cell) for name, cell in data["cells"].items()}})

    def cell(self, name: str) -> Cell | None:
        """A metric; `kept` is the mean of IRA and CRA, of whichever there is.

        Both count the same images in part, so that `kept` gets the mean of their bounds: as wide as if one followed
        from the other.
        """
        if name != "kept":
            return self.cells.get(name)
        both = [self.cells[one] for one in ("IRA", "CRA") if one in self.cells]
        if not both:
            return None
        mean = {key: sum(getattr(one, key) for one in both) / len(both) for key in ("value", "low", "high", "base")}
        return Cell(**mean, n=min(one.n for one in both))

    @property
    def group(self) -> str:
        """Rows of one group are averaged."""
        if len(names := members(self.concept)) > 1:
            return f"{len(names)} {'stacked' if STACK in self.concept else 'together'}"
        return {"identity": "identities"}.get(self.kind, f"{self.kind}s")


def pooled(rows: Sequence[Row], name: str) -> Metric | None:
    """A share over the images of all rows, or H of such shares; None where no row has it."""
    from erasure.evaluation.metrics.statistics import wilson

    if name == "H":
        return harmonic_mean(name, [one for part in HARMONIC_PARTS if (one := pooled(rows, part))])
    cells = [cell for row in rows if (cell := row.cell(name))]
    n, hits = sum(cell.n for cell in cells), sum(cell.value * cell.n for cell in cells)
    return Metric(name, hits / n, n, *wilson(hits, n), True, "") if n else None


@dataclass(frozen=True)
class Table:
    """All rows of a bench."""

    rows: list[Row]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "schema": 2,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "means": self.means(),
        }

    def means(self) -> list[dict[str, Any]]:
        """Mean over the concepts of a method and group that nothing was tuned on, with a bootstrap interval."""
        from erasure.evaluation.metrics.statistics import bootstrap_mean

        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if not row.tuned:
                groups.setdefault((row.group, row.method), []).append(row)
        found = []
        for (group, method), rows in groups.items():
            entry: dict[str, Any] = {"group": group, "method": method, "concepts": len(rows)}
            for name in (*SHOWN, "kept"):
                cells = [cell for row in rows if (cell := row.cell(name))]
                if cells:
                    values = [cell.value for cell in cells]
                    # A mean over one concept has no spread: its own interval stands.
                    low, high = (cells[0].low, cells[0].high) if len(cells) == 1 else bootstrap_mean(values)
                    if len(cells) > 1 and name not in SCORES and (whole := pooled(rows, name)):
                        # Few concepts may agree by chance: never narrower than all their images together.
                        low, high = min(low, whole.low), max(high, whole.high)
                    base = sum(cell.base for cell in cells) / len(cells)
                    entry[name] = {"value": sum(values) / len(values), "low": low, "high": high, "base": base}
            for cost in COSTS:
                entry[cost] = sum(row.costs[cost] for row in rows) / len(rows)
            entry["bytes"] = sum(row.bytes for row in rows) / len(rows)
            found.append(entry)
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Table:
        """What `to_json` wrote."""
        return cls([Row.from_json(row) for row in data["rows"]], data["settings"])

    def summary(self, shown: Sequence[str] = SHOWN, costs: Sequence[str] = COSTS) -> str:
        """The means as Markdown: a line a method, the base's first in each group."""
        lines = _head("concepts", shown, costs)
        seen = set()
        for entry in sorted(self.means(), key=lambda entry: _size(entry["group"])):
            name = f"{entry['group']} ({entry['concepts']})"
            if entry["group"] not in seen:
                seen.add(entry["group"])
                base = [format_value(key, entry[key]["base"]) if key in entry else "" for key in shown]
                lines.append(_line([name, "*base*", *base, *[""] * (len(costs) + 1)]))
            cells = [spread(key, entry[key]) if key in entry else "" for key in shown]
            spent = [f"{entry[cost]:,.0f}" for cost in costs]
            lines.append(_line([name, entry["method"], *cells, *spent, f"{entry['bytes'] / 1000:,.0f}"]))
        return "\n".join(lines)

    def markdown(self) -> str:
        """The tables for people: means; then every concept."""
        lines = [self.summary(), "", *_head("concept", SHOWN, COSTS)]
        for row in self.rows:
            cells = [
                f"{spread(key, asdict(row.cells[key]))} ({format_value(key, row.cells[key].base)})"
                if key in row.cells
                else ""
                for key in SHOWN
            ]
            costs = [f"{row.costs[cost]:,.0f}" for cost in COSTS]
            name = row.concept + (" *" if row.tuned else "")
            lines.append(_line([name, row.method, *cells, *costs, f"{row.bytes / 1000:,.0f}"]))
        lines += ["", NOTE]
        return "\n".join(lines)


NOTE = (
    "Shares with 95 % intervals (a concept: Wilson; a mean: the wider of bootstrap over concepts and Wilson over all "
    "images); the base in brackets or on its "
    "own line. UA: target images without the target. leak: other words for it that still show it. IRA, neighbours, "
    "CRA: other prompts drawn right in the target's domain, among its nearest, in the other domain. H: harmonic mean "
    "of UA, IRA and CRA. CLIP_kept, KID: kept images against their prompts and against the base's (1000 KID over "
    "features of glyph's CLIP; the base's line is the noise floor). F, B: samples forward and backward through the "
    "UNet. * a concept for tuning."
)


def _size(group: str) -> tuple[int, str]:
    """Concepts alone before several, few before many."""
    first = group.partition(" ")[0]
    return int(first) if first.isdigit() else 1, group


def _head(first: str, shown: Sequence[str], costs: Sequence[str]) -> list[str]:
    titles = [f"{name} {BETTER.get(name, '↑')}" for name in shown]
    return [_line([first, "method", *titles, *costs, "KB"]), "|---" * (len(shown) + len(costs) + 3) + "|"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(name: str, cell: Mapping[str, float]) -> str:
    """A figure with its interval."""
    return format_estimate(name, cell["value"], cell["low"], cell["high"])


def interval(name: str, cell: Mapping[str, float], between: str = ", ") -> str:
    """The two ends of an interval, without a unit."""
    return format_interval(name, cell["low"], cell["high"], between)
