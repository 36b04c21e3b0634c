"""Which states of which prompts a closed form edits for concepts, towards what, and which prompts it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import all_anchored, around, prompt_of, retained
from erasure.errors import ErasureError
from erasure.model.base import Base, Block
from erasure.model.text_columns import Pair, Part, Places, checked_names, fits, states_of, states_of_pair

NAME = "{x}"  # the place of the name in a template
MOST_CONTEXTS = 6  # styles that an object is edited in
MOST_OTHERS = 12  # names whose mean is taken in each context: a mean needs no more, and each is a prompt to encode
Guide = Literal["nearest", "mean", "empty", "script"]
Keep = Literal["vocabulary", "neighbours", "listed"]


@dataclass(frozen=True)
class Edited:
    """The states of concepts to edit, one a row, in float64.

    Args:
        states: c [n, d].
        guides: g [n, d], the states that they should be answered like.
        weights: s [n]; those of one name alone count as much as those of all its other prompts together.
    """

    states: Tensor
    guides: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Choice:
    """What is edited for each name of a concept. A method's settings of the same names explain the choices.

    Args:
        states: which states of each prompt: `tail` or `last`.
        places: which states of the other prompt they meet: `same` or `ends`; None: `ends` for another name or text,
            `same` for the empty prompt and the mean.
        guide: what a concept without an anchor is answered like: `nearest`, `mean`, `empty` or `script`.
        beyond: how far beyond the mean, as a share of the distance from the concept.
        contexts: whether a concept is also edited together with others: a style on the subjects of CARRIERS, anything
            else in the first MOST_CONTEXTS styles of the vocabulary.
        templates: more prompts, with NAME in the place of the name.
        bare: take the name itself as the prompt, also for a style.
    """

    states: Part = "tail"
    places: Places | None = None
    guide: Guide = "nearest"
    beyond: float = 0.0
    contexts: bool = False
    templates: tuple[str, ...] = ()
    bare: bool = False

    def __post_init__(self) -> None:
        if wrong := [text for text in self.templates if NAME not in text]:
            raise ErasureError(f"templates={wrong[0]!r}: a template needs {NAME} in the place of the name")

    def edited(self, base: Base, concepts: Sequence[Concept]) -> Edited:
        """Return the states to edit for all names of the concepts, and their guides.

        Raises:
            ErasureError: names that `checked_names` refuses, or no other name to be the nearest or to take the mean of.
        """
        words = retained(base, list(concepts)) if self.guide == "mean" or self.contexts else []
        styles = [word for kind, word in words if kind == "style"][:MOST_CONTEXTS]
        named = checked_names(base, concepts)
        if self.guide == "nearest":
            with_anchor = dict(zip(map(id, concepts), all_anchored(base, list(concepts)), strict=True))
            named = [(with_anchor[id(concept)], name) for concept, name in named]
        blocks = base.blocks([self._block(base, concept, name, words, styles) for concept, name in named])
        states, guides, weights = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return Edited(states, guides, weights)

    def _block(
        self, base: Base, concept: Concept, name: str, words: Sequence[tuple[str, str]], styles: Sequence[str]
    ) -> Block:
        """Return what is edited for one name, unread."""
        first, *more = self.pairs(concept, name, styles)
        pairs = [first, *(pair for pair in more if fits(base, pair.prompt))]
        places = self.places or ("ends" if concept.anchor or self.guide == "script" else "same")
        others = None
        if self.guide == "mean" and not concept.anchor:
            others = [word for kind, word in words if (kind == "style") == (concept.kind == "style")]
        key = repr((pairs, self.states, places, self.beyond if others else 0, others))
        prompts = tuple(text for pair in pairs for text in (pair.prompt, pair.instead))
        return Block(key, prompts, partial(self._read, pairs=pairs, places=places, others=others))

    def _read(
        self, base: Base, pairs: Sequence[Pair], places: Places, others: Sequence[str] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states, guides and weights of the prompts of one name."""
        states, guides, weights = [], [], []
        for number, pair in enumerate(pairs):
            edit, guide = states_of_pair(base, pair, self.states, places)
            if others is not None:
                guide = mean_of_others(base, pair, others if number == 0 else spread(others), self.states)
                guide = guide + self.beyond * (guide - edit)
            states.append(edit)
            guides.append(guide)
            share = 1.0 if number == 0 else 1 / (len(pairs) - 1)
            weights.append(torch.full((len(edit),), share, dtype=torch.float64))
        return torch.cat(states), torch.cat(guides), torch.cat(weights)

    def pairs(self, concept: Concept, name: str, styles: Sequence[str] = ()) -> list[Pair]:
        """Return the prompts of one name with those in their stead, the name alone first."""
        guide = "art" if self.guide == "script" and concept.kind == "style" else ""
        single = replace(concept, name=name, aliases=(), anchor=concept.anchor or guide or None)
        if self.bare:
            return [Pair(name, name, single.anchor or "")]
        pairs = [Pair(prompt, name, instead) for prompt, instead in single.prompt_pairs()]
        if concept.kind != "style":
            instead = [" ".join(f"{single.anchor or ''} in {style} style".split()) for style in styles]
            pairs += [Pair(f"{name} in {style} style", name, text) for style, text in zip(styles, instead, strict=True)]
        pairs = pairs if self.contexts else pairs[:1]
        prompts = [" ".join(text.replace(NAME, name).split()) for text in self.templates]
        guides = [" ".join(text.replace(NAME, single.anchor or "").split()) for text in self.templates]
        return [*pairs, *(Pair(prompt, name, instead) for prompt, instead in zip(prompts, guides, strict=True))]


