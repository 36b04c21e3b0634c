"""One warning when patches are loaded that overlap with others, however many do."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

from erasure.patch.ops.conflicts import NOTABLE, conflicts
from erasure.patch.patch import Patch
from erasure.patch.payload import RUNTIME, LowRank, stack_layers

# Each new patch is compared with so many loaded before it, so that the time for n patches grows like n.
RECENT = 100
LOG = logging.getLogger("erasure")
Pair = tuple[float, str, str, str]  # cosine, earlier patch, later patch, component


def warn_of_overlap(new: Mapping[str, Patch], loaded: Mapping[str, Patch]) -> list[Pair]:
    """Log one warning if new patches overlap notably with each other or with loaded ones.

    Guards and features change no weight, so they overlap with nothing. Loading patches that overlap is allowed and may
    be intended, so no error is raised. Each new patch is compared with the RECENT patches before it. The logger is
    `erasure`.

    Args:
        new: the new patches by name, in order of loading.
        loaded: the patches that are already loaded, by name.

    Returns:
        The notable overlaps as (cosine, earlier patch, later patch, component), the largest cosine in size first.
    """
    new, loaded = (
        {name: patch for name, patch in patches.items() if patch.payload.kind not in RUNTIME}
        for patches in (new, loaded)
    )
    everything = {**dict(list(loaded.items())[-RECENT:]), **new}
    pairs = sorted(_pairs(everything, len(everything) - len(new)), key=lambda pair: -abs(pair[0]))
    if not pairs:
        return []
    _, a, b, component = pairs[0]
    overlaps = conflicts({a: everything[a], b: everything[b]})
    text = next(row for row in overlaps if row.component == component).text()
    if len(pairs) > 1:
        patches = len({name for _, *names, _ in pairs for name in names})
        text = f"{len(pairs)} pairs among {patches} patches overlap notably. The nearest: {text}"
    LOG.warning("%s. To choose strengths, see `erasure patch conflicts` and `erasure patch merge`", text)
    return pairs


def _pairs(patches: Mapping[str, Patch], first: int) -> list[Pair]:
    """Return the notable overlaps of each patch from number `first` on with the RECENT patches before it."""
    names, found = list(patches), []
    for start in range(first, len(names), RECENT):
        begin, end = max(0, start - RECENT), min(start + RECENT, len(names))
        block = [patches[name] for name in names[begin:end]]
        later, earlier = torch.arange(start, end)[:, None], torch.arange(begin, end)
        compared = (earlier < later) & (later - earlier <= RECENT)
        for component in sorted({component for patch in block for component in patch.components}):
            cosines = _cosines(block, start - begin, component).masked_fill(~compared, 0.0)
            notable = cosines.abs() >= NOTABLE
            places = zip(*notable.nonzero(as_tuple=True), cosines[notable], strict=True)
            found += [(float(value), names[begin + b], names[start + a], component) for a, b, value in places]
    return found


def _cosines(patches: list[Patch], first: int, component: str) -> Tensor:
    """Return the cosines [n - first, n] of the patches from number `first` on with all n patches.

    The cosine is that of the changes of the parameters that both change. Those of low-rank changes come from one
    product of stacked factors a layer; others are compared pair by pair.
    """
    n = len(patches)
    products, own, others = (torch.zeros(n - first, n, dtype=torch.float64) for _ in range(3))
    holders: dict[str, list[int]] = {}
    for number, patch in enumerate(patches):
        if isinstance(patch.payload, LowRank):
            for path in patch.payload.layers.get(component, {}):
                holders.setdefault(path, []).append(number)
    for path, numbers in holders.items():
        before = bisect_left(numbers, first)
        if before == len(numbers):
            continue
        inner, squares = _inner([patches[number] for number in numbers], before, component, path)
        places = (torch.tensor(numbers[before:])[:, None] - first, torch.tensor(numbers))
        products[places] += inner
        own[places] += squares[before:, None]
        others[places] += squares
    norms = (own * others).sqrt()
    cosines = torch.where(norms > 0, products / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    for one, patch in enumerate(patches[first:], first):
        for other, earlier in enumerate(patches[:one]):
            if not (isinstance(patch.payload, LowRank) and isinstance(earlier.payload, LowRank)):
                rows = [row for row in conflicts([earlier, patch]) if row.component == component]
                cosines[one - first, other] = rows[0].cosine if rows else 0.0
    return cosines


def _inner(patches: list[Patch], first: int, component: str, path: str) -> tuple[Tensor, Tensor]:
    """Return the inner products of low-rank changes of one layer in float64.

    Returns:
        Those of the changes from number `first` on with all n [n - first, n], and the squared norms [n].
    """
    layers = [patch.payload.layers[component][path] for patch in patches if isinstance(patch.payload, LowRank)]
    ranks = [down.shape[0] for down, _, _ in layers]
    downs, ups = (factor.double() for factor in stack_layers(layers))
    downs, ups = downs.flatten(1), ups.T
    if max(ranks) == 1:
        squares = downs.square().sum(1) * ups.square().sum(1)
        return (downs[first:] @ downs.T) * (ups[first:] @ ups.T), squares
    products = (downs @ downs.T) * (ups @ ups.T)
    owners, n = torch.arange(len(layers)).repeat_interleave(torch.tensor(ranks)), len(layers)
    rows = torch.zeros(n, len(owners), dtype=products.dtype).index_add_(0, owners, products)
    inner = torch.zeros(n, n, dtype=products.dtype).index_add_(1, owners, rows)
    return inner[first:], inner.diagonal()
