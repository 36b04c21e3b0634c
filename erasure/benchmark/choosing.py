"""Which method to take, from the tables of results: by kind of concept, number of names, computing and threat.

Nothing here knows a method by name: a method that is measured appears by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from erasure.benchmark.table import Table, interval, spread
from erasure.evaluation.metrics.statistics import wilson

Measured = Mapping[str, Any]  # an entry of `Table.means`
KINDS = ("objects", "styles", "identities")
SHOWN = ("UA", "quality", "leak", "IRA", "H")


def by_kind(table: Table) -> str:
    """Return for each kind of concept the methods as a Markdown table, by the harmonic mean H.

    Args:
        table: results on single concepts.
    """
    lines = []
    for kind in KINDS:
        entries = _ranked([entry for entry in table.means() if entry["group"] == kind])
        if entries:
            lines.append([kind, _named(entries[0]), _named(_level(entries)), _named(_behind(entries))])
    return _table(["concepts", "highest H", "interval reaches as far", "below it"], lines)


def by_number(tables: Sequence[Table]) -> str:
    """Return for each number of names the methods that were measured with it, by H.

    Args:
        tables: results on several concepts erased together by one patch.
    """
    means = [entry for table in tables for entry in table.means()]
    sizes = {entry["group"] for entry in means if entry["group"].endswith(" together")}
    rows = []
    for size in sorted(sizes, key=lambda group: int(group.split()[0])):
        for entry in _ranked([entry for entry in means if entry["group"] == size]):
            cells = [spread(name, entry[name]) if name in entry else "" for name in ("UA", "IRA", "H")]
            rows.append([size.split()[0], entry["method"], *cells, f"{entry['F'] + entry['B']:,.0f}"])
    return _table(["names", "method", "UA ↑", "IRA ↑", "H ↑", "UNet calls"], rows)


def by_computing(table: Table) -> str:
    """Return what each method computes for one concept, the cheapest first.

    Args:
        table: results on single concepts.
    """
    spent: dict[str, list[Measured]] = {}
    for entry in table.means():
        spent.setdefault(entry["method"], []).append(entry)
    rows = []
    for method, entries in spent.items():
        mean = {key: sum(entry[key] for entry in entries) / len(entries) for key in ("F", "B", "bytes")}
        rows.append((mean["F"] + mean["B"], method, mean))
    cells = [
        [method, f"{mean['F']:,.0f}", f"{mean['B']:,.0f}", f"{mean['bytes'] / 1000:,.0f}"]
        for _, method, mean in sorted(rows, key=lambda row: row[:2])
    ]
    return _table(["method", "UNet forwards", "UNet backwards", "patch KB"], cells)


def by_threat(attacked: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how often attacks brought the concept back, method by method, the hardest to attack first.

    Args:
        attacked: "method/concept" -> the report of the attacks as plain data.
    """
    counts: dict[str, dict[str, list[int]]] = {}
    for key, report in attacked.items():
        for name, outcome in report["attacks"].items():
            count = counts.setdefault(key.split("/")[0], {}).setdefault(name, [0, 0])
            count[0] += outcome["plain"] + len(outcome["won"])
            count[1] += outcome["n"]
    attacks = list(dict.fromkeys(name for found in counts.values() for name in found))
    worst = sorted(counts, key=lambda method: max(hits / n for hits, n in counts[method].values()))
    rows = [[method, *(_rate(counts[method].get(name)) for name in attacks)] for method in worst]
    return _table(["method", *(f"back by {name} ↓" for name in attacks)], rows)


def figures(method: str, tables: Mapping[str, Table]) -> str:
    """Return every mean of one method as a Markdown table, or nothing if it was not measured.

    Args:
        method: name of the method.
        tables: what was measured -> its table.
    """
    rows = [
        [title, f"{entry['group']} ({entry['concepts']})"]
        + [spread(name, entry[name]) if name in entry else "" for name in SHOWN]
        + [f"{entry['F']:,.0f} + {entry['B']:,.0f}"]
        for title, table in tables.items()
        for entry in table.means()
        if entry["method"] == method
    ]
    arrows = {"leak": "↓"}
    heads = ["measured", "concepts", *(f"{name} {arrows.get(name, '↑')}" for name in SHOWN), "F + B"]
    return _table(heads, rows) if rows else ""


def _ranked(entries: Sequence[Measured]) -> list[Measured]:
    return sorted((entry for entry in entries if "H" in entry), key=lambda entry: -entry["H"]["value"])


def _level(entries: Sequence[Measured]) -> list[Measured]:
    """Return the methods after the first whose interval reaches the first one's value."""
    return [entry for entry in entries[1:] if entry["H"]["high"] >= entries[0]["H"]["value"]]


def _behind(entries: Sequence[Measured]) -> list[Measured]:
    return [entry for entry in entries[1:] if entry["H"]["high"] < entries[0]["H"]["value"]]


def _named(entries: Measured | Sequence[Measured]) -> str:
    listed = [entries] if isinstance(entries, Mapping) else entries
    return ", ".join(f"{entry['method']} {entry['H']['value']:.0%} [{interval('H', entry['H'])}]" for entry in listed)


def _rate(count: Sequence[int] | None) -> str:
    if count is None:
        return ""
    hits, n = count
    low, high = wilson(hits, n)
    return spread("ASR", {"value": hits / n, "low": low, "high": high})


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
