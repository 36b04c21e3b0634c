"""Columns for closed forms: the text states of prompts that know of a name.

A text encoder with a causal mask, such as CLIP's, writes a name into its last token and into every state behind it, the
padding included; the states before it do not know of the name. So these states, or the last token's alone, are what a
closed form edits. Where two encoders are concatenated (XL), both have the same tokens at the same places.

In an encoder without such a mask, such as T5, every state of a prompt knows of the name, and padding is masked later:
what PixArt reads. There all states of the prompt are edited, the end token's included. Those before the name are
answered like the ones at their own places of the other prompt; the name's and those behind it like the ones that lie as
far from the end, and what the other prompt is too short for like the first of its name.

SANA reads Gemma: a causal mask, no end token, masked padding, and in front of each prompt what is left of the
pipeline's instruction. There the states from the name's last token on are answered like the ones that lie as far from
the end, and those before it, the same in every prompt that begins so, like themselves. Their places are counted from
the end, because how an instruction's last space and the first word become tokens depends on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.similarity import tokens
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.conditioning import text_encoders

Part = Literal["tail", "last", "all"]  # which states of a prompt
Places = Literal["same", "ends"]


@dataclass(frozen=True)
class Pair:
    """A prompt to edit, and the prompt that it should be answered like.

    Args:
        prompt: a prompt that holds the name.
        name: the name, the states from whose last token on are edited.
        instead: the prompt in its stead; empty for the empty prompt.
    """

    prompt: str
    name: str
    instead: str = ""


def last_place(base: Base, text: str) -> int:
    """Return the place of a text's last token; of the empty text 0, that of the start token or else the end token."""
    return max(0, tokens(base, base.as_read(text)) - 2)  # the end token is counted, and so is a start token


def behind(base: Base, text: str) -> int:
    """Return the number of special tokens, such as an end token, that the tokenizer puts behind a text."""
    tokenizer = base.pipe.tokenizer
    ids, special = tokenizer(text, verbose=False).input_ids, set(tokenizer.all_special_ids)
    own = [place for place, token in enumerate(ids) if token not in special]
    return len(ids) - 1 - own[-1] if own else 0


def masked_place(base: Base, rows: Tensor, prompt: str, before: str) -> int:
    """Return the place of the last token of a prompt's beginning in its states without padding [tokens, width].

    Args:
        base: the checkpoint, for its tokenizer.
        rows: the states of the prompt.
        prompt: the prompt.
        before: its beginning.
    """
    prompt, before = base.as_read(prompt), base.as_read(before)
    return max(0, len(rows) - 1 - behind(base, prompt) - (tokens(base, prompt) - tokens(base, before)))


def fits(base: Base, text: str) -> bool:
    """Tell whether the text encoder reads all tokens of a text."""
    return tokens(base, text) <= int(base.pipe.tokenizer.model_max_length)


def states_of(base: Base, prompts: Sequence[str], part: Part) -> Tensor:
    """Return text states of prompts, one a row [n, d], in float64.

    Args:
        base: the checkpoint, for its text encoders.
        prompts: the prompts; none give no rows.
        part: tail: from the prompt's last token to the end of the padding, and if the encoder has no causal mask, every
            token; last: the last token alone; all: every token of the encoder's length.
    """
    if not prompts:
        return base.rows("")[:0].double()
    architecture = base.architecture
    whole = part == "all" or (part == "tail" and not architecture.causal_text)
    masked = architecture.masked_text
    encoded = [base.rows(prompt).double() for prompt in prompts] if masked else base.encode(list(prompts)).double()
    starts = [0] * len(prompts)
    if not whole and masked and architecture.causal_text:
        starts = [masked_place(base, row, text, text) for row, text in zip(encoded, prompts, strict=True)]
    elif not whole:
        starts = [last_place(base, prompt) for prompt in prompts]
    ends = [start + 1 if part == "last" else None for start in starts]
    return torch.cat([row[start:end] for row, start, end in zip(encoded, starts, ends, strict=True)])


