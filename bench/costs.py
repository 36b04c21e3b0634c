"""What the published loops cost, and what ours: `python bench/costs.py`. It resumes.

Each method erases one concept twice, as published (`parity=True`: its settings, its quirks, nothing pooled) and with
our defaults, each run in a process of its own: F and B, samples forward and backward through the UNet, as the run
counts them, its seconds, how far its memory grew (in a short run of its own), and what it erased and kept. A published
loop of more than `--most` F is not run: `erasure plan` goes through some of its steps with a UNet that answers at once,
counts exactly, and is drawn out to the full length; ours is forecast beside it in the same way, so that the seconds
compare. What a latent gate asks of the UNet to decide on a prompt is counted over the prompts of the evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from erasure.erasing import erase
from erasure.evaluation import evaluate
from erasure.forecast import plan
from erasure.methods import find, names
from erasure.model.diffusion import Counts, counting
from erasure.model.loading import quiet
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.gates.latent import LatentGate
from erasure.prompts.concept_prompts import concept_prompts

DECISION = "latent gate, a prompt"
SHORT = (20, 60)  # iterations after the warm-up, of the drawn-out forecast
TARGETS = {"esd": 10, "advunlearn": 20, "spm": 3, "salun": 3, DECISION: 3}
MEASURED = ("UA", "IRA", "CRA")


def forecast(pipe: Any, concept: str, method: str, *, parity: bool) -> dict[str, Any]:
    """F, B and seconds of a loop; a long one is drawn out from two short ones."""
    quirks = find(method).PARITY if parity else {}
    length, warm_up = quirks.get("iterations", 0), quirks.get("warm_up", 0)
    if length <= 200:
        return plan(pipe, concept, method, parity=parity).to_json()
    counts = [warm_up + count for count in SHORT]
    first, second = (plan(pipe, concept, method, parity=parity, iterations=count).to_json() for count in counts)
    steps = (length - counts[1]) / (counts[1] - counts[0])
    grown = {name: second[name] + (second[name] - first[name]) * steps for name in ("F", "B", "seconds")}
    return {"F": round(grown["F"]), "B": round(grown["B"]), "seconds": grown["seconds"]}


def measure(concept: str, method: str, folder: Path, *, parity: bool, limit: int) -> dict[str, Any]:
    """Erase and evaluate, in this process."""
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    target = folder / "patch.safetensors"
    settings: dict[str, Any] = {"parity": True} if parity else {}
    patch = Patch.load(target) if target.is_file() else erase(pipe, concept, method, out=target, **settings)
    pipe.load_patch(patch, name="costs")
    shared: dict[str, Any] = {"base_folder": folder.parent / "base", "progress": False, "whole": True}
    made = evaluate(pipe, concept, folder=folder, prompts=concept_prompts([concept], limit), **shared)
    cells, base = (
        {metric.name: metric.value for metric in made.rows[side] if metric.name in MEASURED}
        for side in ("patched", "base")
    )
    return {**patch.costs, **cells, "base": base}


def memory(concept: str, method: str, *, parity: bool) -> dict[str, Any]:
    """How far this process grows in two updates and what they need before them: more updates need no more."""
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    pipe("", num_inference_steps=1, output_type="latent")  # what the first call allocates is the base's
    process, stop = psutil.Process(), threading.Event()
    before, highest = process.memory_info().rss, [0]

    def watch() -> None:
        while not stop.wait(0.02):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        settings: dict[str, Any] = {"parity": True} if parity else {}
        erase(pipe, concept, method, progress=False, iterations=2, **settings)
    finally:
        stop.set()
        watcher.join()
    return {"grown_bytes": max(0, highest[0] - before)}


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
    return {"published": {"F": theirs, "B": 0}, "ours": {"F": round(total.forward / len(prompts), 1), "B": 0}}


def compare(pipe: ErasedStableDiffusionPipeline, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both loops of one method: run in processes of their own, or forecast."""
    sides: dict[str, Any] = {}
    long = forecast(pipe, args.concept, method, parity=True)
    if long["F"] > args.most:
        sides["forecast"] = {"published": long, "ours": forecast(pipe, args.concept, method, parity=False)}
    for side in ("published", "ours"):
        sides[side] = {}
        for part in ("run", "memory"):
            if part == "run" and side == "published" and "forecast" in sides:
                sides[side] |= long
                continue
            note = args.work / f"{method}-{side}" / f"{part}.json"
            if not note.is_file():
                command = [sys.executable, __file__, "--concept", args.concept, "--limit", str(args.limit)]
                command += ["--work", str(args.work), "--one", method, "--side", side, "--part", part]
                subprocess.run(command, check=True)
            sides[side] |= json.loads(note.read_text())
    return sides


