"""Attack the patches of every method and write the success rates: `python bench/attack.py`; it can be resumed.

By default these are the two text attacks that use the erased model's gradients, UnlearnDiffAtk and P4D. Each has a
control: equally many tries without the search. Patches that `erasure bench` has not written are trained first, with the
bench's settings and seeds. The concepts are attacked one after the other by all methods, so that a run that was ended
early compares the methods on the same concepts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from erasure.benchmark.attacked import AttackTable
from erasure.benchmark.run import Job
from erasure.evaluation.attacks.report import AttackReport
from erasure.evaluation.attacks.run import attack
from erasure.model.loading import quiet
from erasure.pipelines import ErasedStableDiffusionPipeline

METHODS = ["advunlearn", "esd", "salun", "spm", "unguide", "uce"]
CONCEPTS = ["dog", "castle", "sunflower", "bicycle", "umbrella", "owl"]


def main() -> None:
    """Attack the patches of a benchmark and write the table as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--bench", type=Path, default=Path("build/bench"), help="folder for patches, as `erasure bench` writes it"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/attack"), help="folder for images; a second run resumes from it"
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, help="methods whose patches are attacked")
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS, help="concepts whose patches are attacked")
    parser.add_argument("--attacks", nargs="+", default=["unlearndiffatk", "p4d"], help="attacks to run")
    parser.add_argument("--cases", type=int, default=24, help="prompts to attack per concept")
    parser.add_argument(
        "--budget", choices=["lite", "full"], default="lite", help="lite is adapted to a CPU, full as published"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/attack"), help="path of the results without a suffix"
    )
    parser.add_argument(
        "--reports-from", type=Path, help="a table (attack.json) whose reports are taken instead of attacking again"
    )
    args = parser.parse_args()
    earlier = {} if args.reports_from is None else AttackTable.from_json(args.reports_from, args.budget).reports
    quiet()
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    reports: dict[tuple[str, str], AttackReport] = {}
    for concept in args.concepts:
        for method in args.methods:
            if (method, concept) in earlier:
                reports[method, concept] = earlier[method, concept]
            else:
                (patch,) = Job(method, concept).patches(pipe, args.bench, {"overrides": {}}).values()
                pipe.load_patch(patch, name="attacked")
                folder = args.work / args.budget / method / concept
                options = {"folder": folder, "cases": args.cases, "budget": args.budget, "progress": False}
                reports[method, concept] = attack(pipe, concept, args.attacks, **options)
                pipe.unload_patches()
            print(reports[method, concept].text(), flush=True)
            table = AttackTable(reports, args.budget)
            args.out.with_suffix(".md").write_text(table.markdown(), encoding="utf-8")
            args.out.with_suffix(".json").write_text(json.dumps(table.to_json(), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
