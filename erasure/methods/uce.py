"""UCE: Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761).

The keys and values of cross-attention become the minimum of eq. 7 (`model/closed_form.py`):

    sum_e s_e || W c_e - W0 g_e ||^2 + sum_k s_k || W c_k - W0 c_k ||^2 + lambda || W - W0 ||^2

c_e are text states of the concept's prompts, g_e those of the prompts in their stead, and c_k those of what is kept.

There are two published conventions of which states these are. The older script, which RECE and UnlearnCanvas build on,
takes all states from the name's last token to the end of the padding: `states=tail places=ends guide=script
contexts=false keep=listed keep_states=all keep_weight=null keep_empty=true ridge=0.5`. The present script
(uce_sd_erase.py) takes the last token alone: `parity=true`. On glyph that erases little, because the padding still
names the concept (docs/closed-forms.md).

Cost: no UNet call; one factorisation of a matrix as wide as the text states, and one product for each layer.

Deviations from the published scripts, undone by `parity=true`: the tail is edited. The concept is answered like the
nearest other name of its kind, where the scripts take the empty prompt: what both have in common stays, so the weights
move less, and a well-formed picture is drawn. Every other name and style of the vocabulary is kept.
Always float64, and the change is an exact low-rank term. Not copied: with `--expand_prompts` the
script also keeps the prompts that it edits, and only as many as there are kept concepts; `templates` edits them.

With `attributes` the same algebra moves a concept instead of erasing it (the paper's debiasing): its answer becomes
W0 (c + sum_i r_i a_i), always from the base's weights, where the published loop adds up its own results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import ClosedFormMethod
from erasure.model.base import Base
from erasure.model.closed_form import Columns, Edit, Factors, StateMap
from erasure.model.concept_columns import Choice, Guide, Keep, kept_prompts, kept_states
from erasure.model.text_columns import Part, Places, states_of, unit

LEAST_KEEP = 0.1  # the older script's s_p = max(0.1, 1 / number of kept prompts)


@dataclass(frozen=True)
class UCE(ClosedFormMethod):
    """The settings of UCE, with the values tuned on glyph as defaults.

    Args:
        states: the edited states of each prompt: `tail`, from the name's last token to the end of the padding;
            `last`, the last token of the name alone.
        places: which states of the guide's prompt they are answered like: those at the `same` places, or with the
            `ends` of the two prompts meeting; null: the ends for another name, the same places for the others.
        guide: what a concept without an anchor is answered like: the `nearest` other name of its kind in the
            vocabulary; the `mean` of these names, in the same prompts; the `empty` prompt; or the guide of the
            published `script`, "art" for styles, otherwise empty.
        beyond: how far beyond the mean, away from the concept, as a share of the distance between them.
        answer: what the edited states are answered: the answer to the `guide`, or the part of their own answer that is
            `orthogonal` to it.
        templates: more prompts to edit, with {x} in the place of the name, such as "a photo of {x}".
        contexts: edit the concept also together with others: an object in each style of the vocabulary, a style on
            common subjects. All these prompts together count as much as the name alone.
        attributes: move the concept by these texts' states, each times its number, instead of erasing it.
        keep: what is kept: every other name and style of the `vocabulary`, the concepts' `neighbours`, or only the
            words that the concepts `listed` to be kept.
        keep_states: which states of kept prompts are kept: `all`, the `tail`, or the `last` token.
        keep_empty: keep the empty prompt as well.
        edit_weight: s_e, of each edited state.
        keep_weight: s_k, of each kept state; null: 1 divided by the number of kept prompts, at least 0.1.
        ridge: lambda; greater values keep the weights nearer to where they were.
        rank: the largest rank of the change, for each name; null: the number of edited states, at most the width. The
            states of a name differ little, so that few directions hold nearly all of them (`Columns.principal`).
        parity: reproduce the present published script, with its defaults.
    """

    method: ClassVar[str] = "uce"
    PARITY: ClassVar[dict[str, Any]] = {
        "states": "last",
        "places": "ends",
        "guide": "script",
        "contexts": False,
        "ridge": 0.5,
        "keep": "listed",
        "keep_states": "last",
        "rank": None,
    }
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("rank",)

    states: Literal["tail", "last"] = "tail"
    places: Places | None = None
    guide: Guide = "nearest"
    beyond: float = setting(0.2, at_least=0)
    answer: Literal["guide", "orthogonal"] = "guide"
    templates: tuple[str, ...] = ()
    contexts: bool = True
    attributes: dict[str, float] | None = None
    keep: Keep = "vocabulary"
    keep_states: Part = "tail"
    keep_empty: bool = False
    edit_weight: float = setting(1.0, above=0)
    keep_weight: float | None = setting(1.0, above=0)
    ridge: float = setting(5.0, above=0)
    rank: int | None = setting(8, at_least=1)
    parity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice()
        if self.answer == "orthogonal" and (self.rank is not None or self.attributes):
            raise ErasureError("answer=orthogonal needs rank=null and no attributes, which are for answers to guides")
        for text, number in (self.attributes or {}).items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ErasureError(f"attributes: {text}={number!r} is not a finite number, such as {text}: 0.5")

    def _choice(self) -> Choice:
        return Choice(self.states, self.places, self.guide, self.beyond, self.contexts, self.templates, self.parity)

    def columns(self, base: Base, concepts: list[Concept]) -> Columns:
        """Edit the prompts of every name of the concepts; keep what `keep` says."""
        edited = self._choice().edited(base, concepts)
        kept = kept_prompts(base, concepts, self.keep) + ([""] if self.keep_empty else [])
        columns = Columns(
            edit=edited.states,
            guide=self._moved(base, edited.states) if self.attributes else edited.guides,
            keep=kept_states(base, kept, self.keep_states),
            edit_weight=self.edit_weight * edited.weights,
            keep_weight=max(LEAST_KEEP, 1 / max(1, len(kept))) if self.keep_weight is None else self.keep_weight,
            ridge=self.ridge * unit(base, edited.states),
        )
        return columns if self.rank is None else columns.principal(self.rank)

    def solve(self, edit: StateMap, path: str, module: nn.Module) -> Factors:
        """Return the change of one module's weight, for answers orthogonal to the guides' if they are asked for."""
        if self.answer == "guide" or not isinstance(edit, Edit):
            return super().solve(edit, path, module)
        weight = module.get_parameter("weight").detach().double().cpu()
        return edit.towards(weight, orthogonal(edit.columns @ weight.T, edit.guide @ weight.T))

    def _moved(self, base: Base, edit: Tensor) -> Tensor:
        """Return states moved by the attributes' states at their last tokens, each times its number."""
        attributes = self.attributes or {}
        numbers = torch.tensor(list(attributes.values()), dtype=torch.float64)
        return edit + numbers @ states_of(base, list(attributes), "last").to(edit.device)


def orthogonal(answers: Tensor, guides: Tensor) -> Tensor:
    """Return the part of each answer [n, out] that is orthogonal to the guide's answer [n, out]."""
    unit = torch.nn.functional.normalize(guides, dim=1)
    return answers - (answers * unit).sum(1, keepdim=True) * unit
