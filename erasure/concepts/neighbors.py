"""Words and prompts that erasing must not change: the neighbours of a concept, and retain prompts.

They are chosen where the user names none, from the checkpoint's own vocabulary or else from `configs/words.yaml`.
`similarity.py` measures how close two words are.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path

import torch

from erasure.concepts.concept import Concept
from erasure.concepts.similarity import Encoder, cosines, tokens
from erasure.config import CONFIGS, read_yaml
from erasure.errors import ErasureError

COUNT = 8  # neighbours of a concept where the user names none
SAME = 0.95  # cosine from which a word counts as another name of the concept


@cache
def everyday_words() -> dict[str, tuple[str, ...]]:
    """Return common nouns and styles by kind (object, identity, content, style)."""
    lists = read_yaml(CONFIGS / "words.yaml")
    plural = {"object": "objects", "identity": "identities", "style": "styles"}
    return {**{kind: tuple(lists[name]) for kind, name in plural.items()}, "content": ()}


def words(base: Encoder) -> Mapping[str, tuple[str, ...]]:
    """Return nouns and styles by kind: those that the run lists, the checkpoint's vocabulary, or everyday words."""
    listed: Mapping[str, tuple[str, ...]] | None = getattr(base, "listed", None)
    if listed is not None:
        return listed
    return everyday_words() if base.vocabulary is None else base.vocabulary.by_kind()


def prompt_of(kind: str, word: str) -> str:
    """Return the prompt for a word of a kind: "ink style" for the style "ink", otherwise the word itself."""
    return f"{word} style" if kind == "style" else word


def retained(base: Encoder, concepts: list[Concept]) -> list[tuple[str, str]]:
    """List everything that erasing the concepts must not change.

    These are the words that the concepts keep or a list asks to keep, then the vocabulary without the concepts' names,
    words that contain one, words that are too long for the text encoder, and words whose encoding is nearly that of a
    concept (cosine of SAME or more).

    Args:
        base: the checkpoint, for its vocabulary and its text encoder.
        concepts: all concepts that are erased together.

    Returns:
        Pairs (kind, word), each word once.
    """
    names = {name.lower() for concept in concepts for name in concept.names}
    kinds = {word: concept.kind for concept in concepts for word in concept.keep}
    kinds |= {word: kind for kind, word in getattr(base, "asked", ())}
    kept = set(kinds)
    for kind, listed in words(base).items():
        for word in listed:
            padded, fits = f" {word.lower()} ", tokens(base, word) + 2 <= base.pipe.tokenizer.model_max_length
            if fits and not any(f" {name} " in padded for name in names):
                kinds.setdefault(word, kind)
    candidates = [word for word in kinds if word not in kept]
    if candidates:
        targets = [prompt_of(concept.kind, name) for concept in concepts for name in concept.names]
        near = cosines(base, [prompt_of(kinds[word], word) for word in candidates], targets)
        same = {word for word, row in zip(candidates, near, strict=True) if row.max() >= SAME}
        kinds = {word: kind for word, kind in kinds.items() if word not in same}
    return [(kind, word) for word, kind in kinds.items()]


def neighbours(base: Encoder, concept: Concept, concepts: list[Concept], count: int = COUNT) -> list[str]:
    """Return the concept's `keep`, or if it is empty, the words of its kind that are closest to it.

    Args:
        base: the checkpoint, for its vocabulary and its text encoder.
        concept: the concept whose neighbours are wanted.
        concepts: all concepts that are erased together; none of them is a neighbour.
        count: the largest number of words that are chosen.

    Returns:
        Words, the closest first.
    """
    if concept.keep:
        return list(concept.keep)
    candidates = [word for kind, word in retained(base, concepts) if (kind == "style") == (concept.kind == "style")]
    if not candidates:
        return []
    texts = [prompt_of(concept.kind, word) for word in candidates]
    near = cosines(base, texts, [prompt_of(concept.kind, concept.name)])
    return [candidates[i] for i in near[:, 0].argsort(descending=True)[:count].tolist()]


def around(base: Encoder, concepts: list[Concept]) -> list[str]:
    """Return prompts of the neighbours of all concepts, each once.

    The order is the closest neighbour of every concept, then the second closest of every concept, and so on.
    """
    turns = zip_longest(*(neighbours(base, concept, concepts) for concept in concepts))
    pairs = (zip(concepts, turn, strict=True) for turn in turns)
    return list(
        dict.fromkeys(prompt_of(concept.kind, word) for turn in pairs for concept, word in turn if word is not None)
    )


def anchored(base: Encoder, concept: Concept, concepts: list[Concept], *, first: bool = False) -> Concept:
    """Return the concept with an anchor: its own, or else the closest other word of its kind.

    Args:
        base: the checkpoint, for its vocabulary and its text encoder.
        concept: the concept that needs an anchor.
        concepts: all concepts that are erased together; none of them becomes an anchor.
        first: take the first word of the vocabulary instead of the closest.

    Raises:
        ErasureError: the concept has no anchor and there is no other word of its kind.
    """
    if concept.anchor is not None:
        return concept
    if first:
        candidates = [word for kind, word in retained(base, concepts) if (kind == "style") == (concept.kind == "style")]
    else:
        candidates = neighbours(base, concept, concepts)
    if not candidates:
        raise _no_anchor(concept)
    return replace(concept, anchor=worded(concept, candidates[0]))


