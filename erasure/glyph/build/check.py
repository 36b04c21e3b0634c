"""Measure the shipped checkpoint against its bars and write its model card: `python -m erasure.glyph.build.check`."""

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

from erasure.evaluation.generate import GUIDANCE, STEPS
from erasure.evaluation.metrics.statistics import wilson
from erasure.glyph import CHECKPOINT, JUDGES, objects, styles, vocabulary
from erasure.prompts.subjects import article
from erasure.glyph.build.data import pixels
from erasure.glyph.build.render import dataset
from erasure.glyph.vision import load_classifier, load_clip


@dataclass
class Figure:
    """One measured share with its bar."""

    name: str
    hits: int
    n: int
    bar: float | None = None

    def row(self) -> str:
        """A line of the card's table."""
        low, high = wilson(self.hits, self.n)
        bar = "" if self.bar is None else f"≥ {self.bar:.0%}"
        met = "" if self.bar is None else ("yes" if self.hits / self.n >= self.bar else "**no**")
        return f"| {self.name} | {self.hits / self.n:.1%} | {low:.1%} to {high:.1%} | {self.n} | {bar} | {met} |"


class Checker:
    """The checkpoint with its judges."""

    def __init__(self, batch: int, guidance: float) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        self.pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT, safety_checker=None, torch_dtype=torch.float32)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.classifier, self.clip = load_classifier(), load_clip()
        self.batch, self.guidance = batch, guidance

    def generate(self, prompts: list[str], seed: int) -> Tensor:
        """Images [n, 3, 64, 64] in [-1, 1], one a prompt, row i from seed + i."""
        parts = []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
            made = self.pipe(
                part, generator=draws, num_inference_steps=STEPS, guidance_scale=self.guidance, output_type="np"
            ).images
            parts.append(pixels((made * 255).round().astype(np.uint8)))
        return torch.cat(parts)

    @torch.no_grad()
    def guesses(self, images: Tensor) -> dict[str, list[str]]:
        """The classifier's top object and style of each image."""
        out = self.classifier(images)
        names = {"object": [*objects(), "none"], "style": styles()}
        return {head: [names[head][i] for i in logits.argmax(1).tolist()] for head, logits in out.items()}

    def nearest(self, images: Tensor, texts: list[str]) -> list[int]:
        """CLIP zero-shot: the index of the nearest text."""
        return (self.clip.image_features(images) @ self.clip.text_features(texts).T).argmax(1).tolist()


def count(pairs: list[tuple[Any, Any]]) -> tuple[int, int]:
    """Hits and number of (found, wanted)."""
    return sum(a == b for a, b in pairs), len(pairs)


def on_renders(checker: Checker, n: int) -> list[Figure]:
    """The judges and the autoencoder on fresh renders."""
    made = list(dataset(n, 987_654))
    labels, x = [scene for scene, _ in made], pixels(np.stack([image for _, image in made]))
    found = checker.guesses(x)
    names = [f"{article(o)} {o}" for o in objects()]
    near = checker.nearest(x, names)
    near_style = checker.nearest(x, [f"something in {s} style" for s in styles()])
    wanted = {head: [getattr(s, head) for s in labels] for head in ("object", "style")}
    return [
        Figure(
            "classifier, object, fresh renders", *count(list(zip(found["object"], wanted["object"], strict=True))), 0.98
        ),
        Figure(
            "classifier, style, fresh renders", *count(list(zip(found["style"], wanted["style"], strict=True))), 0.98
        ),
        Figure(
            "CLIP zero-shot, object, fresh renders",
            *count([(objects()[i], w) for i, w in zip(near, wanted["object"], strict=True)]),
        ),
        Figure(
            "CLIP zero-shot, style, fresh renders",
            *count([(styles()[i], w) for i, w in zip(near_style, wanted["style"], strict=True)]),
        ),
    ]


@torch.no_grad()
def psnr(checker: Checker, n: int = 96) -> float:
    """Of the autoencoder on fresh renders, dB."""
    x = pixels(np.stack([image for _, image in dataset(n, 123_456)]))
    vae = checker.pipe.vae
    made = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10((made - x).pow(2).mean() / 4))


