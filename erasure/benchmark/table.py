"""The results of a benchmark: one row per method and concept, means over concepts, and both as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from erasure.evaluation.metrics.accuracy import HARMONIC_PARTS, harmonic_mean
from erasure.evaluation.metrics.metric import Metric, format_estimate, format_interval, format_value

SHOWN = ("UA", "leak", "IRA", "neighbours", "CRA", "H", "CLIP_kept", "KID")
BETTER = {"leak": "↓", "KID": "↓"}
SCORES = ("CLIP_kept", "KID")  # metrics that are not shares of images
COSTS = ("F", "B", "seconds")
JOINT, STACK = "+", "&"  # separators of names: erased together by one patch, or one stacked patch for each


def members(concept: str) -> list[str]:
    """Return the names of the concepts in "a", "a+b" or "a&b"."""
    return concept.split(STACK if STACK in concept else JOINT)


@dataclass(frozen=True)
class Cell:
    """One metric of one run, with the base model's value for comparison.

    Args:
        value: value with the patch.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        n: number of images.
        base: value of the base model; not a number if it was not measured.
    """

    value: float
    low: float
    high: float
    n: int
    base: float


@dataclass(frozen=True)
class Row:
    """The result of one method on one concept, or on several concepts at once.

    Args:
        method: name of the method.
        concept: name of the concept; "a+b" and "a&b" as `members` reads them.
        kind: kind of the concept, such as object or style.
        tuned: whether settings were tuned on the concept; such rows are left out of the means.
        cells: name of a metric -> its values.
        costs: samples forward (F) and backward (B) through the UNet, and seconds.
        bytes: size of all patch files.
    """

    method: str
    concept: str
    kind: str
    tuned: bool
    cells: dict[str, Cell]
    costs: dict[str, float]
    bytes: int

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """Build a row from the plain data that `dataclasses.asdict` returns for it."""
        return cls(**{**data, "cells": {name: Cell(**cell) for name, cell in data["cells"].items()}})

    def cell(self, name: str) -> Cell | None:
        """Return a metric of this row, or None if it was not measured.

        The name `kept` stands for the mean of IRA and CRA, or for the one of them that was measured. The two share
        some of their images, so its interval is the mean of their intervals, which assumes full correlation.
        """
        if name != "kept":
            return self.cells.get(name)
        parts = [self.cells[part] for part in ("IRA", "CRA") if part in self.cells]
        if not parts:
            return None
        mean = {key: sum(getattr(cell, key) for cell in parts) / len(parts) for key in ("value", "low", "high", "base")}
        return Cell(**mean, n=min(cell.n for cell in parts))

    @property
    def group(self) -> str:
        """Return the title of the group that this row is averaged with, such as "objects" or "2 stacked"."""
        if len(names := members(self.concept)) > 1:
            return f"{len(names)} {'stacked' if STACK in self.concept else 'together'}"
        return {"identity": "identities"}.get(self.kind, f"{self.kind}s")


def pooled(rows: Sequence[Row], name: str) -> Metric | None:
    """Return a metric over the images of all rows together, or None if no row has it.

    Args:
        rows: rows of one group and method.
        name: a metric that is a share of images, or H, the harmonic mean of such shares.
    """
    from erasure.evaluation.metrics.statistics import wilson

    if name == "H":
        return harmonic_mean(name, [one for part in HARMONIC_PARTS if (one := pooled(rows, part))])
    cells = [cell for row in rows if (cell := row.cell(name))]
    n, hits = sum(cell.n for cell in cells), sum(cell.value * cell.n for cell in cells)
    return Metric(name, hits / n, n, *wilson(hits, n), True, "") if n else None


@dataclass(frozen=True)
class Table:
    """All rows of a benchmark and the settings that they were made with.

    Args:
        rows: one result per method and concept.
        settings: `limit`, the number of prompts per concept, and `overrides`, the settings given for every method.
    """

    rows: list[Row]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain data of schema 2: settings, rows and means."""
        return {
            "schema": 2,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "means": self.means(),
        }

    def means(self) -> list[dict[str, Any]]:
        """Average the rows of each group and method, without concepts that settings were tuned on.

        Returns:
            One entry per group and method. Each metric has a value, a 95 % interval (bootstrap over concepts, or a
            single concept's own) and the base's mean; costs and patch sizes are averaged too.
        """
        from erasure.evaluation.metrics.statistics import bootstrap_mean

        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if not row.tuned:
                groups.setdefault((row.group, row.method), []).append(row)
        entries = []
        for (group, method), rows in groups.items():
            entry: dict[str, Any] = {"group": group, "method": method, "concepts": len(rows)}
            for name in (*SHOWN, "kept"):
                cells = [cell for row in rows if (cell := row.cell(name))]
                if cells:
                    values = [cell.value for cell in cells]
                    # A single concept has no spread over concepts, so its own interval is used.
                    low, high = (cells[0].low, cells[0].high) if len(cells) == 1 else bootstrap_mean(values)
                    if len(cells) > 1 and name not in SCORES and (whole := pooled(rows, name)):
                        # Few concepts may agree by chance; the interval is at least that of all their images.
                        low, high = min(low, whole.low), max(high, whole.high)
                    base = sum(cell.base for cell in cells) / len(cells)
                    entry[name] = {"value": sum(values) / len(values), "low": low, "high": high, "base": base}
            for cost in COSTS:
                entry[cost] = sum(row.costs[cost] for row in rows) / len(rows)
            entry["bytes"] = sum(row.bytes for row in rows) / len(rows)
            entries.append(entry)
        return entries

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Table:
        """Build a table from the plain data that `to_json` returns."""
        return cls([Row.from_json(row) for row in data["rows"]], data["settings"])

    def summary(self, shown: Sequence[str] = SHOWN, costs: Sequence[str] = COSTS) -> str:
        """Return the means as a Markdown table: one line per method, after the base's line in each group.

        Args:
            shown: names of the metrics to show.
            costs: names of the costs to show.
        """
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
        """Return two Markdown tables, of the means and of every concept, and a note that explains the columns."""
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
    "Shares with 95 % intervals: Wilson for a concept; for a mean the wider of a bootstrap over concepts and Wilson "
    "over all images. The base model's value is in brackets or on its own line. UA: share of target images without the "
    "target. leak: share of prompts with other words for the target that still show it. IRA, neighbours, CRA: share of "
    "other prompts drawn correctly, in the target's domain, among its nearest concepts, and in the other domain. H: "
    "harmonic mean of UA, IRA and CRA. CLIP_kept, KID: kept images compared with their prompts and with the base's "
    "images (1000 KID over features of glyph's CLIP; the base's line is the noise floor). F, B: samples forward and "
    "backward through the UNet. *: a concept that settings were tuned on."
)


def _size(group: str) -> tuple[int, str]:
    """Sort groups of single concepts before joint and stacked ones, and these by the number of concepts."""
    first = group.partition(" ")[0]
    return int(first) if first.isdigit() else 1, group


def _head(first: str, shown: Sequence[str], costs: Sequence[str]) -> list[str]:
    titles = [f"{name} {BETTER.get(name, '↑')}" for name in shown]
    return [_line([first, "method", *titles, *costs, "KB"]), "|---" * (len(shown) + len(costs) + 3) + "|"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(name: str, cell: Mapping[str, float]) -> str:
    """Format a metric's value with its interval, such as "80% [70, 90]"."""
    return format_estimate(name, cell["value"], cell["low"], cell["high"])


def interval(name: str, cell: Mapping[str, float], between: str = ", ") -> str:
    """Format the two ends of a metric's interval without a unit, such as "70, 90"."""
    return format_interval(name, cell["low"], cell["high"], between)
