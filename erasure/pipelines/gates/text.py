"""Gates: how strongly a patch acts on one prompt.

`always`: with its full strength. `text`: SPM's facilitated transport. For a prompt p and each erased text c,

    gamma = max(cos(flat E(p), flat E(c)), |tok(p) & tok(c)| / |tok(c)|)

with E the last hidden state of the text encoder over all token places and tok the set of tokens without special ones;
the strength is gamma ** power (1: the paper, 2: the published code, which scales both factors), the largest over the
texts, and 0 where gamma lies below the threshold. `latent`: see latent.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from erasure.errors import ErasureError, unknown
from erasure.patch import LowRank, Patch
from erasure.pipelines.gates.latent import LatentGate

KINDS = ("always", "text", "latent")


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


def parse_gate(patch: Patch) -> TextGate | LatentGate | None:
    """The gate in the header of `patch`; None for `always`.

    Raises:
        ErasureError: a kind or a key that is not known, a value out of range, or a gate on differences.
    """
    data: Mapping[str, Any] = patch.gate
    kind = data["kind"]
    if kind not in KINDS:
        raise unknown("gate", kind, KINDS)
    classes: dict[str, Any] = {"text": TextGate, "latent": LatentGate}
    allowed = ["kind", *(field.name for field in fields(classes[kind]))] if kind in classes else ["kind"]
    for key in data:
        if key not in allowed:
            raise unknown(f"key of a gate of kind {kind}", key, allowed)
    if kind == "always":
        return None
    if not isinstance(patch.payload, LowRank):
        raise ErasureError(
            f"a {kind} gate needs a low-rank payload: differences of whole weights act on every prompt alike"
        )
    if kind == "latent":
        if patch.components != ["unet"]:
            raise ErasureError(f"a latent gate needs a patch of the unet alone, not of {', '.join(patch.components)}")
        return LatentGate(**{key: value for key, value in data.items() if key != "kind"})
    texts = data.get("texts")
    if texts is None:
        texts = [name for concept in patch.concepts for name in [concept.get("name"), *_list(concept.get("aliases"))]]
    return TextGate(tuple(_list(texts)), data.get("power", 1.0), data.get("threshold", 0.0))


def _list(texts: Any) -> list[Any]:
    if texts is not None and not isinstance(texts, list):
        raise ErasureError(f"a text gate's texts and a concept's aliases are lists, not {texts!r}")
    return texts or []
