"""RECE: Reliable and Efficient Concept Erasure (Gong et al. 2024, arXiv 2407.12383).

UCE, and then rounds against an attacker who has the weights: find the text states that make the edited weights answer
as the base answers the concept, and edit these as well. The states are found in closed form over all keys and values of
cross-attention together (eq. 6; `model/closed_form.recovered`):

    c' = argmin sum_i || W_i c' - W0_i c ||^2 + lambda || c' ||^2

Cost: no UNet call; for each round two factorisations of matrices as wide as the text states.

Deviations from the published code, undone by `parity=true`: all rounds are solved together with the concept from the
base's weights, so that what is kept is kept in the last weights too (the script edits the weights of the round before,
and keeps only " "); the columns and the guide are those of `uce`, and lambda is a share of the mean eigenvalue of
sum_i W_i^T W_i, so that one value serves encoders of any width. The script chooses the number of rounds by pictures;
here it is a setting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.config import setting
from erasure.method import ClosedFormMethod
from erasure.model.base import Base
from erasure.model.closed_form import Columns, Edit, StateMap, readers, recovered
from erasure.model.concept_columns import Choice, Guide, Keep, kept_prompts, kept_states
from erasure.model.text_columns import Part, Places, states_of, unit

OLDER_RIDGE, OLDER_KEEP_WEIGHT = 0.1, 0.1  # of the published script's edits, which keep " " alone


@dataclass(frozen=True)
class RECE(ClosedFormMethod):
    """The settings of RECE; those that UCE has too mean the same.

    Args:
        rounds: how often states that recover the concept are searched and edited; 0 is UCE.
        attack_ridge: lambda of the search, as a share of the mean eigenvalue of the layers' W^T W; smaller values find
            stronger states, whose edits damage more. With parity it is the absolute value.
        attack_weight: weight of each found state in the edit. On glyph, with 1 the found states pull the concept's own
            states half the way back, because they are longer.
        guide: what a concept without an anchor is answered like: `nearest`, `mean`, `empty` or `script`; see `uce`.
        beyond: how far beyond the mean, as a share of the distance from the concept.
        contexts: edit the concept also together with others.
        keep: what is kept: the `vocabulary`, the concepts' `neighbours`, or only words `listed` to be kept.
        keep_states: which states of kept prompts are kept: `all`, the `tail`, or the `last` token.
        keep_weight: weight of each kept state.
        ridge: lambda of the edit; greater values keep the weights nearer to where they were.
        rank: the largest rank of the change, for each name; null: the number of edited states, at most the width.
        parity: reproduce the published script, with its defaults.
    """

    method: ClassVar[str] = "rece"
    PARITY: ClassVar[dict[str, Any]] = {
        "rounds": 3,
        "guide": "script",
        "contexts": False,
        "keep": "listed",
        "keep_states": "all",
        "keep_weight": 0.1,
        "ridge": 0.1,
        "rank": None,
    }
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("rank",)

    rounds: int = setting(2, at_least=0)
    attack_ridge: float = setting(0.1, above=0)
    attack_weight: float = setting(0.05, above=0)
    guide: Guide = "nearest"
    beyond: float = setting(0.3, at_least=0)
    contexts: bool = True
    keep: Keep = "vocabulary"
    keep_states: Part = "tail"
    keep_weight: float = setting(1.0, above=0)
    ridge: float = setting(5.0, above=0)
    rank: int | None = setting(16, at_least=1)
    parity: bool = False

    def columns(self, base: Base, concepts: list[Concept]) -> Columns:
        """Return UCE's columns, which the rounds begin with."""
        places: Places | None = "ends" if self.parity else None
        choice = Choice("tail", places, self.guide, self.beyond, self.contexts, bare=self.parity)
        edited = choice.edited(base, concepts)
        kept = kept_prompts(base, concepts, self.keep) + ([""] if self.parity else [])
        return Columns(
            edit=edited.states,
            guide=edited.guides,
            keep=kept_states(base, kept, self.keep_states),
            edit_weight=edited.weights,
            keep_weight=self.keep_weight,
            ridge=self.ridge * unit(base, edited.states),
        )

    def edit(self, base: Base, concepts: list[Concept]) -> StateMap:
        """Solve for the concept, then in each round also for the states that recover it."""
        first = columns = self.columns(base, concepts)
        solution: StateMap = self._solved(columns)
        before = readers(base.network)
        before = before if before.is_meta else before.cpu()
        for _ in range(self.rounds):
            found = found_states(before, solution, first.edit.cpu(), self.attack_ridge, absolute=self.parity)
            if self.parity:
                solution = solution.then(self._next(base, found, first))
            else:
                weights = self.attack_weight * torch.as_tensor(first.edit_weight)
                columns = replace(
                    columns,
                    edit=torch.cat([columns.edit.cpu(), found]),
                    guide=torch.cat([columns.guide.cpu(), first.guide.cpu()]),
                    edit_weight=torch.cat([torch.as_tensor(columns.edit_weight), weights]),
                )
                solution = self._solved(columns)
        return solution

    def _solved(self, columns: Columns) -> Edit:
        return Edit(columns if self.rank is None else columns.principal(self.rank))

    def _next(self, base: Base, found: Tensor, first: Columns) -> StateMap:
        """Return the published script's edit of the weights of the round before."""
        keep = states_of(base, [" "], "all")
        return Edit(Columns(found, first.guide, keep, 1.0, OLDER_KEEP_WEIGHT, OLDER_RIDGE))


def found_states(before: Tensor, solution: StateMap, states: Tensor, ridge: float, *, absolute: bool = False) -> Tensor:
    """Return the states that make edited weights answer as the base answers `states`.

    Args:
        before: the base's weights, stacked [outputs, d]; without data (meta), the states themselves are returned.
        solution: the edit so far.
        states: the concept's states [n, d], float64.
        ridge: see `recovered`.
        absolute: take `ridge` as it is, not as a share of the mean eigenvalue of W^T W.
    """
    if before.is_meta:
        return states
    after = before + (before @ solution.left) @ solution.right
    if absolute:
        ridge /= float(after.square().sum() / after.shape[1])
    return recovered(after, before, states, ridge).double()
