"""The benchmark as one self-contained HTML page: tables, plots of erased against kept, interference and images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from html import escape
from typing import Any

from PIL import Image

from erasure.benchmark.comparison import BASE, Comparison, marks
from erasure.benchmark.row import JOINT, STACK, Row, members
from erasure.benchmark.table import BETTER, COSTS, NOTE, SHOWN, Table, interval
from erasure.evaluation.metrics.gate_activity import GateActivity
from erasure.evaluation.metrics.metric import format_interval, format_value
from erasure.evaluation.metrics.statistics import ALPHA
from erasure.evaluation.report import charts
from erasure.evaluation.report.html import (
    FEW,
    Shot,
    Tile,
    folded,
    gate_log,
    p_text,
    page_head,
    picture,
    strips,
    tiles,
)
from erasure.version import __version__

Reports = Mapping[tuple[str, str], Mapping[str, Any]]  # (method, concept) -> the content of its report.json
MAIN = ("UA", "quality", "IRA", "H")  # columns of the table of means; the others are folded away
MARKS = (
    '<p class="soft">Bold and blue: no other method is significantly better, and some are significantly worse. Red and '
    "†: significantly worse than the base. H is not tested.</p>"
)
STYLE = """
.tight th,.tight td{padding:.3rem .45rem;white-space:nowrap;overflow-wrap:normal;font-variant-numeric:tabular-nums}
.tight td:first-child,.tight th:first-child{position:sticky;left:0;background:var(--page);
white-space:normal;max-width:9rem}
.new td{border-top:2px solid var(--before)}.figures td:first-child{overflow-wrap:anywhere;min-width:0}
.wide img{max-width:none;image-rendering:pixelated;display:block}h3{font-size:1rem;margin:1.4rem 0 .3rem}
"""
INTERFERENCE = (
    '<p class="soft">Rows: the erased concept. Columns: what the prompts ask for. Cells: change of the share of '
    "correct images from the base in percentage points; below it, the number of images. Red for a loss and blue for a "
    f"gain, only where McNemar's exact test over the same seeds finds a difference (p &lt; {ALPHA:g} after Holm's "
    "correction for the row). Framed: what the row is meant to erase. Blank: no prompt asks for it, or fewer than "
    f"{FEW} do.</p>"
)


def page(
    table: Table, reports: Reports, image: Image.Image, examples: Mapping[str, Sequence[Shot]] | None = None
) -> str:
    """Return the page of the benchmark as self-contained HTML.

    Args:
        table: the results of the benchmark.
        reports: (method, concept) -> the content of the run's report.json.
        image: the base and all methods side by side.
        examples: heading -> images for the strip at the top, as `strip` returns them.
    """
    methods = list(dict.fromkeys(row.method for row in table.rows))
    main_group = max(dict.fromkeys(row.group for row in table.rows), key=lambda group: _weight(table, group))
    found = [comparison for comparison in table.comparisons if comparison.significant]
    wide_image = picture(image, "one line per concept: target prompts, then prompts to keep")
    parts = [
        page_head("Benchmark: what is erased and what is kept", STYLE),
        tiles(verdict(table, main_group)),
        strips(examples or {}),
        f"<p>{escape(summary(table, methods))}.</p>",
        f'<h2>Means</h2><table class="figures">{means(table, main_columns(table))}</table>{MARKS}',
        folded("All metrics and costs", f"{_wide(means(table))}<p class='soft'>{escape(NOTE)}</p>"),
        "<h2>Paired tests: significant differences</h2>" + comparison_table(found, len(table.comparisons))
        if table.comparisons
        else "",
        folded("All paired tests", comparison_table(table.comparisons)),
        "<h2>Erased against kept</h2>" + tradeoff(table, methods),
        "<h2>Interference: effect of erasing one concept on the others</h2>" + INTERFERENCE,
        *(folded(method, interference(table, method, reports)) for method in methods),
        "<h2>Details</h2>" + folded("Every concept", _wide(concepts(table))),
        folded("The same seeds, before and after", f'<div class="wide" tabindex="0">{wide_image}</div>'),
        folded("Gate log", gate_log(gates(table, reports), "method, concept")),
        folded("How this was made", f"<pre>{escape(json.dumps(provenance(table, reports), indent=1))}</pre>"),
        "</html>",
    ]
    return "\n".join(part for part in parts if part)


def main_columns(table: Table) -> list[str]:
    """Return the metrics of MAIN that the table has."""
    entries = table.means()
    return [name for name in MAIN if any(name in entry for entry in entries)]


def _weight(table: Table, group: str) -> tuple[bool, int]:
    """Rank groups of rows: single concepts before concepts that were erased together, then by the number of rows."""
    rows = [row for row in table.rows if row.group == group and not row.tuned]
    return any(len(members(row.concept)) == 1 for row in rows), len(rows)


def comparison_table(comparisons: Sequence[Comparison], tested: int | None = None) -> str:
    """Return a table of paired tests of two methods, or of a method and the base, or nothing without any.

    Args:
        comparisons: the tests.
        tested: number of tests that the comparisons were chosen from, for a sentence on how they were chosen.
    """
    chosen = (
        ""
        if tested is None
        else f'<p class="soft">{len(comparisons)} of {tested} tests on the same images: p &lt; {ALPHA:g} after '
        "Holm's correction, and the interval of the difference excludes 0. McNemar's exact test; bootstrap over "
        "concepts and prompts.</p>"
    )
    rows = []
    for test in comparisons:
        sign = 1 if test.better == test.first else -1
        low, high = sorted((sign * test.low, sign * test.high))
        counts = (test.only_first, test.only_second)[::sign]
        look = ' class="worse"' if test.significant and test.second == BASE and test.worse == test.first else ""
        value = f"<b{look}>{sign * test.difference:+.0%}</b>" if test.significant else f"{sign * test.difference:+.0%}"
        rows.append(
            f"<tr><td>{escape(test.better)} over {escape(test.worse)}<small>{escape(test.metric)}, {escape(test.group)}"
            f" ({test.concepts})</small><td>{value}<small>{format_interval(test.metric, low, high, ' to ')}</small>"
            f"<td>{counts[0]} / {counts[1]}<small>of {test.n}</small><td>{p_text(test.corrected)}</tr>"
        )
    head = "<tr><th>better<th>difference<th>only better / only worse<th>p<small>Holm</small></tr>"
    return chosen + (f'<table class="figures">{head}{"".join(rows)}</table>' if rows else "")


def verdict(table: Table, group: str) -> list[Tile]:
    """Return three tiles for the method with the highest H of a group, with the range of the other methods.

    Args:
        table: the results of the benchmark.
        group: title of the group.
    """
    entries = [entry for entry in table.means() if entry["group"] == group]
    best = best_method(entries)
    shown = []
    for title, name in (("Gone", "UA"), ("Kept", "IRA"), ("Picture still good", "quality")):
        if best is None or name not in best:
            shown.append(Tile(title, "", ["not measured"]))
            continue
        cell = best[name]
        lines = [f"95 %: {interval(name, cell, '–')}", f"base {format_value(name, cell['base'])}"]
        lines.append(f"{best['method']}, {group}" + (": highest H" if len(entries) > 1 else ""))
        others = [entry[name]["value"] for entry in entries if entry is not best and name in entry]
        if others:
            ends = format_interval(name, min(others), max(others), "–").split("–")
            lines.append(f"others: {'–'.join(dict.fromkeys(ends))}")
        below_base = marks(table.comparisons, group, name, best["method"])[1]
        shown.append(Tile(title, format_value(name, cell["value"]), lines, "worse" if below_base else ""))
    return shown


def best_method(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the entry with the highest H among the methods that ran on all concepts of a group, or None."""
    most = max((entry["concepts"] for entry in entries), default=0)
    complete = [entry for entry in entries if "H" in entry and entry["concepts"] == most]
    return max(complete, key=lambda entry: entry["H"]["value"], default=None)


