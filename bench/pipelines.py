"""Measure the cost of patches during generation on glyph: the time of a call with a patch, relative to one without.

Calls with and without a patch take turns and the medians are compared, so that other load on the machine affects both.
The patches are random, since only their shapes and layers matter for the cost. A patch of variant `transformer` has
rank 1 on every layer of the transformer blocks, as SPM trains it by default.

    python bench/pipelines.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import torch

from erasure.model.base import Base
from erasure.patch import LowRank, Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.gates.latent import Decider

TARGETS = {"folded": 1.03, "text gate, open": 1.10, "text gate, closed": 1.10, "text gate, half the batch": 1.10}
NAMED, OTHER = "a cat", "a dog"


def random_patch(base: Base, variant: str, gate: dict[str, Any]) -> Patch:
    """Build a random patch of rank 1 with a small effect.

    Args:
        base: the base model.
        variant: which layers of the UNet it changes, as `Base.targets` takes it.
        gate: data of the gate.
    """
    draw = torch.Generator().manual_seed(0)
    layers = {}
    for path, layer in base.targets(variant).items():
        rows, *inner = layer.get_parameter("weight").shape
        pair = (
            torch.randn(1, *inner, generator=draw),
            1e-3 * torch.randn(rows, 1, *[1] * (len(inner) - 1), generator=draw),
        )
        layers[path] = (*pair, 1.0)
    return Patch(LowRank({"unet": layers}), "random", [{"name": "cat"}], gate=gate)


@contextmanager
def deciding(present: bool) -> Iterator[None]:
    """Fix the decision of the latent gate, so that only the cost after the decision is measured.

    The decision itself is made once per prompt; `erasure plan` reports its cost.
    """
    with replaced.object(Decider, "present", lambda *_: present):
        yield


def cases(base: Base) -> dict[str, tuple[Patch, list[str], bool]]:
    """Return name of a case -> its patch, its prompts, and the decision of the latent gate."""
    text = {"kind": "text", "threshold": 0.99}
    return {
        "folded": (random_patch(base, "transformer", {"kind": "always"}), [NAMED, OTHER], False),
        "text gate, open": (random_patch(base, "transformer", text), [NAMED, NAMED], False),
        "text gate, half the batch": (random_patch(base, "transformer", text), [NAMED, OTHER], False),
        "text gate, closed": (random_patch(base, "transformer", text), [OTHER, OTHER], False),
        "text gate on every layer, open": (random_patch(base, "full", text), [NAMED, NAMED], False),
        "latent gate, open": (random_patch(base, "x", {"kind": "latent"}), [NAMED, NAMED], True),
        "latent gate, closed": (random_patch(base, "x", {"kind": "latent"}), [OTHER, OTHER], False),
    }


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes: wall-clock time with a GPU, otherwise the CPU time of this process."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def measure(pipe: Any, case: tuple[Patch, list[str], bool], options: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of a call without and with the patch, and their ratio.

    Args:
        pipe: the base model.
        case: a case as `cases` returns it.
        options: steps, images per prompt and turns.
    """
    patch, prompts, present = case

    def draw() -> None:
        noise = [torch.Generator().manual_seed(row) for row in range(len(prompts) * options.images)]
        pipe(
            prompts,
            num_inference_steps=options.steps,
            guidance_scale=3.0,
            num_images_per_prompt=options.images,
            generator=noise,
        )

    times: dict[bool, list[float]] = {False: [], True: []}
    with deciding(present):
        for turn in range(options.turns + 1):
            for loaded in (False, True) if turn % 2 else (True, False):
                if loaded:
                    pipe.load_patch(patch, force=True)
                elapsed = seconds(draw)
                pipe.unload_patches()
                if turn:  # the first turn is a warm-up
                    times[loaded].append(elapsed)
    base, with_patch = (statistics.median(times[loaded]) for loaded in (False, True))
    return {"base": round(base, 4), "with": round(with_patch, 4), "ratio": round(with_patch / base, 3)}


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    about = result["about"]
    lines = [
        "# Cost of patches during generation",
        f"On glyph with {about['steps']} steps and two prompts with {about['images']} image(s) each. Median seconds of "
        f"{about['turns']} calls with and without the patch, in turns; CPU time if there is no GPU. "
        f"{about['threads']} thread(s), {about['device']}, torch {about['torch']}; load {about['load before']} before "
        f"and {about['load after']} after. Made by `python bench/pipelines.py`.",
        "",
        "| patch | seconds without it | seconds with it | ratio | target |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["cases"].items():
        target = TARGETS.get(name)
        lines.append(f"| {name} | {row['base']} | {row['with']} | {row['ratio']} | {target or ''} |")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (default: 25)")
    parser.add_argument("--images", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument("--turns", type=int, default=7, help="timed calls of each kind (default: 7)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results"
    )
    options = parser.parse_args()
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    about = {
        "steps": options.steps,
        "images": options.images,
        "turns": options.turns,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
        "load before": round(os.getloadavg()[0], 2),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, case in cases(Base("glyph", pipe)).items():
        rows[name] = measure(pipe, case, options)
        print(f"{name}: {rows[name]}", flush=True)
        result = {"about": {**about, "load after": round(os.getloadavg()[0], 2)}, "cases": rows}
        write(options.output / "pipelines.json", json.dumps(result, indent=2) + "\n")
        write(options.output / "pipelines.md", table(result))


if __name__ == "__main__":
    main()
