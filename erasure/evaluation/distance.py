"""Distance between two sets of images: the kernel distance (KID) over a judge's features.

KID (Binkowski et al. 2018, arXiv 1801.01401) is the unbiased squared MMD with the kernel (x.y / d + 1)^3. It is
mostly taken over Inception features; here over those that the judge has, so figures compare only within one judge.
"""

from __future__ import annotations

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


def split_kid(made: np.ndarray, base: np.ndarray, seed: int = 0) -> list[float]:
    """KID of one half of `made` [n, d] to the other half of `base` [n, d], over random halves.

    Rows of the two are pairs (same prompt, same seed). Halves are disjoint, so `made = base` gives the noise floor:
    what base against base measures.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        order = rng.permutation(len(base))
        half = len(order) // 2
        found.append(kid(made[order[:half]], base[order[half:]]))
    return found
