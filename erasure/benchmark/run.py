"""`erasure bench`: measure every method on every concept of glyph; a run that was interrupted can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from erasure.benchmark.row import JOINT, STACK, Cell, Row, members
from erasure.benchmark.table import COSTS, Table
from erasure.errors import ErasureError, unknown
from erasure.prompts.concept_prompts import concept_prompts, glyph_words


def concept_lists() -> tuple[list[str], list[str]]:
    """Read the concepts for tuning and the concepts for reporting from `configs/concepts/glyph.yaml`.

    Groups of concepts are joined to one name: "a+b" for one joint patch, "a&b" for stacked patches.
    """
    from erasure.config import CONFIGS, read_yaml

    lists = read_yaml(CONFIGS / "concepts" / "glyph.yaml")
    return list(lists["develop"]), [
        *lists["report"],
        *(JOINT.join(names) for names in lists["together"]),
        *(STACK.join(names) for names in lists["stacked"]),
    ]


def bench(
    methods: list[str],
    concepts: list[str] | None,
    folder: Path,
    *,
    limit: int | None = None,
    progress: bool = True,
    overrides: dict[str, Any] | None = None,
    rows_from: Path | None = None,
) -> Table:
    """Erase every concept from glyph with every method and measure the results.

    Results that are already in `folder` are used again. The table is written after each run as bench.json and
    bench.md, and at the end with images as bench.html and bench.png.

    Args:
        methods: names of methods, or ["all"].
        concepts: names of concepts; "a+b" erases two by one patch, "a&b" stacks one patch for each. None takes those
            of `configs/concepts/glyph.yaml`.
        folder: folder for patches, images and the table.
        limit: approximate number of prompts per concept; None takes all.
        progress: show a progress bar.
        overrides: settings for every method.
        rows_from: a table (bench.json) whose rows are taken instead of being measured again. They come without images,
            so the page and the picture leave them out.

    Raises:
        ErasureError: an unknown method or concept, a limit that is too low, or a folder or table with results of other
            settings.
    """
    from tqdm import tqdm

    from erasure import methods as registry
    from erasure.pipelines import ErasedStableDiffusionPipeline

    tuned, report = concept_lists()
    chosen_concepts = concepts or [*tuned, *report]
    _check_concepts(chosen_concepts, [*tuned, *report])
    chosen_methods = registry.names() if methods == ["all"] else methods
    for method in chosen_methods:
        registry.find(method)
    settings = {"limit": limit, "overrides": overrides or {}}
    asked = {concept: concept_prompts(members(concept), limit).rows for concept in chosen_concepts}
    earlier = {} if rows_from is None else _earlier_rows(rows_from, settings)
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    jobs = [(method, concept) for concept in chosen_concepts for method in chosen_methods]
    rows: list[Row] = []
    prompts: dict[str, str] = {}
    for method, concept in tqdm(jobs, desc="bench", disable=None if progress else True):
        job = Job(method, concept, set(members(concept)) <= set(tuned))
        rows.append(job.stored(folder, settings) or earlier.get((method, concept)) or job.run(pipe, folder, settings))
        prompts |= {prompt.id: prompt.prompt for prompt in asked[concept]}
        table = Table(rows, settings, prompts)
        _write_text(folder / "bench.json", json.dumps(table.to_json(), indent=1))
        _write_text(folder / "bench.md", table.markdown() + "\n")
    table = Table(rows, settings, prompts)
    write(table, folder)
    return table


def _earlier_rows(path: Path, settings: dict[str, Any]) -> dict[tuple[str, str], Row]:
    """Return (method, concept) -> row of a table that an earlier run wrote with the same settings."""
    try:
        table = Table.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ErasureError(f"{path}: not a table of `erasure bench` (bench.json): {fault}") from None
    if table.settings != settings:
        raise ErasureError(
            f"{path} was measured with the settings {table.settings}, not {settings}: rows of both in one table would "
            "not be comparable. Give the same --limit and --set, or another table"
        )
    return {(row.method, row.concept): row for row in table.rows}


def _check_concepts(concepts: list[str], listed: list[str]) -> None:
    words = glyph_words()
    vocabulary = [*words.objects, *words.styles, *(name for concept in listed for name in members(concept))]
    known = list(dict.fromkeys(vocabulary))
    for name in (name for concept in concepts for name in members(concept)):
        if name not in known:
            raise unknown("concept", name, known)


def write(table: Table, folder: Path) -> None:
    """Write bench.png and bench.html from a table and the runs in its folder; rows without a run are left out.

    Args:
        table: the rows to show.
        folder: the folder that `bench` wrote.

    Raises:
        ErasureError: the report of a run is missing or damaged.
    """
    from erasure.benchmark.page import page
    from erasure.benchmark.strip import strip

    table = replace(table, rows=[r for r in table.rows if _run_folder(folder, r.method, r.concept).is_dir()])
    if not table.rows:
        return
    image = picture(table.rows, folder)
    image.save(folder / "bench.tmp", format="PNG", optimize=True)
    os.replace(folder / "bench.tmp", folder / "bench.png")
    reports = {}
    for row in table.rows:
        path = _run_folder(folder, row.method, row.concept) / "report.json"
        try:
            reports[row.method, row.concept] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise ErasureError(
                f"{path} cannot be read, so bench.html was not written: {fault}. "
                f"Delete {path.with_name('result.json')} and run the bench again to repeat the judging of that run"
            ) from None
    folders = {(row.method, row.concept): _run_folder(folder, row.method, row.concept) for row in table.rows}
    examples = strip(table.rows, reports, folders, folder / "base")
    _write_text(folder / "bench.html", page(table, reports, image, examples))


def _run_folder(folder: Path, method: str, concept: str) -> Path:
    """Return the folder of one run; long names of groups are shortened."""
    short = concept if len(concept) < 60 else f"{concept[:48]}{JOINT}{len(members(concept)) - 1}"
    return folder / method / short.replace(" ", "-")


@dataclass(frozen=True)
class Job:
    """One method on one concept or group of concepts.

    Args:
        tuned: whether settings were tuned on the concept.
    """

    method: str
    concept: str
    tuned: bool = False

    def stored(self, folder: Path, settings: dict[str, Any]) -> Row | None:
        """Return the row of an earlier run with the same settings, or None if there is none."""
        place = _run_folder(folder, self.method, self.concept)
        path = place / "result.json"
        if not path.is_file():
            return None
        result = json.loads(path.read_text())
        if result.pop("settings") != settings:
            raise ErasureError(
                f"{place} holds a result of other settings, which was left untouched: use another folder or delete it"
            )
        return Row.from_json(result)

    def run(self, pipe: Any, folder: Path, settings: dict[str, Any]) -> Row:
        """Erase and evaluate, and write the row to result.json in the folder of the run."""
        from erasure.concepts.concept import Concept
        from erasure.evaluation import evaluate

        place = _run_folder(folder, self.method, self.concept)
        names = members(self.concept)
        patches = self.patches(pipe, folder, settings)
        try:
            for part, patch in patches.items():
                pipe.load_patch(patch, name=part)
            prompts = concept_prompts(names, settings["limit"])
            options: dict[str, Any] = {"base_folder": folder / "base", "progress": False, "whole": True}
            report = evaluate(pipe, names, folder=place, prompts=prompts, **options)
        finally:
            pipe.unload_patches()
        cells = {}
        for metric in report.rows["patched"]:
            base = report.metric(metric.name, "base")
            base_value = base.value if base else float("nan")
            cells[metric.name] = Cell(metric.value, metric.low, metric.high, metric.n, base_value)
        row = Row(
            method=self.method,
            concept=self.concept,
            kind=Concept.of(names[0], glyph_words()).kind,
            tuned=self.tuned,
            cells=cells,
            costs={cost: sum(patch.costs[cost] for patch in patches.values()) for cost in COSTS},
            bytes=sum(self.patch_path(folder, part).stat().st_size for part in patches),
            outcomes=report.outcomes["patched"],
            base=report.outcomes["base"],
        )
        _write_text(place / "result.json", json.dumps({**asdict(row), "settings": settings}, indent=1))
        return row

    def patches(self, pipe: Any, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the patches by name, one for a joint erasure and one per concept for a stack; erase what is missing.

        A patch that is in the folder, also from another run, is loaded.
        """
        from erasure.erasing import erase
        from erasure.patch import Patch

        names = members(self.concept)
        parts = {name: [name] for name in names} if STACK in self.concept else {self.concept: names}
        patches = {}
        for part, concepts in parts.items():
            path = self.patch_path(folder, part)
            if path.is_file():
                patches[part] = Patch.load(path)
            else:
                options = {"seed": training_seed(part), **settings["overrides"]}
                patches[part] = erase(pipe, concepts, self.method, out=path, **options)
        return patches

    def patch_path(self, folder: Path, part: str) -> Path:
        """Return the path of the patch for one concept or one joint group."""
        return _run_folder(folder, self.method, part) / "patch.safetensors"


