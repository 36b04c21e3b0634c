"""Confidence intervals for shares and means, a test for paired shares, and a correction for several tests."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
ALPHA = 0.05  # a difference is significant if its corrected p-value is below this


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927).

    Args:
        hits: number of successes.
        n: number of trials, or the effective number of images in groups (`effective_size`).

    Returns:
        The lower and the upper end, in [0, 1]; (0, 1) for n = 0, where nothing is known.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def effective_size(marks: Sequence[bool], groups: Sequence[Hashable]) -> float:
    """Return the number of independent images that say as much about a share as these images in groups.

    Images of one prompt that differ only in the seed are alike. The effective size is the number of images divided by
    the design effect, the variance of the share over groups relative to that of independent images (Kish 1965,
    section 5.4). A share of 0 or 1 has no variance, so there the images of a group count as one.

    Args:
        marks: one mark for each image.
        groups: the group of each image, such as its prompt.

    Returns:
        A number between 1 and the number of images; 0 without images.
    """
    n = len(marks)
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    count = len(index)
    if count == n:
        return float(n)
    share = sum(marks) / n
    if count == 1 or share in (0.0, 1.0):
        return float(count)
    members = np.array([index[group] for group in groups])
    deviations = np.bincount(members, np.asarray(marks, dtype=np.float64) - share)
    over_groups = count / (count - 1) * float(deviations @ deviations) / n**2
    independent = share * (1 - share) / (n - 1)
    return n / max(1.0, over_groups / independent)


def bootstrap_mean(
    values: Sequence[float], draws: int = 2000, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean (Efron 1979).

    For differences of pairs this is the paired bootstrap.

    Args:
        values: the values.
        draws: number of resamples.
        seed: seed of the resampling.
        groups: the group of each value, such as its prompt. Whole groups are resampled, because values of one group
            are not independent (cluster bootstrap; Davison and Hinkley 1997, section 3.8). With a single group, which
            says nothing about other groups, single values are resampled.

    Returns:
        The lower and the upper end; NaN without values.
    """
    if not len(values):
        return math.nan, math.nan
    data = np.asarray(values, dtype=np.float64)
    sums: np.ndarray = data
    sizes: np.ndarray = np.ones(len(data))
    if groups is not None and len(set(groups)) > 1:
        index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        members = np.array([index[group] for group in groups])
        sums, sizes = np.bincount(members, data), np.bincount(members)
    picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    low, high = np.percentile(sums[picks].sum(1) / sizes[picks].sum(1), [2.5, 97.5])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) that two paired shares are equal.

    Args:
        only_first: pairs of which only the first member is a success.
        only_second: pairs of which only the second member is a success.
    """
    n = only_first + only_second
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for the number of tests, by the step-down procedure of Holm (1979).

    Args:
        p_values: one p-value for each test.

    Returns:
        The corrected p-values in the same order; each is at least the original and at most 1.

    >>> holm([0.01, 0.5, 0.02])
    [0.03, 0.5, 0.04]
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
