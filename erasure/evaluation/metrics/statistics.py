"""Intervals for shares and means, and paired tests."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

Z95 = 1.959963984540054


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927). With n = 0 nothing is known: (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: Sequence[float], draws: int = 2000, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """95 % percentile interval of a mean (Efron 1979), from a fixed seed; of pairs' differences: the paired bootstrap.

    Args:
        groups: of each value, such as its prompt: whole groups are drawn, for values of one group are not independent
            (cluster bootstrap; Davison & Hinkley 1997, section 3.8). A single group says nothing about others: then
            values are drawn.
    """
    if not len(values):
        return math.nan, math.nan
    data = np.asarray(values, dtype=np.float64)
    sums: np.ndarray = data
    sizes: np.ndarray = np.ones(len(data))
    if groups is not None and len(set(groups)) > 1:
        place = {group: at for at, group in enumerate(dict.fromkeys(groups))}
        where = np.array([place[group] for group in groups])
        sums, sizes = np.bincount(where, data), np.bincount(where)
    picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    low, high = np.percentile(sums[picks].sum(1) / sizes[picks].sum(1), [2.5, 97.5])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two paired shares are equal, from the discordant pairs (McNemar 1947)."""
    n = only_first + only_second
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)
