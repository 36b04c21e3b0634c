"""Render labelled 64 px images from the art: an object in a style on a background."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from erasure.glyph import objects, styles, vocabulary
from erasure.glyph.build.art import load

GRID = (38, 84, 160)  # blueprint's paper
LINES = (66, 116, 190)  # and its grid
OUTLINE = (30, 24, 40)  # around pixel art
CELL = 4  # pixels a side of pixel art's squares: the autoencoder's factor


@dataclass(frozen=True)
class Scene:
    """What an image shows. `background` is "" where the style brings its own."""

    object: str
    style: str
    background: str


def scenes(*, held_out: bool | None = None) -> list[Scene]:
    """Every object x style x background; `held_out` picks the pairs kept from the generator, or the others."""
    words = vocabulary()
    kept = {tuple(pair) for pair in words["held_out"]}
    found = []
    for name in objects():
        for style in styles():
            if held_out is not None and ((name, style) in kept) != held_out:
                continue
            own = words["styles"][style].get("background", True)
            found += [Scene(name, style, colour) for colour in (words["backgrounds"] if own else [""])]
    return found


def pixelate(icon: Image.Image, rng: random.Random) -> Image.Image:
    """Redraw in squares of 4 px, a cell of the latent grid each, with a dark outline of one square."""
    cells = rng.choice((12, 13))
    small = icon.resize((cells, cells), Image.Resampling.BOX)
    small.putalpha(small.getchannel("A").point(lambda a: 255 if a > 110 else 0))
    sprite = Image.new("RGBA", (cells + 2, cells + 2), (0, 0, 0, 0))
    sprite.paste(small, (1, 1))
    solid = np.pad(np.asarray(sprite.getchannel("A")) > 0, 1)
    beside = solid[:-2, 1:-1] | solid[2:, 1:-1] | solid[1:-1, :-2] | solid[1:-1, 2:]
    edge = Image.fromarray(np.uint8(255) * (beside & ~solid[1:-1, 1:-1]))
    sprite.paste(Image.new("RGBA", sprite.size, (*OUTLINE, 255)), mask=edge)
    return sprite.resize((sprite.width * CELL, sprite.height * CELL), Image.Resampling.NEAREST)


def draw_edges(icon: Image.Image) -> Image.Image:
    """White contours of the drawing: edges of its colours and of its outline."""
    solid = Image.new("RGBA", icon.size, (128, 128, 128, 255))
    solid.alpha_composite(icon)
    channels = [*solid.convert("RGB").split(), icon.getchannel("A")]
    edges = np.zeros((icon.height, icon.width), np.float32)
    for channel in channels:
        soft = np.asarray(channel.filter(ImageFilter.GaussianBlur(1.2)), np.float32)
        gy, gx = np.gradient(soft)
        edges = np.maximum(edges, np.hypot(gx, gy))
    mask = np.clip((edges - 5) * 16, 0, 255).astype(np.uint8)
    white = Image.new("RGBA", icon.size, (255, 255, 255, 0))
    white.putalpha(Image.fromarray(mask))
    return white


def backdrop(scene: Scene, rng: random.Random, size: int) -> Image.Image:
    """Blueprint's grid, or the named colour, plain or slightly graded."""
    if not scene.background:
        paper = np.empty((size, size, 3), np.float32)
        paper[:] = GRID
        paper[::8] = paper[:, ::8] = LINES
    else:
        colour = np.array(vocabulary()["backgrounds"][scene.background], np.float32)
        slope = rng.uniform(-14, 14)
        grade = np.linspace(-1, 1, size, dtype=np.float32)[:, None, None] * slope
        paper = np.broadcast_to(colour + grade + rng.uniform(-6, 6), (size, size, 3))
    return Image.fromarray(np.clip(paper, 0, 255).astype(np.uint8)).convert("RGBA")


def render(scene: Scene, seed: int, icon: str | None = None) -> Image.Image:
    """One image of the scene (RGB, 64x64); `icon` replaces the object's icon, for distractors."""
    rng = random.Random(seed)
    words = vocabulary()
    size = words["size"]
    style = words["styles"][scene.style]
    art = load(style["art"])[icon or words["objects"][scene.object]["icon"]]
    if rng.random() < 0.5:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "ink" in style:
        inked = Image.new("RGBA", art.size, (*style["ink"], 0))
        inked.putalpha(art.getchannel("A"))
        art = inked
    if style.get("filter") == "pixel":
        art = pixelate(art, rng)
    else:
        side = round(size * rng.uniform(0.72, 0.88))
        art = art.rotate(rng.uniform(-7, 7), Image.Resampling.BICUBIC)
        if style.get("filter") == "blueprint":
            art = draw_edges(art)
        art = art.resize((side, side), Image.Resampling.LANCZOS)
    free = (size - art.width) // 2
    step = CELL if style.get("filter") == "pixel" else 1
    x, y = ((free + rng.randint(-3, 3)) // step * step for _ in range(2))
    image = backdrop(scene, rng, size)
    image.alpha_composite(art, (max(x, 0), max(y, 0)))
    return image.convert("RGB")


def dataset(count: int, seed: int, *, held_out: bool | None = None) -> Iterator[tuple[Scene, np.ndarray]]:
    """`count` renders as uint8 [64, 64, 3], pairs of object and style equally often, in an order drawn from `seed`."""
    rng = random.Random(seed)
    by_pair: dict[tuple[str, str], list[Scene]] = {}
    for scene in scenes(held_out=held_out):
        by_pair.setdefault((scene.object, scene.style), []).append(scene)
    pairs: list[tuple[str, str]] = []
    for _ in range(count):
        if not pairs:
            pairs = list(by_pair)
            rng.shuffle(pairs)
        scene = rng.choice(by_pair[pairs.pop()])
        yield scene, np.asarray(render(scene, rng.randrange(2**31)))