def row(method: str, sides: dict[str, Any]) -> dict[str, Any]:
    """A line of the table, as data."""
    theirs, ours = sides["published"], sides["ours"]
    return {
        "method": method,
        **sides,
        "F_ratio": theirs["F"] / ours["F"],
        "work_ratio": (theirs["F"] + 2 * theirs["B"]) / (ours["F"] + 2 * ours["B"]),
        "target": TARGETS.get(method),
    }


def markdown(concept: str, limit: int, rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    head = "F + B|F: × fewer|target|work: × less|seconds|memory, MB|UA|IRA|CRA".split("|")
    lines = [
        f"Erasing {concept!r} from glyph: published loop → ours. F + B: samples through the UNet; work: F + 2 B; "
        f"memory: growth of the process as it trains; UA, IRA, CRA: of {limit} prompts. Each run has a process "
        f"of its own with {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s). *: forecast, both sides, not run.",
        "",
        f"| method | {' | '.join(head)} |",
        "|---" * (len(head) + 1) + "|",
    ]
    base = rows[0]["ours"]["base"]  # of the same prompts and seeds for all
    lines.append(f"| *base* | {' | '.join([''] * 6 + [f'{base[name]:.0%}' for name in MEASURED])} |")
    for one in rows:
        a, b = one["published"], one["ours"]
        times = one.get("forecast", {"published": a, "ours": b})
        star = "*" if "forecast" in one else ""
        cells = [
            f"{a['F']:,} + {a['B']:,}{star} → {b['F']:,} + {b['B']:,}",
            f"{one['F_ratio']:.1f}",
            str(one["target"] or ""),
            f"{one['work_ratio']:.1f}",
            _pair(times["published"], times["ours"], "seconds", "{:,.0f}" + star),
            _pair(a, b, "grown_bytes", "{:,.0f}", 1e-6),
            *(_pair(a, b, name, "{:.0f}%", 100) for name in MEASURED),
        ]
        lines.append(f"| {one['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _pair(a: dict[str, Any], b: dict[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    shown = [form.format(side[name] * scale) if name in side else "" for side in (a, b)]
    return " → ".join(shown) if any(shown) else ""


def main() -> None:
    """Write the table as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concept", default="dog")
    parser.add_argument("--methods", nargs="+", default=names())
    parser.add_argument("--most", type=int, default=200_000, help="F of a published loop from which it is forecast")
    parser.add_argument("--limit", type=int, default=45, help="prompts of an evaluation, about")
    parser.add_argument("--work", type=Path, default=Path("build/costs"), help="patches and pictures; a rerun goes on")
    parser.add_argument("--out", type=Path, default=Path("bench/results/costs"))
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own does
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet()
    if args.one:
        place = args.work / f"{args.one}-{args.side}"
        parity = args.side == "published"
        if args.part == "memory":
            found = memory(args.concept, args.one, parity=parity)
        else:
            found = measure(args.concept, args.one, place, parity=parity, limit=args.limit)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{args.part}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        return
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        rows.append(row(method, compare(pipe, method, args)))
        gated = args.work / f"{method}-ours" / "patch.safetensors"
        if Patch.load(gated).gate["kind"] == "latent":
            prompts = list(dict.fromkeys(one.prompt for one in concept_prompts([args.concept], args.limit).rows))
            rows.append(row(DECISION, decision(pipe, Patch.load(gated), prompts)))
        text = markdown(args.concept, args.limit, rows)
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
