"""What patches cost while drawing: time of a call with a patch over the time without, on glyph.

Calls with and without a patch take turns, and the median of each is compared, so that what else the machine does falls
on both alike. Patches are random: their size and place make the cost, not what they say. A membrane patch has rank 1
on every layer of the transformer blocks, as the text-gated method trains it by default.

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
    """A patch of rank 1 that moves little, on the layers of a variant."""
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
    """The latent gate with its decision made: it is made once a prompt, and costs what `erasure plan` says."""
    with replaced.object(Decider, "present", lambda *given: present):
        yield


def cases(base: Base) -> dict[str, tuple[Patch, list[str], bool]]:
    """Name -> patch, prompts, what the latent gate decides."""
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
    """Seconds of a call: of this process's CPU, which other processes disturb least, or of an accelerator's clock."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def measure(pipe: Any, case: tuple[Patch, list[str], bool], options: argparse.Namespace) -> dict[str, float]:
    """Medians without and with the patch, and their ratio."""
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

    found: dict[bool, list[float]] = {False: [], True: []}
    with deciding(present):
        for turn in range(options.turns + 1):
            for loaded in (False, True) if turn % 2 else (True, False):
                if loaded:
                    pipe.load_patch(patch, force=True)
                took = seconds(draw)
                pipe.unload_patches()
                if turn:  # the first of each warms up
                    found[loaded].append(took)
    base, with_patch = (statistics.median(found[loaded]) for loaded in (False, True))
    return {"base": round(base, 4), "with": round(with_patch, 4), "ratio": round(with_patch / base, 3)}


def table(result: dict[str, Any]) -> str:
    """The page."""
    about = result["about"]
    lines = [
        "# What patches cost while drawing",
        f"On glyph, {about['steps']} steps, two prompts, {about['images']} image(s) each; medians of {about['turns']} "
        f"calls with and without in turn; {about['threads']} thread(s), {about['device']}, torch {about['torch']}; "
        f"load {about['load before']} before and {about['load after']} after; CPU seconds where there is no "
        "accelerator. Made by `python bench/pipelines.py`.",
        "",
        "| patch | seconds without | with | ratio | target |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["cases"].items():
        target = TARGETS.get(name)
        lines.append(f"| {name} | {row['base']} | {row['with']} | {row['ratio']} | {target or ''} |")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--images", type=int, default=1, help="per prompt")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
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
