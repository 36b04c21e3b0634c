"""Confidence intervals compared with scipy and with simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from erasure.evaluation.metrics.statistics import bootstrap_mean, effective_size, holm, mcnemar, wilson


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


def test_images_of_one_prompt_count_as_alike():
    alike = [True, True, False, False, True, True, False, False, True, True]
    pairs = [i // 2 for i in range(10)]
    # Both images of a prompt always agree: ten images say as much as five. By hand: share 0.6; deviations of the five
    # groups 0.8, -1.2, 0.8, -1.2, 0.8; 5/4 x 4.8 / 100 = 0.06; independent 0.24 / 9 = 0.02667; effect 2.25.
    assert effective_size(alike, pairs) == pytest.approx(10 / 2.25)
    assert effective_size(alike, list(range(10))) == 10
    # Groups that disagree within, as chance would have it or more, never count for more than their images.
    assert effective_size([True, False] * 5, pairs) == 10
    # A share of 1 has no variance; the images of a prompt then count as one.
    assert effective_size([True] * 10, pairs) == 5 and effective_size([False] * 10, [0] * 10) == 1


def test_the_interval_over_groups_covers_in_simulation():
    draw = np.random.default_rng(0)
    groups = [i // 2 for i in range(60)]
    covered, naive = [], []
    for _ in range(1000):
        marks = list(np.repeat(draw.random(30) < 0.8, 2))  # two seeds of a prompt always agree
        share, size = np.mean(marks), effective_size(marks, groups)
        low, high = wilson(share * size, size)
        covered.append(low <= 0.8 <= high)
        low, high = wilson(sum(marks), 60)
        naive.append(low <= 0.8 <= high)
    assert 0.92 < np.mean(covered) < 0.99 and np.mean(naive) < 0.9
