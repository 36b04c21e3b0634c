"""What training and generation cost on a GPU: `python bench/gpu.py`, on Stable Diffusion 1's true shapes.

The weights are random: time and memory do not depend on them. Every method trains a few steps in the project's loop
as it is by default, once more with gradient checkpointing, and as published (`parity=True`: no pools). Then pictures
are drawn with patches and without. Nothing is downloaded. `--tiny` goes through the same on a small UNet, on any
machine; only what a GPU measured is written to bench/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.forecast import plan
from erasure.glyph import CHECKPOINT
from erasure.methods import configured, names
from erasure.model.base import Base
from erasure.model.loading import quiet
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.training.compute import Computing, Engine
from erasure.training.loop import train
from erasure.training.run import Run

CONCEPT = Concept("cat", anchor="dog")
# The published loops: what only their preparation takes is cut, and the warm-up, which would leave the attack out.
CUT: dict[str, dict[str, Any]] = {
    "salun": {"forget_count": 8, "retain_count": 8, "sample_steps": 2},
    "advunlearn": {"warm_up": 0},
}
POOLS = {"trajectories": 2, "sample_steps": 5}  # PNDM takes no fewer
DRAWN = {"forget_count": 2, "retain_count": 2, "sample_steps": 2}
ADVERSARY = {"warm_up": 0, "retain_trajectories": 2, "retain_sample_steps": 2, "attack_steps": 2}
TINY: dict[str, dict[str, Any]] = {
    "esd": {**POOLS, "batch_size": 2},
    "spm": {**POOLS, "batch_size": 2},
    "unguide": {**POOLS, "batch_size": 2},
    "salun": {**DRAWN, "batch_size": 2},
    "advunlearn": {**POOLS, **ADVERSARY, "batch_size": 2, "retain_batch_size": 2},
}
PROMPTS = ["cat", "a dog", "a painting of a house", "blueprint of a car"]
TARGETS = {"folded": 1.03, "gated": 1.10}


def pipeline(device: str, *, tiny: bool = False, weights: bool = True) -> Any:
    """Stable Diffusion 1 with random weights and no autoencoder; the UNet without weights lies on `meta`."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    # The configuration of runwayml/stable-diffusion-v1-5; what is not named is diffusers' default.
    shapes: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
    text: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072}
    text |= {"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77}
    if tiny:
        shapes = {"sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (8, 16), "layers_per_block": 1}
        shapes |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4}
        shapes |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4}
        text |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer", model_max_length=77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends["pad_token_id"] = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device(device):
            encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **ends, **text))
        with torch.device(device if weights else "meta"):
            unet = UNet2DConditionModel(**shapes)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe = ErasedStableDiffusionPipeline(
        vae=None,
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Timed(Run):
    """A run that looks at the clock and the memory after every step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(progress=False, **options)
        self.times: list[float] = []

    def watch(self, step: int, terms: dict[str, torch.Tensor], rate: float) -> None:
        """Note the time; the first step's memory is that of the preparation."""
        self.times.append(now())
        if step == 1 and torch.cuda.is_available():
            self.prepared = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def now() -> float:
    """Seconds, when the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clean() -> None:
    """Free what the last run held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def steps_of(pipe: Any, method: str, steps: int, computing: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Seconds of the preparation and of a step (the first left out), peak memory, and what the plan said of it."""
    built = configured(method, [CONCEPT], settings)
    short = dataclasses.replace(built, iterations=steps + 1)
    gpu = pipe.device.type == "cuda"
    forecast = plan(pipe, CONCEPT, method, **{**settings, **computing, "iterations": 2})
    clean()
    base = Base.of(pipe)
    with Engine(base, Computing(**computing)) as engine:
        run, begun = Timed(engine=engine), now()
        state = train(short, base, [CONCEPT], run)
        state.adapter.remove()
    step = (run.times[-1] - run.times[0]) / steps
    row = {
        "prepare_seconds": run.times[0] - begun - step,
        "step_seconds": step,
        "iterations": built.iterations,
        "batch_size": built.batch_size,
        "peak_bytes": max(torch.cuda.max_memory_allocated(), run.prepared) if gpu else None,
        "forecast_bytes": forecast.peak_bytes,
        "precision": forecast.precision,
    }
    row["whole_seconds"] = max(row["prepare_seconds"], 0.0) + step * built.iterations
    return row


def fitting(*args: Any, **settings: Any) -> dict[str, Any] | None:
    """`steps_of`, or None where the card's memory is too small: the other rows are measured all the same."""
    try:
        return steps_of(*args, **settings)
    except torch.cuda.OutOfMemoryError:
        clean()
        return None


def training(pipe: Any, method: str, steps: int, computing: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """A method in three ways."""
    lean = {**computing, "gradient_checkpointing": True}
    own = {key: value for key, value in small.items() if key not in CUT.get(method, {})} if small else {}
    published = {"parity": True, **CUT.get(method, {}), **own}
    if method == "advunlearn" and not small:
        steps = 1  # some two thousand forwards
    return {
        "ours": fitting(pipe, method, max(steps, 2), computing, **small),
        "lean": fitting(pipe, method, max(steps, 2), lean, **small),
        "published": fitting(pipe, method, steps, computing, **published),
    }


def images_a_second(pipe: Any, rounds: int, sampling: int, dtype: torch.dtype) -> dict[str, float]:
    """Latents a second: no patch, one that is folded into the weights, one whose gate differs from prompt to prompt.

    The three take turns, so that a clock that changes on the way meets all of them.
    """
    quick: dict[str, Any] = {"iterations": 2, "trajectories": 1, "sample_steps": 2, "progress": False}
    patch = erase(pipe, CONCEPT, "spm", **quick, gate_threshold=0.0)
    patches = {"unpatched": None, "folded": dataclasses.replace(patch, gate={"kind": "always"}), "gated": patch}
    pipe.to(dtype=dtype)
    spent = dict.fromkeys(patches, 0.0)
    for turn in range(rounds + 1):  # the first warms up
        for name, one in patches.items():
            pipe.unload_patches()
            if one is not None:
                pipe.load_patch(one, force=True)  # cast to half precision, it is another base by its numbers
            begun = now()
            pipe(PROMPTS, num_inference_steps=sampling, output_type="latent")
            spent[name] += (now() - begun) if turn else 0.0
    pipe.unload_patches()
    return {name: rounds * len(PROMPTS) / seconds for name, seconds in spent.items()}


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{found['model']} on {found['card']}, torch {found['torch']}, {found['precision']}. Random weights; seconds "
        "of a step, peak memory (GB: 10^9 bytes), seconds of a whole run of so many steps with what comes before it.",
        "",
        "| method | loop | batch | s a step | steps | s a run | peak GB | planned GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ways = {"ours": "ours", "lean": "ours, gradient checkpointing", "published": "published"}
    for method, rows in found["training"].items():
        for way, row in rows.items():
            if row is None:
                lines.append(f"| {method} | {ways[way]} | out of memory | | | | | |")
                continue
            peak = f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else "not measured"
            lines.append(
                f"| {method} | {ways[way]} | {row['batch_size']} | {row['step_seconds']:.3f} | {row['iterations']} "
                f"| {row['whole_seconds']:,.0f} | {peak} | {row['forecast_bytes'] / 1e9:.1f} |"
            )
    if drawn := found.get("images"):
        lines += ["", "| pipeline | images a second | times the unpatched | target |", "|---|---|---|---|"]
        for name, rate in drawn.items():
            target = f"at most {TARGETS[name]:.2f}" if name in TARGETS else ""
            lines.append(f"| {name} | {rate:.3f} | {drawn['unpatched'] / rate:.3f} | {target} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the table, after every method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=names())
    parser.add_argument("--steps", type=int, default=4, help="timed ones")
    parser.add_argument("--rounds", type=int, default=5, help="of drawing")
    parser.add_argument("--sampling", type=int, default=20, help="steps of the sampler")
    parser.add_argument("--precision", help="default: bf16 on a GPU that has it")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    quiet()
    gpu = torch.cuda.is_available()
    out = args.out or (Path("bench/results/gpu") if gpu and not args.tiny else Path("build/gpu"))
    out.parent.mkdir(parents=True, exist_ok=True)
    computing = {"precision": args.precision, "channels_last": args.channels_last, "compile": args.compile}
    pipe = pipeline("cuda" if gpu else "cpu", tiny=args.tiny)
    precision = Computing(args.precision).on(pipe.device).precision
    found: dict[str, Any] = {
        "model": "A tiny UNet" if args.tiny else "Stable Diffusion 1's shapes",
        "card": torch.cuda.get_device_name() if gpu else "a CPU",
        "torch": torch.__version__,
        "precision": precision,
        "training": {},
    }

    def keep() -> None:
        out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        out.with_suffix(".md").write_text(page(found), encoding="utf-8")

    for method in args.methods:
        found["training"][method] = training(pipe, method, args.steps, computing, TINY[method] if args.tiny else {})
        print(method, json.dumps(found["training"][method]), flush=True)
        keep()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found["images"] = images_a_second(pipe, args.rounds, args.sampling, dtype)
    keep()
    print(page(found))


if __name__ == "__main__":
    main()
