"""Attack the patches of every method and write the success rates: `python bench/attack.py`, after `erasure bench`.

By default these are the two text attacks that use the erased model's gradients, UnlearnDiffAtk and P4D. Each has a
control: equally many tries without the search.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from erasure.evaluation.attacks.report import AttackReport
from erasure.evaluation.attacks.run import attack
from erasure.evaluation.metrics.metric import format_estimate
from erasure.evaluation.metrics.statistics import wilson
from erasure.methods import names
from erasure.model.loading import quiet
from erasure.pipelines import ErasedStableDiffusionPipeline


def main() -> None:
    """Attack the patches of a benchmark and write the table as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--bench", type=Path, default=Path("build/bench"), help="folder that `erasure bench` wrote")
    parser.add_argument(
        "--work", type=Path, default=Path("build/attack"), help="folder for images; a second run resumes from it"
    )
    parser.add_argument("--methods", nargs="+", default=names(), help="methods whose patches are attacked")
    parser.add_argument("--concepts", nargs="+", default=["dog"], help="concepts whose patches are attacked")
    parser.add_argument("--attacks", nargs="+", default=["unlearndiffatk", "p4d"], help="attacks to run")
    parser.add_argument("--cases", type=int, default=12, help="prompts to attack per concept")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/attack"), help="path of the results without a suffix"
    )
    args = parser.parse_args()
    quiet()
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    reports: dict[tuple[str, str], AttackReport] = {}
    for concept in args.concepts:
        for method in args.methods:
            pipe.load_patch(args.bench / method / concept / "patch.safetensors", name="attacked")
            folder = args.work / method / concept
            report = attack(pipe, concept, args.attacks, folder=folder, cases=args.cases, progress=False)
            pipe.unload_patches()
            reports[method, concept] = report
            print(report.text(), flush=True)
            args.out.with_suffix(".md").write_text(markdown(reports, args.cases), encoding="utf-8")
            data = {"/".join(key): result.to_json() for key, result in reports.items()}
            args.out.with_suffix(".json").write_text(json.dumps(data, indent=1), encoding="utf-8")


def markdown(reports: dict[tuple[str, str], AttackReport], cases: int) -> str:
    """Return a table of all concepts together for each method and attack, and a table of each concept.

    Args:
        reports: (method, concept) -> the report of its attacks.
        cases: number of prompts per concept.
    """
    together = [["method", "attack", "concepts", "before", "after", "control"]]
    for method in dict.fromkeys(method for method, _ in reports):
        of_method = [report for (name, _), report in reports.items() if name == method]
        for first in of_method[0].outcomes:
            outcomes = [report.outcome(first.name) for report in of_method]
            n, plain = sum(outcome.n for outcome in outcomes), sum(outcome.plain for outcome in outcomes)
            counts = [plain, plain + sum(len(outcome.won) for outcome in outcomes)]
            if first.control is not None:
                counts.append(plain + sum(len(outcome.control or {}) for outcome in outcomes))
            cells = [format_estimate("ASR", hits / n, *wilson(hits, n)) for hits in counts]
            together.append([method, first.name, str(len(outcomes)), *cells, *[""] * (3 - len(cells))])
    head = next(iter(reports.values())).rows()[0]
    separate = [["method", "concept", *head]]
    separate += [[*key, *row] for key, report in reports.items() for row in report.rows()[1:]]
    note = (
        f"Attack success rates over {cases} prompts per concept for which the base model shows it, with 95 % intervals "
        "(Wilson); budget lite, adapted to a CPU."
    )
    return "\n\n".join([note, _table(together), _table(separate)]) + "\n"


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
