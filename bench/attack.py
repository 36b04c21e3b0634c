"""What attackers get back from every method's patches: `python bench/attack.py`, after `erasure bench`.

Both attacks by text that see the weights, each with a control of as many tries (erasure/evaluation/attacks).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from erasure.base import quiet
from erasure.evaluation.attacks.run import attack
from erasure.methods import names
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
    found: dict[str, object] = {}
    lines: list[list[str]] = []
    for concept in args.concepts:
        for method in args.methods:
            pipe.load_patch(args.bench / method / concept / "patch.safetensors", name="attacked")
            place = args.work / method / concept
            report = attack(pipe, concept, args.attacks, folder=place, cases=args.cases, progress=False)
            pipe.unload_patches()
            found[f"{method}/{concept}"] = report.to_json()
            head, *rows = report.rows()
            lines = lines or [["method", "concept", *head]]
            lines += [[method, concept, *row] for row in rows]
            print(report.text(), flush=True)
            table = [f"| {' | '.join(cells)} |" for cells in lines]
            note = f"{args.cases} prompts a row that show the concept on the base; budget lite."
            text = "\n".join([note, "", table[0], "|---" * len(lines[0]) + "|", *table[1:]])
            args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
            args.out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
