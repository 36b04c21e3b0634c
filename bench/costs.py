"""What the published loops cost and what ours cost: `python bench/costs.py`, after `erasure bench`.

F and B are samples forward and backward through the UNet. The published loop (`parity=True`) is forecast by
`erasure plan`, which goes through every step of the loop with a UNet that answers at once, and so counts exactly;
where it takes too many steps for that, the forecast of two shorter runs is drawn out to the full length. Ours is
counted by the run itself, whose UA and IRA stand in the table of `erasure bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from erasure.base import quiet
from erasure.methods import find, names
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.plan import Forecast, plan

SHORT = (20, 60)  # iterations after the warm-up, of the drawn-out forecast
TARGETS = {"esd": 10, "advunlearn": 20, "spm": 3, "salun": 3}


def published(pipe: object, concept: str, method: str) -> Forecast:
    """Forecast of the published loop."""
    quirks = find(method).PARITY
    length, warm_up = quirks["iterations"], quirks.get("warm_up", 0)
    if length <= 200:
        return plan(pipe, concept, method, parity=True)
    counts = [warm_up + count for count in SHORT]
    first, second = (plan(pipe, concept, method, parity=True, iterations=count) for count in counts)
    grown = {}
    for field in ("F", "B", "seconds"):
        step = (getattr(second, field) - getattr(first, field)) / (counts[1] - counts[0])
        grown[field] = type(getattr(first, field))(getattr(second, field) + step * (length - counts[1]))
    return dataclasses.replace(second, **grown)


def main() -> None:
    """Write the table as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concept", default="dog")
    parser.add_argument("--table", type=Path, default=Path("bench/results/glyph.json"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/costs"))
    args = parser.parse_args()
    quiet()
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    table = json.loads(args.table.read_text())["rows"]
    measured = {row["method"]: row for row in table if row["concept"] == args.concept}
    rows = []
    for method in names():
        theirs, ours = published(pipe, args.concept, method), plan(pipe, args.concept, method)
        rows.append(
            {
                "method": method,
                "published": theirs.to_json(),
                "ours": ours.to_json(),
                "F_ratio": theirs.F / ours.F,
                "work_ratio": (theirs.F + 2 * theirs.B) / (ours.F + 2 * ours.B),
                "target": TARGETS.get(method),
                "measured": measured.get(method, {}).get("costs"),
            }
        )
    lines = [
        f"Erasing {args.concept!r} from glyph. F + B: samples through the UNet; work: F + 2 B.",
        "",
        "| method | published F + B | ours F + B | F: × fewer | work: × less | target | memory, published → ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = row["published"], row["ours"]
        memory = [(x["training_bytes"] + x["activation_bytes"] + x["model_bytes"]) / 1e6 for x in (a, b)]
        lines.append(
            f"| {row['method']} | {a['F']:,} + {a['B']:,} | {b['F']:,} + {b['B']:,} | {row['F_ratio']:.1f} "
            f"| {row['work_ratio']:.1f} | {row['target'] or ''} | {memory[0]:.0f} → {memory[1]:.0f} MB |"
        )
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
