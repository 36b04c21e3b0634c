"""Measure how much of SalUn's saliency a mask of a given density keeps: `python bench/saliency.py`.

A mask that keeps nearly all saliency leaves the first-order effect of unlearning as it is, and protects nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from erasure.concepts.concept import Concept
from erasure.methods import configured
from erasure.model.base import Base
from erasure.model.loading import quiet
from erasure.training.run import Run
from erasure.training.saliency import top

DENSITIES = (0.5, 0.1, 0.02)  # shares of the weights that a mask selects


def main() -> None:
    """Measure every concept and write the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["church", "guitar"], help="concepts to erase")
    parser.add_argument("--out", type=Path, default=Path("bench/results/saliency.md"), help="path of the table")
    args = parser.parse_args()
    quiet()
    base = Base.load("glyph")
    lines = ["| concept | density | share of the saliency | share of the squared saliency |", "|---|---|---|---|"]
    for name in args.concepts:
        concepts = [Concept.of(name)]
        method = configured("salun", concepts, {"density": 1.0})
        state = method.prepare(base, concepts, Run(progress=False))
        scores = method.saliency(state)
        state.adapter.remove()
        all_scores = torch.cat([score.flatten() for score in scores.values()]).double()
        for density in DENSITIES:
            kept = torch.cat([scores[parameter][mask] for parameter, mask in top(scores, density).items()]).double()
            shares = [float((kept**power).sum() / (all_scores**power).sum()) for power in (1, 2)]
            lines.append(f"| {name} | {density} | {shares[0]:.1%} | {shares[1]:.1%} |")
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