def all_anchored(base: Encoder, concepts: list[Concept]) -> list[Concept]:
    """Return the concepts, each with its own anchor or the closest other word of its kind, whatever it keeps.

    The same as `anchored` for each of them, but what may be an anchor is found once for all.

    Args:
        base: the checkpoint, for its vocabulary and its text encoder.
        concepts: all concepts that are erased together; none of them becomes an anchor.

    Raises:
        ErasureError: a concept has no anchor and there is no other word of its kind.
    """
    found = list(concepts)
    listed = retained(base, concepts) if any(concept.anchor is None for concept in concepts) else []
    for style in (False, True):
        mine = [i for i, one in enumerate(concepts) if one.anchor is None and (one.kind == "style") == style]
        candidates = [word for kind, word in listed if (kind == "style") == style]
        if mine and not candidates:
            raise _no_anchor(concepts[mine[0]])
        if mine:
            kind = "style" if style else "object"
            texts = [prompt_of(kind, word) for word in candidates]
            near = cosines(base, texts, [prompt_of(kind, concepts[i].name) for i in mine])
            for i, best in zip(mine, near.argmax(0).tolist(), strict=True):
                found[i] = replace(concepts[i], anchor=worded(concepts[i], candidates[best]))
    return found


def _no_anchor(concept: Concept) -> ErasureError:
    return ErasureError(f"no word of the vocabulary can be the anchor of {concept.name!r}; give an anchor")


def worded(concept: Concept, word: str) -> str:
    """Return the prompt for another word, in the form in which the concept's own prompts name it."""
    template = next((text for text in concept.prompts if "{}" in text), None)
    return prompt_of(concept.kind, word) if template is None else template.replace("{}", word)


def kept_prompts(base: Encoder, concepts: list[Concept], count: int, seed: int) -> list[str]:
    """Return the prompts of a retain term: words to keep, the nearest ones, others up to `count`, and the empty prompt.

    Args:
        base: the checkpoint.
        concepts: all concepts that are erased together.
        count: number of prompts besides the empty one; half of them, at most, are neighbours.
        seed: seed of the draw of others.

    Raises:
        ErasureError: as `retain_prompts`.
    """
    named = {word for concept in concepts for word in concept.keep}
    near = [text for text in around(base, concepts) if text not in named][: count // 2]
    return [*retain_prompts(base, concepts, count, first=near, seed=seed), ""]


def retain_prompts(
    base: Encoder,
    concepts: list[Concept],
    count: int | None,
    *,
    first: Sequence[str] = (),
    file: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Return prompts whose images must stay as they are, each once.

    `first` and the concepts' `keep` come first, then prompts from the file. Without a file, these are the words of
    `retained` and, up to `count`, objects in styles ("a cat in ink style"). Prompts that name a concept or are too
    long for the text encoder are left out.

    Args:
        base: the checkpoint, for its vocabulary and its text encoder.
        concepts: all concepts that are erased together.
        count: number of prompts. If there are more, they are drawn at random, but `first` and `keep` are always
            returned. None: every prompt of the file, or every word.
        first: the user's own prompts.
        file: a CSV file with a column `prompt`.
        seed: seed of the random draw.

    Raises:
        ErasureError: there are no prompts, the file cannot be read, or a prompt in `first` names a concept.
    """
    names = [name.lower() for concept in concepts for name in concept.names]
    for text in first:
        if naming(text, names):
            raise ErasureError(f"the retain prompt {text!r} names what is to be erased: remove it from retain")
    kept = [prompt_of(concept.kind, word) for concept in concepts for word in concept.keep]
    prompts = list(dict.fromkeys([*first, *kept]))
    combined: list[str] = []
    if file is not None:
        others = [text for text in read_prompts(file) if not naming(text, names)]
    else:
        listed = retained(base, concepts)
        nouns = [word for kind, word in listed if kind != "style"]
        looks = [prompt_of(kind, word) for kind, word in listed if kind == "style"]
        others = [prompt_of(kind, word) for kind, word in listed]
        combined = [f"a {noun} in {look}" for noun in nouns for look in looks] if count is not None else []
    longest = base.pipe.tokenizer.model_max_length
    others, combined = (
        [text for text in dict.fromkeys(texts) if text not in prompts and tokens(base, text) <= longest]
        for texts in (others, combined)
    )
    if not prompts and not others:
        raise ErasureError(
            "no retain prompts: every prompt names the concept or is too long for the text encoder; give some in retain"
        )
    draw = torch.Generator().manual_seed(seed)
    for texts in (others, combined):
        room = len(texts) if count is None else max(0, count - len(prompts))
        order = range(len(texts)) if len(texts) <= room else torch.randperm(len(texts), generator=draw)[:room].tolist()
        prompts += [texts[i] for i in order]
    return prompts


def naming(text: str, names: Sequence[str]) -> bool:
    """Tell whether a prompt contains one of the names, which are in lower case, as whole words."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text.lower()) for name in names)


def read_prompts(source: str | os.PathLike[str]) -> list[str]:
    """Read the column `prompt` of a CSV file, skipping empty cells.

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
