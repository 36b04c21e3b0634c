"""The results of a benchmark: one row per method and concept, means over concepts, and both as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from erasure.benchmark.comparison import Comparison, compare, differences, marks
from erasure.benchmark.row import Outcomes, Row
from erasure.evaluation.metrics.accuracy import HARMONIC_PARTS, harmonic_mean
from erasure.evaluation.metrics.metric import Metric, format_estimate, format_interval, format_value, share_metric

SHOWN = ("UA", "quality", "leak", "IRA", "neighbours", "CRA", "H", "CLIP_kept", "KID")
BETTER = {"leak": "↓", "KID": "↓"}
SCORES = ("CLIP_kept", "KID")  # metrics that are not shares of images
COSTS = ("F", "B", "seconds")


def pooled(rows: Sequence[Row], name: str, prompts: Mapping[str, str]) -> Metric | None:
    """Return a metric over the images of all rows together, or None if no row has it.

    Args:
        rows: rows of one group and method.
        name: a metric that is a share of images, or H, the harmonic mean of such shares.
        prompts: id of an image -> its prompt; images of one prompt are not independent.
    """
    from erasure.evaluation.metrics.statistics import wilson

    if name == "H":
        return harmonic_mean(name, [one for part in HARMONIC_PARTS if (one := pooled(rows, part, prompts))])
    outcomes = [(row.concept, key, mark) for row in rows for key, mark in row.outcomes.get(name, {}).items()]
    if outcomes:
        groups = [(concept, prompts.get(key, key)) for concept, key, _ in outcomes]
        return share_metric(name, [mark for _, _, mark in outcomes], True, "", groups)
    cells = [cell for row in rows if (cell := row.cell(name))]
    n, hits = sum(cell.n for cell in cells), sum(cell.value * cell.n for cell in cells)
    return Metric(name, hits / n, n, *wilson(hits, n), True, "") if n else None


@dataclass(frozen=True)
class Table:
    """All rows of a benchmark and the settings that they were made with.

    Args:
        rows: one result per method and concept.
        settings: `limit`, the number of prompts per concept, and `overrides`, the settings given for every method.
        prompts: id of an image -> its prompt.
    """

    rows: list[Row]
    settings: dict[str, Any]
    prompts: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data of schema 3: settings, prompts, rows, the base's outcomes, means and comparisons.

        Outcomes are written as one character for each image, 1 if it counts, in the order of `ids`.
        """
        ids = {row.concept: {name: list(marks) for name, marks in row.base.items()} for row in self.rows if row.base}
        base = {row.concept: _written(row.base, ids[row.concept]) for row in self.rows if row.base}
        rows = [
            {**asdict(replace(row, outcomes={}, base={})), "outcomes": _written(row.outcomes, ids.get(row.concept, {}))}
            for row in self.rows
        ]
        return {
            "schema": 3,
            "settings": self.settings,
            "prompts": self.prompts,
            "ids": ids,
            "base": base,
            "rows": [{key: value for key, value in row.items() if key != "base"} for row in rows],
            "means": self.means(),
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
        }

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Return the paired comparisons of the methods with each other and with the base."""
        return compare(self.rows, self.prompts)

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
                    if len(cells) > 1 and name not in SCORES and (whole := pooled(rows, name, self.prompts)):
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
        """Build a table from the plain data that `to_json` returns; older schemas have no outcomes."""
        ids = data.get("ids", {})
        rows = []
        for row in data["rows"]:
            of_concept = ids.get(row["concept"], {})
            outcomes = _read(row.get("outcomes", {}), of_concept)
            base = _read(data.get("base", {}).get(row["concept"], {}), of_concept)
            rows.append(Row.from_json({**row, "outcomes": outcomes, "base": base}))
        return cls(rows, data["settings"], data.get("prompts", {}))

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
            cells = [self._marked(entry, key) if key in entry else "" for key in shown]
            spent = [f"{entry[cost]:,.0f}" for cost in costs]
            lines.append(_line([name, entry["method"], *cells, *spent, f"{entry['bytes'] / 1000:,.0f}"]))
        return "\n".join(lines)

    def _marked(self, entry: Mapping[str, Any], metric: str) -> str:
        """Return a metric of a mean as text, marked by the paired comparisons."""
        best, below_base = marks(self.comparisons, entry["group"], metric, entry["method"])
        text = spread(metric, entry[metric])
        return (f"**{text}**" if best else text) + (" †" if below_base else "")

    def markdown(self) -> str:
        """Return Markdown tables of the means, of what differs significantly and of every concept, and a note."""
        compared = [differences(self.comparisons), ""] if self.comparisons else []
        lines = [self.summary(), "", *compared, *_head("concept", SHOWN, COSTS)]
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
    "Shares with 95 % intervals: Wilson for a concept, with images of one prompt counted as alike; for a mean the "
    "wider of a bootstrap over concepts and Wilson over all images. The base model's value is in brackets or on its "
    "own line. Bold: no other method is significantly better, and some are significantly worse. †: significantly "
    "worse than the base. Both by paired tests on the same images: McNemar with Holm's correction, and a bootstrap "
    "over concepts and prompts whose interval excludes 0; H is not tested. UA: share of target images without the "
    "target. quality: share of them that are well-formed images of anything. leak: share of prompts with other words "
    "for the target that still show it. IRA, neighbours, CRA: share of other prompts drawn correctly, in the target's "
    "domain, among its nearest concepts, and in the other domain. H: harmonic mean of UA, IRA, CRA and quality. "
    "CLIP_kept, KID: kept images compared with their prompts and with the base's images (1000 KID over features of "
    "glyph's CLIP; the base's is 0). F, B: samples forward and backward through the UNet. *: a concept that settings "
    "were tuned on."
)


def _written(outcomes: Outcomes, ids: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: "".join("1" if marks[key] else "0" for key in ids[name]) for name, marks in outcomes.items()}


def _read(written: Mapping[str, str], ids: Mapping[str, Sequence[str]]) -> dict[str, dict[str, bool]]:
    return {
        name: {key: mark == "1" for key, mark in zip(ids[name], text, strict=True)} for name, text in written.items()
    }


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
