"""Measure what many gated patches cost on glyph: loading them, and calls in which none, one or sixteen of them act.

The patches have random factors of rank 1 on every layer of the transformer blocks, as SPM trains them by default, since
only shapes and layers matter for the cost. Each has a name of its own. Calls with and without patches take turns, and
the medians of the CPU seconds of this process are compared, so that other load on the machine affects both.

On a text encoder of CLIP ViT-L's size with random weights, what the gates add is compared with the encoding of the
prompts alone, which is a small part of a call.

    OMP_NUM_THREADS=1 python bench/membranes.py
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import torch
from torch.nn.functional import normalize
from transformers import CLIPTextConfig, CLIPTextModel

from erasure.concepts.similarity import TextStates, text_states, token_rows
from erasure.model.base import Base
from erasure.patch import LowRank, Patch, fingerprint
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.gates import gate_texts

SYLLABLES = "ba de fi go hu ka le mi no pu".split()
TARGETS = {"none acts": 1.05, "1 acts": 1.15, "16 act": 1.25}
MANY, ONE, NONE = "a castle", "a banana", "a house"  # prompts for which 16 patches act, one, and none


def name(number: int) -> str:
    """Return the name of patch number `number`, three syllables that no other patch has in this order."""
    return " ".join(SYLLABLES[(number // 10**place) % 10] for place in (2, 1, 0))


def patches(base: Base, n: int) -> list[Patch]:
    """Build n random patches, each with a name and factors of its own, of which 16 also act on MANY and one on ONE.

    Args:
        base: the base model.
        n: number of patches.
    """
    shapes = {path: layer.get_parameter("weight").shape for path, layer in base.targets("transformer").items()}
    prints = {"unet": fingerprint(base.unet, [f"{path}.weight" for path in shapes])}
    made = []
    for number in range(n):
        draw = torch.Generator().manual_seed(number)
        layers = {
            path: (
                torch.randn(1, *inner, generator=draw),
                1e-3 * torch.randn(rows, 1, *[1] * (len(inner) - 1), generator=draw),
                1.0,
            )
            for path, (rows, *inner) in shapes.items()
        }
        more = ["castle"] if number < 16 else ["banana"] if number == 16 else []
        gate = {"kind": "text", "threshold": 0.999, "texts": [name(number), *more]}
        concepts = [{"name": name(number)}]
        made.append(Patch(LowRank({"unet": layers}), "random", concepts, "glyph", prints, gate=gate))
    return made


def seconds(call: Callable[[], Any]) -> float:
    """Return the CPU seconds of this process that a call takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


