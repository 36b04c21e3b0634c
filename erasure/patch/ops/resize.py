"""Resize patches: find the best change of a given rank in each layer, and its loss of accuracy.

With W = U S V' the change of a layer as a matrix [out, in], the nearest of rank r in the least-squares sense keeps the
r largest singular values (Eckart and Young 1936). U comes from the eigenvectors of the smaller Gram matrix in float64,
and the other factor as U' W, so that what is kept is a projection of W and full rank is exact. A convolution's
[out, in, h, w] is taken as [out, in h w].
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

# Look-up tables, which low-rank terms cannot act on.
TABLES = ("token_embedding.weight", "position_embedding.weight", "class_embedding.weight")


Label = tuple[str, str]  # component, parameter name


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of one layer's change.

    Args:
        outer: orthonormal columns [out, k] in front of `core`, or None where `core` is the change itself.
        core: the change, or its small core, as a matrix [a, b].
        basis: orthonormal columns for the smaller side of `core`, with the largest singular value first.
        values: singular values in falling order, as many as the smaller side has.
    """

    outer: Tensor | None
    core: Tensor
    basis: Tensor
    values: Tensor

    @classmethod
    def of(cls, payload: LowRank | Delta, component: str, name: str) -> Spectrum:
        """Decompose the change of one layer in float64; low-rank factors by way of their small core."""
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
        """Return the smallest rank that keeps this share of the squared singular values."""
        kept = self.values.square().cumsum(0)
        found = torch.searchsorted(kept, energy * kept[-1])
        return min(int(found) + 1, len(kept)) if kept[-1] else 1

    def lost(self, rank: int) -> float:
        """Return the squared norm of what a rank leaves out."""
        return float(self.values[rank:].square().sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return down [rank, in h w] and up [out, rank], balanced so that both are of similar size."""
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
    """Return the patch with at most `rank` in each layer, or with the rank that keeps `energy` of its squared change.

    The relative error |resized - patch| / |patch| of each layer and of all together is stored in the header's config.

    Args:
        patch: a low-rank patch or one of differences; the result is low-rank and has the same gate.
        rank: the new rank, at most the highest that a layer has; layers of a smaller rank keep it.
        energy: share of each layer's squared norm to keep, above 0 and at most 1.
        drop: leave out what low-rank terms cannot change (biases, norms, embeddings); it counts as error.
        base, force: as for `merge`; the base is read only where something was left out.

    Raises:
        ErasureError: both or neither of rank and energy, one out of range, or parameters that are not matrices.
    """
    if (rank is None) == (energy is None):
        raise ErasureError("give either rank or energy")
    if energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1):
        raise ErasureError(f"energy is a share above 0 and at most 1, not {energy!r}")
    labels, dropped = matrices(patch, drop)
    if rank is not None:
        check_rank(rank, max(full_rank(patch.payload, *label) for label in labels))
    layers: dict[str, dict[str, Layer]] = {}
    for component, name in labels:
        spectrum = Spectrum.of(patch.payload, component, name)
        chosen = spectrum.rank(energy or 1.0) if rank is None else min(rank, len(spectrum.values))
        down, up = spectrum.factors(chosen)
        shape = patch.payload.shape(component, name)
        pair = down.reshape(chosen, *shape[1:]), up.reshape(shape[0], chosen, *(1 for _ in shape[2:]))
        layers.setdefault(component, {})[name.removesuffix(".weight")] = (*pair, float(chosen))
    made = LowRank(layers)
    total, errors = _errors(patch.payload, made, labels, dropped)
    details: dict[str, Any] = {"energy": energy} if rank is None else {"rank": rank}
    if dropped:
        details["dropped"] = [".".join(label) for label in dropped]
    return dataclasses.replace(
        patch,
        payload=made,
        config=history("resize", [(patch, 1.0)], **details, error=total, errors=errors),
        base_fingerprint=fingerprints([patch], made, base, force),
        results=None,
        stored={},
    )


def full_rank(payload: LowRank | Delta, component: str, name: str) -> int:
    """Return the highest rank that the change of a layer can have."""
    shape = payload.shape(component, name)
    limit = min(shape[0], math.prod(shape[1:]))
    if isinstance(payload, LowRank):
        return min(limit, payload.layers[component][name.removesuffix(".weight")][0].shape[0])
    return limit


def check_rank(rank: Any, limit: int) -> None:
    """Raise an ErasureError unless `rank` is a whole number from 1 to `limit`."""
    if type(rank) is not int or not 1 <= rank <= limit:
        raise ErasureError(f"rank is a whole number from 1 to {limit}, the full rank of the patch, not {rank!r}")


def matrices(patch: Patch, drop: bool) -> tuple[list[Label], list[Label]]:
    """Split the parameters into those that low-rank terms can change and the others.

    Raises:
        ErasureError: there are others and `drop` is off, or there are only others.
    """
    payload = patch.payload
    labels = [(component, name) for component in payload.components for name in payload.names(component)]
    fits = [label for label in labels if _is_matrix(payload.shape(*label), label[1])]
    rest = [label for label in labels if label not in set(fits)]
    if rest and not drop:
        raise ErasureError(
            f"{len(rest)} of {len(labels)} parameters are no weights of linear layers or convolutions, such as "
            f"{'.'.join(rest[0])}: low-rank terms cannot change them. drop=True (--drop) leaves them out"
        )
    if not fits:
        raise ErasureError("the patch changes no weight of a linear layer or a convolution: nothing can be low-rank")
    return fits, rest


def _is_matrix(shape: tuple[int, ...], name: str) -> bool:
    return len(shape) in (2, 4) and name.endswith(".weight") and not name.endswith(TABLES)


def _errors(
    before: LowRank | Delta, after: LowRank, labels: Sequence[Label], dropped: Sequence[Label]
) -> tuple[float, dict[str, float]]:
    """Return the relative error of the fp32 factors, of all layers together and of each."""
    errors, lost, total = {}, 0.0, 0.0
    for label in labels:
        exact = before.change(*label).double()
        wrong = float((after.change(*label).double() - exact).square().sum())
        size = float(exact.square().sum())
        errors[".".join(label)] = math.sqrt(wrong / size) if size else 0.0
        lost, total = lost + wrong, total + size
    left = sum(float(before.change(*label).double().square().sum()) for label in dropped)
    return math.sqrt((lost + left) / (total + left)) if total + left else 0.0, errors