def summary(table: Table, methods: list[str]) -> str:
    """Return one sentence: the number of methods, concepts and runs, and the method with the highest H per group."""
    names = {row.concept for row in table.rows}
    text = f"{_count(len(methods), 'method')}, {_count(len(names), 'concept')}, {_count(len(table.rows), 'run')}"
    best_methods = []
    for group, entries in _groups(table).items():
        best = best_method(entries)
        if best is not None:
            shares = f"erased {best['UA']['value']:.0%}, kept {best['kept']['value']:.0%}"
            best_methods.append(f"{group} {best['method']} ({shares})")
    return text + ("; highest H: " + ", ".join(best_methods) if best_methods else "")


def means(table: Table, shown: Sequence[str] | None = None) -> str:
    """Return the table rows of the means, with the base's line first in each group.

    Args:
        table: the results of the benchmark.
        shown: names of the metrics; None: all of them, and the costs.
    """
    names, costs = (SHOWN, True) if shown is None else (shown, False)
    rows = [_head("method", names, costs)]
    for group, entries in _groups(table).items():
        best = max(entries, key=lambda entry: entry["concepts"])
        rows.append(_base(group, {key: best[key]["base"] for key in names if key in best}, names, costs))
        for entry in entries:
            looks = {key: marks(table.comparisons, entry["group"], key, entry["method"]) for key in names}
            cells = [_cell(key, entry[key], *looks[key]) if key in entry else "" for key in names]
            spent = _costs(entry, entry["bytes"]) if costs else []
            rows.append(_line([escape(_named(entry, entries)), *cells, *spent]))
    return "".join(rows)


