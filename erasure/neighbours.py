"""What a concept must not take with it: its neighbours and the retain prompts, found when the user names none.

Words come from the checkpoint's own vocabulary (glyph) or from `configs/words.yaml`; nearness is that
of similarity.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from erasure.base import BUNDLED, Base
from erasure.concept import Concept
from erasure.config import CONFIGS, read_yaml
from erasure.errors import ErasureError
from erasure.similarity import cosines, tokens

COUNT = 8  # neighbours where the user names none
SAME = 0.95  # cosine from which a word is taken for another name of the concept


@cache
def words(embedded: bool) -> dict[str, tuple[str, ...]]:
    """Nouns by kind: `object`, `identity`, `content`, `style`; of glyph's vocabulary or of everyday words."""
    if not embedded:
        found = read_yaml(CONFIGS / "words.yaml")
        plural = {"object": "objects", "identity": "identities", "style": "styles"}
        return {**{kind: tuple(found[name]) for kind, name in plural.items()}, "content": ()}
    from erasure.glyph import styles, vocabulary

    listed = vocabulary()
    by_kind: dict[str, list[str]] = {"object": [], "identity": [], "content": [], "style": styles()}
    for name, entry in listed["objects"].items():
        by_kind[listed["families"][entry["family"]]["kind"]].append(name)
    return {kind: tuple(names) for kind, names in by_kind.items()}


def prompt_of(kind: str, word: str) -> str:
    """The prompt that a word of this kind stands for."""
    return f"{word} style" if kind == "style" else word


def retained(base: Base, concepts: list[Concept]) -> list[tuple[str, str]]:
    """(kind, word) of everything that should stay: what the concepts list to keep, then the vocabulary.

    Names of the concepts, words that contain one, and words that the text encoder takes for the same are left out.
    """
    gone = {name.lower() for concept in concepts for name in concept.names}
    found = {word: concept.kind for concept in concepts for word in concept.keep}
    for kind, listed in words(base.name in BUNDLED).items():
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


def neighbours(base: Base, concept: Concept, count: int = COUNT) -> list[str]:
    """The concept's `keep`, or the `count` nearest words of its kind that are not the concept."""
    if concept.keep:
        return list(concept.keep)
    rest = [word for kind, word in retained(base, [concept]) if (kind == "style") == (concept.kind == "style")]
    if not rest:
        return []
    near = cosines(base, [prompt_of(concept.kind, word) for word in rest], [prompt_of(concept.kind, concept.name)])
    return [rest[i] for i in near[:, 0].argsort(descending=True)[:count].tolist()]


def anchored(base: Base, concept: Concept, concepts: list[Concept], *, first: bool = False) -> Concept:
    """The concept with an anchor that its prompts are to show: its own, else the nearest other word of its kind.

    Args:
        concepts: all that are erased together: none of them is an anchor.
        first: take the first word of the vocabulary, not the nearest.

    Raises:
        ErasureError: there is no other word.
    """
    if concept.anchor is not None:
        return concept
    left = retained(base, concepts)
    if first:
        near = [word for kind, word in left if (kind == "style") == (concept.kind == "style")]
    else:
        kept = {word for _, word in left} | set(concept.keep)
        near = [word for word in neighbours(base, concept) if word in kept]
    if not near:
        raise ErasureError(f"{concept.name!r}: no other word to lead it to; give an anchor")
    return replace(concept, anchor=prompt_of(concept.kind, near[0]))
