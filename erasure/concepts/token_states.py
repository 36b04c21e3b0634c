"""Texts compared token by token, for encoders such as T5 that have no state which stands for a whole text.

CLIP's rule (`similarity.py`) compares the states of two texts place by place: its states are causal, so that those
before a word do not depend on it, and padding repeats the end of the text. T5 reads in both directions, a name stands
at another place in every prompt, and its padding means nothing. A few dimensions also have states so large in every
text that all cosines are near 1. So here, with h_i(p) the state of token i of a prompt p, special tokens and padding
left out, and the mean m and the standard deviation s of every dimension over the tokens of reference texts,

    z_i(p) = (h_i(p) - m) / s, to length 1
    a(p, c) = mean over the tokens j of a name c of max_i <z_i(p), z_j(c)>
    gamma(p, c) = max(share of c's tokens that p contains, (a(p, c) - f_c) / (1 - f_c)),

where f_c is the mean of a(r, c) over the reference texts r that do not contain c: 0 is a text like any other, and 1 the
name itself. The reference texts are everyday words that ship with the package.

Gemma and Qwen are causal: a state knows the text before it alone, so that of a name's tokens only the last has read the
whole name. There a(p, c) is max_i <z_i(p), z_j(c)> for this token j; the mean would call every prompt near that begins
like the name. Their tokenizers also make other tokens of a word at the start of a text than of the same word behind a
space, and in front of a prompt the pipelines write an instruction. So all texts are read behind a space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasure.concepts.word_lists import kinds

REFERENCES = 64  # texts
LEAST_SPREAD = 1e-6
BOTH_WAYS = ("t5", "bert")  # in the names of encoders whose states depend on the whole text


@dataclass(frozen=True, eq=False)
class Reference:
    """What states are measured against.

    Args:
        mean: of the states of all tokens of the reference texts [width].
        spread: their standard deviation [width].
        rows: the normalised states of each text [tokens, width].
        words: the tokens of each.
        causal: whether the encoder is causal, so that the last state of a name stands for it.
    """

    mean: Tensor
    spread: Tensor
    rows: list[Tensor]
    words: list[set[int]]
    causal: bool = False

    def name(self, row: Tensor) -> Tensor:
        """Return those normalised states of a text [tokens, width] that stand for it where it is a name."""
        return row[-1:] if self.causal else row

    def normal(self, states: Tensor) -> Tensor:
        """Return states [tokens, width] less the mean, in units of the spread, to length 1."""
        return torch.nn.functional.normalize((states.to(self.mean) - self.mean) / self.spread, dim=1)

    def floor(self, row: Tensor, words: set[int]) -> float:
        """Return f, how near reference texts come to a name with these normalised states and tokens."""
        row = self.name(row)
        found = [nearness(other, row) for other, has in zip(self.rows, self.words, strict=True) if not words <= has]
        return sum(found) / len(found) if found else 0.0


def reference_texts() -> list[str]:
    """Return REFERENCES words of the lists that ship with the package, spread evenly over them."""
    known = list(kinds())
    return known[:: max(1, len(known) // REFERENCES)][:REFERENCES]


def reference(pipe: Any, tokenizer: Any, encoder: Any, dtype: torch.dtype) -> Reference:
    """Measure an encoder's states of the reference texts."""
    states, words = token_states(pipe, tokenizer, encoder, reference_texts(), dtype)
    every = torch.cat(states)
    mean, spread = every.mean(0), every.std(0).clamp_min(LEAST_SPREAD)
    bare = Reference(mean, spread, [], [])
    return Reference(mean, spread, [bare.normal(state) for state in states], words, is_causal(encoder))


def is_causal(encoder: Any) -> bool:
    """Tell whether a text encoder is a language model, whose states depend on the text before them alone."""
    return not any(kind in str(encoder.config.model_type) for kind in BOTH_WAYS)


@torch.no_grad()
def token_states(
    pipe: Any, tokenizer: Any, encoder: Any, texts: Sequence[str], dtype: torch.dtype
) -> tuple[list[Tensor], list[set[int]]]:
    """Encode texts as the pipeline writes them, those of one length together, so that none has padding.

    Args:
        pipe: a diffusers pipeline.
        tokenizer: a tokenizer.
        encoder: its text encoder.
        texts: n texts.
        dtype: number format of the states.

    Returns:
        The states of each text [tokens, width], and its tokens, both without special ones.
    """
    written = getattr(pipe, "_text_preprocessing", None)
    read = list(texts) if written is None else [str(written(text)[0]) for text in texts]
    before = " " if is_causal(encoder) else ""
    ids = [tokenizer(before + text, truncation=True).input_ids for text in read]
    special, states = set(tokenizer.all_special_ids), [torch.empty(0)] * len(ids)
    for length in sorted({len(row) for row in ids}):
        group = [number for number, row in enumerate(ids) if len(row) == length]
        rows = torch.tensor([ids[number] for number in group])
        rows = rows.to(pipe._execution_device)
        found = encoder(rows, attention_mask=torch.ones_like(rows), output_hidden_states=True)
        last = getattr(found, "last_hidden_state", None)  # a model with a head for words, as Qwen-Image's, has none
        for number, row, state in zip(group, rows, found.hidden_states[-1] if last is None else last, strict=True):
            words = torch.tensor([int(token) not in special for token in row])
            states[number] = state.cpu().to(dtype)[words]
    return states, [set(row) - special for row in ids]


def nearness(prompt: Tensor, text: Tensor) -> float:
    """Return a: the mean over a text's tokens of the largest cosine with a token of the prompt.

    Args:
        prompt: normalised states [n, width].
        text: normalised states [m, width].
    """
    if not len(prompt) or not len(text):
        return 0.0
    return float((text @ prompt.T).amax(1).mean())
