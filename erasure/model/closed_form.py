"""Closed-form edits of linear layers: regularised least squares in float64, with the change as exact low-rank factors.

For a matrix W0 [out, d] that reads text states, with columns c_e to edit, the answers v_e that they should get, and
columns c_k to keep (UCE, Gandikota et al. 2024, arXiv 2308.14761):

    W = argmin  sum_e s_e || W c_e - v_e ||^2  +  sum_k s_k || W c_k - W0 c_k ||^2  +  lambda || W - W0 ||^2

    W - W0 = [ sum_e s_e (v_e - W0 c_e) c_e^T ] G^-1       G = lambda I + sum_e s_e c_e c_e^T + sum_k s_k c_k c_k^T

Mostly v_e = W0 g_e, the answer to another state g_e. G does not depend on W0: it is factorised once for all layers
that read the same states. The rank of the change is at most the number of edited columns, so the change is an exact
low-rank patch. With such answers the change is W0 A B, and A [d, n] and B [n, d] are the same for all layers: a
`StateMap`, which other closed forms than least squares also are. The same layers are attacked in closed form (RECE,
arXiv 2407.12383): see `recovered`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.model.quantising import is_quantised

MOST_SVD = 600  # rows and columns up to which a singular value decomposition is taken
READERS = ("attn2.to_k", "attn2.to_v")  # the layers that read text states: keys and values of cross-attention
Factors = tuple[Tensor, Tensor, float]  # down [rank, d], up [out, rank], alpha: the change is alpha / rank * up @ down


@dataclass(frozen=True)
class Columns:
    """The text states that a closed-form edit changes and keeps, one a row, d numbers each.

    Args:
        edit: states to edit [n, d].
        guide: the states whose answers the edited ones get instead [n, d].
        keep: states whose answers stay [m, d]; m may be 0.
        edit_weight: s_e, one number for all edited columns, or one for each [n].
        keep_weight: s_k, one number for all kept columns, or one for each [m].
        ridge: lambda; greater values keep the weights nearer to where they were.

    Raises:
        ErasureError: shapes that do not agree, nothing to edit, NaN or infinity, or a weight or ridge that is not
            above 0.
    """

    edit: Tensor
    guide: Tensor
    keep: Tensor
    edit_weight: float | Tensor = 1.0
    keep_weight: float | Tensor = 1.0
    ridge: float = 0.5

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("edit", "guide", "keep")}
        if self.edit.dim() != 2 or not len(self.edit) or shapes["edit"] != shapes["guide"]:
            raise ErasureError(
                "a closed form needs at least one column to edit, and a guide of the same width for each: got edit "
                f"{shapes['edit']} and guide {shapes['guide']}"
            )
        if self.keep.dim() != 2 or self.keep.shape[1] != self.edit.shape[1]:
            raise ErasureError(f"kept columns {shapes['keep']} are not as wide as the edited ones {shapes['edit']}")
        if not all(torch.isfinite(states).all() for states in (self.edit, self.guide, self.keep)):
            raise ErasureError("the text states hold NaN or infinity: load the text encoder in fp32")
        for name, count in (("edit_weight", len(self.edit)), ("keep_weight", len(self.keep)), ("ridge", None)):
            value = torch.as_tensor(getattr(self, name))
            if value.dim() and value.shape != (count,):
                raise ErasureError(f"{name} has shape {tuple(value.shape)}: give one number, or {count}")
            if not (value > 0).all() or not torch.isfinite(value).all():
                raise ErasureError(f"{name}={getattr(self, name)}: must be finite and above 0")

    def principal(self, count: int) -> Columns:
        """Return the same objective with at most `count` columns to edit, so that the change has that rank.

        The objective depends on the edited columns only through sums over them, so an orthogonal change of their basis
        leaves it as it is. The basis is that of the singular value decomposition of the columns next to their shifts,
        [sqrt(s_e) c_e, sqrt(s_e) (g_e - c_e)]; the smallest directions are dropped. With `count` of 2 d or more, or of
        all columns, the solution is the same.

        Args:
            count: the largest number of columns.
        """
        weights = torch.as_tensor(self.edit_weight, dtype=torch.float64).cpu().expand(len(self.edit))
        edit, guide = principal_states(self.edit, self.guide, weights, count)
        return replace(self, edit=edit, guide=guide, edit_weight=1.0)


def principal_states(states: Tensor, guides: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return at most `count` states of weight 1, and their guides, that stand for many; see `Columns.principal`.

    Args:
        states: c [n, d].
        guides: g [n, d].
        weights: s [n].
        count: the largest number of states.

    Returns:
        Two tensors [count or fewer, d] in float64.
    """
    edit, guide, root = states.double().cpu(), guides.double().cpu(), weights.double().cpu().sqrt()[:, None]
    stacked = torch.cat([root * edit, root * (guide - edit)], dim=1)
    if min(stacked.shape) > MOST_SVD:  # several times as fast, and exact to half of the digits
        squares, vectors = torch.linalg.eigh(stacked.T @ stacked)
        values, rows = squares.clamp_min(0).sqrt().flip(0), vectors.T.flip(0)
    else:
        _, values, rows = torch.linalg.svd(stacked, full_matrices=False)
    kept, width = values[:count, None] * rows[:count], edit.shape[1]
    return kept[:, :width], kept[:, :width] + kept[:, width:]


