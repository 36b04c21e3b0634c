"""Formulas compared with torchmetrics, torch-fidelity and scipy, and with cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch_fidelity import metric_fid, metric_kid
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from erasure.concepts.concept import Concept
from erasure.evaluation.generate import Record
from erasure.evaluation.metrics.accuracy import harmonic_mean
from erasure.evaluation.metrics.kid_fid import enough_images, frechet, half_split_distances, kid
from erasure.evaluation.metrics.measure import measure
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.metrics.statistics import bootstrap_mean, mcnemar, wilson
from erasure.evaluation.metrics.target import JudgedImage, Target
from erasure.evaluation.score import judge_run, paired_accuracy, paired_erasure
from erasure.evaluation.select import find_target
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.standin import BrightnessJudge

DRAW = np.random.default_rng(7)
SETS = {
    "many": (DRAW.normal(size=(60, 8)), DRAW.normal(1, 2, size=(50, 8))),
    "few": (DRAW.normal(size=(9, 20)), DRAW.normal(size=(7, 20)) ** 3),
    "flat": (np.outer(DRAW.normal(size=30), np.arange(4.0)), DRAW.normal(size=(30, 4))),  # a covariance of rank 1
}


class Features(torch.nn.Module):
    """A network for torchmetrics that returns its input as features."""

    num_features = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def test_frechet_equals_torchmetrics():
    first, second = SETS["many"]
    theirs = FrechetInceptionDistance(feature=Features())
    theirs.update(torch.from_numpy(first), real=True)
    theirs.update(torch.from_numpy(second), real=False)
    assert frechet(first, second) == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_frechet_equals_the_formula_with_scipys_root(name):
    first, second = SETS[name]
    first_covariance, second_covariance = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # The root over S^1/2 S' S^1/2, which is symmetric: scipy's root of singular S S' fails.
    values, vectors = linalg.eigh(first_covariance)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(linalg.eigvalsh(root @ second_covariance @ root).clip(0)).sum()
    expected = (
        ((first.mean(0) - second.mean(0)) ** 2).sum()
        + np.trace(first_covariance)
        + np.trace(second_covariance)
        - 2 * cross
    )
    assert frechet(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet(second, first) == pytest.approx(expected, rel=1e-6)
    assert frechet(first, first) == pytest.approx(0, abs=1e-9 * np.trace(first_covariance))


def test_frechet_by_hand():
    # One dimension: (mean gap)^2 + (sd - sd')^2.
    assert frechet(np.array([[-1.0], [1.0]]), np.array([[2.0], [8.0]])) == pytest.approx(25 + (18**0.5 - 2**0.5) ** 2)
    whole = np.array([[0, 0], [0, 2], [2, 0], [2, 2]])
    assert frechet(whole, whole + 3) == pytest.approx(18)


def test_frechet_has_the_documented_bias_and_halves_show_it():
    draw = np.random.default_rng(3)
    d, n = 12, 240
    distances = [frechet(draw.normal(size=(n, d)), draw.normal(size=(n, d))) for _ in range(20)]
    assert np.mean(distances) == pytest.approx(d * (d + 5) / (2 * n), rel=0.15)
    base = draw.normal(size=(2 * n, d))
    assert np.mean(half_split_distances(frechet, base, base)) == pytest.approx(np.mean(distances), rel=0.3)


@pytest.mark.parametrize(("n", "d", "so"), [(258, 128, True), (257, 128, False), (8, 16, False), (60, 16, True)])
def test_frechet_needs_covariances_of_full_rank(n, d, so):
    assert enough_images(n, d) is so
    half = np.random.default_rng(0).normal(size=(n // 2, d))
    assert (int(np.linalg.matrix_rank(np.cov(half, rowvar=False))) == d) is so


def test_kid_equals_torchmetrics():
    first, second = SETS["many"][0][:50], SETS["many"][1]
    theirs = poly_mmd(torch.from_numpy(first), torch.from_numpy(second))
    assert kid(first, second) == pytest.approx(float(theirs), rel=1e-9)


@pytest.mark.parametrize("name", SETS)
def test_frechet_and_kid_equal_torch_fidelity(name):
    """torch-fidelity's KID uses a single subset with all features."""
    first, second = (torch.from_numpy(features[: min(map(len, SETS[name]))]) for features in SETS[name])
    stats = [metric_fid.fid_features_to_statistics(features) for features in (first, second)]
    theirs = metric_fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    # Where covariances are singular, the root of their product leaves rounding of about 1e-8 in torch-fidelity.
    assert frechet(first.numpy(), second.numpy()) == pytest.approx(theirs, rel=1e-6 if name == "many" else 1e-5)
    options = {"kid_subsets": 1, "kid_subset_size": len(first), "kid_degree": 3, "kid_gamma": None, "kid_coef0": 1}
    metrics = metric_kid.kid_features_to_metric(first, second, rng_seed=0, verbose=False, **options)
    assert kid(first.numpy(), second.numpy()) == pytest.approx(metrics["kernel_inception_distance_mean"], rel=1e-9)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (3, 7), (50, 50), (317, 1000)])
