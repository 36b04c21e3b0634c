"""Prompts that test the erasure of a glyph concept: the concept, other words for it, its neighbours, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError
from erasure.model import presets
from erasure.prompts.prompt_set import PromptSet, order_by_hash, reseed
from erasure.prompts.row import Prompt

SIZES = {"target": 48, "synonym": 12, "neighbour": 24, "other": 48}  # images of each kind
TARGET_PROMPTS = 24  # distinct prompts among the target's images; the others repeat them with a second seed
MIN_LIMIT = 12
SETS = ("glyph-objects", "glyph-backgrounds", "glyph-varied", "glyph-synonyms")


def concept_prompts(names: Sequence[str], limit: int | None = None) -> PromptSet:
    """Build a prompt set about concepts of glyph, whose label `role` marks synonyms and neighbours.

    The prompts are worded like the training captions, with and without a background, and in other ways. The result is
    deterministic. The text and the seed of a row depend on its id alone, so that prompt sets about
    several concepts share the base model's images. Styles have no neighbours here: all other styles count as others.

    Args:
        names: objects, styles, or a word for the weapons; they are erased together.
        limit: approximate number of images, divided in the proportions of SIZES; None: all of SIZES.

    Raises:
        ErasureError: the limit is below MIN_LIMIT.
    """
    if limit is not None and limit < MIN_LIMIT:
        raise ErasureError(f"limit={limit}: an evaluation needs at least {MIN_LIMIT} prompts")
    scale = 1.0 if limit is None else limit / sum(SIZES.values())
    size = {role: max(1, round(count * scale)) for role, count in SIZES.items()}
    vocabulary = glyph_words()
    head = "style" if names[0] in vocabulary.styles else "object"
    families = {name: vocabulary.family(name) for name in vocabulary.objects}
    members = {member for name in names for member in _members(vocabulary, name)}
    pool = [row for name in SETS for row in PromptSet.read(name).rows if row.labels.get(head)]
    rows = [row for row in pool if not row.labels.get("synonym")]
    target = _take([row for row in rows if row.labels[head] in members], head, TARGET_PROMPTS)
    others = [row for row in rows if row.labels[head] not in members]
    words = {word for member in members for word in vocabulary.synonyms(member)}
    synonyms = [row for row in pool if row.labels.get("synonym") in words and row.labels[head] in members]
    if head == "object" and any(name not in families for name in names):
        # the broad prompts: "a weapon", "a dangerous weapon"
        synonyms += [row for row in PromptSet.read("glyph-content").rows if not row.labels.get("object")]
    near = {families[name] for name in members if name in families}
    neighbours = [row for row in others if head == "object" and families[row.labels[head]] in near]
    chosen = [reseed(target[i % len(target)], i // len(target)) for i in range(size["target"])]
    chosen += [_with_role(row, "synonym") for row in _take(synonyms, "synonym", size["synonym"])]
    chosen_neighbours = _take(neighbours, head, size["neighbour"])
    used = {row.id for row in chosen_neighbours}
    chosen += [_with_role(row, "neighbour") for row in chosen_neighbours]
    chosen += _take([row for row in others if row.id not in used], head, size["other"])
    return PromptSet(f"about-{'+'.join(names)}", chosen)


def glyph_words() -> Vocabulary:
    """Return the vocabulary of glyph, the checkpoint that these prompt sets are written for.

    Raises:
        ErasureError: glyph's preset names no vocabulary.
    """
    vocabulary = presets.vocabulary("glyph")
    if vocabulary is None:
        raise ErasureError("the preset of glyph names no vocabulary")
    return vocabulary


def _members(vocabulary: Vocabulary, name: str) -> list[str]:
    family = vocabulary.family_named(name)
    return [name] if family is None else vocabulary.members(family)


def _with_role(row: Prompt, role: str) -> Prompt:
    return replace(row, labels={**row.labels, "role": role})


def _take(rows: list[Prompt], label: str, count: int) -> list[Prompt]:
    """Take `count` rows, spread evenly over the values of a label; repeat rows with other seeds if they run out."""
    groups: dict[str, list[Prompt]] = {}
    for row in order_by_hash(rows):
        groups.setdefault(row.labels.get(label, ""), []).append(row)
    ordered = [row for turn in range(len(rows)) for group in groups.values() for row in group[turn : turn + 1]]
    return [reseed(ordered[i % len(ordered)], i // len(ordered)) for i in range(count)] if ordered else []