def spread(words: Sequence[str]) -> Sequence[str]:
    """Return at most MOST_OTHERS words, evenly spread over the list."""
    count = min(MOST_OTHERS, len(words))
    return [words[i * len(words) // count] for i in range(count)]


def mean_of_others(base: Base, pair: Pair, others: Sequence[str], part: Part) -> Tensor:
    """Return the mean over other names of the states at the edited places of the same prompt [n, d].

    Args:
        base: the checkpoint, for its text encoders.
        pair: the prompt to edit, and the name in it.
        others: the names to put in its place.
        part: which states of the prompt are edited.

    Raises:
        ErasureError: there are no other names.
    """
    at = pair.prompt.rindex(pair.name)
    before, after = pair.prompt[:at], pair.prompt[at + len(pair.name) :]
    prompts = [text for text in (f"{before}{word}{after}" for word in others) if fits(base, text)]
    if not prompts:
        raise ErasureError(
            f"no other name of the vocabulary is left whose mean could stand for {pair.name!r}: give an anchor "
            "(--anchor), or take the empty prompt (--set guide=empty). Nothing was changed"
        )
    pairs = [Pair(pair.prompt, pair.name, text) for text in prompts]
    return torch.stack([states_of_pair(base, one, part, "same")[1] for one in pairs]).mean(0)


def kept_states(base: Base, prompts: list[str], part: Part) -> Tensor:
    """Return the states of kept prompts, one a row [m, d], in float64; of a list, d rows with the same Gram matrix.

    Args:
        base: the checkpoint, for its text encoders.
        prompts: the prompts; see `kept_prompts`.
        part: which states of each.
    """
    return base.kept_states(prompts, part, states_of)


def kept_prompts(base: Base, concepts: Sequence[Concept], keep: Keep) -> list[str]:
    """Return the prompts that are kept.

    Args:
        base: the checkpoint, for its vocabulary and its text encoder.
        concepts: all concepts that are erased together.
        keep: every other name and style of the `vocabulary`, the concepts' `neighbours`, or only the words that the
            concepts `listed` to be kept.
    """
    if keep == "vocabulary":
        return [prompt_of(kind, word) for kind, word in retained(base, list(concepts))]
    if keep == "neighbours":
        return around(base, list(concepts))
    return [prompt_of(concept.kind, word) for concept in concepts for word in concept.keep]