def concepts(table: Table) -> str:
    """Return the table rows of every run, with the base's line first for each concept."""
    rows, last = [_head("method", SHOWN, True)], ""
    for row in table.rows:
        if row.concept != last:
            name = short(row) + (" *" if row.tuned else "")
            base = {key: cell.base for key, cell in row.cells.items() if key in SHOWN}
            rows.append(_base(name, base, SHOWN, True))
        last = row.concept
        cells = [_cell(key, asdict(row.cells[key])) if key in row.cells else "" for key in SHOWN]
        rows.append(_line([escape(row.method), *cells, *_costs(row.costs, row.bytes)]))
    return "".join(rows)


def tradeoff(table: Table, methods: list[str]) -> str:
    """Return one plot per group with a point for each method and for the base: erased against kept."""
    plots = []
    for group, listed in _groups(table).items():
        entries = [entry for entry in listed if "UA" in entry and "kept" in entry]
        points = [
            charts.Point(
                _named(entry, listed), _ends(entry["kept"]), _ends(entry["UA"]), methods.index(entry["method"])
            )
            for entry in entries
        ]
        # Methods that ran on different concepts of a group are compared with different base values.
        for kept, ua in sorted({(entry["kept"]["base"], entry["UA"]["base"]) for entry in entries}):
            points.append(charts.Point("base", (kept, kept, kept), (ua, ua, ua), -1))
        plots.append(f"<div><h3>{escape(group)}</h3>{charts.plot(points, 'kept', 'erased (UA)', group)}</div>")
    return (
        f'<div class="plots">{"".join(plots)}</div><p class="soft">Up and right is better. Kept: mean of IRA and CRA. '
        "Lines through the marks: 95 % intervals, over concepts if there are several. Concepts that settings were "
        "tuned on are left out. The axes start near the smallest value, not at 0.</p>"
    )


def interference(table: Table, method: str, reports: Reports) -> str:
    """Return the interference matrix of one method: one row per erased concept, one column per label measured.

    Cells of fewer than FEW images are blank in the matrix, and the complete matrix is folded away below it.
    """
    rows: dict[str, dict[str, charts.Change]] = {}
    own: dict[str, list[str]] = {}
    columns: dict[str, dict[str, None]] = {}
    for row in table.rows:
        if row.method != method:
            continue
        report = reports[method, row.concept]
        name = short(row)
        own[name] = [f"{report['domain']}/{label}" for label in report["concept"]]
        cells = rows.setdefault(name, {})
        for head, labels in report["accuracies"]["patched"].items():
            for label, after in labels.items():
                before = report["accuracies"]["base"][head].get(label, (0, 0))
                columns.setdefault(head, {})[label] = None
                pair = report.get("paired_labels", {}).get(head, {}).get(label)  # runs of older versions have none
                p = pair["p"] if pair is not None and after[1] >= FEW else None
                cells[f"{head}/{label}"] = charts.Change(tuple(before), tuple(after), p)
    # Erased labels come first, in the order of the rows, so that the framed cells form a diagonal.
    erased = list(dict.fromkeys(key for keys in own.values() for key in keys))
    order = {key: position for position, key in enumerate(erased)}
    listed = {
        head: sorted(names, key=lambda name: (order.get(f"{head}/{name}", len(order)), name))
        for head, names in columns.items()
    }
    many = {
        name: {key: change for key, change in cells.items() if change.after[1] >= FEW} for name, cells in rows.items()
    }
    kept = {key for cells in many.values() for key in cells}
    if not kept:
        return charts.matrix(rows, listed, own)
    filled = {head: [name for name in names if f"{head}/{name}" in kept] for head, names in listed.items()}
    if filled == listed and many == rows:
        return charts.matrix(rows, listed, own)
    complete = folded(f"With cells of fewer than {FEW} images", charts.matrix(rows, listed, own))
    return charts.matrix(many, filled, own) + complete


