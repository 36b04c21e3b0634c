"""Whether LoReUn, gradient surgery and DoCo keep their promises: `python bench/objective.py`; it can be resumed.

Every run erases a concept from glyph with the method's default settings and one option, and is read by its curves
(`erasure/training/curves.py`): on states that nothing trains on, how far the prediction for the concept went to the
method's target, and how far those for neighbours and the empty prompt drifted. No picture is drawn. None of the
concepts was used to choose a setting.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from erasure.benchmark.run import training_seed
from erasure.erasing import erase
from erasure.glyph import CHECKPOINT
from erasure.model.loading import quiet
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline

EVERY = 15  # updates between measurements
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "esd": ("esd", {}),
    "esd, static weights": ("esd", {"reweight": "static"}),
    "esd, dynamic weights": ("esd", {"reweight": "dynamic"}),
    "spm": ("spm", {}),
    "spm, surgery": ("spm", {"surgery": "first"}),
    "doco": ("doco", {}),
    "doco, no surgery": ("doco", {"surgery": "none"}),
    "doco, published surgery": ("doco", {"surgery": "doco"}),
}
HEADS = ("concept", "run", "updates", "least erased", "mean erased", "largest drift", "mean drift", "F", "B")
RESULTS = Path(__file__).resolve().parent / "results"


def measure(pipe: ErasedStableDiffusionPipeline, concept: str, run: str, work: Path) -> dict[str, Any]:
    """Erase a concept, unless its patch is in the folder, and return the row: the last measurement and the costs."""
    method, options = RUNS[run]
    target = work / f"{concept}-{run.replace(', ', '-').replace(' ', '-')}.safetensors"
    if target.is_file():
        patch = Patch.load(target)
    else:
        settings = {**options, "measure_every": EVERY}
        patch = erase(pipe, concept, method, out=target, progress=False, seed=training_seed(concept), **settings)
    curves = patch.curves or {}
    erased, drift = curves["erased"], curves["drift"]
    return {
        "concept": concept,
        "run": run,
        "updates": curves["steps"][-1],
        "least erased": min(erased[-1]),
        "mean erased": sum(erased[-1]) / len(erased[-1]),
        "largest drift": max(drift[-1]),
        "mean drift": sum(drift[-1]) / len(drift[-1]),
        "F": patch.costs["F"],
        "B": patch.costs["B"],
        "curves": curves,
    }


def text(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [HEADS, ("---",) * len(HEADS)]
    lines += [
        tuple(f"{row[head]:.2f}" if isinstance(row[head], float) else str(row[head]) for head in HEADS) for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Run everything that is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["dog", "castle", "ink"])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("-o", "--out", type=Path, default=Path("build/objective"), help="folder of the patches")
    args = parser.parse_args()
    quiet()
    pipe = ErasedStableDiffusionPipeline.from_pretrained(CHECKPOINT)
    rows = []
    for concept in args.concepts:
        for run in args.runs:
            rows.append(measure(pipe, concept, run, args.out))
            print(text(rows[-1:]).splitlines()[-1], flush=True)
            temporary = RESULTS / "objective.json.tmp"
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, RESULTS / "objective.json")


if __name__ == "__main__":
    main()
