"""UCE: Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761).

The keys and values of cross-attention become the minimum of eq. 7 (`model/closed_form.py`):

    sum_e s_e || W c_e - W0 g_e ||^2 + sum_k s_k || W c_k - W0 c_k ||^2 + lambda || W - W0 ||^2

c_e are text states of the concept's prompts, g_e those of the prompts in their stead, and c_k those of what is kept.

There are two published conventions of which states these are. The older script, which RECE and UnlearnCanvas build on,
takes all states from the name's last token to the end of the padding: `states=tail places=ends guide=null
carriers=false keep=listed keep_states=all keep_weight=null keep_empty=true`. The present script (uce_sd_erase.py) takes
the last token alone: `parity=true`. On glyph the last token alone erases little, because the padding still names the
concept (docs/closed-forms.md).

Cost: no UNet call; one factorisation of a matrix as wide as the text states, and one product for each layer.

Deviations from the published scripts, undone by `parity=True`: the tail is edited, towards the same places of the empty
prompt; every other name and style of the vocabulary is kept; a style is erased from subjects in that style, towards
the same subjects. Always float64, and the change is an exact low-rank term. Not copied: with `--expand_prompts` the
script also keeps the prompts that it edits, and only as many as there are kept concepts; `templates` edits them.

With `attributes` the same algebra moves a concept instead of erasing it (the paper's debiasing): its answer becomes
W0 (c + sum_i r_i a_i), always from the base's weights, where the published loop adds up its own results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import around, prompt_of, retained
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import ClosedFormMethod
from erasure.model.base import Base
from erasure.model.closed_form import Columns, Edit, Factors, StateMap
from erasure.model.text_columns import Pair, Part, Places, checked_names, states_of, states_of_pair

NAME = "{x}"  # the place of the name in a template
LEAST_KEEP = 0.1  # the older script's s_p = max(0.1, 1 / number of kept prompts)


@dataclass(frozen=True)
class UCE(ClosedFormMethod):
    """The settings of UCE, with the values tuned on glyph as defaults.

    Args:
        states: the edited states of each prompt: `tail`, from the name's last token to the end of the padding;
            `last`, the last token of the name alone.
        places: which states of the guide's prompt they are answered like: those at the `same` places, or with the
            `ends` of the two prompts meeting.
        guide: the prompt in the concept's stead where the concept has no anchor; null: "art" for styles, otherwise
            empty (the published script).
        answer: what the edited states are answered: the answer to the `guide`, or the part of their own answer that is
            `orthogonal` to it.
        templates: more prompts to edit, with {x} in the place of the name, such as "a photo of {x}".
        carriers: erase a style also from subjects in that style, towards the subjects alone.
        attributes: move the concept by these texts' states, each times its number, instead of erasing it.
        keep: what is kept: every other name and style of the `vocabulary`, the concepts' `neighbours`, or only the
            words that the concepts `listed` to be kept.
        keep_states: which states of kept prompts are kept: `all`, the `tail`, or the `last` token.
        keep_empty: keep the empty prompt as well.
        edit_weight: s_e, of each edited state.
        keep_weight: s_k, of each kept state; null: 1 divided by the number of kept prompts, at least 0.1.
        ridge: lambda; greater values keep the weights nearer to where they were.
        rank: the largest rank of the change; null: the number of edited states. See `Columns.principal`.
        parity: reproduce the present published script, with its defaults.
    """

    method: ClassVar[str] = "uce"
    PARITY: ClassVar[dict[str, Any]] = {
        "states": "last",
        "places": "ends",
        "guide": None,
        "carriers": False,
        "keep": "listed",
        "keep_states": "last",
    }

    states: Literal["tail", "last"] = "tail"
    places: Places = "same"
    guide: str | None = ""
    answer: Literal["guide", "orthogonal"] = "guide"
    templates: tuple[str, ...] = ()
    carriers: bool = True
    attributes: dict[str, float] | None = None
    keep: Literal["vocabulary", "neighbours", "listed"] = "vocabulary"
    keep_states: Part = "tail"
    keep_empty: bool = False
    edit_weight: float = setting(1.0, above=0)
    keep_weight: float | None = setting(1.0, above=0)
    ridge: float = setting(0.5, above=0)
    rank: int | None = setting(None, at_least=1)
    parity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [text for text in self.templates if NAME not in text]:
            raise ErasureError(f"templates={wrong[0]!r}: a template needs {NAME} in the place of the name")
        if self.answer == "orthogonal" and (self.rank is not None or self.attributes):
            raise ErasureError("answer=orthogonal: leave out rank and attributes, which are for answers to guides")

    def columns(self, base: Base, concepts: list[Concept]) -> Columns:
        """Edit the prompts of every name of the concepts; keep what `keep` says."""
        edited, guides, weights = [], [], []
        for concept, name in checked_names(base, concepts):
            pairs = self._pairs(concept, name)
            for number, pair in enumerate(pairs):
                edit, guide = states_of_pair(base, pair, self.states, self.places)
                edited.append(edit)
                guides.append(self._moved(base, edit) if self.attributes else guide)
                # The name alone counts as much as all the other prompts together.
                share = 1.0 if number == 0 else 1 / (len(pairs) - 1)
                weights.append(torch.full((len(edit),), self.edit_weight * share, dtype=torch.float64))
        kept = self._kept(base, concepts)
        columns = Columns(
            edit=torch.cat(edited),
            guide=torch.cat(guides),
            keep=states_of(base, kept, self.keep_states),
            edit_weight=torch.cat(weights),
            keep_weight=max(LEAST_KEEP, 1 / max(1, len(kept))) if self.keep_weight is None else self.keep_weight,
            ridge=self.ridge,
        )
        return columns if self.rank is None else columns.principal(self.rank)

    def solve(self, edit: StateMap, path: str, module: nn.Module) -> Factors:
        """Return the change of one module's weight, for answers orthogonal to the guides' if they are asked for."""
        if self.answer == "guide" or not isinstance(edit, Edit):
            return super().solve(edit, path, module)
        weight = module.get_parameter("weight").detach().double().cpu()
        return edit.towards(weight, orthogonal(edit.columns @ weight.T, edit.guide @ weight.T))

    def _pairs(self, concept: Concept, name: str) -> list[Pair]:
        """Return the prompts of one name with those in their stead, the name alone first."""
        guide = self.guide if self.guide is not None else "art" if concept.kind == "style" else ""
        single = replace(concept, name=name, aliases=(), anchor=concept.anchor or guide or None)
        if self.parity:  # the published script is given the prompts themselves
            return [Pair(name, name, single.anchor or "")]
        pairs = [Pair(prompt, name, instead) for prompt, instead in single.prompt_pairs()]
        pairs = pairs if self.carriers else pairs[:1]
        prompts = [" ".join(text.replace(NAME, name).split()) for text in self.templates]
        guides = [" ".join(text.replace(NAME, single.anchor or "").split()) for text in self.templates]
        return [*pairs, *(Pair(prompt, name, instead) for prompt, instead in zip(prompts, guides, strict=True))]

    def _moved(self, base: Base, edit: Tensor) -> Tensor:
        """Return states moved by the attributes' states at their last tokens, each times its number."""
        attributes = self.attributes or {}
        numbers = torch.tensor(list(attributes.values()), dtype=torch.float64)
        return edit + numbers @ states_of(base, list(attributes), "last").to(edit.device)

    def _kept(self, base: Base, concepts: list[Concept]) -> list[str]:
        """Return the prompts that are kept."""
        if self.keep == "vocabulary":
            kept = [prompt_of(kind, word) for kind, word in retained(base, concepts)]
        elif self.keep == "neighbours":
            kept = around(base, concepts)
        else:
            kept = [prompt_of(concept.kind, word) for concept in concepts for word in concept.keep]
        return [*kept, ""] if self.keep_empty else kept


def orthogonal(answers: Tensor, guides: Tensor) -> Tensor:
    """Return the part of each answer [n, out] that is orthogonal to the guide's answer [n, out]."""
    unit = torch.nn.functional.normalize(guides, dim=1)
    return answers - (answers * unit).sum(1, keepdim=True) * unit
