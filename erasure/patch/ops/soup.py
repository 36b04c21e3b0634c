"""Diffusion Soup: an average of patches, from which each can be taken out again (Biggs et al. 2024, arXiv 2406.08431).

Each of N contributors trains a patch D_k on their own data, all from the same base and in the same layers. The model in
use has the average, and without the k-th contributor it has what it would have had if they had never taken part:

    D = (D_1 + .. + D_N) / N        D' = (N D - D_k) / (N - 1)

Both are exact up to rounding. Factors of low rank are put next to each other, so there the factors of the k-th
contributor are taken out as they were put in. What the base knew before stays: it is nobody's contribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from erasure.errors import ErasureError
from erasure.patch.ops.arithmetic import merge
from erasure.patch.ops.provenance import history, say
from erasure.patch.patch import Patch
from erasure.patch.payload import Delta, Layer, LowRank

AVERAGE = "average"


def average(patches: Sequence[Patch], *, base: Any = None, force: bool = False, drop_gate: bool = False) -> Patch:
    """Return the average of patches, whose header lists them, so that `remove` can take each of them out again.

    Args:
        patches: at least two different patches of one kind, which change the same parameters.
        base: as for `merge`.
        force: as for `merge`.
        drop_gate: as for `merge`.

    Raises:
        ErasureError: there are fewer than two, one occurs twice, they change different parameters or are of different
            kinds, or `merge` refuses them.
    """
    patches = list(patches)
    if len(patches) < 2:
        raise ErasureError("an average needs at least two patches")
    first = patches[0]
    for i, patch in enumerate(patches):
        if any(patch.payload.digest == other.payload.digest for other in patches[:i]):
            raise ErasureError(
                f"{say(patch)} occurs twice: an average has one patch for each contributor; give each of them once"
            )
        if _names(patch) != _names(first) or patch.weights.kind != first.weights.kind:
            raise ErasureError(
                f"{say(patch)} ({patch.payload.kind}) changes other parameters than {say(first)} "
                f"({first.payload.kind}): only patches of one kind that change the same parameters can be averaged"
            )
    parts = [(patch, 1 / len(patches)) for patch in patches]
    merged = merge(parts, base=base, force=force, drop_gate=drop_gate)
    return dataclasses.replace(merged, method=AVERAGE, config=history(AVERAGE, parts))


def remove(soup: Patch, patch: Patch, *, force: bool = False) -> Patch:
    """Return an average without one of its patches: the average of the others.

    Args:
        soup: what `average` or `remove` has returned.
        patch: one of the patches that it is the average of.
        force: also take out of an average that was stored in half precision, whose rounding then stays.

    Raises:
        ErasureError: the first is no average or the second is not in it, only one is left, or the average was stored
            in half precision.
    """
    parents = _parents(soup)
    if patch.payload.digest not in [parent["digest"] for parent in parents]:
        named = ", ".join(f"{'+'.join(parent['concepts'])!r} ({parent['method']})" for parent in parents)
        raise ErasureError(f"{say(patch)} is not in the average, which has {named}; nothing was written")
    if len(parents) < 2:
        raise ErasureError(f"{say(patch)} is all that is left in the average: use the base without a patch instead")
    if soup.stored.get("dtype", "fp32") != "fp32" and not force:
        raise ErasureError(
            f"the average is stored in {soup.stored['dtype']}, so what is left of it would keep rounding errors of "
            f"{say(patch)}. Keep averages in fp32, or accept the error with force=True (--force)"
        )
    rest = [parent for parent in parents if parent["digest"] != patch.payload.digest]
    names = {name for parent in rest for name in parent["concepts"]}
    return dataclasses.replace(
        soup,
        payload=_without(soup.weights, patch.weights, len(parents)),
        concepts=tuple(concept for concept in soup.concepts if concept.get("name") in names),
        config={**soup.config, "parents": [{**parent, "weight": 1 / len(rest)} for parent in rest]},
        curves=None,
        results=None,
        stored={},
    )


def _parents(soup: Patch) -> list[Mapping[str, Any]]:
    """Return what an average was made of.

    Raises:
        ErasureError: the patch is no average.
    """
    parents = soup.config.get("parents")
    if soup.config.get("operation") != AVERAGE or not isinstance(parents, list):
        raise ErasureError(
            f"{say(soup)} is not an average of patches (erasure patch average), so no patch can be taken out of it; "
            "`erasure patch subtract` takes any change out of another"
        )
    return parents


def _without(whole: LowRank | Delta, part: LowRank | Delta, count: int) -> LowRank | Delta:
    """Return (N whole - part) / (N - 1)."""
    if isinstance(whole, LowRank) and isinstance(part, LowRank):
        return LowRank(
            {
                component: {
                    path: _cut(f"{component}.{path}", layer, part.layers[component][path], count)
                    for path, layer in layers.items()
                }
                for component, layers in whole.layers.items()
            }
        )
    return Delta(
        {
            component: {
                name: (count * whole.change(component, name).double() - part.change(component, name).double()).float()
                / (count - 1)
                for name in whole.names(component)
            }
            for component in whole.components
        }
    )


def _cut(label: str, whole: Layer, part: Layer, count: int) -> Layer:
    """Return a layer's factors without those of one patch, which stand next to the others', scaled to the new mean."""
    (downs, ups, alpha), (down, up, own) = whole, part
    rank, put = down.shape[0], alpha / downs.shape[0] * count
    starts = [i for i in range(downs.shape[0] - rank + 1) if torch.equal(downs[i : i + rank], down)]
    # Patches that are multiples of one another have `down` in common.
    change = up.double() * own / rank
    apart = {i: float((ups[:, i : i + rank].double() * put - change).abs().max()) for i in starts}
    starts = [i for i in starts if apart[i] <= 1e-5 * float(change.abs().max())]
    if len(starts) != 1:
        raise ErasureError(f"{label}: the factors of the patch are not in the average as they were put in")
    rows = [i for i in range(downs.shape[0]) if not starts[0] <= i < starts[0] + rank]
    return downs[rows], ups[:, rows] * (put / (count - 1)), float(len(rows))


def _names(patch: Patch) -> dict[str, list[str]]:
    """Return the names of the parameters that a patch changes, by component."""
    return {component: patch.weights.names(component) for component in patch.components}
