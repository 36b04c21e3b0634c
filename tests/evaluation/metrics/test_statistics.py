"""Confidence intervals compared with scipy and with simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from erasure.evaluation.metrics.statistics import bootstrap_mean, holm, mcnemar, wilson


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (33, 240), (239, 240)])
def test_wilson_equals_scipy(hits, n):
    reference = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_wilson_without_trials_is_the_whole_range():
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_in_simulation():
    draw = np.random.default_rng(0)
    covered = [low <= 0.9 <= high for low, high in (wilson(int(k), 60) for k in draw.binomial(60, 0.9, 2000))]
    assert 0.92 < np.mean(covered) < 0.99


@pytest.mark.parametrize(("a", "b"), [(0, 0), (3, 3), (0, 6), (10, 2), (40, 25)])
def test_mcnemar_is_the_exact_binomial_test(a, b):
    assert mcnemar(a, b) == pytest.approx(stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0, abs=1e-12)


def test_the_bootstrap_is_close_to_the_normal_interval_and_repeatable():
    values = list(np.random.default_rng(1).normal(10, 2, 400))
    low, high = bootstrap_mean(values)
    half = 1.96 * np.std(values) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.06)
    assert high == pytest.approx(np.mean(values) + half, abs=0.06)
    assert (low, high) == bootstrap_mean(values)


def test_holm_steps_down_from_the_smallest():
    # Worked by hand: 4 x 0.01, 3 x 0.02, 2 x 0.03 (raised to the one before it), and 0.9.
    assert holm([0.9, 0.02, 0.01, 0.03]) == pytest.approx([0.9, 0.06, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([0.03]) == [0.03]
