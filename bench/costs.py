"""Compare the cost of the published training loops with this project's: `python bench/costs.py`; it can be resumed.

Each method erases one concept twice, as published (`parity=True`: the published settings and quirks, without pools of
trajectories) and with the default settings. Each run has its own process. It measures F and B (samples forward and
backward through the UNet), seconds, the growth of memory (in a separate short run), and what was erased and kept.

The published ESD was made for Stable Diffusion 1: it trains in bf16 at twice the native size. LOOPS lists it twice, as
its loop alone (in fp32 at glyph's own size) and as it is, both with the modules that this project trains: the first
row compares loops at similar results, the second shows what precision and size do. SalUn's published loop learns from
photographs: the pictures that are drawn in their place are not counted as its cost.

A published loop of more than `--most` F is not run. Instead `erasure plan` counts F and B over a few steps with a UNet
that does no work, and the counts are extrapolated to the full length. This project's loop is then forecast in the same
way, so that the seconds are comparable. The cost of a latent gate's decision is counted over the prompts of the
evaluation.
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
from erasure.method import GradientMethod
from erasure.methods import find, names
from erasure.model.diffusion import Counts, counting
from erasure.model.loading import quiet
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.gates.latent import LatentGate
from erasure.prompts.concept_prompts import concept_prompts

DECISION = "latent gate, per prompt"
SHORT = (20, 60)  # iterations after the warm-up that a forecast is extrapolated from
TARGETS = {"esd": 10, "advunlearn": 20, "spm": 3, "salun": 3, DECISION: 3}
MEASURED = ("UA", "IRA", "CRA")  # metrics to show
FEWER = {"salun": {"forget_count": 24, "retain_count": 48}}  # published images to measure memory with
# Rows of methods whose published loop is not run with parity's settings alone: label -> settings besides.
LOOPS: dict[str, dict[str, dict[str, Any]]] = {
    "esd": {
        "esd": {"variant": "x", "resolution_scale": 1.0, "weight_rounding": "none"},
        "esd, bf16 at twice the size": {"variant": "x"},
    },
}


def loops(method: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a method: label -> settings of the published loop besides parity's."""
    return LOOPS.get(method, {method: {}})


