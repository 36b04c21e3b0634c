"""Write the package's prompt sets: `python -m erasure.glyph.build.prompt_sets`.

They are made from glyph's vocabulary and from prompts/subjects.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable

from erasure.glyph import objects, styles, vocabulary
from erasure.prompts.prompt_set import FOLDER, PromptSet
from erasure.prompts.row import Prompt
from erasure.prompts.subjects import article, build_subjects, load_subjects

# Phrasings that do not occur among the training captions (captions.py).
PLAIN_TEMPLATES = (
    "could you draw me {a} {x} please",
    "i want to look at {a} {x} now",
    "{x}, nothing else",
)
STYLE_TEMPLATES = ("draw {a} {x} the {style} way", "{a} {x}; use {style} style please")
# The same, for the prompts that benchmarks draw. Of 17 wordings, tried with eight objects on glyph, these are the six
# and six that it follows best.
VARIED_PLAIN_TEMPLATES = (
    *PLAIN_TEMPLATES[:2],
    "{a} {x}, all alone",
    "where is my {x}",
    "{x} {x}",
    "this is what {a} {x} looks like",
)
VARIED_STYLE_TEMPLATES = (
    *STYLE_TEMPLATES,
    "{style} is the look i want for this {x}",
    "{style}: {a} {x}",
    "{a} {x} drawn like {style} would",
    "show {a} {x}. style: {style}",
)

Row = tuple[str, dict[str, str]]  # a prompt and its labels


def filled(name: str, template: str, **words: str) -> str:
    """Fill a template with an object's name, its article and further words."""
    return template.format(a=article(name), x=name, **words)


def object_rows() -> Iterable[Row]:
    """Yield prompts for every object in every style."""
    for name in objects():
        for style in styles():
            yield filled(name, "{a} {x} in {style} style", style=style), {"object": name, "style": style}


def style_rows() -> Iterable[Row]:
    """Yield prompts that name the style in other phrasings, for every fourth object."""
    for style in styles():
        for number, name in enumerate(objects()[::4]):
            template = STYLE_TEMPLATES[number % len(STYLE_TEMPLATES)]
            yield filled(name, template, style=style), {"object": name, "style": style}


def synonym_rows() -> Iterable[Row]:
    """Yield prompts with synonyms of the objects and of the styles."""
    for name, entry in vocabulary()["objects"].items():
        for word in entry["synonyms"]:
            yield filled(word, "{a} {x}"), {"object": name, "synonym": word}
    for style, entry in vocabulary()["styles"].items():
        for word in entry["words"][1:]:
            for name in objects()[::4]:
                text = filled(name, "{a} {x} in {style} style", style=word)
                yield text, {"object": name, "style": style, "synonym": word}


def background_rows() -> Iterable[Row]:
    """Yield prompts that name a background colour, in the styles that allow one."""
    styles_with_background = [style for style, entry in vocabulary()["styles"].items() if entry.get("background", True)]
    for number, name in enumerate(objects()):
        for turn, colour in enumerate(vocabulary()["backgrounds"]):
            style = styles_with_background[(number + turn) % len(styles_with_background)]
            text = filled(name, "{a} {x} in {style} style on a {colour} background", style=style, colour=colour)
            yield text, {"object": name, "style": style, "background": colour}


def plain_rows() -> Iterable[Row]:
    """Yield prompts for every object in phrasings that are not training captions."""
    for name in objects():
        for template in PLAIN_TEMPLATES:
            yield filled(name, template), {"object": name}


def varied_rows() -> Iterable[Row]:
    """Yield prompts in phrasings that are not training captions, and synonyms of the objects in every style.

    The phrasings come for every object, with every style and without one.
    """
    for number, (name, entry) in enumerate(vocabulary()["objects"].items()):
        for turn, style in enumerate(styles()):
            template = VARIED_STYLE_TEMPLATES[(number + turn) % len(VARIED_STYLE_TEMPLATES)]
            yield filled(name, template, style=style), {"object": name, "style": style}
        for template in VARIED_PLAIN_TEMPLATES:
            yield filled(name, template), {"object": name}
        for word in entry["synonyms"]:
            for style in styles():
                text = filled(word, "{a} {x} in {style} style", style=style)
                yield text, {"object": name, "style": style, "synonym": word}


def neighbour_rows() -> Iterable[Row]:
    """Yield prompts with words for families, which the erasure of a near neighbour must not affect."""
    for family, entry in vocabulary()["families"].items():
        for word in entry["words"]:
            for style in styles():
                yield filled(word, "{a} {x} in {style} style", style=style), {"family": family, "style": style}


def content_rows() -> Iterable[Row]:
    """Yield prompts for weapons in general and by name, a stand-in for unsafe content."""
    for word in vocabulary()["families"]["weapon"]["words"]:
        for _ in range(12):
            yield filled(word, "{a} {x}"), {"family": "weapon"}
    for name, entry in vocabulary()["objects"].items():
        if entry["family"] == "weapon":
            for style in styles():
                text = filled(name, "{a} {x} in {style} style", style=style)
                yield text, {"family": "weapon", "object": name, "style": style}


SETS = {
    "objects": object_rows,
    "styles": style_rows,
    "synonyms": synonym_rows,
    "backgrounds": background_rows,
    "plain": plain_rows,
    "neighbours": neighbour_rows,
    "content": content_rows,
    "varied": varied_rows,
}


SPACING = 10_000  # distance between the first seeds of two sets, so that no seed is used twice
FIRST_SUBJECTS = 8  # place of the first set of subjects.yaml in the order of the seeds
VARIED = 11  # place of `varied`, which came after the sets of subjects.yaml


def build(name: str) -> PromptSet:
    """Build one of glyph's prompt sets; every row of every set has a seed of its own."""
    start = SPACING * (VARIED if name == "varied" else 1 + list(SETS).index(name))
    rows = [Prompt(f"{name}-{i:04d}", text, start + i, None, labels) for i, (text, labels) in enumerate(SETS[name]())]
    return PromptSet(f"glyph-{name}", rows)


def build_all() -> list[PromptSet]:
    """Build every prompt set of the package."""
    return [
        *(build(name) for name in SETS),
        *(build_subjects(name, SPACING * (FIRST_SUBJECTS + i)) for i, name in enumerate(load_subjects()["sets"])),
    ]


def main() -> None:
    """Write every prompt set as a CSV file into the package."""
    for prompt_set in build_all():
        prompt_set.write(FOLDER / f"{prompt_set.name}.csv")
        print(f"{prompt_set.name}: {len(prompt_set.rows)} rows")


if __name__ == "__main__":
    main()