def training_seed(concept: str) -> int:
    """Return the seed that a concept is erased with: another for each concept, so that no seed favours a method."""
    return int.from_bytes(hashlib.sha256(concept.encode()).digest()[:2], "big")


def picture(rows: list[Row], folder: Path, prompts: int = 3) -> Any:
    """Compose one image of the base and all methods side by side, with the same seeds.

    There is one line per concept, with target prompts first and kept prompts after them. Groups of concepts are
    left out.

    Args:
        rows: rows of the table.
        folder: the folder that `bench` wrote.
        prompts: number of target prompts, and of kept prompts.
    """
    from PIL import Image, ImageDraw

    side, gap, head = 64, 4, 16
    methods = list(dict.fromkeys(row.method for row in rows))
    names = [name for name in dict.fromkeys(row.concept for row in rows) if len(members(name)) == 1]
    block = 2 * prompts * side + 3 * gap
    canvas = Image.new("RGB", ((len(methods) + 1) * block + gap, head + len(names) * (side + head)), "white")
    pen = ImageDraw.Draw(canvas)
    for line, name in enumerate(names):
        for column, method in enumerate(["base", *methods]):
            place = folder / "base" if method == "base" else _run_folder(folder, method, name) / "patched"
            records = _run_folder(folder, methods[0], name) / "patched" / "records.jsonl"
            if not (place / "images").is_dir() or not records.is_file():
                continue
            x, y = column * block + gap, head + line * (side + head)
            if line == 0:
                pen.text((x, 2), method, fill="black")
            pen.text((x, y + side + 2), name, fill="#b00020")
            for i, identity in enumerate(_shown_ids(records, name, prompts)):
                path = place / "images" / f"{identity}.png"
                if path.is_file():
                    left = x + i * side + (gap if i >= prompts else 0)
                    canvas.paste(Image.open(path).convert("RGB").resize((side, side)), (left, y))
    return canvas


def _shown_ids(records: Path, name: str, count: int) -> list[str]:
    """Return the ids of the first `count` target prompts and of the first `count` kept prompts."""
    from erasure.concepts.concept import Concept

    names = set(Concept.of(name, glyph_words()).names)
    rows = [json.loads(text) for text in records.read_text(encoding="utf-8").splitlines()]
    target = [row["id"] for row in rows if names & set(row["labels"].values()) and not row["labels"].get("role")]
    kept = [row["id"] for row in rows if not names & set(row["labels"].values()) and not row["labels"].get("role")]
    return target[:count] + kept[:count]


def _write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
