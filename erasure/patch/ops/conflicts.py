"""Conflicts between patches, found by comparing their changes of the same weights without drawing images.

For two patches and one component, let A and B be their changes of the parameters that both change:

    cosine = <A, B> / (|A| |B|)        share of A = |A|^2 over these / |A|^2 over the whole component

With a cosine near 0 the patches act independently. With a clearly positive cosine they change the weights in the same
direction, and loaded together they act more strongly than each by itself. With a clearly negative cosine each undoes a
part of the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from erasure.errors import ErasureError
from erasure.patch.patch import Patch
from erasure.patch.payload import RUNTIME, Delta, LowRank

# Among 18 patches of the benchmark on glyph, cosines between different concepts are at most 0.16 in size, and those
# between methods for the same concept reach 0.28.
NOTABLE = 0.2
_SQUARES: weakref.WeakKeyDictionary[LowRank | Delta, dict[str, dict[str, float]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Overlap:
    """The overlap of two patches in one component.

    Args:
        a: the name of the first patch.
        b: the name of the second patch.
        component: the component that both change.
        layers: the number of parameters that both change.
        cosine: the cosine of their changes of these parameters, -1 to 1; 0 if one of the changes is zero.
        share_a: the share of the first patch's squared change in the component that is in these parameters, 0 to 1.
        share_b: the same share for the second patch.
        layer: the parameter that contributes most to the cosine.
    """

    a: str
    b: str
    component: str
    layers: int
    cosine: float
    share_a: float
    share_b: float
    layer: str

    @property
    def notable(self) -> bool:
        """Tell whether the cosine differs from zero by at least NOTABLE."""
        return abs(self.cosine) >= NOTABLE

    def to_json(self) -> dict[str, Any]:
        """Return the fields and `notable` as plain data."""
        return {**dataclasses.asdict(self), "notable": self.notable}

    def text(self) -> str:
        """Describe the overlap in one sentence."""
        effect = "they add up" if self.cosine > 0 else "each undoes a part of the other"
        verdict = f"; {effect}, most in {self.layer}" if self.notable else ""
        return (
            f"{self.a} and {self.b} both change {self.layers} parameters of the {self.component} "
            f"({self.share_a:.0%} and {self.share_b:.0%} of their changes), cosine {self.cosine:+.2f}{verdict}"
        )


def conflicts(patches: Mapping[str, Patch] | Sequence[Patch]) -> list[Overlap]:
    """Compare every pair of patches that change the same weights.

    Gates and strengths are ignored: the changes are compared at full strength.

    Args:
        patches: patches by name, or a list of patches, which are then named after their concepts.

    Returns:
        One overlap for each pair and each component that both change, with the largest cosine in size first.

    Raises:
        ErasureError: there are fewer than two patches, or they are for different architectures.
    """
    named = dict(patches) if isinstance(patches, Mapping) else _named(patches)
    if len(named) < 2:
        raise ErasureError("give at least two patches to compare")
    rows = []
    weighty = {name: patch for name, patch in named.items() if patch.payload.kind not in RUNTIME}
    for one, other in itertools.combinations(weighty.items(), 2):
        for component in one[1].components:
            if component in other[1].components:
                rows += _overlap(component, one, other)
    return sorted(rows, key=lambda row: -abs(row.cosine))


def _named(patches: Iterable[Patch]) -> dict[str, Patch]:
    named: dict[str, Patch] = {}
    for patch in patches:
        stem = "+".join(patch.names)
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        named[next(name for name in candidates if name not in named)] = patch
    return named


def _squares(payload: LowRank | Delta, component: str) -> dict[str, float]:
    """Return the squared norm of the change of each parameter, computed once because payloads are immutable."""
    known = _SQUARES.setdefault(payload, {})
    if component not in known:
        known[component] = {name: _inner(payload, payload, component, name) for name in payload.names(component)}
    return known[component]


def _overlap(component: str, one: tuple[str, Patch], other: tuple[str, Patch]) -> list[Overlap]:
    (a, first), (b, second) = one, other
    size_a, size_b = (_squares(patch.weights, component) for patch in (first, second))
    shared = sorted(size_a.keys() & size_b.keys())
    if not shared:
        return []
    products = {name: _inner(first.weights, second.weights, component, name) for name in shared}
    here_a, here_b = (sum(size[name] for name in shared) for size in (size_a, size_b))
    whole_a, whole_b = sum(size_a.values()), sum(size_b.values())
    norm = math.sqrt(here_a * here_b)
    return [
        Overlap(
            a,
            b,
            component,
            len(shared),
            max(-1.0, min(1.0, sum(products.values()) / norm)) if norm else 0.0,
            here_a / whole_a if whole_a else 0.0,
            here_b / whole_b if whole_b else 0.0,
            max(shared, key=lambda name: abs(products[name])),
        )
    ]


def _inner(one: LowRank | Delta, other: LowRank | Delta, component: str, name: str) -> float:
    """Return the inner product of two changes in float64; low-rank changes are not made dense."""
    if one.shape(component, name) != other.shape(component, name):
        shapes = f"{list(one.shape(component, name))} and {list(other.shape(component, name))}"
        raise ErasureError(f"{component}.{name} has the shapes {shapes}: the patches are for different architectures")
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        path = name.removesuffix(".weight")
        (down, up, alpha), (below, above, beta) = one.layers[component][path], other.layers[component][path]
        ups = up.flatten(1).double().T @ above.flatten(1).double()
        downs = down.flatten(1).double() @ below.flatten(1).double().T
        return float((ups * downs).sum()) * (alpha / down.shape[0]) * (beta / below.shape[0])
    pair = (payload.change(component, name).double().flatten() for payload in (one, other))
    return float(torch.dot(*pair))
