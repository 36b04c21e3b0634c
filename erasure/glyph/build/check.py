"""Measure the shipped checkpoint and write its model card: `python -m erasure.glyph.build.check`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.evaluation.metrics.statistics import wilson
from erasure.glyph import CHECKPOINT, JUDGES, objects, styles, vocabulary
from erasure.glyph.build.data import pixels
from erasure.glyph.build.render import dataset
from erasure.glyph.vision import load_classifier, load_clip
from erasure.model import presets
from erasure.prompts.subjects import article

SAMPLING = presets.find("glyph").sampling


@dataclass
class Figure:
    """One measured share with its target.

    Args:
        name: what was measured.
        hits: number of successes.
        n: number of images.
        bar: the share to reach; None if there is no target.
    """

    name: str
    hits: int
    n: int
    bar: float | None = None

    def row(self) -> str:
        """Return the figure as a row of the model card's table."""
        low, high = wilson(self.hits, self.n)
        bar = "" if self.bar is None else f"≥ {self.bar:.0%}"
        met = "" if self.bar is None else ("yes" if self.hits / self.n >= self.bar else "**no**")
        return f"| {self.name} | {self.hits / self.n:.1%} | {low:.1%} to {high:.1%} | {self.n} | {bar} | {met} |"


class Checker:
    """The checkpoint with its judges, which generates images and classifies them.

    Args:
        batch: number of images per call of the pipeline.
        guidance: guidance scale.
    """

    def __init__(self, batch: int, guidance: float) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        self.pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT, safety_checker=None, torch_dtype=torch.float32)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.classifier, self.clip = load_classifier(), load_clip()
        self.batch, self.guidance = batch, guidance

    def generate(self, prompts: list[str], seed: int) -> Tensor:
        """Generate one image per prompt, the i-th from seed + i, as a tensor [n, 3, 64, 64] in [-1, 1]."""
        parts = []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
            images = self.pipe(
                part,
                generator=draws,
                num_inference_steps=SAMPLING.steps,
                guidance_scale=self.guidance,
                output_type="np",
            ).images
            parts.append(pixels((images * 255).round().astype(np.uint8)))
        return torch.cat(parts)

    @torch.no_grad()
    def guesses(self, images: Tensor) -> dict[str, list[str]]:
        """Return the most probable object and style of each image [n, 3, 64, 64], by the classifier."""
        out = self.classifier(images)
        names = {"object": [*objects(), "none"], "style": styles()}
        return {head: [names[head][i] for i in logits.argmax(1).tolist()] for head, logits in out.items()}

    def nearest(self, images: Tensor, texts: list[str]) -> list[int]:
        """Return for each image [n, 3, 64, 64] the index of the nearest text, by CLIP."""
        return (self.clip.image_features(images) @ self.clip.text_features(texts).T).argmax(1).tolist()


def count(pairs: list[tuple[Any, Any]]) -> tuple[int, int]:
    """Return how many pairs of prediction and label are equal, and the number of pairs."""
    return sum(prediction == label for prediction, label in pairs), len(pairs)


def on_renders(checker: Checker, n: int) -> list[Figure]:
    """Measure the judges on `n` new renders."""
    renders = list(dataset(n, 987_654))
    scenes, x = [scene for scene, _ in renders], pixels(np.stack([image for _, image in renders]))
    guesses = checker.guesses(x)
    names = [f"{article(o)} {o}" for o in objects()]
    near = checker.nearest(x, names)
    near_style = checker.nearest(x, [f"something in {s} style" for s in styles()])
    labels = {head: [getattr(scene, head) for scene in scenes] for head in ("object", "style")}
    return [
        Figure(
            "classifier, object, fresh renders",
            *count(list(zip(guesses["object"], labels["object"], strict=True))),
            0.98,
        ),
        Figure(
            "classifier, style, fresh renders", *count(list(zip(guesses["style"], labels["style"], strict=True))), 0.98
        ),
        Figure(
            "CLIP zero-shot, object, fresh renders",
            *count([(objects()[i], label) for i, label in zip(near, labels["object"], strict=True)]),
        ),
        Figure(
            "CLIP zero-shot, style, fresh renders",
            *count([(styles()[i], label) for i, label in zip(near_style, labels["style"], strict=True)]),
        ),
    ]


