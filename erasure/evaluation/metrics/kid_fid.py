"""Distance between two sets of images over a judge's features: the kernel distance (KID) and the Frechet distance (FD).

KID (Binkowski et al. 2018, arXiv 1801.01401) is the unbiased squared MMD with the kernel (x.y / d + 1)^3. FD (Heusel
et al. 2017, arXiv 1706.08500) is the distance of the normal distributions of same mean and covariance. Both are mostly
taken over Inception's features, where FD is called FID; here over those of the judge or of whoever else was named, so
figures compare only over the same ones.

Neither depends on a library: tests hold them against torchmetrics' on the same features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DRAWS = 50


def kid(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared MMD of features [n, d] and [m, d]; around 0, also below it, for equal distributions."""
    d, n, m = first.shape[1], len(first), len(second)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / d + 1) ** 3

    aa, bb = kernel(first, first), kernel(second, second)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * kernel(first, second).mean())


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """|| mu - mu' ||^2 + tr(S + S' - 2 (S S')^1/2) of features [n, d] and [m, d]; in float64.

    Biased upwards: for equal distributions of n = m images it is about tr(S) (d + 5) / 2n (less where few directions
    hold most of the spread), never 0. Comparable only between sets of one size: read it against base-against-base of
    the same size (`halves`), or take KID.
    """
    # With S = A^T A and S' = B^T B the trace of the root is the sum of the singular values of A B^T: no root of a
    # matrix, and none of a negative eigenvalue. A QR decomposition gives the least A, of min(n, d) rows.
    roots = []
    for rows in (first.astype(np.float64), second.astype(np.float64)):
        roots.append(np.linalg.qr((rows - rows.mean(0)) / np.sqrt(len(rows) - 1)).R)
    gap = first.mean(0, dtype=np.float64) - second.mean(0, dtype=np.float64)
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(gap @ gap + sum((root**2).sum() for root in roots) - 2 * cross)


def enough_images(n: int, d: int) -> bool:
    """Whether halves of n images have covariances of full rank in d dimensions: each half has more images than that.

    With fewer, FD mostly says how many images there are: nearly all of the spread counts as distance.
    """
    return n // 2 > d


def half_split_distances(
    distance: Callable[[np.ndarray, np.ndarray], float], made: np.ndarray, base: np.ndarray, seed: int = 0
) -> list[float]:
    """The distance of one half of `made` [n, d] to the other half of `base` [n, d], over random halves.

    Rows of the two are pairs (same prompt, same seed). Halves are disjoint, so `made = base` gives the noise floor:
    what base against base measures.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        order = rng.permutation(len(base))
        half = len(order) // 2
        found.append(distance(made[order[:half]], base[order[half:]]))
    return found