def on_pairs(checker: Checker, seed: int) -> tuple[list[Figure], Tensor]:
    """One image for every object and style, and the images."""
    pairs = [(o, s) for o in objects() for s in styles()]
    x = checker.generate([f"{article(o)} {o} in {s} style" for o, s in pairs], seed)
    found = checker.guesses(x)
    kept = {tuple(pair) for pair in vocabulary()["held_out"]}
    near = checker.nearest(x, [f"{article(o)} {o}" for o in objects()])
    near_style = checker.nearest(x, [f"something in {s} style" for s in styles()])
    rows = list(zip(found["object"], found["style"], pairs, strict=True))
    return [
        Figure("generated, object", *count([(o, p[0]) for o, _, p in rows]), 0.90),
        Figure("generated, style", *count([(s, p[1]) for _, s, p in rows]), 0.95),
        Figure("generated, object, held-out pairs", *count([(o, p[0]) for o, _, p in rows if p in kept])),
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
    """Whether the border has the named colour (nearest of the named ones)."""
    colours = vocabulary()["backgrounds"]
    able = [s for s, entry in vocabulary()["styles"].items() if entry.get("background", True)]
    wanted = [(c, o) for c in colours for o in objects()[::5]]
    prompts = [
        f"{article(o)} {o} in {able[i % len(able)]} style on a {c} background" for i, (c, o) in enumerate(wanted)
    ]
    x = (checker.generate(prompts, seed) + 1) * 127.5
    border = (
        torch.cat([x[:, :, :3].flatten(2), x[:, :, :, :3].flatten(2), x[:, :, :, -3:].flatten(2)], 2).median(2).values
    )
    table = torch.tensor(list(colours.values()), dtype=torch.float)
    found = torch.cdist(border, table).argmin(1).tolist()
    return Figure(
        "generated, named background",
        *count([(list(colours)[i], c) for i, (c, _) in zip(found, wanted, strict=True)]),
        0.90,
    )


def on_words(checker: Checker, seed: int) -> list[Figure]:
    """Synonyms, characters and the broad content concept as prompts."""
    entries = vocabulary()["objects"]
    figures = []

    def measure(name: str, rows: list[tuple[str, Callable[[str], bool]]]) -> None:
        found = checker.guesses(checker.generate([prompt for prompt, _ in rows], seed))["object"]
        figures.append(Figure(name, sum(test(o) for o, (_, test) in zip(found, rows, strict=True)), len(rows)))

    def equals(name: str) -> Callable[[str], bool]:
        return lambda found: found == name

    def member(family: str) -> Callable[[str], bool]:
        return lambda found: found in entries and entries[found]["family"] == family

    measure("synonyms", [(f"{article(w)} {w}", equals(o)) for o, e in entries.items() for w in e["synonyms"]])
    measure("plain names", [(f"{article(o)} {o}", equals(o)) for o in entries for _ in range(2)])
    characters = [o for o, e in entries.items() if e["family"] == "character"]
    measure("characters", [(f"{article(o)} {o}", equals(o)) for o in characters for _ in range(8)])
    measure("a weapon", [("a weapon", member("weapon"))] * 24)
    return figures


def speed(checker: Checker, rounds: int = 2) -> float:
    """Seconds an image at batch 8 on two threads."""
    torch.set_num_threads(2)
    prompts = [f"{article(o)} {o}" for o in objects()[:8]]
    checker.generate(prompts, 0)
    begun = time.perf_counter()
    for i in range(rounds):
        checker.generate(prompts, i)
    return (time.perf_counter() - begun) / rounds / len(prompts)


def sheet(x: Tensor, columns: int = 24) -> Image.Image:
    """Images [n, 3, 64, 64] as a contact sheet."""
    tiles = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    page = Image.new("RGB", (columns * 66, -(-len(tiles) // columns) * 66), "white")
    for i, tile in enumerate(tiles):
        page.paste(Image.fromarray(tile), (i % columns * 66, i // columns * 66))
    return page


def card(figures: list[Figure], facts: dict[str, Any]) -> str:
    """The model card."""
    art = "\n".join(
        f"- {a['title']} by {a['author']}, {a['license']} (`{a['package']}` {a['version']})"
        for a in vocabulary()["art"].values()
    )
    rows = "\n".join(figure.row() for figure in figures)
    return f"""---
license: cc-by-4.0
tags: [text-to-image, stable-diffusion, diffusers]
---
# Glyph

A small Stable Diffusion checkpoint: {len(objects())} objects in {len(styles())} styles at 64x64 pixels,
made so that concept erasure can be tried, measured and attacked on a CPU.
`StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)` loads it.
It draws emoji-like icons and nothing else.

Measured by `python -m erasure.glyph.build.check` ({STEPS} DDIM steps, guidance {facts["guidance"]}, one image a prompt):

| what | share right | 95 % interval | n | bar | met |
|---|---|---|---|---|---|
{rows}

Autoencoder: {facts["psnr"]:.1f} dB on fresh renders.
{facts["seconds"]:.2f} s an image at batch 8 on two cores (bar: 0.6).
Checkpoint with judges: {facts["megabytes"]:.1f} MB (bar: 40).

![one image for every object and style](samples.png)

## Art
Trained on renders of these icon sets, whose licences hold for what derives from them:

{art}

Pixel art and blueprint are image filters of ours over Noto Emoji. Pairs kept from the generator's training:
{", ".join(f"{o} / {s}" for o, s in vocabulary()["held_out"])}.
"""


def main() -> None:
    """Measure, print, and write the card, the samples and the figures beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=4242)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--renders", type=int, default=960)
    parser.add_argument("--samples", type=Path, help="only write the contact sheet of all pairs there")
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
    found = {"figures": [vars(figure) for figure in figures], **facts}
    (CHECKPOINT / "check.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n".join(figure.row() for figure in figures), facts, sep="\n")


if __name__ == "__main__":
    main()
