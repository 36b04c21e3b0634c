"""Similarity of texts by a text encoder: at the end token, for neighbours, or over all tokens, for SPM's gate."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError


class Encoder(Protocol):
    """The part of a checkpoint that compares texts; `erasure.Base` is one."""

    @property
    def pipe(self) -> Any:
        """Return the pipeline that holds the tokenizer."""

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Return the words that the checkpoint was taught, or None where they are not known."""

    def encode(self, prompts: list[str]) -> Tensor:
        """Return the text encoder's states [n, tokens, width] of prompts."""


def tokens(base: Encoder, text: str) -> int:
    """Return the number of tokens of a text, including the start and end tokens."""
    return len(base.pipe.tokenizer(text, verbose=False).input_ids)


def ends(base: Encoder, texts: list[str]) -> Tensor:
    """Return the text encoder's normalised states at the end token of each text [n, width]."""
    at = [tokens(base, text) - 1 for text in texts]
    states = base.encode(texts)[torch.arange(len(texts)), torch.tensor(at)]
    return torch.nn.functional.normalize(states.float().cpu(), dim=1)


def cosines(base: Encoder, texts: list[str], others: list[str]) -> Tensor:
    """Return the cosine similarities of texts and others, by their end states [n, m]."""
    return ends(base, texts) @ ends(base, others).T


def similarities(pipe: Any, prompts: list[str], texts: list[str]) -> list[list[float]]:
    """Return SPM's similarity gamma (arXiv 2312.16145, eq. 8) of each prompt (rows) with each text (columns).

    The pipeline's first text encoder is used; pipelines' `gates/text.py` states the formula.

    Raises:
        ErasureError: the pipeline has no tokenizer or no text encoder.
    """
    pairs = [(getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)) for end in ("", "_2")]
    tokenizer, encoder = next((pair for pair in pairs if None not in pair), (None, None))
    if tokenizer is None or encoder is None:
        raise ErasureError("a text gate needs the pipeline's tokenizer and text encoder, and there is none")
    distinct = list(dict.fromkeys([*prompts, *texts]))
    ids = tokenizer(
        distinct, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        states = encoder(ids.to(pipe._execution_device)).last_hidden_state
    flat = torch.nn.functional.normalize(states.flatten(1).cpu().double(), dim=1)
    special = set(tokenizer.all_special_ids)
    tokens = [set(row) - special for row in ids.tolist()]
    row = {text: number for number, text in enumerate(distinct)}
    return [[_gamma(flat, tokens, row[prompt], row[text]) for text in texts] for prompt in prompts]


def _gamma(flat: Tensor, tokens: list[set[int]], prompt: int, text: int) -> float:
    cosine = 1.0 if prompt == text else float(flat[prompt] @ flat[text])
    shared = len(tokens[prompt] & tokens[text]) / len(tokens[text]) if tokens[text] else 0.0
    return min(1.0, max(cosine, shared))
