"""The text gate: SPM's facilitated transport (Lyu et al. 2024, arXiv 2312.16145).

For a prompt p and each erased text c, the similarity is

    gamma = max(cos(flat E(p), flat E(c)), |tok(p) & tok(c)| / |tok(c)|)

with E the last hidden state of the text encoder, [tokens, width], flattened over all token positions, and tok the set
of tokens without the special ones. Of an encoder other than CLIP, such as PixArt's T5, how near single tokens come
stands for the cosine (`concepts/token_states.py`). The strength is scale * gamma ** power, the largest over the texts,
and 0 where gamma is below the threshold. The power is 1 in the paper and 2 in the published code, which scales both
factors by gamma. The published code doubles gamma for styles, which is a scale of 4 with a power of 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from erasure.errors import ErasureError


@dataclass(frozen=True)
class TextGate:
    """A gate that compares the prompt with the erased texts.

    Args:
        texts: the erased texts, at least one.
        power: exponent of the similarity, 0 or more.
        threshold: similarity below which the patch does not act, 0 or more.
        scale: strength at a similarity of 1, 0 or more.

    Raises:
        ErasureError: a text is empty, or a number is out of range.
    """

    texts: tuple[str, ...]
    power: float = 1.0
    threshold: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.texts or not all(isinstance(text, str) and text.strip() for text in self.texts):
            raise ErasureError(f"a text gate needs at least one text and no empty ones, not {list(self.texts)!r}")
        for name, value in (("power", self.power), ("threshold", self.threshold), ("scale", self.scale)):
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise ErasureError(f"the {name} of a text gate must be a number of 0 or more, not {value!r}")

    def strength(self, similarity: float) -> float:
        """Return the strength at a similarity: its power times the scale, or 0 below the threshold.

        Args:
            similarity: gamma of the prompt and the nearest text, -1 to 1.
        """
        return self.scale * similarity**self.power if similarity > 0 and similarity >= self.threshold else 0.0