def forecast(pipe: Any, concept: str, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Forecast F, B and seconds of a training loop; a long loop is extrapolated from two short ones.

    Args:
        pipe: the base model.
        concept: concept to erase.
        method: name of the method.
        settings: its settings; with `parity` it is the published loop.
    """
    quirks = find(method).PARITY if settings.get("parity") else {}
    length, warm_up = quirks.get("iterations", 0), quirks.get("warm_up", 0)
    if length <= 200:
        return plan(pipe, concept, method, **settings).to_json()
    counts = [warm_up + count for count in SHORT]
    first, second = (plan(pipe, concept, method, iterations=count, **settings).to_json() for count in counts)
    steps = (length - counts[1]) / (counts[1] - counts[0])
    totals = {name: second[name] + (second[name] - first[name]) * steps for name in ("F", "B", "seconds")}
    drawn = 2 * quirks.get("sample_steps", 0) * (quirks.get("forget_count", 0) + quirks.get("retain_count", 0))
    share = 1 - drawn / totals["F"]  # without the pictures that stand for photographs
    return {"F": round(totals["F"]) - drawn, "B": round(totals["B"]), "seconds": totals["seconds"] * share}


def measure(concept: str, method: str, folder: Path, settings: dict[str, Any], limit: int) -> dict[str, Any]:
    """Erase and evaluate in this process, and return costs and metrics.

    Args:
        concept: concept to erase.
        method: name of the method.
        folder: folder for the patch and the images.
        settings: of the method; with `parity` it is the published loop.
        limit: approximate number of prompts.
    """
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    target = folder / "patch.safetensors"
    patch = Patch.load(target) if target.is_file() else erase(pipe, concept, method, out=target, **settings)
    pipe.load_patch(patch, name="costs")
    shared: dict[str, Any] = {"base_folder": folder.parent / "base", "progress": False, "whole": True}
    report = evaluate(pipe, concept, folder=folder, prompts=concept_prompts([concept], limit), **shared)
    cells, base = (
        {metric.name: metric.value for metric in report.rows[side] if metric.name in MEASURED}
        for side in ("patched", "base")
    )
    return {**patch.costs, **cells, "base": base}


def memory(concept: str, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return how many bytes this process grows during the preparation and two updates; more updates need no more."""
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    pipe("", num_inference_steps=1, output_type="latent")  # allocate what the base needs before measuring
    process, stop = psutil.Process(), threading.Event()
    before, peak = process.memory_info().rss, [0]

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        erase(pipe, concept, method, progress=False, iterations=2, **settings)
    finally:
        stop.set()
        watcher.join()
    return {"grown_bytes": max(0, peak[0] - before)}


def decision(pipe: ErasedStableDiffusionPipeline, patch: Patch, prompts: list[str]) -> dict[str, Any]:
    """Return the F that a latent gate needs per prompt to decide, as published and as counted over the prompts.

    Args:
        pipe: the base model.
        patch: a patch with a latent gate.
        prompts: prompts to decide on.
    """
    # For each noise: a walk with guidance, then one prediction by both networks, for the prompt and the empty prompt.
    published = 2 * LatentGate().repeats * (2 * LatentGate().after + 2)
    total = Counts()
    pipe.load_patch(patch, name="counted")
    for prompt in prompts:
        counts = Counts()
        with counting(pipe.unet, counts):
            pipe(prompt, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
        opened = pipe.gate_log[0]["counted"] != 0
        total.forward += counts.forward - (2 if opened else 1)  # without the sampling step itself
    pipe.unload_patches()
    return {"published": {"F": published, "B": 0}, "ours": {"F": round(total.forward / len(prompts), 1), "B": 0}}


def options(method: str, label: str, side: str) -> dict[str, Any]:
    """Return the settings of one side of a row."""
    return {"parity": True, **loops(method)[label]} if side == "published" else {}


def place(work: Path, method: str, label: str, side: str) -> Path:
    """Return the folder of one side of a row; all rows of a method share this project's side."""
    return work / f"{(label if side == 'published' else method).replace(', ', '-').replace(' ', '-')}-{side}"


def compare(pipe: ErasedStableDiffusionPipeline, method: str, label: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure both loops of a row, each in its own process; a published loop that is too long is forecast."""
    sides: dict[str, Any] = {}
    published = forecast(pipe, args.concept, method, options(method, label, "published"))
    if published["F"] > args.most:
        sides["forecast"] = {"published": published, "ours": forecast(pipe, args.concept, method, {})}
    for side in ("published", "ours"):
        sides[side] = {}
        for part in ("run", "memory"):
            if part == "run" and side == "published" and "forecast" in sides:
                sides[side] |= published
                continue
            path = place(args.work, method, label, side) / f"{part}.json"
            if not path.is_file():
                command = [sys.executable, __file__, "--concept", args.concept, "--limit", str(args.limit)]
                command += ["--work", str(args.work), "--one", method, "--label", label, "--side", side, "--part", part]
                subprocess.run(command, check=True)
            sides[side] |= json.loads(path.read_text())
    return sides


def row(method: str, sides: dict[str, Any]) -> dict[str, Any]:
    """Return one row of the table as data, with the ratios of the published costs to this project's."""
    published, ours = sides["published"], sides["ours"]
    return {
        "method": method,
        **sides,
        "F_ratio": published["F"] / ours["F"],
        "work_ratio": (published["F"] + 2 * published["B"]) / (ours["F"] + 2 * ours["B"]),
        "target": TARGETS.get(method),
    }


def markdown(concept: str, limit: int, rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown, with a sentence that explains it.

    Args:
        concept: the erased concept.
        limit: number of prompts of an evaluation.
        rows: rows as `row` returns them.
    """
    head = "F + B|F ratio|target|work ratio|seconds|memory, MB|UA|IRA|CRA".split("|")
    lines = [
        f"Erasing {concept!r} from glyph: published loop → this project's loop. F, B: samples forward and backward "
        "through the UNet; work: F + 2 B; ratios: published over this project's; memory: growth of the process during "
        f"training; UA, IRA, CRA: over {limit} prompts. Each run has its own process with "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s). *: forecast for both loops, not run.",
        "",
        f"| method | {' | '.join(head)} |",
        "|---" * (len(head) + 1) + "|",
    ]
    base = rows[0]["ours"]["base"]  # the same prompts and seeds for all methods
    lines.append(f"| *base* | {' | '.join([''] * 6 + [f'{base[name]:.0%}' for name in MEASURED])} |")
    for entry in rows:
        a, b = entry["published"], entry["ours"]
        times = entry.get("forecast", {"published": a, "ours": b})
        star = "*" if "forecast" in entry else ""
        cells = [
            f"{a['F']:,} + {a['B']:,}{star} → {b['F']:,} + {b['B']:,}",
            f"{entry['F_ratio']:.1f}",
            str(entry["target"] or ""),
            f"{entry['work_ratio']:.1f}",
            _pair(times["published"], times["ours"], "seconds", "{:,.0f}" + star),
            _pair(a, b, "grown_bytes", "{:,.0f}", 1e-6),
            *(_pair(a, b, name, "{:.0f}%", 100) for name in MEASURED),
        ]
        lines.append(f"| {entry['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _pair(a: dict[str, Any], b: dict[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    texts = [form.format(side[name] * scale) if name in side else "" for side in (a, b)]
    return " → ".join(texts) if any(texts) else ""


def main() -> None:
    """Measure every method and write the table as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--concept", default="dog", help="concept to erase")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=names(GradientMethod),
        help="methods to measure; those that train have a published loop",
    )
    parser.add_argument("--most", type=int, default=200_000, help="forecast published loops of more F than this")
    parser.add_argument("--limit", type=int, default=45, help="approximate number of prompts of an evaluation")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/costs"),
        help="folder for patches and images; a second run resumes from it",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/costs"), help="path of the results without a suffix"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)  # for the processes that this script starts
    parser.add_argument("--label", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet()
    if args.one:
        folder = place(args.work, args.one, args.label, args.side)
        settings = options(args.one, args.label, args.side)
        if args.part == "memory":
            fewer = FEWER.get(args.one, {}) if args.side == "published" else {}
            result = memory(args.concept, args.one, {**settings, **fewer})
        else:
            result = measure(args.concept, args.one, folder, settings, args.limit)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{args.part}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        return
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        for label in loops(method):
            rows.append(row(label, compare(pipe, method, label, args)))
        path = args.work / f"{method}-ours" / "patch.safetensors"
        if Patch.load(path).gate["kind"] == "latent":
            prompts = list(dict.fromkeys(prompt.prompt for prompt in concept_prompts([args.concept], args.limit).rows))
            rows.append(row(DECISION, decision(pipe, Patch.load(path), prompts)))
        text = markdown(args.concept, args.limit, rows)
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
