"""Whether LoReUn, surgery, DoCo, sparsity and NegMerge keep what they promise: `python bench/objective.py` (resumable).

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

import torch

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
    "esd, l1": ("esd", {"sparsity": "l1", "sparsity_l1": 0.3}),
    "esd, prune": ("esd", {"sparsity": "prune"}),
    "esd, sara": ("esd", {"sparsity": "sara", "learning_rate": 1e-3}),
    "negmerge": ("negmerge", {}),
    "negmerge, mean": ("negmerge", {"consensus": "none"}),
    "task negation": ("negmerge", {"fine_tunes": 1}),
    "doco": ("doco", {}),
    "doco, no surgery": ("doco", {"surgery": "none"}),
    "doco, published surgery": ("doco", {"surgery": "doco"}),
}
HEADS = ("concept", "run", "updates", "least erased", "mean erased", "largest drift", "mean drift", "changed", "F", "B")
RESULTS = Path(__file__).resolve().parent / "results"


def measure(pipe: ErasedStableDiffusionPipeline, concept: str, run: str, work: Path) -> dict[str, Any]:
    """Erase a concept, unless its patch is in the folder, and return the row: the last measurement and the costs."""
    method, options = RUNS[run]
    target = work / f"{concept}-{run.replace(', ', '-').replace(' ', '-')}.safetensors"
    if target.is_file():
        patch = Patch.load(target)
    else:
        settings = {**options, **({} if method == "negmerge" else {"measure_every": EVERY})}  # it measures its scales
        patch = erase(pipe, concept, method, out=target, progress=False, seed=training_seed(concept), **settings)
    curves = patch.curves or {}
    place = curves["scales"].index(curves["scale"]) if "scale" in curves else -1
    erased, drift = curves["erased"][place], curves["drift"][place]
    numbers = torch.cat([tensor.flatten() for tensor in patch.payload.tensors()])
    return {
        "concept": concept,
        "run": run,
        "updates": patch.config["iterations"],
        "least erased": min(erased),
        "mean erased": sum(erased) / len(erased),
        "largest drift": max(drift),
        "mean drift": sum(drift) / len(drift),
        "changed": float((numbers != 0).float().mean()),
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
    """Run everything that is missing, and write the results beside those of other runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["dog", "castle", "ink"])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("-o", "--out", type=Path, default=Path("build/objective"), help="folder of the patches")
    args = parser.parse_args()
    quiet()
    pipe = ErasedStableDiffusionPipeline.from_pretrained(CHECKPOINT)
    results = RESULTS / "objective.json"
    asked = {(concept, run) for concept in args.concepts for run in args.runs}
    earlier = json.loads(results.read_text()) if results.is_file() else []
    rows = [row for row in earlier if (row["concept"], row["run"]) not in asked]
    for concept in args.concepts:
        for run in args.runs:
            rows.append(measure(pipe, concept, run, args.out))
            print(text(rows[-1:]).splitlines()[-1], flush=True)
            temporary = results.with_suffix(".tmp")
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, results)


if __name__ == "__main__":
    main()
