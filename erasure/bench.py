"""`erasure bench`: methods x concepts on glyph, resumable, as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError, unknown

LIMIT = 96  # prompts a concept: 32 of the target, the others spread over all labels
SHOWN = ("UA", "IRA", "CRA")


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
    """One method on one concept."""

    method: str
    concept: str
    kind: str
    tuned: bool
    cells: dict[str, Cell]
    costs: dict[str, float]
    bytes: int


@dataclass(frozen=True)
class Table:
    """All rows of a bench."""

    rows: list[Row]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "schema": 1,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "means": self.means(),
        }

    def means(self) -> list[dict[str, Any]]:
        """Mean over the concepts of a method and domain that nothing was tuned on, with a bootstrap interval."""
        from erasure.evaluation.intervals import bootstrap_mean

        found = []
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if not row.tuned:
                groups.setdefault((row.method, "styles" if row.kind == "style" else "objects"), []).append(row)
        for (method, domain), rows in groups.items():
            entry: dict[str, Any] = {"method": method, "domain": domain, "concepts": len(rows)}
            for name in SHOWN:
                cells = [row.cells[name] for row in rows if name in row.cells]
                values = [cell.value for cell in cells]
                low, high = bootstrap_mean(values)
                base = sum(cell.base for cell in cells) / len(cells)
                entry[name] = {"value": sum(values) / len(values), "low": low, "high": high, "base": base}
            for cost in ("F", "B", "seconds"):
                entry[cost] = sum(row.costs[cost] for row in rows) / len(rows)
            found.append(entry)
        return found

    def markdown(self) -> str:
        """The table for people: means first, then every concept."""
        lines = [
            "| method | concepts | UA ↑ (base) | IRA ↑ (base) | CRA ↑ (base) | F | B | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for entry in self.means():
            cells = [f"{spread(entry[k])} ({entry[k]['base']:.0%})" for k in SHOWN]
            costs = f"{entry['F']:.0f} | {entry['B']:.0f} | {entry['seconds']:.0f}"
            lines.append(
                f"| {entry['method']} | {entry['concepts']} {entry['domain']} | {' | '.join(cells)} | {costs} |"
            )
        lines += [
            "",
            "| method | concept | UA ↑ (base) | IRA ↑ (base) | CRA ↑ (base) | F | B | seconds | KB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            cells = [
                f"{spread(asdict(row.cells[k]))} ({row.cells[k].base:.0%})" if k in row.cells else "" for k in SHOWN
            ]
            name = f"{row.concept} *" if row.tuned else row.concept
            costs = f"{row.costs['F']:.0f} | {row.costs['B']:.0f} | {row.costs['seconds']:.0f} | {row.bytes / 1000:.0f}"
            lines.append(f"| {row.method} | {name} | {' | '.join(cells)} | {costs} |")
        lines += [
            "",
            "Shares with 95 % intervals (a concept: Wilson; a mean: bootstrap over concepts). * a concept for tuning.",
        ]
        return "\n".join(lines)


def spread(cell: dict[str, float]) -> str:
    """A share with its interval."""
    return f"{cell['value']:.0%} [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"


def concepts() -> tuple[list[str], list[str]]:
    """Concepts to tune on and concepts to report, of `configs/concepts/glyph.yaml`."""
    from erasure.config import CONFIGS, read_yaml

    found = read_yaml(CONFIGS / "concepts" / "glyph.yaml")
    return list(found["develop"]), list(found["report"])


def bench(
    methods: list[str],
    wanted: list[str] | None,
    folder: Path,
    *,
    limit: int | None = None,
    progress: bool = True,
    overrides: dict[str, Any] | None = None,
) -> Table:
    """Erase every concept with every method and measure each; what is there is not made again.

    Args:
        methods: names of methods.
        wanted: concepts; None: those of `configs/concepts/glyph.yaml`.
        folder: for patches, images, and the table as bench.json and bench.md.
        limit: prompts a concept.
        overrides: settings for every run.

    Raises:
        ErasureError: an unknown method or concept, or a folder with results of other settings.
    """
    from tqdm import tqdm

    from erasure import methods as registry
    from erasure.pipelines import ErasedStableDiffusionPipeline

    tuned, report = concepts()
    names = wanted or [*tuned, *report]
    for name in names:
        if name not in [*tuned, *report]:
            from erasure.glyph import objects, styles

            if name not in (known := [*objects(), *styles()]):
                raise unknown("concept", name, known)
    for method in methods:
        registry.find(method)
    settings = {"limit": limit or LIMIT, "overrides": overrides or {}}
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    jobs = [(method, name) for method in methods for name in names]
    rows = []
    for method, name in tqdm(jobs, desc="bench", disable=None if progress else True):
        rows.append(_one(pipe, method, name, folder, settings, name in tuned))
        table = Table(rows, settings)
        _put(folder / "bench.json", json.dumps(table.to_json(), indent=1))
        _put(folder / "bench.md", table.markdown() + "\n")
    return Table(rows, settings)


def _one(pipe: Any, method: str, name: str, folder: Path, settings: dict[str, Any], tuned: bool) -> Row:
    from erasure.concept import known_kind
    from erasure.evaluation import evaluate
    from erasure.methods import erase
    from erasure.patch import Patch

    place = folder / method / name.replace(" ", "-")
    note = place / "result.json"
    if note.is_file():
        found = json.loads(note.read_text())
        if found.pop("settings") != settings:
            raise ErasureError(f"{place} holds a result of other settings; use another folder, or delete it")
        return Row(**{**found, "cells": {key: Cell(**cell) for key, cell in found["cells"].items()}})
    target = place / "patch.safetensors"
    patch = Patch.load(target) if target.is_file() else erase(pipe, name, method, out=target, **settings["overrides"])
    pipe.load_patch(patch, name="bench")
    try:
        made = evaluate(pipe, name, folder=place, base_folder=folder / "base", limit=settings["limit"], progress=False)
    finally:
        pipe.unload_patches()
    cells = {}
    for metric in made.rows["patched"]:
        base = made.metric(metric.name, "base")
        cells[metric.name] = Cell(metric.value, metric.low, metric.high, metric.n, base.value if base else float("nan"))
    row = Row(method, name, known_kind(name), tuned, cells, dict(patch.costs), target.stat().st_size)
    _put(note, json.dumps({**asdict(row), "settings": settings}, indent=1))
    return row


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
