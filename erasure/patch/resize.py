"""Smaller patches: the best change of a given rank in each layer, and what that costs in accuracy.

With W = U S V' the change of a layer as a matrix [out, in], the nearest of rank r in the least-squares sense keeps the
r largest singular values (Eckart and Young 1936). U comes from the eigenvectors of the smaller Gram matrix in float64,
and the other factor as U' W, so that what is kept is a projection of W and full rank is exact. A convolution's
[out, in, h, w] is taken as [out, in h w].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError, unknown
from erasure.patch.encode import DTYPES
from erasure.patch.lineage import fingerprints, history
from erasure.patch.patch import Patch
from erasure.patch.payload import Delta, Layer, LowRank

# Look-up tables, which low-rank terms cannot act on.
TABLES = ("token_embedding.weight", "position_embedding.weight", "class_embedding.weight")


Label = tuple[str, str]  # component, parameter name


@dataclass(frozen=True)
class Spectrum:
    """One layer's change, taken apart.

    Args:
        outer: [out, k] orthonormal columns in front of `core`, or None where `core` is the change itself.
        core: [a, b].
        basis: orthonormal columns of the smaller side of `core`, largest singular value first.
        values: singular values, falling, of the length of the smaller side.
    """

    outer: Tensor | None
    core: Tensor
    basis: Tensor
    values: Tensor

    @classmethod
    def of(cls, payload: LowRank | Delta, component: str, name: str) -> Spectrum:
        """Of one layer, in float64; of low-rank factors, by their small core."""
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
        """The smallest rank that keeps this share of the squared singular values."""
        kept = self.values.square().cumsum(0)
        found = torch.searchsorted(kept, energy * kept[-1])
        return min(int(found) + 1, len(kept)) if kept[-1] else 1

    def lost(self, rank: int) -> float:
        """Squared norm of what a rank leaves out."""
        return float(self.values[rank:].square().sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """down [rank, in h w] and up [out, rank], of like size row by column."""
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
    """The patch with at most `rank` in each layer, or with the rank that keeps `energy` of its squared change.

    The relative error |resized - patch| / |patch| of each layer and of all together goes into the header's config.

    Args:
        patch: low-rank or differences; the result is low-rank, behind the same gate.
        rank: the new rank, at most the highest that a layer has; smaller layers keep all of theirs.
        energy: share of each layer's squared norm to keep, above 0, at most 1.
        drop: leave out what low-rank terms cannot change (biases, norms, embeddings); it counts as error.
        base, force: as for `merge`; the base is read only where something was left out.

    Raises:
        ErasureError: both or neither of rank and energy, one out of range, or parameters that are no matrices.
    """
    if (rank is None) == (energy is None):
        raise ErasureError("give either rank or energy")
    if energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1):
        raise ErasureError(f"energy is a share above 0 and at most 1, not {energy!r}")
    labels, dropped = _matrices(patch, drop)
    if rank is not None:
        _check_rank(rank, max(full_rank(patch.payload, *label) for label in labels))
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
    """The highest rank that a layer's change can have."""
    shape = payload.shape(component, name)
    limit = min(shape[0], math.prod(shape[1:]))
    if isinstance(payload, LowRank):
        return min(limit, payload.layers[component][name.removesuffix(".weight")][0].shape[0])
    return limit


def _check_rank(rank: Any, limit: int) -> None:
    if type(rank) is not int or not 1 <= rank <= limit:
        raise ErasureError(f"rank is a whole number from 1 to {limit}, the full rank of the patch, not {rank!r}")


def _matrices(patch: Patch, drop: bool) -> tuple[list[Label], list[Label]]:
    """The parameters that low-rank terms can change, and the others.

    Raises:
        ErasureError: there are others and `drop` is off, or nothing else.
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
    """Relative error of all together, and by layer, of the fp32 factors as they are."""
    errors, lost, total = {}, 0.0, 0.0
    for label in labels:
        exact = before.change(*label).double()
        wrong = float((after.change(*label).double() - exact).square().sum())
        size = float(exact.square().sum())
        errors[".".join(label)] = math.sqrt(wrong / size) if size else 0.0
        lost, total = lost + wrong, total + size
    left = sum(float(before.change(*label).double().square().sum()) for label in dropped)
    return math.sqrt((lost + left) / (total + left)) if total + left else 0.0, errors


@dataclass(frozen=True)
class Sizes:
    """Size against accuracy.

    Args:
        now: kind and bytes of the patch as it is (of its tensors, in `dtype`).
        dtype: of the tensors whose bytes are counted.
        rows: for each rank its bytes, relative error in total, and the layer that suffers most.
    """

    now: dict[str, Any]
    dtype: str
    rows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"now": self.now, "dtype": self.dtype, "rows": self.rows}

    def text(self) -> str:
        """A table."""
        lines = [f"now: {self.now['kind']}, {self.now['bytes']:,} bytes in {self.dtype}"]
        lines.append(f"{'rank':>6} {'bytes':>14} {'of now':>7} {'error':>8}  worst layer")
        for row in self.rows:
            share = row["bytes"] / self.now["bytes"]
            worst = f"{row['worst_error']:.1%} {row['worst']}"
            lines.append(f"{row['rank']:>6} {row['bytes']:>14,} {share:>7.1%} {row['error']:>8.2%}  {worst}")
        return "\n".join(lines)


def sizes(patch: Patch, ranks: Iterable[int] | None = None, *, dtype: str = "fp32", drop: bool = False) -> Sizes:
    """What each rank would take and lose, without making the patches.

    Args:
        patch: low-rank or differences.
        ranks: which to try; None: 1, 2, 4 .. up to the full rank.
        dtype: of the tensors whose bytes are counted.
        drop: as in `resize`.

    Raises:
        ErasureError: a rank out of range, an unknown dtype, parameters that are no matrices.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    payload = patch.payload
    labels, dropped = _matrices(patch, drop)
    limit = max(full_rank(payload, *label) for label in labels)
    wanted = sorted({2**n for n in range(limit.bit_length())} | {limit}) if ranks is None else sorted(set(ranks))
    for rank in wanted:
        _check_rank(rank, limit)
    width = DTYPES[dtype].itemsize
    lost = {rank: dict[str, float]() for rank in wanted}
    room, size = dict.fromkeys(wanted, 0), dict[str, float]()
    for label in labels:
        spectrum, shape = Spectrum.of(payload, *label), payload.shape(*label)
        size[".".join(label)] = float(spectrum.values.square().sum())
        for rank in wanted:
            lost[rank][".".join(label)] = spectrum.lost(rank)
            room[rank] += min(rank, len(spectrum.values)) * (shape[0] + math.prod(shape[1:])) * width
    left = sum(float(payload.change(*label).double().square().sum()) for label in dropped)
    total = sum(size.values()) + left
    rows = []
    for rank in wanted:
        shares = {name: math.sqrt(lost[rank][name] / size[name]) if size[name] else 0.0 for name in size}
        worst = max(shares, key=lambda name: shares[name])
        error = math.sqrt((sum(lost[rank].values()) + left) / total) if total else 0.0
        rows.append({"rank": rank, "bytes": room[rank], "error": error, "worst": worst, "worst_error": shares[worst]})
    now = {"kind": payload.kind, "bytes": sum(tensor.numel() for tensor in payload.tensors()) * width}
    return Sizes(now, dtype, rows)