def _width_checked(weight: Tensor, width: int) -> Tensor:
    """Return a layer's weight in float64 on the CPU.

    Raises:
        ErasureError: the layer is quantised, or reads states of another width.
    """
    if is_quantised(weight):
        raise ErasureError(
            "the weights of keys and values are quantised, and a closed form solves for them: load the model "
            "unquantised, which this needs once and without a GPU; the patch loads on the quantised model. Nothing was "
            "changed"
        )
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ErasureError(
            f"a layer with {'x'.join(map(str, weight.shape))} weights does not read text states of {width} numbers: "
            "only layers that do can be solved for, keys and values of cross-attention"
        )
    return weight.detach().double().cpu()


class StateMap:
    """A change that maps the text states before every layer reads them: W - W0 = W0 left right.

    Args:
        left: A [d, n], float64.
        right: B [n, d], float64.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        # With orthonormal rows in `right` the product in fp32 loses nothing to cancellation.
        basis, mix = torch.linalg.qr(right.T)
        self.left, self.right, self._mix = left @ mix.T, basis.T.contiguous(), mix

    @property
    def rank(self) -> int:
        """Return the rank of the factors: the number of edited columns, at most d."""
        return len(self.right)

    def factors(self, weight: Tensor) -> Factors:
        """Return the change of a layer's weight as low-rank factors.

        Args:
            weight: W0 [out, d], of any floating-point type on any device.

        Returns:
            down [rank, d] and up [out, rank] in float32 on the CPU, and alpha = rank, so that loaders multiply the
            product by 1.

        Raises:
            ErasureError: the layer reads states of another width.
        """
        up = _width_checked(weight, len(self.left)) @ self.left
        return self.right.float(), up.float(), float(self.rank)

    def truncated(self, rank: int, gram: Tensor, states: Tensor) -> tuple[StateMap, float]:
        """Return the map of at most `rank` whose answers to `states` are nearest to this one's, over all layers.

        With L^T L the layers' Gram matrix and S the states as columns, the answers change by L A B S. Its best
        approximation of that rank (Eckart and Young 1936) projects it on its left singular vectors U, so that the map
        becomes L^-1 U U^T L A B: no state whatever, and so no kept one, is moved further than before.

        Args:
            rank: the largest rank.
            gram: sum_i W_i^T W_i over the layers [d, d]; see `readers_gram`.
            states: the edited states, weighted by the square roots of their weights [n, d].

        Returns:
            The map, and the share of the squared change of the answers that it holds, 1 if nothing is left out.
        """
        if self.rank <= rank:
            return self, 1.0
        ridge = torch.finfo(gram.dtype).eps * len(gram) * gram.diagonal().mean()
        lower = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
        change = (lower.T @ self.left) @ (self.right @ states.double().cpu().T)
        values, vectors = torch.linalg.eigh(change @ change.T)  # ascending
        basis = vectors[:, -rank:]
        right = (basis.T @ (lower.T @ self.left)) @ self.right
        share = values[-rank:].sum() / values.clamp_min(0).sum()
        return StateMap(torch.linalg.solve_triangular(lower.T, basis, upper=True), right), min(1.0, float(share))

    def then(self, other: StateMap) -> StateMap:
        """Return the map of applying this one and then, to the weights that result, another one.

        W0 (I + A B)(I + A' B') - W0 = W0 [A, (I + A B) A'] [B; B'].
        """
        left = torch.cat([self.left, other.left + self.left @ (self.right @ other.left)], dim=1)
        return StateMap(left, torch.cat([self.right, other.right]))


class Edit(StateMap):
    """The minimum of the objective for columns: G is factorised once for all layers, in float64 on the CPU.

    Raises:
        ErasureError: the ridge is too small for columns that nearly depend on each other.
    """

    def __init__(self, columns: Columns) -> None:
        edit, guide, keep = (states.double().cpu() for states in (columns.edit, columns.guide, columns.keep))
        self.columns, self.guide = edit, guide  # [n, d]
        self.weights = torch.as_tensor(columns.edit_weight, dtype=torch.float64).cpu().expand(len(edit))  # [n]
        kept = torch.as_tensor(columns.keep_weight, dtype=torch.float64).cpu().expand(len(keep))
        gram = columns.ridge * torch.eye(edit.shape[1], dtype=torch.float64)
        gram += edit.T @ (self.weights[:, None] * edit) + keep.T @ (kept[:, None] * keep)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise ErasureError(
                f"ridge={columns.ridge:g} is too small: the columns nearly depend on each other, and the system has no "
                "stable solution in float64. Give a larger one"
            )
        super().__init__((self.weights[:, None] * (guide - edit)).T, torch.cholesky_solve(edit.T, factor).T)

    def towards(self, weight: Tensor, answers: Tensor) -> Factors:
        """Return the change of a layer's weight for wanted answers that are not those to the guides.

        Args:
            weight: W0 [out, d], of any floating-point type on any device.
            answers: v_e [n, out].

        Returns:
            The same as `factors`.

        Raises:
            ErasureError: the layer reads states of another width.
        """
        base = _width_checked(weight, self.columns.shape[1])
        shift = answers.double().cpu() - self.columns @ base.T
        up = (self.weights[:, None] * shift).T @ self._mix.T
        return self.right.float(), up.float(), float(self.rank)


@contextmanager
def applied(modules: Mapping[str, nn.Module], layers: Mapping[str, Factors]) -> Iterator[None]:
    """Add the changes of an edit to the weights of `modules`; leaving the block puts the modules' own tensors back."""
    own = {path: module.get_parameter("weight").data for path, module in modules.items() if path in layers}
    try:
        for path, weight in own.items():
            down, up, alpha = layers[path]
            change = (up @ down) * (alpha / len(down))
            modules[path].get_parameter("weight").data = weight + change.to(weight)
        yield
    finally:
        for path, weight in own.items():
            modules[path].get_parameter("weight").data = weight


