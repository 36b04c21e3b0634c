"""How much of SalUn's saliency a mask keeps, by its density: `python bench/saliency.py`.

A mask that keeps nearly all of it takes nothing from the unlearning's first-order effect, and spares nothing either.
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

DENSITIES = (0.5, 0.1, 0.02)


def main() -> None:
    """Write the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=["church", "guitar"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/saliency.md"))
    args = parser.parse_args()
    quiet()
    base = Base.load("glyph")
    lines = ["| concept | density | share of the saliency | of its squares |", "|---|---|---|---|"]
    for name in args.concepts:
        several = [Concept.of(name)]
        method = configured("salun", several, {"density": 1.0})
        state = method.prepare(base, several, Run(progress=False))
        scores = method.saliency(state)
        state.adapter.remove()
        every = torch.cat([score.flatten() for score in scores.values()]).double()
        for density in DENSITIES:
            kept = torch.cat([scores[one][mask] for one, mask in top(scores, density).items()]).double()
            shares = [float((kept**power).sum() / (every**power).sum()) for power in (1, 2)]
            lines.append(f"| {name} | {density} | {shares[0]:.1%} | {shares[1]:.1%} |")
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
