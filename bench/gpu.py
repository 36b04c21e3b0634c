"""Measure time and memory of training and generation on a GPU, with the shapes of Stable Diffusion 1.

The weights are random, since time and memory do not depend on them, and nothing is downloaded. Every method trains a
few steps in this project's loop, with the default settings, with gradient checkpointing, and as published
(`parity=True`: without pools of trajectories). Then images are generated with and without patches. `--tiny` does the
same with a small UNet on any machine. Only results from a GPU are written to bench/results.

    python bench/gpu.py
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.forecast import plan
from erasure.glyph import CHECKPOINT
from erasure.method import GradientMethod
from erasure.methods import configure, find, names
from erasure.model.base import Base
from erasure.model.loading import quiet
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.training.compute import Computing, Engine
from erasure.training.loop import train
from erasure.training.run import Run

CONCEPT = Concept("cat", anchor="dog")
# Settings that shorten the published loops: less preparation, and no warm-up, which would leave out the attack.
PRESET = "sd1"  # whose shapes the models have; the tiny one is of no family
CUT: dict[str, dict[str, Any]] = {
    "salun": {"forget_count": 8, "retain_count": 8, "sample_steps": 2},
    "advunlearn": {"warm_up": 0},
    "doco": {"anchor_count": 8, "retain_count": 8, "sample_steps": 2, "warm_up": 0},
    "mace": {"images": 2, "sample_steps": 2},
    "negmerge": {"image_count": 8, "sample_steps": 2, "fine_tunes": 1, "scale": 1.0},
    "stereo": {"rounds": 0},
}
POOLS = {"trajectories": 2, "sample_steps": 5}  # PNDM needs at least 5 steps
DRAWN = {"forget_count": 2, "retain_count": 2, "sample_steps": 2}
ADVERSARY = {"warm_up": 0, "retain_trajectories": 2, "retain_sample_steps": 2, "attack_steps": 2}
TINY: dict[str, dict[str, Any]] = {
    "esd": {**POOLS, "batch_size": 2},
    "spm": {**POOLS, "batch_size": 2},
    "unguide": {**POOLS, "batch_size": 2},
    "salun": {**DRAWN, "batch_size": 2},
    "doco": {"anchor_count": 2, "retain_count": 2, "sample_steps": 2, "warm_up": 1, "batch_size": 2},
    "gem": {"early_steps": 2, "sample_steps": 3, "retain_trajectories": 2, "retain_batch_size": 2},
    "mace": {"images": 2, "sample_steps": 2, "batch_size": 2},
    "negmerge": {"image_count": 2, "sample_steps": 2, "fine_tunes": 1, "scale": 1.0, "batch_size": 2},
    "eraseflow": {**POOLS, "batch_size": 2, "retain_trajectories": 2, "retain_batch_size": 2},
    "receler": {**POOLS, "attack_steps": 2, "batch_size": 2},
    "stereo": {**POOLS, "rounds": 0, "batch_size": 2},
    "advunlearn": {**POOLS, **ADVERSARY, "batch_size": 2, "retain_batch_size": 2},
}
PROMPTS = ["cat", "a dog", "a painting of a house", "blueprint of a car"]
TARGETS = {"folded": 1.03, "gated": 1.10}  # largest allowed time, relative to no patch


def pipeline(device: str, *, tiny: bool = False, weights: bool = True) -> Any:
    """Build Stable Diffusion 1 with random weights and without an autoencoder.

    Args:
        device: device of the networks.
        tiny: use a small UNet and a small text encoder.
        weights: allocate the UNet's weights; otherwise it is on the `meta` device.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    # The configuration of runwayml/stable-diffusion-v1-5; other values are the defaults of diffusers.
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
    """A run that records the time after every step, and the peak memory of the preparation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(progress=False, **options)
        self.times: list[float] = []

    def watch(self, step: int, terms: dict[str, torch.Tensor], figures: Mapping[str, float]) -> None:
        """Record the time; after the first step, also the peak memory so far, which includes the preparation."""
        self.times.append(now())
        if step == 1 and torch.cuda.is_available():
            self.prepared = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def now() -> float:
    """Return the clock in seconds after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clean() -> None:
    """Free the memory of the previous run and reset the peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def steps_of(pipe: Any, method: str, steps: int, computing: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Train a few steps and return their time and peak memory, with the peak memory that `plan` forecasts.

    Args:
        pipe: the base model.
        method: name of the method.
        steps: number of timed steps; one more, the first, is not timed.
        computing: precision and other options of `Computing`.
        settings: settings of the method.
    """
    base = Base.of(pipe)
    built = configure(method, CONCEPT.kind, settings, family=base.family(PRESET))
    short = dataclasses.replace(built, iterations=steps + 1)
    gpu = pipe.device.type == "cuda"
    forecast = plan(pipe, CONCEPT, method, preset=PRESET, **{**settings, **computing, "iterations": 2})
    clean()
    with Engine(base, Computing(**computing)) as engine:
        run, started = Timed(engine=engine), now()
        state = train(short, base, [CONCEPT], run)
        state.adapter.remove()
    step = (run.times[-1] - run.times[0]) / steps
    row = {
        "prepare_seconds": run.times[0] - started - step,
        "step_seconds": step,
        "iterations": built.iterations,
        "batch_size": getattr(built, "batch_size", None),  # GEM takes whole trajectories
        "peak_bytes": max(torch.cuda.max_memory_allocated(), run.prepared) if gpu else None,
        "forecast_bytes": forecast.peak_bytes,
        "precision": forecast.precision,
    }
    row["whole_seconds"] = max(row["prepare_seconds"], 0.0) + step * built.iterations
    return row


