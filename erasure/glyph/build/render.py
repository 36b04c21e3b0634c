"""Render labelled images of 64x64 pixels from the icons: an object in a style on a background."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from erasure.glyph import objects, styles, vocabulary
from erasure.glyph.build.art import load

PAPER = (38, 84, 160)  # RGB of the paper of blueprints
LINES = (66, 116, 190)  # RGB of the grid on it
OUTLINE = (30, 24, 40)  # RGB of the outline of pixel art
CELL = 4  # side of a square of pixel art in pixels: the downsampling factor of the autoencoder


@dataclass(frozen=True)
class Scene:
    """The content of an image.

    Args:
        object: name of the object.
        style: name of the style.
        background: name of the background colour; "" if the style has a background of its own.
    """

    object: str
    style: str
    background: str


def scenes(*, held_out: bool | None = None) -> list[Scene]:
    """Return every combination of object, style and background.

    Args:
        held_out: True selects the pairs of object and style that the UNet is not trained on, False the others.
    """
    words = vocabulary()
    held_out_pairs = {tuple(pair) for pair in words["held_out"]}
    combinations = []
    for name in objects():
        for style in styles():
            if held_out is not None and ((name, style) in held_out_pairs) != held_out:
                continue
            choice = words["styles"][style].get("background", True)
            combinations += [Scene(name, style, colour) for colour in (words["backgrounds"] if choice else [""])]
    return combinations


def pixelate(icon: Image.Image, rng: random.Random) -> Image.Image:
    """Redraw an icon in squares of 4 px, each a cell of the latent grid, with a dark outline of one square."""
    cells = rng.choice((12, 13))
    small = icon.resize((cells, cells), Image.Resampling.BOX)
    small.putalpha(small.getchannel("A").point(lambda a: 255 if a > 110 else 0))
    sprite = Image.new("RGBA", (cells + 2, cells + 2), (0, 0, 0, 0))
    sprite.paste(small, (1, 1))
    solid = np.pad(np.asarray(sprite.getchannel("A")) > 0, 1)
    neighbours = solid[:-2, 1:-1] | solid[2:, 1:-1] | solid[1:-1, :-2] | solid[1:-1, 2:]
    edge = Image.fromarray(np.uint8(255) * (neighbours & ~solid[1:-1, 1:-1]))
    sprite.paste(Image.new("RGBA", sprite.size, (*OUTLINE, 255)), mask=edge)
    return sprite.resize((sprite.width * CELL, sprite.height * CELL), Image.Resampling.NEAREST)


def draw_edges(icon: Image.Image) -> Image.Image:
    """Return the white contours of an icon: the edges of its colours and of its outline."""
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
    """Return the background of a scene: the grid of blueprints, or the named colour with a slight gradient."""
    if not scene.background:
        paper = np.empty((size, size, 3), np.float32)
        paper[:] = PAPER
        paper[::8] = paper[:, ::8] = LINES
    else:
        colour = np.array(vocabulary()["backgrounds"][scene.background], np.float32)
        slope = rng.uniform(-14, 14)
        grade = np.linspace(-1, 1, size, dtype=np.float32)[:, None, None] * slope
        paper = np.broadcast_to(colour + grade + rng.uniform(-6, 6), (size, size, 3))
    return Image.fromarray(np.clip(paper, 0, 255).astype(np.uint8)).convert("RGBA")


def render(scene: Scene, seed: int, icon: str | None = None) -> Image.Image:
    """Render a scene as an RGB image of 64x64 pixels.

    Args:
        scene: the content of the image.
        seed: seed of flip, size, rotation, position and background shade.
        icon: name of an icon that replaces the object's, for distractors.
    """
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
    """Yield scenes with their renders, uint8 [64, 64, 3]; all pairs of object and style occur equally often.

    Args:
        count: number of renders.
        seed: seed of the order and of the renders.
        held_out: as `scenes` takes it.
    """
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
