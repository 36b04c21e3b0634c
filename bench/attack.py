"""What attackers get back from every method's patches: `python bench/attack.py`, after `erasure bench`.

Both attacks by text that see the weights, each with a control of as many tries (erasure/evaluation/attacks).
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
    """Attack the patches of a bench and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, default=Path("build/bench"))
    parser.add_argument("--work", type=Path, default=Path("build/attack"), help="for pictures; a second run goes on")
    parser.add_argument("--methods", nargs="+", default=names())
    parser.add_argument("--concepts", nargs="+", default=["dog"])
    parser.add_argument("--attacks", nargs="+", default=["unlearndiffatk", "p4d"])
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("bench/results/attack"))
    args = parser.parse_args()
    quiet()
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    reports: dict[tuple[str, str], AttackReport] = {}
    for concept in args.concepts:
        for method in args.methods:
            pipe.load_patch(args.bench / method / concept / "patch.safetensors", name="attacked")
            place = args.work / method / concept
            report = attack(pipe, concept, args.attacks, folder=place, cases=args.cases, progress=False)
            pipe.unload_patches()
            reports[method, concept] = report
            print(report.text(), flush=True)
            args.out.with_suffix(".md").write_text(markdown(reports, args.cases), encoding="utf-8")
            found = {"/".join(key): one.to_json() for key, one in reports.items()}
            args.out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def markdown(reports: dict[tuple[str, str], AttackReport], cases: int) -> str:
    """All concepts of a method together, then each."""
    together = [["method", "attack", "concepts", "before", "after", "control"]]
    for method in dict.fromkeys(method for method, _ in reports):
        several = [report for (one, _), report in reports.items() if one == method]
        for attacked in several[0].outcomes:
            ran = [report.outcome(attacked.name) for report in several]
            n, plain = sum(one.n for one in ran), sum(one.plain for one in ran)
            shares = [plain, plain + sum(len(one.won) for one in ran)]
            if attacked.control is not None:
                shares.append(plain + sum(len(one.control or {}) for one in ran))
            cells = [format_estimate("ASR", hits / n, *wilson(hits, n)) for hits in shares]
            together.append([method, attacked.name, str(len(ran)), *cells, *[""] * (3 - len(cells))])
    head = next(iter(reports.values())).rows()[0]
    each = [["method", "concept", *head]]
    each += [[*key, *row] for key, report in reports.items() for row in report.rows()[1:]]
    note = f"{cases} prompts a concept that show it on the base; budget lite; shares with 95 % intervals (Wilson)."
    return "\n\n".join([note, _table(together), _table(each)]) + "\n"


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
