"""Similarity of two texts: by the text encoder's state at the end token, or as SPM's text gate measures it.

The gate's measure was made for CLIP; of other encoders, such as T5, single tokens are compared (`token_states.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from erasure.concepts.token_states import Reference, nearness, reference, token_states
from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError

LEAST = 1e-6  # of 1 - f


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
    if (known := getattr(base, "end_states", None)) is not None:  # a base that reads long lists
        return torch.nn.functional.normalize(known(texts).float(), dim=1)
    whole = base.summary(texts)
    if whole is not None:
        return torch.nn.functional.normalize(whole.float().cpu(), dim=1)
    at = [tokens(base, text) - 1 for text in texts]
    states = base.encode(texts)[torch.arange(len(texts)), torch.tensor(at)]
    return torch.nn.functional.normalize(states.float().cpu(), dim=1)


def cosines(base: Encoder, texts: list[str], others: list[str]) -> Tensor:
    """Return the cosines [n, m] between the end states of n texts and those of m others."""
    return ends(base, texts) @ ends(base, others).T


@dataclass(frozen=True, eq=False)
class TextStates:
    """Texts as the text gate compares them.

    Args:
        texts: n texts.
        flat: the text encoder's last hidden state of each, flattened over all token positions and normalised to length
            1 [n, tokens * width]; of encoders other than CLIP it has no columns.
        words: the tokens of each, without the special ones.
        rows: of encoders other than CLIP, the normalised states of each [tokens, width].
        floors: of these encoders, f of each (`token_states.py`).
        names: of these encoders, those of `rows` that stand for each text where it is a name.
    """

    texts: list[str]
    flat: Tensor
    words: list[set[int]]
    rows: list[Tensor] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    names: list[Tensor] = field(default_factory=list)

    def take(self, rows: list[int]) -> TextStates:
        """Return some of the texts, by their row numbers."""
        return TextStates(
            [self.texts[row] for row in rows],
            self.flat[rows],
            [self.words[row] for row in rows],
            [self.rows[row] for row in rows] if self.rows else [],
            [self.floors[row] for row in rows] if self.floors else [],
            [self.names[row] for row in rows] if self.names else [],
        )

    @classmethod
    def join(cls, parts: list[TextStates]) -> TextStates:
        """Return the texts of several in one."""
        if len(parts) == 1:
            return parts[0]
        keys = ("texts", "words", "rows", "floors", "names")
        lists = {key: [item for part in parts for item in getattr(part, key)] for key in keys}
        return cls(flat=torch.cat([part.flat for part in parts]), **lists)


def gate_encoder(pipe: Any) -> tuple[Any, Any]:
    """Return the tokenizer and the text encoder that gates compare texts with: the first CLIP, or else the first.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        ErasureError: the pipeline has no such pair.
    """
    pairs = [(getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)) for end in ("", "_2")]
    loaded = [pair for pair in pairs if None not in pair]
    for tokenizer, encoder in loaded:
        if has_end_state(encoder):
            return tokenizer, encoder
    if loaded:
        return loaded[0]
    raise ErasureError(
        f"a text gate needs a tokenizer and a text encoder, and this {type(pipe).__name__} holds no such pair"
    )


def has_end_state(encoder: Any) -> bool:
    """Tell whether CLIP's rule holds for an encoder: whether it is a CLIP, or of no kind that is known."""
    kind = str(getattr(getattr(encoder, "config", None), "model_type", ""))
    return not kind or "clip" in kind


