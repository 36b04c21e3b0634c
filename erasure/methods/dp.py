"""DP: closed-form double projections (arXiv 2604.10032).

The change of every key and value of cross-attention is confined to the directions U that kept text states leave free,
and maps the concept's states C exactly to others C* (joint form for several columns):

    X = U^T C        W = W0 + W0 (C* - C) X^+ U^T        so that W k = W0 k for what U does not see, and W C = W0 C*

In the paper C* is the projection of C on the span S of safe states, S (S^T S)^+ S^T C.

Cost: no UNet call; one eigendecomposition of a matrix as wide as the text states, and one product for each layer.

No code was published to compare with. Deviations from the paper, undone by `parity=true`: the columns are the largest
directions of the states from a name's last token to the end of the padding, not the last token alone; C* is the nearest
other name; and the kept space is that of the directions that hold most of
the kept states' squared lengths, because on encoders as narrow as glyph's the exact span leaves nearly nothing free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import around
from erasure.config import setting
from erasure.method import ClosedFormMethod
from erasure.model.base import Base
from erasure.model.closed_form import Columns, StateMap
from erasure.model.concept_columns import Choice, Keep, kept_prompts, kept_states
from erasure.model.null_space import check_free, complement
from erasure.model.text_columns import Part, states_of


@dataclass(frozen=True)
class DP(ClosedFormMethod):
    """The settings of DP, with values tuned on glyph as defaults.

    Args:
        states: the edited states of each prompt: `tail`, from the name's last token to the end of the padding; `last`,
            the last token of the name alone.
        guide: what a concept without an anchor becomes: the `nearest` other name, the `mean` of the other names, the
            `empty` prompt, or its projection on the `safe` states, the last tokens of its neighbours.
        beyond: how far beyond the mean, as a share of the distance from the concept.
        contexts: edit the concept also together with others; see `uce`.
        keep: what is kept: the `vocabulary`, the concepts' `neighbours`, or only words `listed` to be kept.
        keep_states: which states of kept prompts are kept: `all`, the `tail`, or the `last` token.
        kept_share: share of the kept states' squared lengths that lies in the directions kept exactly; 1: their span.
        cut: singular values of X below this share of the largest are left out, which would make the change large.
        rank: the largest rank of the change, for each name; null: the number of edited states, at most the width.
        parity: the columns, the guide and the kept space of the paper.
    """

    method: ClassVar[str] = "dp"
    PARITY: ClassVar[dict[str, Any]] = {
        "states": "last",
        "guide": "safe",
        "contexts": False,
        "keep_states": "last",
        "kept_share": 1.0,
        "cut": 1e-6,
        "rank": None,
    }
    EXACT: ClassVar[bool] = True
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("rank",)

    states: Literal["tail", "last"] = "tail"
    guide: Literal["nearest", "mean", "empty", "safe"] = "nearest"
    beyond: float = setting(0.2, at_least=0)
    contexts: bool = True
    keep: Keep = "vocabulary"
    keep_states: Part = "tail"
    kept_share: float = setting(0.99, above=0, at_most=1)
    cut: float = setting(0.3, above=0, below=1)
    rank: int | None = setting(8, at_least=1)
    parity: bool = False

    def columns(self, base: Base, concepts: list[Concept]) -> Columns:
        """Return the states to map, those that they become, and those that are kept."""
        towards = "empty" if self.guide == "safe" else self.guide
        choice = Choice(self.states, None, towards, self.beyond, self.contexts, bare=self.parity)
        edited = choice.edited(base, concepts)
        guides = edited.guides
        if self.guide == "safe" and not all(concept.anchor for concept in concepts):
            guides = projected(edited.states, states_of(base, around(base, concepts), "last"))
        keep = kept_states(base, kept_prompts(base, concepts, self.keep), self.keep_states)
        columns = Columns(edited.states, guides, keep, edited.weights)
        return columns if self.rank is None else columns.principal(self.rank)

    def edit(self, base: Base, concepts: list[Concept]) -> StateMap:
        """Return the joint form of the double projection."""
        columns = self.columns(base, concepts)
        edit, guide, keep = (states.double().cpu() for states in (columns.edit, columns.guide, columns.keep))
        free = complement(keep, self.kept_share)
        check_free(base, concepts, free)
        return StateMap((guide - edit).T, torch.linalg.pinv(edit @ free, rtol=self.cut).T @ free.T)


def projected(states: Tensor, safe: Tensor) -> Tensor:
    """Return the orthogonal projections of states [n, d] on the span of safe states [m, d]."""
    return states @ torch.linalg.pinv(safe) @ safe
