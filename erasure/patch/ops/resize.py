"""Resizing of patches: the best approximation of each layer's change by a given rank, and its error.

Let W = U S V' be the change of a layer, as a matrix [out, in]. The matrix of rank r with the smallest squared error
keeps the r largest singular values (Eckart and Young 1936). We compute U as the eigenvectors of the smaller Gram matrix
in float64, and the other factor as U' W. The result is then a projection of W, which is exact at full rank. The change
of a convolution [out, in, h, w] is treated as the matrix [out, in h w].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.patch.ops.provenance import fingerprints, history
from erasure.patch.patch import Patch
from erasure.patch.payload import Delta, Layer, LowRank

# Embedding tables, which look up rows instead of multiplying, so that low-rank terms cannot change them.
TABLES = ("token_embedding.weight", "position_embedding.weight", "class_embedding.weight")


Label = tuple[str, str]  # component, parameter name


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of one layer's change, in float64.

    Args:
        outer: orthonormal columns [out, k], so that outer @ core is the change; None if `core` is the change itself.
        core: a matrix [a, b].
        basis: singular vectors of the smaller side of `core` as columns, with the largest singular value first.
        values: singular values in falling order, as many as the smaller side of `core` has.
    """

    outer: Tensor | None
    core: Tensor
    basis: Tensor
    values: Tensor

    @classmethod
    def of(cls, payload: LowRank | Delta, component: str, name: str) -> Spectrum:
        """Decompose the change of one layer; for low-rank factors only a matrix of their rank is decomposed.

        Args:
            payload: the payload of the patch.
            component: the component of the layer.
            name: the name of the layer's weight.
        """
        outer = None
        core = payload.change(component, name).double().flatten(1)
        if isinstance(payload, LowRank):
            down, up, alpha = payload.layers[component][name.removesuffix(".weight")]
            if down.shape[0] < min(core.shape):
                outer, small = torch.linalg.qr(up.flatten(1).double())
                core = small @ down.flatten(1).double() * (alpha / down.shape[0])
        gram = core @ core.T if core.shape[0] <= core.shape[1] else core.T @ core
        values, basis = torch.linalg.eigh(gram)
        return cls(outer, core, basis.flip(1), values.flip(0).clamp(min=0).sqrt())

    def rank(self, energy: float) -> int:
        """Return the smallest rank that keeps the share `energy`, 0 to 1, of the squared singular values."""
        kept = self.values.square().cumsum(0)
        index = torch.searchsorted(kept, energy * kept[-1])
        return min(int(index) + 1, len(kept)) if kept[-1] else 1

    def lost(self, rank: int) -> float:
        """Return the squared error of the approximation by the given rank."""
        return float(self.values[rank:].square().sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors down [rank, in h w] and up [out, rank] of the best approximation of the given rank.

        They are scaled so that each row of `down` has the norm of the matching column of `up`.
        """
        basis = self.basis[:, :rank]
        wide = self.core.shape[0] <= self.core.shape[1]
        down, up = (basis.T @ self.core, basis) if wide else (basis.T, self.core @ basis)
        size = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-300)).sqrt()
        size = torch.where(size > 0, size, 1.0)
        down, up = down / size[:, None], up * size
        return down, up if self.outer is None else self.outer @ up


def resize(
    patch: Patch,
    rank: int | None = None,
    energy: float | None = None,
    *,
    drop: bool = False,
    base: Any = None,
    force: bool = False,
) -> Patch:
    """Return a low-rank patch that approximates a patch, with a given rank or a given share of the squared change.

    The relative error |resized - patch| / |patch| is stored in the config of the result, for each layer and in total.

    Args:
        patch: a patch of low-rank factors or of weight differences. The result has the same gate.
        rank: the new rank of each layer, at most the highest rank of a layer. Layers of lower rank keep theirs.
        energy: the share of each layer's squared norm to keep, above 0 and at most 1, instead of a rank.
        drop: leave out parameters that low-rank terms cannot change (biases, norms, embeddings), which counts as error.
        base: as for `merge`; it is read only if a parameter was left out.
        force: as for `merge`.

    Raises:
        ErasureError: both or neither of `rank` and `energy` are given, one is out of range, or there are parameters
            that low-rank terms cannot change and `drop` is false.
    """
    if (rank is None) == (energy is None):
        raise ErasureError("give either rank or energy, and not both")
    if energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1):
        raise ErasureError(f"energy must be a share above 0 and at most 1, not {energy!r}")
    labels, dropped = matrices(patch, drop)
    if rank is not None:
        check_rank(rank, max(full_rank(patch.weights, *label) for label in labels))
    layers: dict[str, dict[str, Layer]] = {}
    for component, name in labels:
        spectrum = Spectrum.of(patch.weights, component, name)
        chosen = spectrum.rank(energy or 1.0) if rank is None else min(rank, len(spectrum.values))
        down, up = spectrum.factors(chosen)
        shape = patch.weights.shape(component, name)
        pair = down.reshape(chosen, *shape[1:]), up.reshape(shape[0], chosen, *(1 for _ in shape[2:]))
        layers.setdefault(component, {})[name.removesuffix(".weight")] = (*pair, float(chosen))
    payload = LowRank(layers)
    total, errors = _errors(patch.weights, payload, labels, dropped)
    details: dict[str, Any] = {"energy": energy} if rank is None else {"rank": rank}
    if dropped:
        details["dropped"] = [".".join(label) for label in dropped]
    return dataclasses.replace(
        patch,
        payload=payload,
        config=history("resize", [(patch, 1.0)], **details, error=total, errors=errors),
        base_fingerprint=fingerprints([patch], payload, base, force),
        curves=None,
        results=None,
        stored={},
    )


def full_rank(payload: LowRank | Delta, component: str, name: str) -> int:
    """Return the highest rank that the change of a layer can have.

    Args:
        payload: the payload of the patch.
        component: the component of the layer.
        name: the name of the layer's weight.
    """
    shape = payload.shape(component, name)
    limit = min(shape[0], math.prod(shape[1:]))
    if isinstance(payload, LowRank):
        return min(limit, payload.layers[component][name.removesuffix(".weight")][0].shape[0])
    return limit


def check_rank(rank: Any, limit: int) -> None:
    """Check that a rank is a whole number from 1 to `limit`.

    Raises:
        ErasureError: it is not; the message names the range.
    """
    if type(rank) is not int or not 1 <= rank <= limit:
        raise ErasureError(f"rank must be a whole number from 1 to {limit}, the full rank of the patch, not {rank!r}")


def matrices(patch: Patch, drop: bool) -> tuple[list[Label], list[Label]]:
    """Split the parameters of a patch into those that low-rank terms can change and the others.

    Args:
        patch: the patch.
        drop: whether there may be others.

    Returns:
        The labels (component, name) of both groups.

    Raises:
        ErasureError: there are others and `drop` is false, or there are only others.
    """
    payload = patch.weights
    labels = [(component, name) for component in payload.components for name in payload.names(component)]
    fits = [label for label in labels if _is_matrix(payload.shape(*label), label[1])]
    others = [label for label in labels if label not in set(fits)]
    if others and not drop:
        raise ErasureError(
            f"low-rank terms can change only the weights of linear layers and convolutions. {len(others)} of "
            f"{len(labels)} parameters are something else (first: {'.'.join(others[0])}); to leave them out, use "
            "drop=True (--drop)"
        )
    if not fits:
        raise ErasureError("the patch changes no weight of a linear layer or convolution, so it cannot become low-rank")
    return fits, others


def _is_matrix(shape: tuple[int, ...], name: str) -> bool:
    return len(shape) in (2, 4) and name.endswith(".weight") and not name.endswith(TABLES)


def _errors(
    before: LowRank | Delta, after: LowRank, labels: Sequence[Label], dropped: Sequence[Label]
) -> tuple[float, dict[str, float]]:
    """Return the relative error of the fp32 factors, in total and for each layer."""
    errors, lost, total = {}, 0.0, 0.0
    for label in labels:
        exact = before.change(*label).double()
        wrong = float((after.change(*label).double() - exact).square().sum())
        size = float(exact.square().sum())
        errors[".".join(label)] = math.sqrt(wrong / size) if size else 0.0
        lost, total = lost + wrong, total + size
    left = sum(float(before.change(*label).double().square().sum()) for label in dropped)
    return math.sqrt((lost + left) / (total + left)) if total + left else 0.0, errors