def gates(table: Table, reports: Reports) -> list[GateActivity]:
    """Return how strongly gated patches acted in each run; runs of older versions did not record it."""
    activities = []
    for row in table.rows:
        logged = [GateActivity(**entry) for entry in reports[row.method, row.concept].get("gates", ())]
        several = len({activity.patch for activity in logged}) > 1
        for activity in logged:
            name = f"{row.method}, {short(row)}" + (f": {activity.patch}" if several else "")
            activities.append(replace(activity, patch=name))
    return activities


def provenance(table: Table, reports: Reports) -> dict[str, Any]:
    """Return the settings and versions of the runs; an entry in which the runs differ lists all its values."""
    entries: dict[str, Any] = {"erasure": __version__, "settings": table.settings, "runs": len(table.rows)}
    for key in ("judge", "scheduler", "steps", "guidance", "versions"):
        values: list[Any] = []
        for report in reports.values():
            value = report["provenance"].get(key)
            if value is not None and value not in values:
                values.append(value)
        entries[key] = values[0] if len(values) == 1 else values
    return entries


def short(row: Row) -> str:
    """Return the name of a row's concept; for several, the first name and the number of the others."""
    first, *others = members(row.concept)
    return f"{first} {STACK if STACK in row.concept else JOINT} {len(others)} more" if others else first


def _groups(table: Table) -> dict[str, list[dict[str, Any]]]:
    """Return title of a group -> its means, one entry per method; the title holds the number of concepts."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in table.means():
        groups.setdefault(entry["group"], []).append(entry)
    titled = {}
    for group, entries in sorted(groups.items()):
        counts = {entry["concepts"] for entry in entries}
        # In an unfinished benchmark methods have run on different numbers of concepts; then _named shows them.
        titled[f"{group} ({counts.pop()})" if len(counts) == 1 else group] = entries
    return titled


def _named(entry: Mapping[str, Any], others: list[dict[str, Any]]) -> str:
    same = len({other["concepts"] for other in others}) == 1
    return entry["method"] if same else f"{entry['method']} ({entry['concepts']})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ends(entry: Mapping[str, float]) -> tuple[float, float, float]:
    return entry["value"], entry["low"], entry["high"]


def _cell(name: str, cell: Mapping[str, float], best: bool = False, below_base: bool = False) -> str:
    """Return a metric with its interval, painted only where a paired test is significant."""
    value = format_value(name, cell["value"])
    value = f'<b class="better">{value}</b>' if best else value
    value = f'<span class="worse">{value} †</span>' if below_base else value
    return f"{value}<small>{interval(name, cell, ' to ')}</small>"


def _costs(costs: Mapping[str, float], size: float) -> list[str]:
    return [*(f"{costs[cost]:,.0f}" for cost in COSTS), f"{size / 1000:,.0f}"]


def _head(first: str, shown: Sequence[str], costs: bool) -> str:
    titles = [first, *(f"{name} {BETTER.get(name, '↑')}" for name in shown), *([*COSTS, "KB"] if costs else [])]
    return f"<tr>{''.join(f'<th>{escape(title)}' for title in titles)}</tr>"


def _base(name: str, values: Mapping[str, float], shown: Sequence[str], costs: bool) -> str:
    cells = [f"<i>{format_value(key, values[key])}</i>" if key in values else "" for key in shown]
    blank = [""] * (len(COSTS) + 1) if costs else []
    return _line([f"<b>{escape(name)}</b><small>base</small>", *cells, *blank], "new")


def _line(cells: list[str], kind: str = "") -> str:
    return f"<tr{f' class={kind}' if kind else ''}>{''.join(f'<td>{cell}' for cell in cells)}</tr>"


def _wide(rows: str) -> str:
    return f'<div class="wide" tabindex="0"><table class="tight">{rows}</table></div>'