def readers(unet: nn.Module) -> Tensor:
    """Return the present weights of all keys and values of cross-attention, stacked [outputs, d], in float64."""
    weights = [
        module.get_parameter("weight").detach().double()
        for path, module in unet.named_modules()
        if path.endswith(READERS)
    ]
    return torch.cat(weights)


def readers_gram(unet: nn.Module) -> Tensor:
    """Return sum_i W_i^T W_i over all keys and values of cross-attention [d, d], in float64 on the CPU."""
    total: Tensor | None = None
    for path, module in unet.named_modules():
        if path.endswith(READERS):
            weight = module.get_parameter("weight").detach().double().cpu()
            total = weight.T @ weight if total is None else total.add_(weight.T @ weight)
    if total is None:
        raise ErasureError(f"this {type(unet).__name__} has no cross-attention: nothing reads the text states")
    return total


def recovered(after: Tensor, before: Tensor, states: Tensor, ridge: float) -> Tensor:
    """Return the states that make edited weights answer as the base's do (RECE, arXiv 2407.12383, eq. 6).

        c' = argmin || W c' - W0 c ||^2 + lambda || c' ||^2

    Args:
        after: the edited weights W [outputs, d], float64; see `readers`.
        before: the base's weights W0 [outputs, d], float64.
        states: c, one a row [tokens, d], float64.
        ridge: lambda, as a share of the mean eigenvalue of W^T W.

    Returns:
        c' [tokens, d] in float32.
    """
    gram = after.T @ after
    ridged = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(ridged, after.T @ (before @ states.T)).T.float()
