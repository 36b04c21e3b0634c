"""Gates: how strongly a patch acts on one prompt.

`always`: with its full strength. `text`: SPM's facilitated transport. For a prompt p and each erased text c,

    gamma = max(cos(flat E(p), flat E(c)), |tok(p) & tok(c)| / |tok(c)|)

with E the last hidden state of the text encoder over all token places and tok the set of tokens without special ones;
the strength is gamma ** power (1: the paper, 2: the published code, which scales both factors), the largest over the
texts, and 0 where gamma lies below the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError, unknown
from erasure.patch import LowRank, Patch

KINDS = ("always", "text")


@dataclass(frozen=True)
class TextGate:
    """A gate that compares the prompt with texts.

    Args:
        texts: what is erased; the header's concepts and their aliases where the gate names none.
        power: exponent of the similarity.
        threshold: similarity below which the patch does not act.
    """

    texts: tuple[str, ...]
    power: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not self.texts or not all(isinstance(text, str) and text.strip() for text in self.texts):
            raise ErasureError("a text gate needs at least one text, and no empty one")
        for name, value in (("power", self.power), ("threshold", self.threshold)):
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise ErasureError(f"a text gate's {name} is a number of 0 or more, not {value!r}")

    def strength(self, similarity: float) -> float:
        """How strongly to act at this similarity."""
        return similarity**self.power if similarity > 0 and similarity >= self.threshold else 0.0


def parse_gate(patch: Patch) -> TextGate | None:
    """The gate in the header of `patch`; None for `always`.

    Raises:
        ErasureError: a kind or a key that is not known, a value out of range, or a gate on differences.
    """
    data: Mapping[str, Any] = patch.gate
    if data["kind"] not in KINDS:
        raise unknown("gate", data["kind"], KINDS)
    allowed = ("kind",) if data["kind"] == "always" else ("kind", "texts", "power", "threshold")
    for key in data:
        if key not in allowed:
            raise unknown(f"key of a gate of kind {data['kind']}", key, allowed)
    if data["kind"] == "always":
        return None
    if not isinstance(patch.payload, LowRank):
        raise ErasureError(
            "a text gate needs a low-rank payload: differences of whole weights act on every prompt alike"
        )
    texts = data.get("texts")
    if texts is None:
        texts = [name for concept in patch.concepts for name in [concept.get("name"), *_list(concept.get("aliases"))]]
    return TextGate(tuple(_list(texts)), data.get("power", 1.0), data.get("threshold", 0.0))


def _list(texts: Any) -> list[Any]:
    if texts is not None and not isinstance(texts, list):
        raise ErasureError(f"a text gate's texts and a concept's aliases are lists, not {texts!r}")
    return texts or []


def similarities(pipe: Any, prompts: list[str], texts: list[str]) -> list[list[float]]:
    """Similarity gamma of each prompt (rows) with each text (columns), by the pipeline's first text encoder.

    A pipeline with two encoders (XL) is asked for the first one it has.
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
