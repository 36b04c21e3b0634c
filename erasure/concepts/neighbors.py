"""What a concept must not take with it: its neighbours and the retain prompts, found when the user names none.

Words come from the checkpoint's own vocabulary or from `configs/words.yaml`; nearness is that
of similarity.py.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path

import torch

from erasure.concepts.concept import Concept
from erasure.concepts.similarity import Encoder, cosines, tokens
from erasure.config import CONFIGS, read_yaml
from erasure.errors import ErasureError

COUNT = 8  # neighbours where the user names none
SAME = 0.95  # cosine from which a word is taken for another name of the concept


@cache
def everyday_words() -> dict[str, tuple[str, ...]]:
    """Return common nouns and styles by kind (object, identity, content, style)."""
    found = read_yaml(CONFIGS / "words.yaml")
    plural = {"object": "objects", "identity": "identities", "style": "styles"}
    return {**{kind: tuple(found[name]) for kind, name in plural.items()}, "content": ()}


def words(base: Encoder) -> dict[str, tuple[str, ...]]:
    """Return nouns and styles by kind: those of the checkpoint's own vocabulary, else everyday words."""
    return everyday_words() if base.vocabulary is None else base.vocabulary.by_kind()


def prompt_of(kind: str, word: str) -> str:
    """The prompt that a word of this kind stands for."""
    return f"{word} style" if kind == "style" else word


def retained(base: Encoder, concepts: list[Concept]) -> list[tuple[str, str]]:
    """(kind, word) of everything that should stay: what the concepts list to keep, then the vocabulary.

    Names of the concepts, words that contain one, and words that the text encoder takes for the same are left out.
    """
    gone = {name.lower() for concept in concepts for name in concept.names}
    found = {word: concept.kind for concept in concepts for word in concept.keep}
    for kind, listed in words(base).items():
        for word in listed:
            spelt, fits = f" {word.lower()} ", tokens(base, word) + 2 <= base.pipe.tokenizer.model_max_length
            if fits and not any(f" {name} " in spelt for name in gone):
                found.setdefault(word, kind)
    kept = {word for concept in concepts for word in concept.keep}
    rest = [word for word in found if word not in kept]
    if rest:
        targets = [prompt_of(concept.kind, name) for concept in concepts for name in concept.names]
        near = cosines(base, [prompt_of(found[word], word) for word in rest], targets)
        same = {word for word, row in zip(rest, near, strict=True) if row.max() >= SAME}
        found = {word: kind for word, kind in found.items() if word not in same}
    return [(kind, word) for word, kind in found.items()]


def neighbours(base: Encoder, concept: Concept, concepts: list[Concept], count: int = COUNT) -> list[str]:
    """The concept's `keep`, or the `count` nearest words of its kind that are none of `concepts`.

    Args:
        concepts: all that are erased together: what one of them is near to must not keep another.
    """
    if concept.keep:
        return list(concept.keep)
    rest = [word for kind, word in retained(base, concepts) if (kind == "style") == (concept.kind == "style")]
    if not rest:
        return []
    near = cosines(base, [prompt_of(concept.kind, word) for word in rest], [prompt_of(concept.kind, concept.name)])
    return [rest[i] for i in near[:, 0].argsort(descending=True)[:count].tolist()]


def around(base: Encoder, concepts: list[Concept]) -> list[str]:
    """Prompts of the neighbours of all concepts, each once: every concept's nearest, then every second, ..."""
    turns = zip_longest(*(neighbours(base, one, concepts) for one in concepts))
    pairs = (zip(concepts, turn, strict=True) for turn in turns)
    return list(dict.fromkeys(prompt_of(one.kind, word) for turn in pairs for one, word in turn if word is not None))


def anchored(base: Encoder, concept: Concept, concepts: list[Concept], *, first: bool = False) -> Concept:
    """The concept with an anchor that its prompts are to show: its own, else the nearest other word of its kind.

    Args:
        concepts: all that are erased together: none of them is an anchor.
        first: take the first word of the vocabulary, not the nearest.

    Raises:
        ErasureError: there is no other word.
    """
    if concept.anchor is not None:
        return concept
    if first:
        near = [word for kind, word in retained(base, concepts) if (kind == "style") == (concept.kind == "style")]
    else:
        near = neighbours(base, concept, concepts)
    if not near:
        raise ErasureError(f"{concept.name!r}: no other word to lead it to; give an anchor")
    return replace(concept, anchor=prompt_of(concept.kind, near[0]))


def retain_prompts(
    base: Encoder,
    concepts: list[Concept],
    count: int | None,
    *,
    first: Sequence[str] = (),
    file: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Prompts that must stay as they are, each once: `first` and the concepts' `keep`, then the file's or found ones.

    Found are the words of `retained`, alone and, up to `count`, objects in styles. Those of the file or found that
    name a concept or are too long for the text encoder are left out.

    Args:
        count: how many, where there are enough; more are drawn by the seed, but `first` and `keep` all stay.
            None: all of the file or all words.
        first: the user's own.
        file: a CSV with a column `prompt`.

    Raises:
        ErasureError: there is none; a bad file; a prompt of the user's names a concept.
    """
    names = [name.lower() for concept in concepts for name in concept.names]
    for text in first:
        if naming(text, names):
            raise ErasureError(f"the retain prompt {text!r} names what is to be erased: take it out of retain")
    kept = [prompt_of(concept.kind, word) for concept in concepts for word in concept.keep]
    fixed = list(dict.fromkeys([*first, *kept]))
    both: list[str] = []
    if file is not None:
        found = [text for text in read_prompts(file) if not naming(text, names)]
    else:
        listed = retained(base, concepts)
        nouns = [word for kind, word in listed if kind != "style"]
        looks = [prompt_of(kind, word) for kind, word in listed if kind == "style"]
        found = [prompt_of(kind, word) for kind, word in listed]
        both = [f"a {noun} in {look}" for noun in nouns for look in looks] if count is not None else []
    longest = base.pipe.tokenizer.model_max_length
    found, both = (
        [text for text in dict.fromkeys(texts) if text not in fixed and tokens(base, text) <= longest]
        for texts in (found, both)
    )
    if not fixed and not found:
        raise ErasureError("no retain prompts: all of them name the concept or are too long; name some with retain")
    draw = torch.Generator().manual_seed(seed)
    for more in (found, both):
        room = len(more) if count is None else max(0, count - len(fixed))
        order = range(len(more)) if len(more) <= room else torch.randperm(len(more), generator=draw)[:room].tolist()
        fixed += [more[i] for i in order]
    return fixed


def naming(text: str, names: Sequence[str]) -> bool:
    """Whether a prompt has one of the names, in lower case, in it as words of their own."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text.lower()) for name in names)


def read_prompts(source: str | os.PathLike[str]) -> list[str]:
    """The column `prompt` of a CSV file, without empty cells.

    Raises:
        ErasureError: the file cannot be read, or has no such column.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(Path(source).read_text(encoding="utf-8-sig"), newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise ErasureError(f"{source}: cannot be read as CSV: {fault}") from None
    if rows and "prompt" not in rows[0]:
        raise ErasureError(f"{source}: column 'prompt' is missing; it has {', '.join(map(str, rows[0]))}")
    return [row["prompt"].strip() for row in rows if (row["prompt"] or "").strip()]
