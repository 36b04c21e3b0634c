"""Distances between two sets of images over a network's features: kernel distance (KID) and Frechet distance (FD).

KID (Binkowski et al. 2018, arXiv 1801.01401) is the unbiased squared MMD with the kernel (x.y / d + 1)^3. FD (Heusel
et al. 2017, arXiv 1706.08500) is the distance between normal distributions with the same means and covariances. Both
are usually computed over Inception's features, where FD is called FID. Here they use the features of the judge, or of
another network if one is named; values compare only over the same features.

Both are implemented here without a library; the tests compare them with torchmetrics on the same features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DRAWS = 50  # random splits into halves
BOOTSTRAP = 2000  # resamples for the interval of `paired_kid`


def kid(first: np.ndarray, second: np.ndarray) -> float:
    """Return the unbiased squared MMD between two sets of features.

    For equal distributions the expected value is 0; an estimate may be negative.

    Args:
        first: features [n, d].
        second: features [m, d].
    """
    d, n, m = first.shape[1], len(first), len(second)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / d + 1) ** 3

    aa, bb = kernel(first, first), kernel(second, second)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * kernel(first, second).mean())


def paired_kid(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return the unbiased squared MMD between two sets of paired features, with its 95 % interval.

    Row i of both sets comes from the same prompt and seed, so that the two images of a pair are not independent.
    Pairs i = j are left out of every sum, also between the sets: the result is the mean of `kid` over all ways to
    compare one half of the first set with the other half of the second. For equal sets it is exactly 0.

    Args:
        first: features [n, d] of one run.
        second: features [n, d] of the base's images.
        seed: seed of the resampling.

    Returns:
        The distance, and the ends of the percentile bootstrap interval over images.
    """
    d, n = first.shape[1], len(first)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) @ b.T.astype(np.float64) / d + 1) ** 3

    cross = kernel(first, second)
    terms = kernel(first, first) + kernel(second, second) - cross - cross.T
    np.fill_diagonal(terms, 0.0)
    # A resample counts each image several times; two copies of one image are no pair.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP)
    sums = np.einsum("bi,ij,bj->b", counts, terms, counts, optimize=True)
    low, high = np.percentile(sums / (n**2 - (counts**2).sum(1)), [2.5, 97.5])
    value = terms.sum() / (n * (n - 1))
    return float(value), min(float(low), value), max(float(high), value)


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Frechet distance || mu - mu' ||^2 + tr(S + S' - 2 (S S')^1/2) between two sets of features.

    The estimate is biased upwards: for equal distributions and n = m images it is about tr(S) (d + 5) / 2n (less if
    few directions hold most of the variance), never 0. Compare it only between sets of the same size, with the base
    against itself as the noise floor (`half_split_distances`), or use KID instead.

    Args:
        first: features [n, d].
        second: features [m, d].

    Returns:
        The distance, computed in float64.
    """
    # With S = A^T A and S' = B^T B, the trace of the root is the sum of the singular values of A B^T. This avoids the
    # root of a matrix and its negative eigenvalues. A QR decomposition gives the smallest A, with min(n, d) rows.
    roots = []
    for features in (first.astype(np.float64), second.astype(np.float64)):
        roots.append(np.linalg.qr((features - features.mean(0)) / np.sqrt(len(features) - 1)).R)
    gap = first.mean(0, dtype=np.float64) - second.mean(0, dtype=np.float64)
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(gap @ gap + sum((root**2).sum() for root in roots) - 2 * cross)


def enough_images(n: int, d: int) -> bool:
    """Return whether half of n images are enough for a covariance of full rank in d dimensions.

    With fewer images FD mostly reflects their number, because nearly all of the variance counts as distance.

    Args:
        n: number of images.
        d: number of features.
    """
    return n // 2 > d


def half_split_distances(
    distance: Callable[[np.ndarray, np.ndarray], float], features: np.ndarray, base: np.ndarray, seed: int = 0
) -> list[float]:
    """Return the distances between one half of `features` and the other half of `base`, over random splits.

    Rows of the two sets are pairs (same prompt, same seed). The halves are disjoint, so that `features = base` gives
    the noise floor, the distance that the base has from itself.

    Args:
        distance: `kid` or `frechet`.
        features: features [n, d] of one run.
        base: features [n, d] of the base's images.
        seed: seed of the splits.

    Returns:
        One distance for each of DRAWS splits.
    """
    rng, distances = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        order = rng.permutation(len(base))
        half = len(order) // 2
        distances.append(distance(features[order[:half]], base[order[half:]]))
    return distances