def fitting(*args: Any, **settings: Any) -> dict[str, Any] | None:
    """Call `steps_of`, and return None if the GPU runs out of memory, so that the other rows are still measured."""
    try:
        return steps_of(*args, **settings)
    except torch.cuda.OutOfMemoryError:
        clean()
        return None


def training(pipe: Any, method: str, steps: int, computing: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Measure a method with the default settings, with gradient checkpointing, and as published where it has that.

    Args:
        pipe: the base model.
        method: name of the method.
        steps: number of timed steps.
        computing: precision and other options of `Computing`.
        small: settings for the tiny model; empty for the true shapes.
    """
    lean = {**computing, "gradient_checkpointing": True}
    own = {key: value for key, value in small.items() if key not in CUT.get(method, {})} if small else {}
    published = {"parity": True, **CUT.get(method, {}), **own}
    if method == "advunlearn" and not small:
        steps = 1  # one step takes about two thousand forward passes
    rows = {
        "ours": fitting(pipe, method, max(steps, 2), computing, **small),
        "lean": fitting(pipe, method, max(steps, 2), lean, **small),
    }
    if hasattr(find(method), "parity"):
        rows["published"] = fitting(pipe, method, steps, computing, **published)
    return rows


def images_a_second(pipe: Any, rounds: int, sampling: int, dtype: torch.dtype) -> dict[str, float]:
    """Return the latents generated per second without a patch, with a folded patch and with a gated patch.

    The gate acts differently from prompt to prompt. The three take turns, so that a change of the GPU's clock rate
    affects all of them.

    Args:
        pipe: the base model.
        rounds: number of timed calls for each of the three; one more is not timed.
        sampling: number of sampling steps.
        dtype: precision of the networks.
    """
    quick: dict[str, Any] = {"iterations": 2, "trajectories": 1, "sample_steps": 2, "progress": False}
    patch = erase(pipe, CONCEPT, "spm", preset=PRESET, **quick, gate_threshold=0.0)
    patches = {"unpatched": None, "folded": dataclasses.replace(patch, gate={"kind": "always"}), "gated": patch}
    pipe.to(dtype=dtype)
    spent = dict.fromkeys(patches, 0.0)
    for turn in range(rounds + 1):  # the first round is a warm-up
        for name, loaded in patches.items():
            pipe.unload_patches()
            if loaded is not None:
                pipe.load_patch(loaded, force=True)  # the base in half precision has another fingerprint
            started = now()
            pipe(PROMPTS, num_inference_steps=sampling, output_type="latent")
            spent[name] += (now() - started) if turn else 0.0
    pipe.unload_patches()
    return {name: rounds * len(PROMPTS) / seconds for name, seconds in spent.items()}


def page(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{results['model']} on {results['card']}, torch {results['torch']}, {results['precision']}. The weights are "
        "random. Seconds per step; seconds per run, for all steps and the preparation; peak memory in GB (10^9 bytes), "
        "measured and as `erasure plan` forecasts it.",
        "",
        "| method | loop | batch | s per step | steps | s per run | peak GB | forecast GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    loops = {"ours": "default", "lean": "default, gradient checkpointing", "published": "published"}
    for method, rows in results["training"].items():
        for loop, row in rows.items():
            if row is None:
                lines.append(f"| {method} | {loops[loop]} | out of memory | | | | | |")
                continue
            peak = f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else "not measured"
            lines.append(
                f"| {method} | {loops[loop]} | {row['batch_size'] or ''} "
                f"| {row['step_seconds']:.3f} | {row['iterations']} "
                f"| {row['whole_seconds']:,.0f} | {peak} | {row['forecast_bytes'] / 1e9:.1f} |"
            )
    if rates := results.get("images"):
        lines += ["", "| pipeline | images per second | time relative to unpatched | target |", "|---|---|---|---|"]
        for name, rate in rates.items():
            target = f"at most {TARGETS[name]:.2f}" if name in TARGETS else ""
            lines.append(f"| {name} | {rate:.3f} | {rates['unpatched'] / rate:.3f} | {target} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every method, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=names(GradientMethod), help="methods to measure (default: all that train)"
    )
    parser.add_argument("--steps", type=int, default=4, help="timed training steps (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each pipeline (default: 5)")
    parser.add_argument("--sampling", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--precision", help="precision of training (default: bf16 on a GPU that supports it)")
    parser.add_argument("--channels-last", action="store_true", help="use the channels-last memory format")
    parser.add_argument("--compile", action="store_true", help="compile the UNet")
    parser.add_argument("--tiny", action="store_true", help="use a small UNet")
    parser.add_argument("--out", type=Path, help="path of the results without a suffix")
    args = parser.parse_args(argv)
    quiet()
    gpu = torch.cuda.is_available()
    out = args.out or (Path("bench/results/gpu") if gpu and not args.tiny else Path("build/gpu"))
    out.parent.mkdir(parents=True, exist_ok=True)
    computing = {"precision": args.precision, "channels_last": args.channels_last, "compile": args.compile}
    pipe = pipeline("cuda" if gpu else "cpu", tiny=args.tiny)
    precision = Computing(args.precision).on(pipe.device).precision
    results: dict[str, Any] = {
        "model": "A tiny UNet" if args.tiny else "Stable Diffusion 1's shapes",
        "card": torch.cuda.get_device_name() if gpu else "a CPU",
        "torch": torch.__version__,
        "precision": precision,
        "training": {},
    }

    def save() -> None:
        out.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        out.with_suffix(".md").write_text(page(results), encoding="utf-8")

    for method in args.methods:
        results["training"][method] = training(pipe, method, args.steps, computing, TINY[method] if args.tiny else {})
        print(method, json.dumps(results["training"][method]), flush=True)
        save()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    results["images"] = images_a_second(pipe, args.rounds, args.sampling, dtype)
    save()
    print(page(results))


if __name__ == "__main__":
    main()