def test_wilson_equals_scipy(hits, n):
    low, high = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1, 0), (2, 9), (17, 17), (120, 90)])
def test_mcnemar_equals_scipy(a, b):
    assert mcnemar(a, b) == pytest.approx(stats.binomtest(a, a + b, 0.5).pvalue, abs=1e-12)


def test_the_paired_bootstrap_equals_scipy():
    draw = np.random.default_rng(5)
    before = draw.normal(20, 5, 80)
    after = before - 0.5 + draw.normal(0, 1, 80)
    theirs = stats.bootstrap(
        (after - before,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_mean(after - before) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    # Pairing is what makes it narrow.
    low, high = bootstrap_mean(after - before)
    assert high - low < 0.3 * (bootstrap_mean(after)[1] - bootstrap_mean(after)[0])


def test_groups_are_resampled_as_a_whole():
    draw = np.random.default_rng(2)
    means = draw.normal(size=30)
    values, groups = np.repeat(means, 10), np.repeat(np.arange(30), 10)
    low, high = bootstrap_mean(values, groups=list(groups))
    assert (low, high) == pytest.approx(bootstrap_mean(means))
    naive = bootstrap_mean(values)
    assert high - low > 2.5 * (naive[1] - naive[0])
    assert bootstrap_mean(values, groups=["one"] * 300) == naive
    # Unequal groups weigh by their size: with 1 + 3 values, the draws are (0, 0), (0, 1), (1, 0) and (1, 1).
    assert bootstrap_mean([0.0, 1.0, 1.0, 1.0], groups=["a", "b", "b", "b"]) == (0, 1)


def rows(labels, tops, roles=None, clips=None, against=None):
    images = []
    for i, (label, top) in enumerate(zip(labels, tops, strict=True)):
        record = Record(str(i), f"prompt {i}", i, 1, 1.0, "", {"object": label, "role": (roles or [""] * 99)[i]})
        verdict = None if top is None else {"object": {top: 1.0}}
        scores = (against or {}).get(i)
        images.append(JudgedImage(record, verdict, None if clips is None else clips[i], None, scores))
    return images


def metrics_by_name(judged, base=None, target=None):
    metrics = measure(judged, target or Target("object", ("cat",), None), base or judged)
    return {metric.name: metric for metric in metrics}


def test_h_o_equals_maces_formula():
    labels = ["cat"] * 4 + ["dog"] * 5 + ["cat"] * 4
    tops = ["dog", "dog", "dog", "cat"] + ["dog"] * 4 + ["cow"] + ["cat", "dog", "dog", "dog"]
    metrics = metrics_by_name(rows(labels, tops, [""] * 9 + ["synonym"] * 4))
    erased, kept, general = 0.25, 0.8, 0.25  # Acc_e, Acc_s, Acc_g
    expected = 3 / (1 / (1 - erased) + 1 / kept + 1 / (1 - general))
    assert metrics["H_o"].value == pytest.approx(expected) == pytest.approx(stats.hmean([0.75, 0.8, 0.75]))
    assert metrics["H_o"].n == 4 and metrics["H_o"].low < expected < metrics["H_o"].high
    assert metrics["leak"].value == 0.25 and "1 - leak" in metrics["H_o"].meaning


def test_h_o_is_0_if_one_part_is_and_missing_without_synonyms():
    metrics = metrics_by_name(rows(["cat", "dog", "cat"], ["dog", "dog", "cat"], ["", "", "synonym"]))
    assert (metrics["leak"].value, metrics["H_o"].value, metrics["H_o"].low) == (
        1,
        0,
        0,
    ) and metrics["H_o"].high < 1
    assert metrics["H"].value == 1 and "H_o" not in metrics_by_name(rows(["cat", "dog"], ["dog", "dog"]))


def test_the_harmonic_mean_equals_scipy():
    values = [0.9, 0.61, 0.77]
    shares = [Metric(str(i), value, 50, 0, 1, True, "") for i, value in enumerate(values)]
    assert harmonic_mean("H", shares).value == pytest.approx(stats.hmean(values))


def test_the_interval_of_a_harmonic_mean_has_a_width_if_all_shares_are_1():
    """It narrows with more images; if one share is known, it equals Jeffreys' interval of the other (scipy)."""
    few, many = (harmonic_mean("H", [Metric(name, 1.0, n, 0, 1, True, "") for name in "ab"]) for n in (4, 400))
    assert few.low < 0.8 < many.low < few.high == many.high == 1
    known = Metric("known", 1.0, 10**9, 0, 1, True, "")
    share = harmonic_mean("H", [Metric("UA", 0.5, 40, 0, 1, True, ""), known])
    low, high = (2 / (1 / end + 1) for end in stats.beta.ppf([0.025, 0.975], 20.5, 20.5))
    assert (share.low, share.high) == pytest.approx((low, high), abs=0.01)


def test_the_clip_change_is_paired_by_seed():
    base = rows(["cat", "dog", "dog", "cow", "cow"], ["cat"] * 5, clips=[30.0, 20.0, 24.0, 28.0, 10.0])
    patched = rows(["cat", "dog", "dog", "cow", "cow"], ["cat"] * 5, clips=[1.0, 19.0, 24.5, 26.0, None])
    change = metrics_by_name(patched, base[::-1])["CLIP_change"]
    assert (change.value, change.n) == (pytest.approx((-1 + 0.5 - 2) / 3), 3)
    assert -2 <= change.low < change.value < change.high <= 0.5
    same = metrics_by_name(base)["CLIP_change"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_paired_tests_count_the_seeds_with_different_results():
    labels, roles = ["cat"] * 8 + ["dog"] * 6, [""] * 7 + ["synonym"] + [""] * 6
    base = rows(labels, ["cat"] * 6 + ["dog", "cat"] + ["dog"] * 5 + ["cow"], roles)
    # Of the cats, five go, one stays, one comes back; a synonym and a kept picture do not count. One is not judged.
    patched = rows(labels, ["dog"] * 4 + [None, "cat", "cat", "dog"] + ["dog"] * 2 + ["cat"] * 2 + [None, "dog"], roles)
    target = Target("object", ("cat",), None)
    both = {"base": base, "patched": patched[::-1]}
    assert paired_erasure(both, target) == {"only_base": 1, "only_patched": 4, "p": stats.binomtest(1, 5, 0.5).pvalue}
    assert paired_accuracy(both, target, "object") == {
        "only_base": 3,
        "only_patched": 1,
        "p": stats.binomtest(1, 4).pvalue,
    }
    assert paired_erasure({"base": base, "patched": base}, target) == {"only_base": 0, "only_patched": 0, "p": 1.0}


def test_cs_and_cer_by_hand():
    against = {0: (30.0, 10.0), 1: (10.0, 30.0), 2: (20.0, 20.0), 3: (-8.0, -9.0)}
    judged = rows(["cat"] * 5 + ["dog"], ["cat"] * 4 + [None, "dog"], against=against)
    metrics = metrics_by_name(judged)
    assert metrics["CER"].value == 2 / 5 and metrics["CER"].n == 5  # a tie is one; what could not be judged is none
    assert metrics["CS"].value == pytest.approx(2.5 * (0.3 + 0.1 + 0.2 + 0) / 4)
    assert not {"CS", "CER"} & metrics_by_name(rows(["cat", "dog"], ["cat", "dog"])).keys()


def test_target_images_are_scored_against_the_name_and_the_anchor(tmp_path):
    scored = []

    class Noted(BrightnessJudge):
        def clip_scores(self, images, texts):
            scored.append(texts)
            return [float(len(text)) for text in texts]

    from PIL import Image

    (tmp_path / "images").mkdir()
    records = [Record(name, f"a {name}", 0, 1, 1.0, "", {"object": name, "style": "flat"}) for name in ("cat", "dog")]
    for record in records:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{record.id}.png")
    sets = PromptSet("two", [Prompt(r.id, r.prompt, 0, None, dict(r.labels)) for r in records])
    target = find_target(Concept("cat", anchor="animal"), sets, Noted())
    cat, dog = judge_run(Noted(), tmp_path, records, target, [])
    assert scored == [["a cat", "cat", "animal", "a dog"]]  # one batch
    assert (cat.clip, cat.name_scores, dog.name_scores) == (5.0, (3.0, 6.0), None)
    assert find_target("flat", sets, Noted()).name_texts(records[0]) == ("flat style", "")


def test_the_frechet_distance_needs_enough_images():
    draw = np.random.default_rng(1)
    labels = ["cat"] + ["dog"] * 40

    def with_features(features):
        return [JudgedImage(j.record, j.verdict, None, f) for j, f in zip(rows(labels, labels), features, strict=True)]

    for d, measured in ((4, True), (19, True), (20, False)):
        plain = draw.normal(size=(41, d))
        base, patched = with_features(plain), with_features(plain + 1)
        floor, far = metrics_by_name(base), metrics_by_name(patched, base)
        assert ("FD" in far) is measured and far["KID"].n == 40
        if measured:
            assert far["FD"].value > floor["FD"].value + 0.8 * d and floor["FD"].low <= floor["FD"].value
            assert far["FD"].value == np.mean(half_split_distances(frechet, plain[1:] + 1, plain[1:]))
