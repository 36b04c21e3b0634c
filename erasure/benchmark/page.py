"""The bench as one self-contained HTML page: tables, erase against keep, interference, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from html import escape
from typing import Any

from PIL import Image

from erasure.benchmark.table import (
    BETTER,
    COSTS,
    JOINT,
    NOTE,
    SHOWN,
    STACK,
    Row,
    Table,
    format_value,
    interval,
    members,
)
from erasure.evaluation.metrics.gate_activity import GateActivity
from erasure.evaluation.report import charts
from erasure.evaluation.report.html import INTERFERENCE, gate_log, page_head, picture
from erasure.version import __version__

Reports = Mapping[tuple[str, str], Mapping[str, Any]]  # (method, concept) -> what report.json holds
STYLE = """
.tight th,.tight td{padding:.3rem .45rem;white-space:nowrap;overflow-wrap:normal;font-variant-numeric:tabular-nums}
.tight td:first-child,.tight th:first-child{position:sticky;left:0;background:var(--page);
white-space:normal;max-width:9rem}
.tight .new td{border-top:2px solid var(--before)}
.wide img{max-width:none;image-rendering:pixelated;display:block}h3{font-size:1rem;margin:1.4rem 0 .3rem}
"""


def page(table: Table, reports: Reports, image: Image.Image) -> str:
    """The whole page.

    Args:
        table: the bench.
        reports: what each run's report.json holds.
        image: base and methods side by side.
    """
    methods = list(dict.fromkeys(row.method for row in table.rows))
    parts = [
        page_head("Bench: what is erased, what is kept", summary(table, methods), charts.STYLE + STYLE),
        f"<h2>Means</h2>{_wide(means(table))}<p class='soft'>{escape(NOTE)}</p>",
        "<h2>Erased against kept</h2>" + tradeoff(table, methods),
        "<h2>Interference: what erasing one concept does to the others</h2>" + INTERFERENCE,
        *(f"<h3>{escape(method)}</h3>{interference(table, method, reports)}" for method in methods),
        "<h2>Every concept</h2>" + _wide(concepts(table)),
        "<h2>The same seeds, before and after</h2>"
        f'<div class="wide" tabindex="0">{picture(image, "a line a concept: target prompts, then prompts to keep")}'
        "</div>",
        gate_log(gates(table, reports), "method, concept"),
        f"<h2>How this was made</h2><pre>{escape(json.dumps(made(table, reports), indent=1))}</pre></html>",
    ]
    return "\n".join(parts)


def summary(table: Table, methods: list[str]) -> str:
    """One sentence: how much was run, and the best compromise in each group."""
    names = {row.concept for row in table.rows}
    text = f"{_count(len(methods), 'method')}, {_count(len(names), 'concept')}, {_count(len(table.rows), 'run')}"
    told = []
    for group, entries in _groups(table).items():
        # Only methods that met all concepts of a group can be compared.
        most = max(entry["concepts"] for entry in entries)
        best = max(
            (entry for entry in entries if "H" in entry and entry["concepts"] == most),
            key=lambda entry: entry["H"]["value"],
            default=None,
        )
        if best is not None:
            shares = f"erased {best['UA']['value']:.0%}, kept {best['kept']['value']:.0%}"
            told.append(f"{group} {best['method']} ({shares})")
    return text + ("; highest H: " + ", ".join(told) if told else "")


def means(table: Table) -> str:
    """The means, the base's line first in each group."""
    rows = [_head("method")]
    for group, entries in _groups(table).items():
        best = max(entries, key=lambda entry: entry["concepts"])
        rows.append(_base(group, {key: best[key]["base"] for key in SHOWN if key in best}))
        for entry in entries:
            cells = [_cell(key, entry[key]) if key in entry else "" for key in SHOWN]
            rows.append(_line([escape(_named(entry, entries)), *cells, *_costs(entry, entry["bytes"])]))
    return "".join(rows)


def concepts(table: Table) -> str:
    """Every run, the base's line first for each concept."""
    rows, last = [_head("method")], ""
    for row in table.rows:
        if row.concept != last:
            name = short(row) + (" *" if row.tuned else "")
            rows.append(_base(name, {key: cell.base for key, cell in row.cells.items() if key in SHOWN}))
        last = row.concept
        cells = [_cell(key, asdict(row.cells[key])) if key in row.cells else "" for key in SHOWN]
        rows.append(_line([escape(row.method), *cells, *_costs(row.costs, row.bytes)]))
    return "".join(rows)


def tradeoff(table: Table, methods: list[str]) -> str:
    """A plot a group: one point a method, and the base's."""
    plots = []
    for group, listed in _groups(table).items():
        entries = [entry for entry in listed if "UA" in entry and "kept" in entry]
        points = [
            charts.Point(
                _named(entry, listed), _ends(entry["kept"]), _ends(entry["UA"]), methods.index(entry["method"])
            )
            for entry in entries
        ]
        # Methods that measured other concepts of a group met another base.
        for kept, ua in sorted({(entry["kept"]["base"], entry["UA"]["base"]) for entry in entries}):
            points.append(charts.Point("base", (kept, kept, kept), (ua, ua, ua), -1))
        plots.append(f"<div><h3>{escape(group)}</h3>{charts.plot(points, 'kept', 'erased (UA)', group)}</div>")
    return (
        f'<div class="plots">{"".join(plots)}</div><p class="soft">Up and right is better. Kept: mean of IRA and CRA. '
        "Lines through the marks: 95 % intervals, over concepts where there are several; concepts for tuning are left "
        "out. The axes begin where the figures do.</p>"
    )