def token_rows(pipe: Any, texts: list[str]) -> Tensor:
    """Return the tokens of each text, padded as a prompt is [n, tokens]."""
    tokenizer, _ = gate_encoder(pipe)
    return tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def text_states(
    pipe: Any,
    texts: list[str],
    dtype: torch.dtype = torch.float64,
    known: Mapping[tuple[int, ...], Tensor] | None = None,
    measure: Reference | None = None,
) -> TextStates:
    """Encode texts, to compare them with `gammas`.

    Args:
        pipe: a diffusers pipeline.
        texts: n different texts.
        dtype: number format of the normalised states.
        known: states [tokens, width] that the text encoder has already computed, by tokens; only others are encoded.
        measure: what `measured` returned for this encoder; None measures it again, if it is needed.

    Raises:
        ErasureError: the pipeline has no pair of tokenizer and text encoder.
    """
    tokenizer, encoder = gate_encoder(pipe)
    if not has_end_state(encoder):
        unit = measure or reference(pipe, tokenizer, encoder, dtype)
        found, tokens_of = token_states(pipe, tokenizer, encoder, texts, dtype)
        rows_of = [unit.normal(state) for state in found]
        floors = [unit.floor(row, words) for row, words in zip(rows_of, tokens_of, strict=True)]
        names = [unit.name(row) for row in rows_of]
        return TextStates(texts, torch.empty(len(texts), 0, dtype=dtype), tokens_of, rows_of, floors, names)
    ids = token_rows(pipe, texts)
    rows, states = [tuple(row) for row in ids.tolist()], dict(known or {})
    missing = [number for number, row in enumerate(rows) if row not in states]
    if missing:
        with torch.no_grad():
            encoded = encoder(ids[missing].to(pipe._execution_device)).last_hidden_state
        states |= {rows[number]: state for number, state in zip(missing, encoded, strict=True)}
    flat = torch.stack([states[row].flatten().cpu().to(dtype) for row in rows])
    special = set(tokenizer.all_special_ids)
    return TextStates(texts, torch.nn.functional.normalize(flat, dim=1), [set(row) - special for row in rows])


def measured(pipe: Any, dtype: torch.dtype = torch.float64) -> Reference | None:
    """Return what `text_states` measures texts against on a pipeline; None where CLIP's rule holds.

    Raises:
        ErasureError: the pipeline has no pair of tokenizer and text encoder.
    """
    tokenizer, encoder = gate_encoder(pipe)
    return None if has_end_state(encoder) else reference(pipe, tokenizer, encoder, dtype)


def gammas(prompts: TextStates, texts: TextStates) -> list[list[float]]:
    """Return the similarity gamma of each prompt to each text (SPM, Lyu et al. 2024, arXiv 2312.16145, eq. 8).

    gamma = min(1, max(cosine of the flattened text states, share of the text's tokens that the prompt contains)); of
    encoders other than CLIP, how near single tokens come stands for the cosine (`token_states.py`).

    Args:
        prompts: n prompts.
        texts: m texts to compare them with.

    Returns:
        n rows of m values, each at most 1.
    """
    # Prompt by prompt: in a product of matrices the rounding of a row would depend on the other prompts of the call.
    if texts.rows:
        cosines = [
            [
                (nearness(row.to(text), text) - f) / max(LEAST, 1 - f)
                for text, f in zip(texts.names, texts.floors, strict=True)
            ]
            for row in prompts.rows
        ]
    else:
        cosines = [(texts.flat @ prompt).tolist() for prompt in prompts.flat.to(texts.flat.dtype)]
    return [
        [
            1.0 if prompt == text else min(1.0, max(cosine, len(has & words) / len(words) if words else 0.0))
            for cosine, text, words in zip(row, texts.texts, texts.words, strict=True)
        ]
        for row, prompt, has in zip(cosines, prompts.texts, prompts.words, strict=True)
    ]


def similarities(pipe: Any, prompts: list[str], texts: list[str]) -> list[list[float]]:
    """Encode prompts and texts, and return their `gammas`.

    The text encoder is the first CLIP that is loaded, also where there are two (XL), or else the first encoder.

    Args:
        pipe: a diffusers pipeline.
        prompts: n prompts.
        texts: m texts to compare them with.

    Returns:
        n rows of m values, each at most 1.

    Raises:
        ErasureError: the pipeline has no pair of tokenizer and text encoder.
    """
    states = text_states(pipe, list(dict.fromkeys([*prompts, *texts])))
    row = {text: number for number, text in enumerate(states.texts)}
    return gammas(states.take([row[text] for text in prompts]), states.take([row[text] for text in texts]))
