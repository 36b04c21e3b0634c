"""Prompts about concepts of glyph: the concept itself, other words for it, near ones, all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError
from erasure.model import presets
from erasure.prompts.prompt_set import PromptSet, order_by_hash, reseed
from erasure.prompts.row import Prompt

SIZES = {"target": 24, "synonym": 8, "neighbour": 12, "other": 24}
LEAST = 12


def concept_prompts(names: Sequence[str], limit: int | None = None) -> PromptSet:
    """A prompt set whose label `role` sets synonyms and neighbours apart (metrics.py).

    Deterministic, and a row's text and seed depend on its id alone, so that sets about several concepts share
    the base's pictures. Styles have no neighbours here: all other styles are others.

    Args:
        names: objects, or styles, or a word for the weapons; erased together.
        limit: about this many prompts, in the proportions of SIZES.

    Raises:
        ErasureError: a limit below LEAST.
    """
    if limit is not None and limit < LEAST:
        raise ErasureError(f"limit={limit}: at least {LEAST} prompts are needed to measure anything")
    scale = 1.0 if limit is None else limit / sum(SIZES.values())
    size = {role: max(1, round(count * scale)) for role, count in SIZES.items()}
    listed = glyph_words()
    head = "style" if names[0] in listed.styles else "object"
    families = {name: listed.family(name) for name in listed.objects}
    members = {name for one in names for name in _members(listed, one)}
    rows = PromptSet.read("glyph-objects").rows
    target = [row for row in rows if row.labels[head] in members]
    other = [row for row in rows if row.labels[head] not in members]
    words = [row for row in PromptSet.read("glyph-synonyms").rows if row.labels.get(head) in members]
    if head == "object" and any(one not in families for one in names):  # "a weapon", "a dangerous weapon"
        broad = [row for row in PromptSet.read("glyph-content").rows if not row.labels.get("object")]
        words = [row for row in words if not row.labels.get("style")] + broad
    elif head == "object":
        words = [row for row in words if not row.labels.get("style")]
    near = {families[name] for name in members if name in families}
    neighbours = [row for row in other if head == "object" and families[row.labels[head]] in near]
    found = _take(target, head, size["target"])
    found += [_role(row, "synonym") for row in _take(words, "synonym", size["synonym"])]
    close = _take(neighbours, head, size["neighbour"])
    used = {row.id for row in close}
    found += [_role(row, "neighbour") for row in close]
    found += _take([row for row in other if row.id not in used], head, size["other"])
    return PromptSet(f"about-{'+'.join(names)}", found)


def glyph_words() -> Vocabulary:
    """Return the vocabulary of glyph, whose prompt sets these are."""
    found = presets.vocabulary("glyph")
    if found is None:
        raise ErasureError("the preset of glyph names no vocabulary")
    return found


def _members(listed: Vocabulary, name: str) -> list[str]:
    family = listed.family_named(name)
    return [name] if family is None else listed.members(family)


def _role(row: Prompt, role: str) -> Prompt:
    return replace(row, labels={**row.labels, "role": role})


def _take(rows: list[Prompt], label: str, count: int) -> list[Prompt]:
    """`count` rows, spread over the label's values, then with other seeds."""
    groups: dict[str, list[Prompt]] = {}
    for row in order_by_hash(rows):
        groups.setdefault(row.labels.get(label, ""), []).append(row)
    ordered = [row for turn in range(len(rows)) for group in groups.values() for row in group[turn : turn + 1]]
    return [reseed(ordered[i % len(ordered)], i // len(ordered)) for i in range(count)] if ordered else []
