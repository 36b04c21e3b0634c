"""A prompt as the text encoders read it with each of its tokens hidden in turn, and the subspaces of such states.

The state that stands for a text is the one at its end token, in the layer that the network reads (of Stable Diffusion 1
and 2 the last one, whose state there is CLIP's pooled output before its projection; of XL the penultimate one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasure.model.conditioning import place, text_encoders, token_ids

ALIKE = 1e-3  # share of the largest singular value below which a direction is taken for rounding


@dataclass(frozen=True)
class Ends:
    """What stands for several texts in one text encoder, in float64 on the CPU.

    Args:
        states: states at the end tokens [n, width].
        pooled: of XL's second encoder, whose pooled text the network reads as well [n, width]; None of others.
        tokens: number of tokens of each text, without the start and end tokens [n].
    """

    states: Tensor
    pooled: Tensor | None
    tokens: list[int]


def ends(pipe: Any, texts: Sequence[str], number: int) -> Ends:
    """Return what stands for each of several texts in a text encoder.

    Args:
        pipe: the diffusers pipeline.
        texts: n texts; those that are too long are truncated, as pipelines do.
        number: of the text encoder, 0 for the first.
    """
    tokenizer, _ = text_encoders(pipe)[number]
    ids = token_ids(tokenizer, texts)
    counts = [count_tokens(tokenizer, text) for text in texts]
    return _encoded(pipe, number, ids, torch.ones_like(ids), counts)


def without_each(pipe: Any, text: str, number: int, by_id: bool = False) -> Ends:
    """Return what stands for a prompt in a text encoder, then for the prompt with each of its tokens hidden [n + 1].

    Args:
        pipe: the diffusers pipeline.
        text: the prompt, of n tokens.
        number: of the text encoder, 0 for the first.
        by_id: put the token of id 0 in the place of a hidden one, instead of leaving it out of the attention.
    """
    tokenizer, _ = text_encoders(pipe)[number]
    count = count_tokens(tokenizer, text)
    rows = token_ids(tokenizer, [text]).repeat(count + 1, 1)
    mask = torch.ones_like(rows)
    hidden = torch.arange(1, count + 1)  # the start token precedes them, and row 0 hides none
    (rows if by_id else mask)[hidden, hidden] = 0
    return _encoded(pipe, number, rows, mask, [count] * (count + 1))


def count_tokens(tokenizer: Any, text: str) -> int:
    """Return the number of tokens of a text that an encoder reads, without the start and end tokens."""
    return min(len(tokenizer(text, truncation=False, verbose=False).input_ids), tokenizer.model_max_length) - 2


@torch.no_grad()
def _encoded(pipe: Any, number: int, ids: Tensor, mask: Tensor, counts: list[int]) -> Ends:
    """Return the states at the end tokens of rows of tokens [n, length]; the mask is 0 at tokens that none may see."""
    pairs = text_encoders(pipe)
    encoder = pairs[number][1]
    device = place(pipe, encoder)
    seen = None if bool(mask.all()) else mask.to(device)
    output = encoder(ids.to(device), attention_mask=seen, output_hidden_states=True)
    states = output.last_hidden_state if len(pairs) == 1 else output.hidden_states[-2]
    pooled = output[0].double().cpu() if number else None
    at = torch.tensor(counts) + 1
    return Ends(states[torch.arange(len(ids)), at.to(device)].double().cpu(), pooled, counts)


def projector(vectors: Tensor) -> Tensor:
    """Return the orthogonal projector [width, width] onto the span of vectors [n, width], in float64.

    Directions along which they differ by less than ALIKE of the largest one are left out.
    """
    _, sizes, directions = torch.linalg.svd(vectors.double(), full_matrices=False)
    kept = directions[sizes > ALIKE * sizes.max()]
    return kept.T @ kept


def unregularised_projector(vectors: Tensor) -> Tensor:
    """Return E (E^T E)^+ E^T for the columns E of vectors [n, width] in fp32, as published.

    The product squares the condition number, and the pseudo-inverse leaves nothing out but exact zeros, so that
    rounding errors count like directions.
    """
    columns = vectors.float().T
    return (columns @ torch.linalg.pinv(columns.T @ columns, rtol=1e-15) @ columns.T).double()