def loading(pipe: Any, made: list[Patch], folder: Path) -> list[dict[str, Any]]:
    """Return for several numbers of patches the seconds to read their files and to load them."""
    files = [patch.save(folder / f"{number:04}.safetensors") for number, patch in enumerate(made)]
    pipe.load_patches(made[:2])  # warms up
    pipe.unload_patches()
    rows = []
    for n in sorted({len(made) // 4, len(made) // 2, len(made)}):
        read: list[Patch] = []
        row = {"patches": n, "read": seconds(partial(read.extend, map(Patch.load, files[:n])))}
        row["load_patches"] = seconds(partial(pipe.load_patches, read))
        pipe.unload_patches()
        rows.append({key: round(value, 2) for key, value in row.items()})
        print(rows[-1], flush=True)
    few = made[: len(made) // 4]
    rows.append({"patches": len(few), "load_patch": round(seconds(lambda: [pipe.load_patch(one) for one in few]), 2)})
    pipe.unload_patches()
    print(rows[-1], flush=True)
    return rows


def in_turns(calls: dict[str, Callable[[], float]], turns: int) -> dict[str, dict[str, float]]:
    """Return for each call its median seconds, and the median of its ratios to the first call of the same turn."""
    times: dict[str, list[float]] = {key: [] for key in calls}
    for turn in range(turns + 1):
        order = list(calls) if turn % 2 else list(calls)[::-1]
        for key in order:
            elapsed = calls[key]()
            if turn:  # the first turn is a warm-up
                times[key].append(elapsed)
    first = times[next(iter(calls))]
    return {
        key: {
            "seconds": round(statistics.median(values), 4),
            "ratio": round(statistics.median(value / base for value, base in zip(values, first, strict=True)), 3),
        }
        for key, values in times.items()
    }


def drawing(pipe: Any, made: list[Patch], steps: int, turns: int) -> dict[str, dict[str, float]]:
    """Return what a call of two prompts costs without patches, and with all of them loaded while some act."""
    bare = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    bare.set_progress_bar_config(disable=True)
    pipe.load_patches(made)
    prompts = {"none acts": NONE, "1 acts": ONE, "16 act": MANY}

    def draw(of: Any, prompt: str) -> float:
        noise = [torch.Generator().manual_seed(row) for row in range(2)]
        return seconds(lambda: of([prompt, NONE], num_inference_steps=steps, guidance_scale=3.0, generator=noise))

    calls: dict[str, Callable[[], float]] = {"no patches": partial(draw, bare, NONE)}
    for key, prompt in prompts.items():
        calls[key] = partial(draw, pipe, prompt)
    rows = in_turns(calls, turns)
    for key, prompt in prompts.items():
        draw(pipe, prompt)
        rows[key]["acting"] = sum(value != 0 for value in pipe.gate_log[0].values())
    pipe.unload_patches()
    return rows


def gating(pipe: Any, made: list[Patch], turns: int) -> dict[str, Any]:
    """Return what the gates of all patches add to encoding two prompts with a text encoder of ViT-L's size.

    Random states stand in for those of the gate texts, which would take minutes to encode; the prompts are encoded.
    """
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    parts = {**pipe.components, "text_encoder": CLIPTextModel(config).eval()}
    large = ErasedStableDiffusionPipeline(**parts, requires_safety_checker=False)
    special = set(pipe.tokenizer.all_special_ids)

    def drawn(pipe: Any, texts: list[str], dtype: torch.dtype) -> TextStates:
        words = [set(row) - special for row in token_rows(pipe, texts).tolist()]
        return TextStates(texts, normalize(torch.randn(len(texts), 77 * 768), dim=1), words)

    few = [name(number) for number in range(4)]
    each = seconds(lambda: text_states(large, few)) / len(few)

    def encode(prompt: str) -> float:
        return seconds(lambda: large.encode_prompt([prompt, NONE], "cpu", 1, True))

    def gated(prompt: str) -> float:
        with ExitStack() as scope:
            large._erasure_scope = scope.enter_context(ExitStack())
            elapsed = encode(prompt)
        large._erasure_end()
        return elapsed

    with torch.no_grad():
        with replaced.object(gate_texts, "text_states", drawn):
            large.load_patches(made)
        calls: dict[str, Callable[[], float]] = {"no patches": partial(encode, NONE)}
        for key, prompt in {"none acts": NONE, "1 acts": ONE, "16 act": MANY}.items():
            calls[key] = partial(gated, prompt)
        rows = in_turns(calls, turns)
    large.unload_patches()
    return {"seconds a gate text": round(each, 3), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    about, n = result["about"], result["about"]["patches"]
    lines = [
        "# Many gated patches",
        f"CPU seconds on glyph with {about['steps']} steps and two prompts; medians of {about['turns']} turns. "
        f"{about['threads']} thread(s), {about['device']}, torch {about['torch']}, load {about['load before']} before "
        f"and {about['load after']} after. Made by `python bench/membranes.py`.",
        "",
        "| patches | read their files | `load_patches` | a `load_patch` each |",
        "|---|---|---|---|",
    ]
    for row in result["loading"]:
        cells = (row.get(key, "") for key in ("patches", "read", "load_patches", "load_patch"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        f"| {n} loaded | a call on glyph | ratio | target | encoding with ViT-L's size and the gates | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in result["drawing"].items():
        gate = result["gating"]["rows"][key]
        lines.append(
            f"| {key} | {row['seconds']} | {row['ratio']} | {TARGETS.get(key, '')} | {gate['seconds']} | "
            f"{gate['ratio']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=1000, help="number of patches, at most 1000 (default: 1000)")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (default: 25)")
    parser.add_argument("--turns", type=int, default=7, help="timed calls of each kind (default: 7)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results"
    )
    options = parser.parse_args()
    logging.getLogger("erasure").setLevel(logging.ERROR)
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    about = {
        "patches": options.patches,
        "steps": options.steps,
        "turns": options.turns,
        "threads": torch.get_num_threads(),
        "device": platform.machine(),
        "torch": torch.__version__,
        "load before": round(os.getloadavg()[0], 2),
    }
    made = patches(Base("glyph", pipe), options.patches)
    result: dict[str, Any] = {"about": about}
    with tempfile.TemporaryDirectory() as folder:
        result["loading"] = loading(pipe, made, Path(folder))
    result["gating"] = gating(pipe, made, options.turns)
    print(result["gating"], flush=True)
    result["drawing"] = drawing(pipe, made, options.steps, options.turns)
    print(result["drawing"], flush=True)
    about["load after"] = round(os.getloadavg()[0], 2)
    options.output.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(result, indent=2) + "\n"), ("md", table(result))):
        path = options.output / f"membranes.{suffix}"
        path.with_suffix(f".{suffix}.tmp").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(f".{suffix}.tmp"), path)


if __name__ == "__main__":
    main()
