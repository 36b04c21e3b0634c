"""Random captions of a scene, with a record of the object, style and background that they name."""

from __future__ import annotations

import random
from dataclasses import dataclass

from erasure.glyph import vocabulary
from erasure.glyph.build.render import Scene
from erasure.prompts.subjects import article

SUBJECTS = (
    "{a} {x}",
    "{x}",
    "the {x}",
    "one {x}",
    "{a} picture of {a2} {x}",
    "{a} photo of {a2} {x}",
    "an image of {a2} {x}",
)
STYLED = (
    "{subject} in {style} style",
    "{subject} in the style of {style}",
    "{style} of {subject}",
    "{style} drawing of {subject}",
    "{style} style, {subject}",
    "{subject}, {style}",
    "{subject} as {style}",
    "a {style} {bare}",
)
PLACED = (
    "{rest} on a {colour} background",
    "{rest} on {colour}",
    "{rest}, {colour} background",
    "{rest} with a {colour} background",
    "{colour} background, {rest}",
)
# Words that say nothing about the image, so that freely worded prompts are understood too.
FILLER = (
    "please draw me nice beautiful lovely detailed high quality best simple small big cute little old new my your "
    "this that here is we want to see show some really very good clean modern classic art artwork painting "
    "illustration render icon emoji sticker logo sketch i would like can you make for paint create and with at by "
    "in front now today masterpiece professional colorful amazing great view close up centered alone single"
).split()


@dataclass(frozen=True)
class Caption:
    """A text and what it names.

    Args:
        text: the caption.
        fits: the objects that fit the caption.
        style: the style that the caption names; "" if it names none.
        background: the background colour that the caption names; "" if it names none.
    """

    text: str
    fits: frozenset[str]
    style: str
    background: str

    def describes(self, scene: Scene) -> bool:
        """Return whether the caption fits an image of `scene`."""
        return (
            scene.object in self.fits and self.style in ("", scene.style) and self.background in ("", scene.background)
        )


def family(name: str) -> frozenset[str]:
    """Return the names of all objects of a family, such as animal or weapon."""
    return frozenset(o for o, entry in vocabulary()["objects"].items() if entry["family"] == name)


def _subject(scene: Scene, rng: random.Random, broadly: float) -> tuple[str, frozenset[str]]:
    """Choose words for the object of a scene, and return them with the objects that they fit."""
    words = vocabulary()
    entry = words["objects"][scene.object]
    draw = rng.random()
    broad = broadly if entry["family"] == "weapon" else 0.06
    if draw < broad:
        return rng.choice(words["families"][entry["family"]]["words"]), family(entry["family"])
    if draw < broad + 0.05:
        return "something", frozenset(words["objects"])
    if draw < broad + 0.30:
        return rng.choice(entry["synonyms"]), frozenset([scene.object])
    return scene.object, frozenset([scene.object])


def caption(
    scene: Scene, rng: random.Random, *, styled: float = 0.6, placed: float = 0.5, broadly: float = 0.25
) -> Caption:
    """Return a random caption that fits the scene.

    The tokenizer is trained on captions with the default probabilities. Other defaults would give another tokenizer,
    which does not fit the trained text encoders.

    Args:
        scene: the scene to describe.
        rng: source of all random choices.
        styled: probability of naming the style.
        placed: probability of naming the background.
        broadly: probability of calling a weapon just "a weapon".
    """
    bare, fits = _subject(scene, rng, broadly)
    form = rng.choice(SUBJECTS) if rng.random() < 0.5 else SUBJECTS[0]
    text = form.format(a=article(bare) if form[4:5] == "{" else "a", a2=article(bare), x=bare)
    style = background = ""
    if rng.random() < styled:
        style = scene.style
        words = vocabulary()["styles"][style]["words"]
        word = words[0] if rng.random() < 0.8 else rng.choice(words)
        text = rng.choice(STYLED).format(subject=text, style=word, bare=bare)
    if scene.background and rng.random() < placed:
        background = scene.background
        text = rng.choice(PLACED).format(rest=text, colour=background)
    if rng.random() < 0.25:
        text = " ".join(rng.choices(FILLER, k=rng.randint(1, 5))) + " " + text
    if rng.random() < 0.15:
        text = text + rng.choice((" ", ", ")) + " ".join(rng.choices(FILLER, k=rng.randint(1, 3)))
    return Caption(text, fits, style, background)
