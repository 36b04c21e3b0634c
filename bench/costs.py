"""What the published loops cost and what ours cost: `python bench/costs.py`, after `erasure bench`.

F and B are samples forward and backward through the UNet. The published loop (`parity=True`) is forecast by
`erasure plan`, which goes through every step of the loop with a UNet that answers at once, and so counts exactly;
where it takes too many steps for that, the forecast of two shorter runs is drawn out to the full length. Ours is
counted by the run itself, whose UA and IRA stand in the table of `erasure bench`. What the latent gate asks of the
UNet to decide on a prompt is counted over the prompts of the bench.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from erasure.base import quiet
from erasure.diffusion import Counts, counting
from erasure.methods import find, names
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.latent import LatentGate
from erasure.plan import Forecast, plan
from erasure.prompts.about import about

DECISION = "latent gate, a prompt"
SHORT = (20, 60)  # iterations after the warm-up, of the drawn-out forecast
TARGETS = {"esd": 10, "advunlearn": 20, "spm": 3, "salun": 3, DECISION: 3}


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


def decision(pipe: ErasedStableDiffusionPipeline, patch: Patch, prompts: list[str]) -> dict[str, Any]:
    """F to decide whether a latent gate opens, a prompt: the published decision's, and ours as counted here."""
    # R noises, each walked with guidance and then asked of both networks, for the prompt and anew for the empty one.
    theirs = 2 * LatentGate().repeats * (2 * LatentGate().after + 2)
    total = Counts()
    pipe.load_patch(patch, name="counted")
    for prompt in prompts:
        asked = Counts()
        with counting(pipe.unet, asked):
            pipe(prompt, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
        opened = pipe.gate_log[0]["counted"] != 0
        total.forward += asked.forward - (2 if opened else 1)  # the picture's own step
    pipe.unload_patches()
    ours = total.forward / len(prompts)
    return {"method": DECISION, "published": {"F": theirs, "B": 0}, "ours": {"F": round(ours, 1), "B": 0}}


def main() -> None:
    """Write the table as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concept", default="dog")
    parser.add_argument("--table", type=Path, default=Path("bench/results/glyph.json"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/costs"))
    parser.add_argument(
        "--bench", type=Path, default=Path("build/bench"), help="where `erasure bench` left its patches"
    )
    args = parser.parse_args()
    quiet()
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    table = json.loads(args.table.read_text())["rows"]
    measured = {row["method"]: row for row in table if row["concept"] == args.concept}
    rows: list[dict[str, Any]] = []
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
    place = args.bench / "unguide" / args.concept / "patch.safetensors"
    if place.is_file():
        prompts = list(dict.fromkeys(row.prompt for row in about([args.concept], 45).rows))
        row = decision(pipe, Patch.load(place), prompts)
        ratio = row["published"]["F"] / row["ours"]["F"]
        rows.append({**row, "F_ratio": ratio, "work_ratio": ratio, "target": TARGETS[DECISION], "measured": None})
    lines = [
        f"Erasing {args.concept!r} from glyph. F + B: samples through the UNet; work: F + 2 B.",
        "",
        "| method | published F + B | ours F + B | F: × fewer | work: × less | target | MB, published → ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = row["published"], row["ours"]
        memory = [f"{x['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in x else "" for x in (a, b)]
        lines.append(
            f"| {row['method']} | {a['F']:,} + {a['B']:,} | {b['F']:,} + {b['B']:,} | {row['F_ratio']:.1f} "
            f"| {row['work_ratio']:.1f} | {row['target'] or ''} | {' → '.join(memory)} |"
        )
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
