"""SAFREE (Yoon et al. 2025, ICLR, arXiv 2410.12761): the tokens that name the concept are projected away from it.

No weight changes. Each token of a prompt is hidden in turn; those without which the prompt is much farther from the
concept are triggers, and their states are projected away from the concept and into the space of the prompt, in the
first steps, the more of them the farther that turns the prompt. `pipelines/guards/tokens.py` has the equations and the
code. The patch holds the names and the numbers.

Cost: nothing to erase; while drawing, the text encoder on each prompt once for each of its tokens. With re-attention
one more row of the network for each prompt with a trigger while it is filtered.

A guard protects where its owner draws. Who holds the weights draws without it: see docs/guards.md.

Deviations from the published code (jaehong31/SAFREE), all but the last undone by `parity=true`:
- a token is hidden from the attention. The code puts the token of id 0 in its place, which is "!" in CLIP's vocabulary
  and one more word.
- subspaces are by singular values in float64. The code inverts E^T E in fp32, which squares the condition number of
  states that are nearly alike, so that rounding errors count like directions.
- a prompt of one token is compared with itself. The code compares it with the mean of no other token, which is NaN, so
  that every such prompt is filtered.
- the filter lasts for a share of the noise schedule, from 0 up. The code counts steps, and filters one at least.
- the concept's names are not the negative prompt, which the published scripts make them whatever the prompt is.
- midpoint, slope and steps are those of glyph's text encoder; the published ones were tuned on Stable Diffusion 1.4.
- on XL each encoder's states are projected in their own space, and the pooled text as well. The script projects the
  second encoder's penultimate states by subspaces of its pooled output, and leaves the first encoder and the pooled
  text as they are. Parity is refused there.
- re-attention scales what the filter made louder. The code puts the scale itself, a constant, in place of Fourier
  coefficients, compares real parts, reads a band that is not symmetric, and goes on where the filter has ended. In the
  published scripts it is inert, because they register it without a mode; so parity leaves it out.
- several concepts span one subspace, as the paper's list of phrases does; gate=text is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import prompt_of
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.guard_method import GuardMethod
from erasure.model.base import Base
from erasure.model.conditioning import text_encoders
from erasure.patch import Guard
from erasure.pipelines.guards.tokens import Tokens

FORM = ("margin", "steps", "midpoint", "slope", "padding", "negative", "reattention", "wide_scale", "narrow_scale")


@dataclass(frozen=True)
class SAFREE(GuardMethod):
    """Settings of the guard SAFREE.

    Args:
        margin: how much farther from the concept a prompt must be without a token for that to be a trigger (alpha).
        steps: largest share of the noise schedule in which filtered states serve, from its noisy end.
        midpoint: how far the projection turns a prompt (beta, 1 - cosine) that is filtered for half of these steps.
        slope: how sharply their share rises with it.
        padding: filter the states at the end token and the padding too, where a token is a trigger.
        negative: make the concept's names the negative prompt, as the published scripts do.
        reattention: weaken low frequencies that the filter made louder (costs a third row of the network).
        wide_scale: factor of re-attention on the decoder's widest features.
        narrow_scale: factor of re-attention on its second widest.
        parity: the published code, for Stable Diffusion 1 and 2.
    """

    method: ClassVar[str] = "safree"
    PARITY: ClassVar[dict[str, Any]] = {
        "margin": 0.01,
        "steps": 0.2,
        "midpoint": 0.5333,
        "padding": False,
        "negative": True,
    }
    PARITY_KINDS: ClassVar[dict[str, dict[str, Any]]] = {
        kind: {"midpoint": 0.55, "slope": 70.0} for kind in ("style", "identity")
    }

    margin: float = setting(0.1, at_least=0)
    steps: float = setting(1.0, above=0, at_most=1)
    midpoint: float = setting(0.0, at_least=0, at_most=2)
    slope: float = setting(50.0, above=0)
    padding: bool = True
    negative: bool = False
    reattention: bool = False
    wide_scale: float = setting(0.9, at_least=0)
    narrow_scale: float = setting(0.2, at_least=0)
    parity: bool = False

    @classmethod
    def form(cls) -> type[Tokens]:
        """Return the form of the guards: tokens that name a text are projected away from it."""
        return Tokens

    def guard(self, base: Base, concepts: list[Concept]) -> Guard:
        """Return the concepts' names, with the settings of the filter.

        Raises:
            ErasureError: a name has more tokens than the text encoder reads, or parity is asked for on XL.
        """
        if self.parity and len(text_encoders(base.pipe)) > 1:
            raise ErasureError(
                "safree: parity follows the published code for one text encoder; on XL its subspaces and states are of "
                "different layers. Leave parity out; nothing was changed"
            )
        named = [(concept.kind, name) for concept in concepts for name in concept.names]
        texts = list(dict.fromkeys(text for kind, name in named for text in (name, prompt_of(kind, name))))
        base.conditions([*texts, ", ".join(texts)] if self.negative else texts)  # refuses what is too long to be read
        return Guard("tokens", tuple(texts), {**{name: getattr(self, name) for name in FORM}, "published": self.parity})