def interference(table: Table, method: str, reports: Reports) -> str:
    """The matrix of one method: concept erased x label measured."""
    rows: dict[str, dict[str, charts.Change]] = {}
    own: dict[str, list[str]] = {}
    columns: dict[str, dict[str, None]] = {}
    for row in table.rows:
        if row.method != method:
            continue
        found = reports[method, row.concept]
        name = short(row)
        own[name] = [f"{found['domain']}/{label}" for label in found["concept"]]
        cells = rows.setdefault(name, {})
        for head, labels in found["accuracies"]["patched"].items():
            for label, after in labels.items():
                before = found["accuracies"]["base"][head].get(label, (0, 0))
                columns.setdefault(head, {})[label] = None
                cells[f"{head}/{label}"] = charts.Change(tuple(before), tuple(after))
    # What is erased somewhere comes first, in the order of the lines: the framed cells form a diagonal.
    erased = list(dict.fromkeys(key for keys in own.values() for key in keys))
    order = {key: at for at, key in enumerate(erased)}
    listed = {
        head: sorted(names, key=lambda name: (order.get(f"{head}/{name}", len(order)), name))
        for head, names in columns.items()
    }
    return charts.matrix(rows, listed, own)


def gates(table: Table, reports: Reports) -> list[GateActivity]:
    """How strongly gated patches acted, for each run; of runs by older versions nothing is known."""
    found = []
    for row in table.rows:
        logged = [GateActivity(**one) for one in reports[row.method, row.concept].get("gates", ())]
        several = len({one.patch for one in logged}) > 1
        for one in logged:
            name = f"{row.method}, {short(row)}" + (f": {one.patch}" if several else "")
            found.append(replace(one, patch=name))
    return found


def made(table: Table, reports: Reports) -> dict[str, Any]:
    """Settings and versions; where runs differ, all that there were."""
    found: dict[str, Any] = {"erasure": __version__, "settings": table.settings, "runs": len(table.rows)}
    for key in ("judge", "scheduler", "steps", "guidance", "versions"):
        values: list[Any] = []
        for report in reports.values():
            value = report["provenance"].get(key)
            if value is not None and value not in values:
                values.append(value)
        found[key] = values[0] if len(values) == 1 else values
    return found


def short(row: Row) -> str:
    """A concept's name; of several the first and how many more."""
    first, *more = members(row.concept)
    return f"{first} {STACK if STACK in row.concept else JOINT} {len(more)} more" if more else first


def _groups(table: Table) -> dict[str, list[dict[str, Any]]]:
    """Title of a group -> its means, a line a method."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in table.means():
        groups.setdefault(entry["group"], []).append(entry)
    found = {}
    for group, entries in sorted(groups.items()):
        counts = {entry["concepts"] for entry in entries}
        # Methods of a bench that is not through have met different numbers of concepts; _named says how many.
        found[f"{group} ({counts.pop()})" if len(counts) == 1 else group] = entries
    return found


def _named(entry: Mapping[str, Any], others: list[dict[str, Any]]) -> str:
    same = len({other["concepts"] for other in others}) == 1
    return entry["method"] if same else f"{entry['method']} ({entry['concepts']})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ends(entry: Mapping[str, float]) -> tuple[float, float, float]:
    return entry["value"], entry["low"], entry["high"]


def _cell(name: str, cell: Mapping[str, float], more: str = "") -> str:
    return f"<b>{format_value(name, cell['value'])}</b>{more}<small>{interval(name, cell, ' to ')}</small>"


def _costs(costs: Mapping[str, float], size: float) -> list[str]:
    return [*(f"{costs[cost]:,.0f}" for cost in COSTS), f"{size / 1000:,.0f}"]


def _head(first: str) -> str:
    titles = [first, *(f"{name} {BETTER.get(name, '↑')}" for name in SHOWN), *COSTS, "KB"]
    return f"<tr>{''.join(f'<th>{escape(title)}' for title in titles)}</tr>"


def _base(name: str, values: Mapping[str, float]) -> str:
    cells = [f"<i>{format_value(key, values[key])}</i>" if key in values else "" for key in SHOWN]
    return _line([f"<b>{escape(name)}</b><small>base</small>", *cells, *[""] * (len(COSTS) + 1)], "new")


def _line(cells: list[str], kind: str = "") -> str:
    return f"<tr{f' class={kind}' if kind else ''}>{''.join(f'<td>{cell}' for cell in cells)}</tr>"


def _wide(rows: str) -> str:
    return f'<div class="wide" tabindex="0"><table class="tight">{rows}</table></div>'
