"""Pictures of things that glyph draws, from the sheet that ships with it, to choose a concept by."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from erasure.model import presets

NAMES = ("cat", "dog", "frog", "owl", "car", "sailboat", "church", "rose", "apple", "santa claus", "guitar", "crown")
CELL, GAP = 64, 2  # pixels
ACROSS = 4  # objects in a row of the sheet


@dataclass(frozen=True)
class Sample:
    """A concept with a picture of it."""

    name: str
    image: Image.Image


def samples() -> list[Sample]:
    """Return pictures of some of the things that glyph draws; none where the sheet is missing."""
    preset = presets.bundled()["glyph"]
    words = presets.vocabulary("glyph")
    sheet = preset.checkpoint / "samples.png" if preset.checkpoint else None
    if sheet is None or words is None or not sheet.is_file():
        return []
    with Image.open(sheet) as file:
        whole = file.convert("RGB")
    styles = len(words.styles)
    found = []
    for name in NAMES:
        row, place = divmod(words.objects.index(name), ACROSS)
        left, top = place * styles * (CELL + GAP), row * (CELL + GAP)
        crop = whole.crop((left, top, left + CELL, top + CELL))
        found.append(Sample(name, crop.resize((2 * CELL, 2 * CELL), Image.Resampling.LANCZOS)))
    return found
