"""Similarity of two texts: by the text encoder's state at the end token, or as SPM's text gate measures it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError


class Encoder(Protocol):
    """The part of a checkpoint that texts are compared with, such as an `erasure.Base`."""

    @property
    def pipe(self) -> Any:
        """Return the pipeline that holds the tokenizer."""

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Return the words that the checkpoint was taught, or None if they are not known."""

    def summary(self, prompts: list[str]) -> Tensor | None:
        """Return one vector [n, width] for each prompt; None where the states at the end tokens serve."""

    def encode(self, prompts: list[str]) -> Tensor:
        """Return the text encoder's states [n, tokens, width] for prompts."""


def tokens(base: Encoder, text: str) -> int:
    """Count the tokens of a text, including the start and end tokens."""
    return len(base.pipe.tokenizer(text, verbose=False).input_ids)


def ends(base: Encoder, texts: list[str]) -> Tensor:
    """Return the text encoder's state at the end token of each text, normalised to length 1 [n, width].

    Where the network reads several encoders, or one without causal states, the vector is the base's `summary`.
    """
    whole = base.summary(texts)
    if whole is not None:
        return torch.nn.functional.normalize(whole.float().cpu(), dim=1)
    at = [tokens(base, text) - 1 for text in texts]
    states = base.encode(texts)[torch.arange(len(texts)), torch.tensor(at)]
    return torch.nn.functional.normalize(states.float().cpu(), dim=1)


def cosines(base: Encoder, texts: list[str], others: list[str]) -> Tensor:
    """Return the cosines [n, m] between the end states of n texts and those of m others."""
    return ends(base, texts) @ ends(base, others).T


def similarities(pipe: Any, prompts: list[str], texts: list[str]) -> list[list[float]]:
    """Return the similarity gamma of each prompt to each text (SPM, Lyu et al. 2024, arXiv 2312.16145, eq. 8).

    gamma = min(1, max(cosine of the flattened text states, share of the text's tokens that the prompt contains)).
    The text encoder is the pipeline's first one that is loaded, also where there are two (XL).

    Args:
        pipe: a diffusers pipeline.
        prompts: n prompts.
        texts: m texts to compare them with.

    Returns:
        n rows of m values, each at most 1.

    Raises:
        ErasureError: the pipeline has no pair of tokenizer and text encoder.
    """
    pairs = [(getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)) for end in ("", "_2")]
    tokenizer, encoder = next((pair for pair in pairs if None not in pair), (None, None))
    if tokenizer is None or encoder is None:
        raise ErasureError(
            f"a text gate needs a tokenizer and a text encoder, and this {type(pipe).__name__} holds no such pair"
        )
    distinct = list(dict.fromkeys([*prompts, *texts]))
    ids = tokenizer(
        distinct, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        states = encoder(ids.to(pipe._execution_device)).last_hidden_state
    flat = torch.nn.functional.normalize(states.flatten(1).cpu().double(), dim=1)
    special = set(tokenizer.all_special_ids)
    words = [set(row) - special for row in ids.tolist()]
    row = {text: number for number, text in enumerate(distinct)}
    return [[_gamma(flat, words, row[prompt], row[text]) for text in texts] for prompt in prompts]


def _gamma(flat: Tensor, words: list[set[int]], prompt: int, text: int) -> float:
    cosine = 1.0 if prompt == text else float(flat[prompt] @ flat[text])
    shared = len(words[prompt] & words[text]) / len(words[text]) if words[text] else 0.0
    return min(1.0, max(cosine, shared))
