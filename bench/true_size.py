"""Measure the memory of one update on the CPU at the true size of Stable Diffusion 1 or XL, beside `plan`'s forecast.

The weights are random, since memory does not depend on them, and nothing is downloaded. Every row has a process of its
own: it forecasts, and if the forecast is larger than the memory that is free, the row says so and nothing is trained.
Otherwise it trains one update with the preset's settings, except that few states are collected beforehand. The peak is
that of the whole process, less what Python and its libraries take before there is a model.

    python bench/true_size.py sd1 --methods esd spm --precision fp32
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu import TINY, Timed

from erasure.concepts.concept import Concept
from erasure.erasing import settle
from erasure.forecast import plan
from erasure.method import GradientMethod
from erasure.methods import names
from erasure.model.base import Base
from erasure.model.clip_tokenizer import END, clip_tokenizer
from erasure.model.loading import quiet
from erasure.model.meta import parts_of
from erasure.model.single_file import carried
from erasure.pipelines import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline
from erasure.training.compute import Computing, Engine
from erasure.training.loop import train

# glibc keeps freed blocks of less than 32 MB, and the peak would count what fell between them. Blocks of 1 MB and more
# go back to the system at once; elsewhere the variable means nothing.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
PIPELINES: dict[str, Any] = {"sd1": ErasedStableDiffusionPipeline, "sdxl": ErasedStableDiffusionXLPipeline}
CONCEPTS = {"object": Concept("cat", anchor="dog"), "style": Concept("Van Gogh", kind="style")}


def pipeline(kind: str, dtype: torch.dtype, *, weights: bool) -> Any:
    """Build a pipeline of the true size without an autoencoder.

    Args:
        kind: sd1 or sdxl.
        dtype: of the UNet.
        weights: fill the UNet with random numbers; otherwise it stays on the `meta` device.
    """
    parts, pads = parts_of(kind), carried(kind).pads
    filled = {name: part for name, part in vars(parts).items() if name.startswith("text_encoder")}
    for name, part in ({**filled, "unet": parts.unet} if weights else filled).items():
        part.to(dtype if name == "unet" else torch.float32).to_empty(device="cpu").eval().requires_grad_(False)
        for key, param in part.named_parameters():
            if param.ndim > 1:
                param.data.normal_(0, 1 / math.sqrt(math.prod(param.shape[1:])))
            else:
                param.data.fill_(0.0 if key.endswith("bias") else 1.0)
        for key, buffer in part.named_buffers():
            if key.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    given = {name: part for name, part in vars(parts).items() if name in ("unet", "scheduler") or name in filled}
    for name in filled:
        tokenizer = name.replace("text_encoder", "tokenizer")
        given[tokenizer] = clip_tokenizer(pads.get(tokenizer, END))
    if kind == "sd1":
        given |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = PIPELINES[kind](vae=None, **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def resident() -> float:
    """Return the most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free() -> float:
    """Return the memory that a new process can take, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return float(lines["MemAvailable"].split()[0]) * 1024


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """Forecast one update, train it in this process if it fits, and return the row with both figures.

    Args:
        row: model, method, concept (its kind), precision and checkpointing.
    """
    quiet()
    short = {key: value for key, value in TINY[row["method"]].items() if "batch_size" not in key} | {"iterations": 1}
    concept, kind = CONCEPTS[row["concept"]], row["model"]
    computing = {"precision": row["precision"], "gradient_checkpointing": row["checkpointing"]}
    dtype = torch.bfloat16 if row["precision"] == "bf16" else torch.float32
    libraries = resident()
    hollow = pipeline(kind, dtype, weights=False)
    row["forecast_bytes"] = plan(hollow, concept, row["method"], preset=kind, **short, **computing).peak_bytes
    del hollow
    gc.collect()  # its text encoder is 0.5 GB, and the peak is the process's
    if row["forecast_bytes"] > free():
        return {**row, "free_bytes": free()}
    base = Base.of(pipeline(kind, dtype, weights=True))
    settled = settle(base, [concept], row["method"], {"benchmark": short}, preset=kind)
    with Engine(base, Computing(**computing)) as engine:
        run, began = Timed(engine=engine), time.process_time()
        train(settled.chosen.method, base, settled.concepts, run).adapter.remove()
        spent = time.process_time() - began
    counted = {"F": run.costs.forward, "B": run.costs.backward}
    return {**row, **counted, "peak_bytes": resident() - libraries, "libraries_bytes": libraries, "cpu_seconds": spent}


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "One update on a CPU, random weights. GB are 10^9 bytes. Forecast: what `erasure plan` says of this run. Peak: "
        "of the process, less the libraries. F and B: calls in the run, in samples; most belong to the few states that "
        "are collected before the update.",
        "",
        "| model | method | concept | precision | checkpointing | forecast GB | peak GB | peak / forecast | F | B | "
        "CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], row["method"], row["concept"], row["precision"], "yes" if row["checkpointing"] else "no"]
        cells.append(f"{row['forecast_bytes'] / 1e9:.1f}")
        if "peak_bytes" in row:
            cells += [f"{row['peak_bytes'] / 1e9:.1f}", f"{row['peak_bytes'] / row['forecast_bytes']:.2f}"]
            cells += [str(row["F"]), str(row["B"]), f"{row['cpu_seconds']:,.0f}"]
        else:
            cells += [f"does not fit into {row['free_bytes'] / 1e9:.1f}", "", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each row in a process of its own, and write the table after each; rows that stand there are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["sd1"], help=f"which of {', '.join(PIPELINES)} (default: sd1)")
    parser.add_argument("--methods", nargs="+", default=names(GradientMethod), help="default: all that train")
    parser.add_argument("--concept", choices=CONCEPTS, default="object", help="kind of concept (default: object)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "true_size.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        print(json.dumps(measure(json.loads(args.row))))
        return
    if wrong := [name for name in args.models if name not in PIPELINES]:
        parser.error(f"{wrong[0]} is not measured; choose from {', '.join(PIPELINES)}")
    for model in args.models:
        for method in args.methods:
            row = {"model": model, "method": method, "concept": args.concept, "precision": args.precision}
            row["checkpointing"] = args.gradient_checkpointing
            command = [sys.executable, __file__, "--row", json.dumps(row)]
            done = subprocess.run(command, env={**os.environ, **RETURNED}, capture_output=True, text=True)
            if done.returncode:
                print(f"{model} {method}: no row, the process ended with {done.returncode}\n{done.stderr[-2000:]}")
                continue
            print(done.stdout.splitlines()[-1], flush=True)
            add(args.out, json.loads(done.stdout.splitlines()[-1]), list(row))


def add(out: Path, row: dict[str, Any], key: Sequence[str]) -> None:
    """Put a row into the file in the place of the one with the same key, and write the table anew."""
    earlier = json.loads(out.read_text()) if out.is_file() else []
    rows = [other for other in earlier if any(other[name] != row[name] for name in key)] + [row]
    rows.sort(key=lambda row: tuple(str(row[name]) for name in key))
    for path, text in ((out, json.dumps(rows, indent=1) + "\n"), (out.with_suffix(".md"), page(rows))):
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


if __name__ == "__main__":
    main()