def states_of_pair(base: Base, pair: Pair, part: Part, places: Places) -> tuple[Tensor, Tensor]:
    """Return the states of a prompt to edit, and for each the state that it should be answered like.

    Args:
        base: the checkpoint, for its text encoders.
        pair: the two prompts.
        part: tail: the states from the name's last token on, and if the encoder has no causal mask, or the network
            masks the padding, every state; last: this token alone; all: every state.
        places: same: each state is answered like the one at its own place of the other prompt; ends: the places are
            shifted so that the prompts' last tokens meet, and with them whatever both have behind the name.

    Returns:
        Two tensors [n, d] in float64.
    """
    before = pair.prompt[: pair.prompt.rindex(pair.name) + len(pair.name)]
    edit, guide = base.rows(pair.prompt).double(), base.rows(pair.instead).double()
    if not base.architecture.causal_text:
        first = tokens(base, base.as_read(pair.prompt[: pair.prompt.rindex(pair.name)])) - 1
        met = torch.arange(len(edit))
        if places == "ends":
            met[first:] = (met[first:] + len(guide) - len(edit)).clamp_min(first)
        chosen = slice(last_place(base, before), last_place(base, before) + 1) if part == "last" else slice(None)
        return edit[chosen], guide[met.clamp_max(len(guide) - 1)[chosen]]
    if base.architecture.masked_text:
        start = masked_place(base, edit, pair.prompt, before)
        met = (torch.arange(start, len(edit)) + (len(guide) - len(edit) if places == "ends" else 0)).clamp_min(0)
        answers = torch.cat([edit[:start], guide[met.clamp_max(len(guide) - 1)]])
        chosen = slice(start, start + 1) if part == "last" else slice(None)
        return edit[chosen], answers[chosen]
    start = 0 if part == "all" else last_place(base, before)
    shift = tokens(base, pair.instead) - tokens(base, pair.prompt) if places == "ends" else 0
    start = max(start, -shift)
    length = 1 if part == "last" else len(edit) - start - max(0, shift)
    return edit[start : start + length], guide[start + shift : start + shift + length]


def unit(base: Base, states: Tensor) -> float:
    """Return the unit of a ridge, so that one value suits encoders of any scale.

    It is the mean square of the states' entries. CLIP's last norm makes that about 1 already, so that there it is 1.

    Args:
        base: the checkpoint, for its kind of text encoder.
        states: the edited states [n, d].
    """
    return 1.0 if not base.architecture.masked_text else float(states.double().square().mean())


def named_pairs(concept: Concept) -> list[Pair]:
    """Return the concept's prompts with the name in each; a prompt without one is all name."""
    names = sorted(concept.names, key=len, reverse=True)
    return [
        Pair(prompt, next((name for name in names if name in prompt), prompt), instead)
        for prompt, instead in concept.prompt_pairs()
    ]


def places_of_name(base: Base, pair: Pair) -> tuple[int, int]:
    """Return the place of the first token of the name in a pair's prompt, and the place behind its last."""
    start = pair.prompt.rindex(pair.name)
    before, whole = pair.prompt[:start].rstrip(), pair.prompt[: start + len(pair.name)]
    return last_place(base, before) + 1, last_place(base, whole) + 1


def states_beside_name(base: Base, pair: Pair) -> tuple[Tensor, Tensor]:
    """Return the states of a prompt but for those of the name's own tokens, and the states at the same words instead.

    Words before the name meet from the start of the two prompts, all that is behind it, with the padding, from their
    ends (MACE, arXiv 2403.06135, section 3.2).

    Returns:
        Two tensors [n, d] in float64.
    """
    edit, guide = base.encode([pair.prompt])[0].double(), base.encode([pair.instead])[0].double()
    first, end = places_of_name(base, pair)
    shift = tokens(base, pair.instead) - tokens(base, pair.prompt)
    first, end = min(first, max(1, end + shift)), max(end, 1 - shift)
    stop = len(edit) - max(0, shift)
    return torch.cat([edit[:first], edit[end:stop]]), torch.cat([guide[:first], guide[end + shift : stop + shift]])


def checked_names(base: Base, concepts: Sequence[Concept]) -> list[tuple[Concept, str]]:
    """Return every name of the concepts with its concept, each once, after checking them by their tokens.

    Spellings that a tokenizer reads alike ("Van Gogh", "van  gogh") are one name.

    Args:
        base: the checkpoint, for its tokenizers.
        concepts: all concepts that are erased together.

    Raises:
        ErasureError: a name without tokens of its own, one that two concepts share, or one that is also kept.
    """
    owners: dict[tuple[tuple[int, ...], ...], tuple[Concept, str]] = {}
    for concept in concepts:
        for name in concept.names:
            key = own_tokens(base, name)
            if not any(key):
                raise ErasureError(
                    f"{name!r} has no tokens of its own: the text encoder reads it like the empty prompt, so there is "
                    "nothing to erase. Nothing was changed"
                )
            owner, spelling = owners.setdefault(key, (concept, name))
            if owner is not concept:
                raise ErasureError(
                    f"{name!r} and {spelling!r} are the same tokens to the text encoder, and they belong to two "
                    "concepts: remove one of them. Nothing was changed"
                )
    for concept in concepts:
        for word in concept.keep:
            if found := owners.get(own_tokens(base, word)):
                raise ErasureError(
                    f"{word!r} is to be kept, and the text encoder reads it like {found[1]!r}, which is to be erased: "
                    "take it out of one of the lists. Nothing was changed"
                )
    return list(owners.values())


def own_tokens(base: Base, text: str) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of a text for each tokenizer of the checkpoint, without the special ones."""
    found = []
    for tokenizer, _ in text_encoders(base.pipe):
        special = set(tokenizer.all_special_ids)
        ids = tokenizer(base.as_read(text), verbose=False).input_ids
        found.append(tuple(i for i in ids if i not in special))
    return tuple(found)
