"""`erasure bench`: methods x concepts on glyph, resumable, as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError, unknown
from erasure.evaluation import metrics
from erasure.evaluation.metrics import figure

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


def pooled(rows: Sequence[Row], name: str) -> metrics.Metric | None:
    """A share over the images of all rows, or H of such shares; None where no row has it."""
    from erasure.evaluation.intervals import wilson

    if name == "H":
        return metrics.harmonic(name, [one for part in metrics.WHOLE if (one := pooled(rows, part))])
    cells = [cell for row in rows if (cell := row.cell(name))]
    n, hits = sum(cell.n for cell in cells), sum(cell.value * cell.n for cell in cells)
    return metrics.Metric(name, hits / n, n, *wilson(hits, n), True, "") if n else None


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
        from erasure.evaluation.intervals import bootstrap_mean

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
                base = [figure(key, entry[key]["base"]) if key in entry else "" for key in shown]
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
                f"{spread(key, asdict(row.cells[key]))} ({figure(key, row.cells[key].base)})"
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
    return metrics.spread(name, cell["value"], cell["low"], cell["high"])


def interval(name: str, cell: Mapping[str, float], between: str = ", ") -> str:
    """The two ends of an interval, without a unit."""
    return metrics.interval(name, cell["low"], cell["high"], between)


def concepts() -> tuple[list[str], list[str]]:
    """Concepts to tune on and concepts to report, of `configs/concepts/glyph.yaml`."""
    from erasure.config import CONFIGS, read_yaml

    found = read_yaml(CONFIGS / "concepts" / "glyph.yaml")
    return list(found["develop"]), [
        *found["report"],
        *(JOINT.join(names) for names in found["together"]),
        *(STACK.join(names) for names in found["stacked"]),
    ]


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
        methods: names of methods; `all` for all of them.
        wanted: concepts, "a+b" for several erased together by one patch, "a&b" for a patch each, stacked; None:
            those of `configs/concepts/glyph.yaml`.
        folder: for patches, images, and the table as bench.json, bench.md, bench.html and bench.png.
        limit: prompts a concept, about.
        overrides: settings for every run.

    Raises:
        ErasureError: an unknown method or concept, or a folder with results of other settings.
    """
    from tqdm import tqdm

    from erasure import methods as registry
    from erasure.glyph import objects, styles
    from erasure.pipelines import ErasedStableDiffusionPipeline

    tuned, report = concepts()
    names = wanted or [*tuned, *report]
    vocabulary = [*objects(), *styles(), *(one for name in [*tuned, *report] for one in members(name))]
    known = list(dict.fromkeys(vocabulary))
    for name in [one for each in names for one in members(each)]:
        if name not in known:
            raise unknown("concept", name, known)
    chosen = registry.names() if methods == ["all"] else methods
    for method in chosen:
        registry.find(method)
    settings = {"limit": limit, "overrides": overrides or {}}
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    jobs = [(method, name) for name in names for method in chosen]
    rows = []
    for method, name in tqdm(jobs, desc="bench", disable=None if progress else True):
        rows.append(_one(pipe, method, name, folder, settings, set(members(name)) <= set(tuned)))
        table = Table(rows, settings)
        _put(folder / "bench.json", json.dumps(table.to_json(), indent=1))
        _put(folder / "bench.md", table.markdown() + "\n")
    write(Table(rows, settings), folder)
    return Table(rows, settings)


def write(table: Table, folder: Path) -> None:
    """Write bench.png and bench.html from the runs that lie in a bench's folder.

    Raises:
        ErasureError: a run's report is gone.
    """
    from erasure.bench_page import page

    image = picture(table.rows, folder)
    image.save(folder / "bench.tmp", format="PNG", optimize=True)
    os.replace(folder / "bench.tmp", folder / "bench.png")
    reports = {}
    for row in table.rows:
        place = _place(folder, row.method, row.concept) / "report.json"
        try:
            reports[row.method, row.concept] = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise ErasureError(
                f"{place} cannot be read, so bench.html was not written: {fault}. "
                f"Delete {place.with_name('result.json')} and run the bench again: it judges that run anew"
            ) from None
    _put(folder / "bench.html", page(table, reports, image))


