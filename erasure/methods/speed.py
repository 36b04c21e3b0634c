"""SPEED: scalable, precise and efficient concept erasure in the null space of what is kept (arXiv 2503.07392).

With T = mean c c^T and A = mean a c^T over the concept's states c and their anchors a, the change of each value of
cross-attention is

    dW = W0 (A - T) P [I - M K (K^T P M K)^-1 K^T P] M        M = (T P + rho I)^-1

P projects on the null space of the kept states: the directions in which their mean Gram matrix is small. K are states
that must not move at all: the start token and the centres of the empty prompt's states (invariant equality constraint,
IEC). Of the kept states only those that the unconstrained change W0 (A - T)(I + T)^-1 moves more than the mean are used
(influence-based prior filtering, IPF), with variants along the direction that the weights read least (directed prior
augmentation, DPA). dW k = 0 for every k in the kept span and for K; the rank is the number of the concept's columns.

Cost: no UNet call; a few factorisations of matrices as wide as the text states, and one product for each layer.

Deviations from the published code (train_erase_null.py), undone by `parity=true` as far as settings go: the columns and
anchors are those of `uce`, keys are edited with the values, and the kept states are whole tails, all of them (on glyph
the filter leaves other names to be moved twice as far). Always: filter,
augmentation and null space are one for all layers, from their stacked weights, and the null space is where eigenvalues
are below a share of their mean, which on Stable Diffusion 1 is about the published absolute value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.config import setting
from erasure.errors import ErasureError
from erasure.method import ClosedFormMethod
from erasure.model.base import Base
from erasure.model.closed_form import Columns, StateMap, readers
from erasure.model.concept_columns import Choice, Guide, Keep, kept_prompts, kept_states
from erasure.model.null_space import check_free
from erasure.model.text_columns import Part, states_of, unit

CENTRES = 3  # of the empty prompt's states
ROUNDS = 20  # of k-means, which begins with states spread over the prompt


@dataclass(frozen=True)
class SPEED(ClosedFormMethod):
    """The settings of SPEED, with values tuned on glyph as defaults.

    Args:
        layers: edit the `values` alone, or keys and values (`both`).
        states: the edited states of each prompt: `tail`, from the name's last token to the end of the padding; `last`,
            the last token of the name alone.
        guide: the anchor of a concept that names none: `nearest`, `mean`, `empty` or `script`; see `uce`.
        beyond: how far beyond the mean, as a share of the distance from the concept.
        contexts: edit the concept also together with others; see `uce`.
        keep: what is kept: the `vocabulary`, the concepts' `neighbours`, or only words `listed` to be kept.
        keep_states: which states of kept prompts are kept: `all`, the `tail`, or the `last` token.
        filter: use only the kept states that the unconstrained change moves more than the mean (IPF).
        augment: variants of each of these states (DPA).
        null_below: eigenvalues of the kept Gram matrix below this share of their mean span the null space.
        retain: rho; greater values keep the weights nearer to where they were.
        rank: the largest rank of the change, for each name; null: the number of edited states, at most the width.
        parity: the published settings.
    """

    method: ClassVar[str] = "speed"
    PARITY: ClassVar[dict[str, Any]] = {
        "layers": "values",
        "states": "last",
        "guide": "script",
        "contexts": False,
        "keep_states": "last",
        "filter": True,
        "augment": 10,
        "retain": 1.0,
        "rank": None,
    }
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ("rank",)

    layers: Literal["values", "both"] = "both"
    states: Literal["tail", "last"] = "tail"
    guide: Guide = "nearest"
    beyond: float = setting(0.2, at_least=0)
    contexts: bool = True
    keep: Keep = "vocabulary"
    keep_states: Part = "tail"
    filter: bool = False
    augment: int = setting(0, at_least=0)
    null_below: float = setting(0.1, above=0)
    retain: float = setting(3.0, above=0)
    rank: int | None = setting(8, at_least=1)
    parity: bool = False

    def modules(self, base: Base) -> dict[str, nn.Module]:
        """Return the values of cross-attention, and the keys if both are edited."""
        return {
            path: module
            for path, module in super().modules(base).items()
            if self.layers == "both" or path.endswith("to_v")
        }

    def columns(self, base: Base, concepts: list[Concept]) -> Columns:
        """Return the concept's states, their anchors, and the states that are kept."""
        choice = Choice(self.states, None, self.guide, self.beyond, self.contexts, bare=self.parity)
        edited = choice.edited(base, concepts)
        each = self.filter or self.augment  # these work on single states
        keep = (states_of if each else kept_states)(base, kept_prompts(base, concepts, self.keep), self.keep_states)
        columns = Columns(edited.states, edited.guides, keep, edited.weights)
        return columns if self.rank is None else columns.principal(self.rank)

    def edit(self, base: Base, concepts: list[Concept]) -> StateMap:
        """Solve for the map of text states that all layers share."""
        columns = self.columns(base, concepts)
        edit, guide, keep = (states.double().cpu() for states in (columns.edit, columns.guide, columns.keep))
        weights = torch.as_tensor(columns.edit_weight, dtype=torch.float64).cpu().expand(len(edit))
        left = ((guide - edit) * (weights / weights.sum())[:, None]).T  # (A - T) = left @ edit
        mean = edit.T @ (edit * (weights / weights.sum())[:, None])  # T
        stacked = readers(base.network) if self.filter or self.augment else None
        if stacked is not None and not stacked.is_meta:  # a forecast may have no weights to filter by
            stacked = stacked.cpu()
            if self.filter:
                keep = most_moved(keep, stacked, left, edit, mean)
            keep = torch.cat([keep, *self._variants(keep, stacked)])
        free = null_space(keep, self.null_below)
        check_free(base, concepts, free)
        still = fixed_states(base.rows("").double().cpu())
        return StateMap(left, constrained(edit, mean, free @ free.T, still, self.retain * unit(base, edit)))

    def _variants(self, keep: Tensor, stacked: Tensor) -> list[Tensor]:
        """Return the variants of kept states along the direction that the weights read least."""
        weakest = torch.linalg.eigh(stacked.T @ stacked).eigenvectors[:, :1]
        draw = torch.Generator().manual_seed(0)
        noise = [torch.randn(keep.shape, generator=draw, dtype=torch.float64) for _ in range(self.augment)]
        return [keep + (one @ weakest) @ weakest.T for one in noise]


