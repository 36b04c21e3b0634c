"""What an erasure must not change: a concept's neighbours and the retain prompts, chosen where the user names none.

Candidates come from the checkpoint's own vocabulary or from `configs/words.yaml`, and similarity.py compares them.
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
    lists = read_yaml(CONFIGS / "words.yaml")
    plural = {"object": "objects", "identity": "identities", "style": "styles"}
    return {**{kind: tuple(lists[name]) for kind, name in plural.items()}, "content": ()}


def words(base: Encoder) -> dict[str, tuple[str, ...]]:
    """Return nouns and styles by kind: those of the checkpoint's own vocabulary, else everyday words."""
    return everyday_words() if base.vocabulary is None else base.vocabulary.by_kind()


def prompt_of(kind: str, word: str) -> str:
    """Return the prompt for a word of this kind: "ink style" for a style, the word itself otherwise."""
    return f"{word} style" if kind == "style" else word


def retained(base: Encoder, concepts: list[Concept]) -> list[tuple[str, str]]:
    """Return (kind, word) for everything that should stay: what the concepts list to keep, then the vocabulary.

    Left out are the concepts' names, words that contain one, and words with almost the same text encoding.
    """
    gone = {name.lower() for concept in concepts for name in concept.names}
    kinds = {word: concept.kind for concept in concepts for word in concept.keep}
    for kind, listed in words(base).items():
        for word in listed:
            spelt, fits = f" {word.lower()} ", tokens(base, word) + 2 <= base.pipe.tokenizer.model_max_length
            if fits and not any(f" {name} " in spelt for name in gone):
                kinds.setdefault(word, kind)
    kept = {word for concept in concepts for word in concept.keep}
    rest = [word for word in kinds if word not in kept]
    if rest:
        targets = [prompt_of(concept.kind, name) for concept in concepts for name in concept.names]
        near = cosines(base, [prompt_of(kinds[word], word) for word in rest], targets)
        same = {word for word, row in zip(rest, near, strict=True) if row.max() >= SAME}
        kinds = {word: kind for word, kind in kinds.items() if word not in same}
    return [(kind, word) for word, kind in kinds.items()]


def neighbours(base: Encoder, concept: Concept, concepts: list[Concept], count: int = COUNT) -> list[str]:
    """Return the concept's `keep`, or the `count` nearest words of its kind that are not among `concepts`.

    Args:
        base: the checkpoint whose text encoder measures how near they are.
        concept: the concept whose neighbours are wanted.
        concepts: all concepts that are erased together; none of them is a neighbour to keep.
        count: how many neighbours to choose where the concept lists none.
    """
    if concept.keep:
        return list(concept.keep)
    rest = [word for kind, word in retained(base, concepts) if (kind == "style") == (concept.kind == "style")]
    if not rest:
        return []
    near = cosines(base, [prompt_of(concept.kind, word) for word in rest], [prompt_of(concept.kind, concept.name)])
    return [rest[i] for i in near[:, 0].argsort(descending=True)[:count].tolist()]


def around(base: Encoder, concepts: list[Concept]) -> list[str]:
    """Return prompts for the neighbours of all concepts, each once: every concept's nearest first, then the second."""
    turns = zip_longest(*(neighbours(base, one, concepts) for one in concepts))
    pairs = (zip(concepts, turn, strict=True) for turn in turns)
    return list(dict.fromkeys(prompt_of(one.kind, word) for turn in pairs for one, word in turn if word is not None))


def anchored(base: Encoder, concept: Concept, concepts: list[Concept], *, first: bool = False) -> Concept:
    """Return the concept with an anchor: its own, else the nearest other word of its kind.

    Args:
        base: the checkpoint whose text encoder measures how near words are.
        concept: the concept to anchor.
        concepts: all concepts that are erased together; none of them becomes an anchor.
        first: take the first word of the vocabulary instead of the nearest.

    Raises:
        ErasureError: there is no other word of its kind.
    """
    if concept.anchor is not None:
        return concept
    if first:
        near = [word for kind, word in retained(base, concepts) if (kind == "style") == (concept.kind == "style")]
    else:
        near = neighbours(base, concept, concepts)
    if not near:
        raise ErasureError(f"{concept.name!r}: there is no other word to replace it with; give an anchor")
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
    """Return prompts that must not change, each once: `first`, the concepts' `keep`, then others.

    The others come from `file`, or are the words of `retained`, alone and, up to `count`, as objects in styles. Those
    that name a concept, or are too long for the text encoder, are left out.

    Args:
        base: the checkpoint that encodes the prompts.
        concepts: all concepts that are erased together.
        count: how many prompts to return, where there are enough; a random choice by `seed`, in which `first` and
            `keep` always stay. None returns the whole file, or all words.
        first: the user's own prompts.
        file: a CSV file with a column `prompt`.
        seed: seed of the random choice.

    Raises:
        ErasureError: no prompts are left, the file cannot be read, or a prompt of the user's names a concept.
    """
    names = [name.lower() for concept in concepts for name in concept.names]
    for text in first:
        if naming(text, names):
            raise ErasureError(f"the retain prompt {text!r} names what is to be erased: remove it from retain")
    kept = [prompt_of(concept.kind, word) for concept in concepts for word in concept.keep]
    fixed = list(dict.fromkeys([*first, *kept]))
    both: list[str] = []
    if file is not None:
        others = [text for text in read_prompts(file) if not naming(text, names)]
    else:
        listed = retained(base, concepts)
        nouns = [word for kind, word in listed if kind != "style"]
        looks = [prompt_of(kind, word) for kind, word in listed if kind == "style"]
        others = [prompt_of(kind, word) for kind, word in listed]
        both = [f"a {noun} in {look}" for noun in nouns for look in looks] if count is not None else []
    longest = base.pipe.tokenizer.model_max_length
    others, both = (
        [text for text in dict.fromkeys(texts) if text not in fixed and tokens(base, text) <= longest]
        for texts in (others, both)
    )
    if not fixed and not others:
        raise ErasureError("no retain prompts: all of them name the concept or are too long; name some with retain")
    draw = torch.Generator().manual_seed(seed)
    for more in (others, both):
        room = len(more) if count is None else max(0, count - len(fixed))
        order = range(len(more)) if len(more) <= room else torch.randperm(len(more), generator=draw)[:room].tolist()
        fixed += [more[i] for i in order]
    return fixed


def naming(text: str, names: Sequence[str]) -> bool:
    """Tell whether a prompt contains one of the names (given in lower case) as whole words."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text.lower()) for name in names)


def read_prompts(source: str | os.PathLike[str]) -> list[str]:
    """Read the column `prompt` of a CSV file, leaving out empty cells.

    Raises:
        ErasureError: the file cannot be read or has no such column.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(Path(source).read_text(encoding="utf-8-sig"), newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise ErasureError(f"{source}: cannot be read as CSV: {fault}") from None
    if rows and "prompt" not in rows[0]:
        raise ErasureError(f"{source}: column 'prompt' is missing; it has {', '.join(map(str, rows[0]))}")
    return [row["prompt"].strip() for row in rows if (row["prompt"] or "").strip()]