def _place(folder: Path, method: str, name: str) -> Path:
    short = name if len(name) < 60 else f"{name[:48]}{JOINT}{len(members(name)) - 1}"
    return folder / method / short.replace(" ", "-")


def _one(pipe: Any, method: str, name: str, folder: Path, settings: dict[str, Any], tuned: bool) -> Row:
    from erasure.concept import Concept
    from erasure.evaluation import evaluate
    from erasure.methods import erase
    from erasure.patch import Patch
    from erasure.prompts.about import about

    place = _place(folder, method, name)
    note = place / "result.json"
    if note.is_file():
        found = json.loads(note.read_text())
        if found.pop("settings") != settings:
            raise ErasureError(f"{place} holds a result of other settings; use another folder, or delete it")
        return Row.from_json(found)
    names = members(name)
    parts = {name: names} if STACK not in name else {one: [one] for one in names}
    targets = [_place(folder, method, part) / "patch.safetensors" for part in parts]
    patches = [
        Patch.load(target) if target.is_file() else erase(pipe, what, method, out=target, **settings["overrides"])
        for target, what in zip(targets, parts.values(), strict=True)
    ]
    try:
        for part, patch in zip(parts, patches, strict=True):
            pipe.load_patch(patch, name=part)
        prompts = about(names, settings["limit"])
        options: dict[str, Any] = {"base_folder": folder / "base", "progress": False, "whole": True}
        made = evaluate(pipe, names, folder=place, prompts=prompts, **options)
    finally:
        pipe.unload_patches()
    cells = {}
    for metric in made.rows["patched"]:
        base = made.metric(metric.name, "base")
        cells[metric.name] = Cell(metric.value, metric.low, metric.high, metric.n, base.value if base else float("nan"))
    costs = {cost: sum(patch.costs[cost] for patch in patches) for cost in COSTS}
    row = Row(method, name, Concept.of(names[0]).kind, tuned, cells, costs, sum(one.stat().st_size for one in targets))
    _put(note, json.dumps({**asdict(row), "settings": settings}, indent=1))
    return row


def picture(rows: list[Row], folder: Path, prompts: int = 3) -> Any:
    """Base and every method side by side, same seeds: a line a concept, target prompts and then kept ones."""
    from PIL import Image, ImageDraw

    side, gap, head = 64, 4, 16
    methods = list(dict.fromkeys(row.method for row in rows))
    names = [name for name in dict.fromkeys(row.concept for row in rows) if len(members(name)) == 1]
    block = 2 * prompts * side + 3 * gap
    page = Image.new("RGB", ((len(methods) + 1) * block + gap, head + len(names) * (side + head)), "white")
    pen = ImageDraw.Draw(page)
    for line, name in enumerate(names):
        for column, method in enumerate(["base", *methods]):
            place = folder / "base" if method == "base" else _place(folder, method, name) / "patched"
            report = _place(folder, methods[0], name) / "patched" / "records.jsonl"
            if not (place / "images").is_dir() or not report.is_file():
                continue
            x, y = column * block + gap, head + line * (side + head)
            if line == 0:
                pen.text((x, 2), method, fill="black")
            pen.text((x, y + side + 2), name, fill="#b00020")
            for i, identity in enumerate(_shown(report, name, prompts)):
                path = place / "images" / f"{identity}.png"
                if path.is_file():
                    at = x + i * side + (gap if i >= prompts else 0)
                    page.paste(Image.open(path).convert("RGB").resize((side, side)), (at, y))
    return page


def _shown(records: Path, name: str, count: int) -> list[str]:
    """Ids of the first target prompts and of the first kept ones."""
    from erasure.concept import Concept

    names = set(Concept.of(name).names)
    rows = [json.loads(text) for text in records.read_text(encoding="utf-8").splitlines()]
    hit = [row["id"] for row in rows if names & set(row["labels"].values()) and not row["labels"].get("role")]
    kept = [row["id"] for row in rows if not names & set(row["labels"].values()) and not row["labels"].get("role")]
    return hit[:count] + kept[:count]


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
