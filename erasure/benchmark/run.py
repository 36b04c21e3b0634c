"""`erasure bench`: methods x concepts on glyph, resumable, as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from erasure.benchmark.table import COSTS, JOINT, STACK, Cell, Row, Table, members
from erasure.errors import ErasureError, unknown
from erasure.prompts.concept_prompts import glyph_words


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
    from erasure.pipelines import ErasedStableDiffusionPipeline

    tuned, report = concepts()
    names = wanted or [*tuned, *report]
    words = glyph_words()
    vocabulary = [*words.objects, *words.styles, *(one for name in [*tuned, *report] for one in members(name))]
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
    from erasure.benchmark.page import page

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
    from erasure.concepts.concept import Concept
    from erasure.erasing import erase
    from erasure.evaluation import evaluate
    from erasure.patch import Patch
    from erasure.prompts.concept_prompts import concept_prompts

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
        prompts = concept_prompts(names, settings["limit"])
        options: dict[str, Any] = {"base_folder": folder / "base", "progress": False, "whole": True}
        made = evaluate(pipe, names, folder=place, prompts=prompts, **options)
    finally:
        pipe.unload_patches()
    cells = {}
    for metric in made.rows["patched"]:
        base = made.metric(metric.name, "base")
        cells[metric.name] = Cell(metric.value, metric.low, metric.high, metric.n, base.value if base else float("nan"))
    costs = {cost: sum(patch.costs[cost] for patch in patches) for cost in COSTS}
    row = Row(
        method,
        name,
        Concept.of(names[0], glyph_words()).kind,
        tuned,
        cells,
        costs,
        sum(one.stat().st_size for one in targets),
    )
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
    from erasure.concepts.concept import Concept

    names = set(Concept.of(name, glyph_words()).names)
    rows = [json.loads(text) for text in records.read_text(encoding="utf-8").splitlines()]
    hit = [row["id"] for row in rows if names & set(row["labels"].values()) and not row["labels"].get("role")]
    kept = [row["id"] for row in rows if not names & set(row["labels"].values()) and not row["labels"].get("role")]
    return hit[:count] + kept[:count]


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