@torch.no_grad()
def psnr(checker: Checker, n: int = 96) -> float:
    """Return the mean PSNR of the autoencoder on `n` new renders, in dB."""
    x = pixels(np.stack([image for _, image in dataset(n, 123_456)]))
    vae = checker.pipe.vae
    decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10((decoded - x).pow(2).mean() / 4))


def on_pairs(checker: Checker, seed: int) -> tuple[list[Figure], Tensor]:
    """Measure one image for every pair of object and style, and return the images [n, 3, 64, 64] too."""
    pairs = [(o, s) for o in objects() for s in styles()]
    x = checker.generate([f"{article(o)} {o} in {s} style" for o, s in pairs], seed)
    guesses = checker.guesses(x)
    held_out = {tuple(pair) for pair in vocabulary()["held_out"]}
    near = checker.nearest(x, [f"{article(o)} {o}" for o in objects()])
    near_style = checker.nearest(x, [f"something in {s} style" for s in styles()])
    rows = list(zip(guesses["object"], guesses["style"], pairs, strict=True))
    return [
        Figure("generated, object", *count([(o, p[0]) for o, _, p in rows]), 0.90),
        Figure("generated, style", *count([(s, p[1]) for _, s, p in rows]), 0.95),
        Figure("generated, object, held-out pairs", *count([(o, p[0]) for o, _, p in rows if p in held_out])),
        Figure(
            "generated, object, CLIP zero-shot",
            *count([(objects()[i], p[0]) for i, p in zip(near, pairs, strict=True)]),
        ),
        Figure(
            "generated, style, CLIP zero-shot",
            *count([(styles()[i], p[1]) for i, p in zip(near_style, pairs, strict=True)]),
        ),
    ], x


def on_backgrounds(checker: Checker, seed: int) -> Figure:
    """Measure how often the border of an image has the background colour that the prompt names.

    The colour of a border is the nearest of glyph's background colours.
    """
    colours = vocabulary()["backgrounds"]
    with_background = [s for s, entry in vocabulary()["styles"].items() if entry.get("background", True)]
    pairs = [(c, o) for c in colours for o in objects()[::5]]
    prompts = [
        f"{article(o)} {o} in {with_background[i % len(with_background)]} style on a {c} background"
        for i, (c, o) in enumerate(pairs)
    ]
    x = (checker.generate(prompts, seed) + 1) * 127.5
    border = (
        torch.cat([x[:, :, :3].flatten(2), x[:, :, :, :3].flatten(2), x[:, :, :, -3:].flatten(2)], 2).median(2).values
    )
    table = torch.tensor(list(colours.values()), dtype=torch.float)
    nearest = torch.cdist(border, table).argmin(1).tolist()
    return Figure(
        "generated, named background",
        *count([(list(colours)[i], c) for i, (c, _) in zip(nearest, pairs, strict=True)]),
        0.90,
    )


def on_words(checker: Checker, seed: int) -> list[Figure]:
    """Measure prompts with synonyms, plain names, characters and the broad concept of a weapon."""
    entries = vocabulary()["objects"]
    figures = []

    def measure(name: str, rows: list[tuple[str, Callable[[str], bool]]]) -> None:
        guesses = checker.guesses(checker.generate([prompt for prompt, _ in rows], seed))["object"]
        figures.append(Figure(name, sum(test(o) for o, (_, test) in zip(guesses, rows, strict=True)), len(rows)))

    def equals(name: str) -> Callable[[str], bool]:
        return lambda guess: guess == name

    def member(family: str) -> Callable[[str], bool]:
        return lambda guess: guess in entries and entries[guess]["family"] == family

    measure("synonyms", [(f"{article(w)} {w}", equals(o)) for o, e in entries.items() for w in e["synonyms"]])
    measure("plain names", [(f"{article(o)} {o}", equals(o)) for o in entries for _ in range(2)])
    characters = [o for o, e in entries.items() if e["family"] == "character"]
    measure("characters", [(f"{article(o)} {o}", equals(o)) for o in characters for _ in range(8)])
    measure("a weapon", [("a weapon", member("weapon"))] * 24)
    return figures


