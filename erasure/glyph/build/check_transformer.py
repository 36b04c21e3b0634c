"""Measure a transformer sibling of glyph: `python -m erasure.glyph.build.check_transformer dit --work build/glyph`.

The averaged weights of a run in progress, or with `--folder` an exported folder. The judges and the prompts are
glyph's own (`erasure.glyph.build.check`); `--quick N` asks for N of the object and style pairs and for the backgrounds.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.glyph import objects, styles
from erasure.glyph.build.check import Checker, Figure, count, on_backgrounds, on_pairs, on_words, sheet, speed
from erasure.glyph.build.data import pixels
from erasure.glyph.build.train_t5 import LONGEST
from erasure.glyph.vision import load_classifier, load_clip
from erasure.model import presets
from erasure.prompts.subjects import article

SAMPLING = presets.find("glyph").sampling

KINDS = ("dit", "mmdit")


def settings(kind: str, guidance: float) -> dict[str, Any]:
    """Return the arguments of a kind of pipeline besides prompts, seeds and steps."""
    if kind == "dit":
        return {
            "guidance_scale": guidance,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": 77,
        }
    return {"true_cfg_scale": guidance, "height": 64, "width": 64, "max_sequence_length": LONGEST}


def pipeline(kind: str, work: Path, folder: Path | None) -> Any:
    """Return the exported pipeline in `folder`, or else the pipeline of the run in `work`."""
    from erasure.glyph.build import train_dit, train_mmdit

    if folder:
        return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return train_dit.assemble(work) if kind == "dit" else train_mmdit.assemble(work)


class SiblingChecker(Checker):
    """A sibling's pipeline with glyph's judges."""

    def __init__(self, pipe: Any, kind: str, batch: int, guidance: float, steps: int) -> None:
        self.pipe, self.kind, self.batch, self.steps = pipe, kind, batch, steps
        self.pipe.set_progress_bar_config(disable=True)
        self.classifier, self.clip = load_classifier(), load_clip()
        self.call = settings(kind, guidance)

    def generate(self, prompts: list[str], seed: int) -> Tensor:
        """Generate an image for each prompt, with seed + i for row i: [n, 3, 64, 64] in [-1, 1]."""
        parts = []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
            call = dict(self.call)
            if self.kind == "mmdit":
                call["negative_prompt"] = [""] * len(part)
            made = self.pipe(part, generator=draws, num_inference_steps=self.steps, output_type="np", **call).images
            parts.append(pixels((made * 255).round().astype(np.uint8)))
        return torch.cat(parts)


def some_pairs(checker: SiblingChecker, n: int, seed: int) -> tuple[list[Figure], Tensor]:
    """Object and style of n of the pairs, and the images."""
    pairs = random.Random(0).sample([(o, s) for o in objects() for s in styles()], n)
    x = checker.generate([f"{article(o)} {o} in {s} style" for o, s in pairs], seed)
    found = checker.guesses(x)
    rows = list(zip(found["object"], found["style"], pairs, strict=True))
    return [
        Figure("generated, object", *count([(o, p[0]) for o, _, p in rows]), 0.90),
        Figure("generated, style", *count([(s, p[1]) for _, s, p in rows]), 0.95),
    ], x


def main() -> None:
    """Measure, print, and write the contact sheet to `--samples`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--work", type=Path, default=Path("build/glyph"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=4242)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=SAMPLING.guidance)
    parser.add_argument("--steps", type=int, default=SAMPLING.steps)
    parser.add_argument("--quick", type=int)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--speed", action="store_true", help="also time an image at batch 8 on two threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    checker = SiblingChecker(
        pipeline(args.kind, args.work, args.folder), args.kind, args.batch, args.guidance, args.steps
    )
    if args.quick:
        figures, x = some_pairs(checker, args.quick, args.seed)
    else:
        figures, x = on_pairs(checker, args.seed)
        figures += on_words(checker, args.seed + 2000)
    figures.append(on_backgrounds(checker, args.seed + 1000))
    if args.samples:
        sheet(x).save(args.samples, optimize=True)
    print("\n".join(figure.row() for figure in figures), f"{time.perf_counter() - begun:.0f} s", sep="\n")
    if args.speed:
        checker.batch = 8
        print(f"{speed(checker):.2f} s an image at batch 8 on two threads")


if __name__ == "__main__":
    main()