def most_moved(keep: Tensor, stacked: Tensor, left: Tensor, edit: Tensor, mean: Tensor) -> Tensor:
    """Return the kept states whose answers the unconstrained change W0 (A - T)(I + T)^-1 moves more than the mean.

    Args:
        keep: kept states [m, d].
        stacked: the layers' weights W0 [outputs, d].
        left, edit: A - T = left @ edit.
        mean: T [d, d].
    """
    if len(keep) == 0:
        return keep
    moved = torch.linalg.solve(torch.eye(len(mean), dtype=mean.dtype) + mean, keep.T)  # (I + T)^-1 p
    lengths = (stacked @ left @ (edit @ moved)).norm(dim=0)
    return keep[lengths >= lengths.mean()]


def null_space(keep: Tensor, below: float) -> Tensor:
    """Return a basis [d, m] of the directions in which the kept states' Gram matrix is small.

    Args:
        keep: kept states [n, d].
        below: eigenvalues below this share of their mean count as small.
    """
    values, vectors = torch.linalg.eigh(keep.T @ keep)
    return vectors[:, values < below * values.mean()] if len(keep) else vectors


def fixed_states(empty: Tensor) -> Tensor:
    """Return the states that must not move [1 + CENTRES, d]: the start token, and centres of the empty prompt's others.

    Args:
        empty: the states of the empty prompt [tokens, d].
    """
    others = empty[1:]
    if len(others) <= CENTRES:  # no padding is read
        return empty
    centres = others[torch.linspace(0, len(others) - 1, CENTRES).long()]
    for _ in range(ROUNDS):
        nearest = torch.cdist(others, centres).argmin(1)
        groups = [others[nearest == i] for i in range(CENTRES)]
        centres = torch.stack([group.mean(0) if len(group) else centres[i] for i, group in enumerate(groups)])
    return torch.cat([empty[:1], centres])


def constrained(edit: Tensor, mean: Tensor, project: Tensor, still: Tensor, retain: float) -> Tensor:
    """Return C^T P [I - M K (K^T P M K)^-1 K^T P] M, the right factor of the change [n, d].

    Args:
        edit: the concept's states C [n, d].
        mean: T [d, d].
        project: P [d, d], the projector on the null space of what is kept.
        still: K [k, d], states that must not move.
        retain: rho.

    Raises:
        ErasureError: the system has no solution in float64.
    """
    eye = torch.eye(len(mean), dtype=mean.dtype)
    inverse = torch.linalg.solve(mean @ project + retain * eye, eye)
    inner = still @ project @ inverse @ still.T
    # States of K that lie in the kept space do not move anyway, and make this matrix singular.
    held = eye - inverse @ still.T @ torch.linalg.pinv(inner, rtol=1e-9) @ still @ project
    right = edit @ project @ held @ inverse
    if not torch.isfinite(right).all():
        raise ErasureError(f"retain={retain:g} is too small: the system has no stable solution in float64")
    return right