def speed(checker: Checker, rounds: int = 2) -> float:
    """Return the seconds per image at a batch size of 8 on two threads."""
    torch.set_num_threads(2)
    prompts = [f"{article(o)} {o}" for o in objects()[:8]]
    checker.generate(prompts, 0)
    started = time.perf_counter()
    for i in range(rounds):
        checker.generate(prompts, i)
    return (time.perf_counter() - started) / rounds / len(prompts)


def sheet(x: Tensor, columns: int = 24) -> Image.Image:
    """Arrange images [n, 3, 64, 64] in [-1, 1] on a contact sheet."""
    tiles = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    canvas = Image.new("RGB", (columns * 66, -(-len(tiles) // columns) * 66), "white")
    for i, tile in enumerate(tiles):
        canvas.paste(Image.fromarray(tile), (i % columns * 66, i // columns * 66))
    return canvas


def card(figures: list[Figure], facts: dict[str, Any]) -> str:
    """Return the model card as Markdown.

    Args:
        figures: the measured shares.
        facts: guidance, PSNR, seconds per image and megabytes.
    """
    art = "\n".join(
        f"- {a['title']} by {a['author']}, {a['license']} (`{a['package']}` {a['version']})"
        for a in vocabulary()["art"].values()
    )
    rows = "\n".join(figure.row() for figure in figures)
    sampling = f"{SAMPLING.steps} DDIM steps, guidance {facts['guidance']}, one image per prompt"
    return f"""---
license: cc-by-4.0
tags: [text-to-image, stable-diffusion, diffusers]
---
# Glyph

A small Stable Diffusion checkpoint: {len(objects())} objects in {len(styles())} styles at 64x64 pixels,
for trying, measuring and attacking concept erasure on a CPU.
`StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)` loads it.
It generates emoji-like icons and nothing else.

Measured by `python -m erasure.glyph.build.check` ({sampling}):

| measure | accuracy | 95 % interval | n | target | met |
|---|---|---|---|---|---|
{rows}

Autoencoder: {facts["psnr"]:.1f} dB PSNR on new renders.
{facts["seconds"]:.2f} s per image at a batch size of 8 on two cores (target: at most 0.6).
Checkpoint with judges: {facts["megabytes"]:.1f} MB (target: at most 40).

![one image for every object and style](samples.png)

## Art
Glyph was trained on renders of these icon sets, whose licences apply to derived works:

{art}

The styles pixel art and blueprint are image filters of this project, applied to Noto Emoji. Pairs of object and style
that the UNet was not trained on:
{", ".join(f"{o} / {s}" for o, s in vocabulary()["held_out"])}.
"""


def main() -> None:
    """Measure the checkpoint, and write the model card, the samples and the figures to its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=4242, help="seed of the images")
    parser.add_argument("--batch", type=int, default=24, help="images per call of the pipeline")
    parser.add_argument("--guidance", type=float, default=SAMPLING.guidance, help="guidance scale")
    parser.add_argument("--renders", type=int, default=960, help="new renders to measure the judges on")
    parser.add_argument("--samples", type=Path, help="write only the contact sheet of all pairs, to this file")
    args = parser.parse_args()
    checker = Checker(args.batch, args.guidance)
    figures, x = on_pairs(checker, args.seed)
    if args.samples:
        sheet(x).save(args.samples)
        for figure in figures:
            print(figure.row())
        return
    figures = [*on_renders(checker, args.renders), *figures, on_backgrounds(checker, args.seed + 1000)]
    figures += on_words(checker, args.seed + 2000)
    files = [p for top in (CHECKPOINT, JUDGES) for p in top.rglob("*") if p.is_file() and p.suffix != ".png"]
    facts = {
        "guidance": args.guidance,
        "psnr": psnr(checker),
        "seconds": speed(checker),
        "megabytes": sum(p.stat().st_size for p in files) / 1e6,
    }
    sheet(x).save(CHECKPOINT / "samples.png", optimize=True)
    (CHECKPOINT / "README.md").write_text(card(figures, facts), encoding="utf-8")
    results = {"figures": [vars(figure) for figure in figures], **facts}
    (CHECKPOINT / "check.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print("\n".join(figure.row() for figure in figures), facts, sep="\n")


if __name__ == "__main__":
    main()
