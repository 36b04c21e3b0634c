"""How `stop=auto` transfers: `python bench/stopping.py`; it can be resumed.

Every concept is erased from glyph with the rule of `erasure/training/stopping.py` as it is, at learning rates from a
tenth to ten times that of the preset, and evaluated. None of the concepts was used to choose the rule's thresholds. The
aim for each rate is UA >= 90 % with IRA and CRA at most 5 points below the base's, or a run that says that the concept
is not gone and why.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from erasure.benchmark.run import training_seed
from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.evaluation import evaluate
from erasure.evaluation.metrics.metric import format_estimate, format_value
from erasure.methods import configure
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.concept_prompts import concept_prompts, glyph_words

FACTORS = {"1/10": 0.1, "1/3": 1 / 3, "1": 1.0, "3": 3.0, "10": 10.0}
MEASURED = ("UA", "IRA", "CRA")
ERASED, LOST = 0.9, 0.05  # the aim: UA at least, and IRA and CRA at most so far below the base's
RESULTS = Path(__file__).resolve().parent / "results"


def measure(pipe: ErasedStableDiffusionPipeline, job: tuple[str, str, str], work: Path, limit: int) -> dict[str, Any]:
    """Erase a concept at one rate and evaluate it, and return the row; what lies in the folder is used again.

    Args:
        pipe: glyph, without patches.
        job: method, concept, and the name of the factor on the learning rate.
        work: folder for patches and images.
        limit: approximate number of prompts.
    """
    method, concept, factor = job
    place = work / f"{method}-{concept}-{factor.replace('/', '-')}".replace(" ", "-")
    path = place / "row.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    target = place / "patch.safetensors"
    if target.is_file():
        patch = Patch.load(target)
    else:
        kind = Concept.of(concept, glyph_words()).kind
        rate = configure(method, kind).learning_rate * FACTORS[factor]
        options = {"seed": training_seed(concept), "stop": "auto", "learning_rate": rate}
        patch = erase(pipe, concept, method, out=target, **options)
    pipe.load_patch(patch, name="stopped")
    try:
        shared: dict[str, Any] = {"base_folder": work / "base", "progress": False, "whole": True}
        report = evaluate(pipe, concept, folder=place, prompts=concept_prompts([concept], limit), **shared)
    finally:
        pipe.unload_patches()
    cells, base = (
        {m.name: [m.value, m.low, m.high] for m in report.rows[side] if m.name in MEASURED}
        for side in ("patched", "base")
    )
    curves = dict(patch.curves or {})
    costs = {name: patch.costs[name] for name in ("F", "B")}
    row = {
        "method": method,
        "concept": concept,
        "factor": factor,
        "stop": curves["stop"],
        "costs": costs,
        "cells": cells,
        "base": base,
        "limit": limit,
    }
    write(path, json.dumps(row, indent=1))
    return row


def outcome(row: dict[str, Any]) -> str:
    """Return whether a row reaches the aim, or says itself that the concept is not gone, or does neither."""
    cells, base = row["cells"], row["base"]
    kept = all(cells[name][0] >= base[name][0] - LOST - 1e-9 for name in ("IRA", "CRA"))
    if cells["UA"][0] >= ERASED and kept:
        return "reached"
    return "missed" if row["stop"]["gone"] else "refused"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown, with a sentence that explains it."""
    bounds = rows[0]["stop"]["bounds"]
    lines = [
        f"`stop=auto` on glyph at learning rates from a tenth to ten times the preset's, over about {rows[0]['limit']} "
        f"prompts, with 95 % intervals. Thresholds: gone from {bounds['gone']:g}, gain {bounds['gain']:g}, drift "
        f"{bounds['drift']:g}. updates: the state that the patch holds, of the largest number allowed; lowered: how "
        "often the rate was lowered; erased, drift: of that state. aim: UA of at least 90 % with IRA and CRA at most 5 "
        "points below the base's. refused: the run says that the concept is not gone.",
        "",
        "| concept | method | rate | ended by | updates | lowered | erased | drift | UA ↑ | IRA ↑ | CRA ↑ | F | B "
        "| aim |",
        "|---" * 14 + "|",
    ]
    shown = set()
    for row in rows:
        stop, concept = row["stop"], row["concept"]
        if concept not in shown:
            base = " | ".join(format_value(name, row["base"][name][0]) for name in MEASURED)
            lines.append(f"| {concept} | *base* |  |  |  |  |  |  | {base} |  |  |  |")
            shown.add(concept)
        cells = [format_estimate(name, *row["cells"][name]) for name in MEASURED]
        why = f"{stop['why']}{'' if stop['gone'] else ', not gone'}"
        facts = [
            *(concept, row["method"], f"× {row['factor']}", why, f"{stop['step']} of {stop['limit']}"),
            *(str(stop["lowered"]), f"{stop['erased']:.2f}", f"{stop['drift']:.2f}", *cells),
            *(f"{row['costs'][name]:,}" for name in ("F", "B")),
            outcome(row),
        ]
        lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Measure every row and write the table as Markdown and JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["owl", "banana", "stamp"], help="concepts to erase")
    parser.add_argument("--methods", nargs="+", default=["esd"], help="methods that stop=auto suits")
    parser.add_argument(
        "--rates", nargs="+", default=list(FACTORS), choices=FACTORS, help="factors on the preset's rate"
    )
    parser.add_argument("--limit", type=int, default=40, help="number of prompts, approximately")
    parser.add_argument("--work", type=Path, default=Path("build/stopping"), help="folder for patches and images")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "stopping.json", help="the table; .md is written beside it"
    )
    args = parser.parse_args()
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    for job in [(method, concept, rate) for concept in args.concepts for method in args.methods for rate in args.rates]:
        rows.append(measure(pipe, job, args.work, args.limit))
        write(args.out, json.dumps(rows, indent=1) + "\n")
        write(args.out.with_suffix(".md"), markdown(rows))
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
