"""AdaVD (Wang et al. 2025, CVPR, arXiv 2412.06143): the concept is taken out of the values of cross-attention.

No weight changes. In every layer of cross-attention, the part along the concept's value is subtracted from the value of
each token of the prompt, as strongly as the two are alike; `pipelines/guards/values.py` has the equation and the code.
The patch holds the names and three numbers.

Cost: to erase, the text encoder on the kept words and one product for each layer, which choose the centre; while
drawing, two thin products for each layer and step and no pass of the network.

A guard protects where its owner draws. Who holds the weights draws without it: see docs/guards.md.

Deviations from the published code (WYuan1001/AdaVD), all but the last undone by `parity=true`:
- cosine and projection are of the values of one prompt. The code joins the two halves of classifier-free guidance
  (`pipelines/guards/joined_values.py`), so that the cosine contains the unconditional half, which is the same in both
  prompts, and the unconditional branch is changed, too.
- centre: without that half, cosines are lower than those for which the published 0.93 was chosen. None measures it: the
  quantile `far` of the cosines between the concept's value and those of kept words' tokens, over all layers.
- several names span an orthonormal basis, and each direction of it has a shift of its own. The code orthogonalises
  against the names' values themselves, which is no orthogonal basis from three names on.
- shifts below 1e-4 are 0, so that prompts that are far from the concept keep every bit.
- a style is erased by two values, of its name alone and of "... style", because both follow it in prompts.
- all heads of a layer belong together. The code assumes eight of them, as Stable Diffusion 1 has, and fails or mixes
  images on other models; parity does what it means. On XL, which the code does not know, parity is refused.
- gate=text lets the guard act on prompts near the concept's names alone; the paper has no gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import prompt_of, retained
from erasure.concepts.similarity import tokens
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.guard_method import GuardMethod
from erasure.model.base import Base
from erasure.model.conditioning import text_encoders
from erasure.patch import Guard
from erasure.pipelines.guards.values import Values, bases, value_layers

MOST_WORDS = 120  # kept words whose values are compared, evenly spread over all of them


@dataclass(frozen=True)
class AdaVD(GuardMethod):
    """Settings of the guard AdaVD.

    Args:
        peak: the largest shift: the multiple of the concept's part that is subtracted.
        slope: how sharply the shift rises with the cosine; 0 with a peak of 2 subtracts the whole part everywhere.
        centre: cosine at which the shift is half of its peak; None measures it with `far`.
        far: share of the kept words' cosines below the measured centre.
        parity: the published code, for Stable Diffusion 1 and 2.
    """

    method: ClassVar[str] = "adavd"
    PARITY: ClassVar[dict[str, Any]] = {"centre": 0.93}

    peak: float = setting(2.0, above=0)
    slope: float = setting(100.0, at_least=0)
    centre: float | None = setting(None, at_least=-1, at_most=1)
    far: float = setting(0.99, above=0, at_most=1)
    parity: bool = False

    @classmethod
    def form(cls) -> type[Values]:
        """Return the form of the guards: values without the concept's part."""
        return Values

    def guard(self, base: Base, concepts: list[Concept]) -> Guard:
        """Return the concepts' names, with the settings of the shift.

        Raises:
            ErasureError: a name has no tokens, there are no kept words to measure the centre with, or parity is asked
                for on XL.
        """
        if self.parity and len(text_encoders(base.pipe)) > 1:
            raise ErasureError(
                "adavd: parity follows the published code, which knows one text encoder, and XL has two. Leave parity "
                "out; nothing was changed"
            )
        named = [(concept.kind, name) for concept in concepts for name in concept.names]
        texts = list(dict.fromkeys(text for kind, name in named for text in (name, prompt_of(kind, name))))
        if self.parity:
            texts = [name for _, name in named]
        if empty := [text for text in texts if tokens(base, text) < 3]:
            raise ErasureError(f"{empty[0]!r} has no tokens, so it has no value to take out. Nothing was changed")
        centre = self.centre
        if centre is None:
            centre = measured(base, texts, [prompt_of(kind, word) for kind, word in retained(base, concepts)], self.far)
        shift = {"peak": self.peak, "slope": self.slope, "centre": centre}
        return Guard("values", tuple(texts), {**shift, "published": True} if self.parity else shift)


@torch.no_grad()
def measured(base: Base, texts: Sequence[str], kept: Sequence[str], far: float) -> float:
    """Return the quantile of the cosines between texts' values and those of kept words' tokens, over all layers.

    Args:
        base: the checkpoint.
        texts: what is erased.
        kept: words that are to stay; the first token of each is its second state, the last one the end token's.
        far: the quantile, 0 to 1.

    Raises:
        ErasureError: there are no kept words.
    """
    if not kept:
        raise ErasureError(
            "no word is kept, so the centre cannot be measured: give it (--set centre=0.9), or words to keep (--keep)"
        )
    count = min(MOST_WORDS, len(kept))
    chosen = [kept[i * len(kept) // count] for i in range(count)]
    states = torch.cat([base.encode([word])[0, 1 : tokens(base, word)] for word in chosen]).to(base.network.dtype)
    layers = value_layers(base)
    found = []
    for path, basis in bases(base, texts, layers).items():
        values = torch.nn.functional.normalize(layers[path](states).float().cpu(), dim=-1)
        found.append((values @ basis.T).amax(1))
    return round(float(torch.cat(found).quantile(far)), 4)
