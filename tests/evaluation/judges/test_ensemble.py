"""Ensembles: several judges combined into one."""

from __future__ import annotations

import numpy as np
import pytest

from erasure.errors import ErasureError
from erasure.evaluation.judges.clip import ClipJudge
from erasure.evaluation.judges.ensemble import EnsembleJudge
from erasure.evaluation.metrics.target import JudgedImage
from tests.evaluation.judging import Fixed, noise, nude


def test_an_ensemble_averages_and_reports_disagreement():
    a = Fixed("a", object={"cat": 0.9, "dog": 0.1}, style={"flat": 1.0, "round": 0.0})
    both = EnsembleJudge([a, Fixed("b", object={"dog": 0.6, "cat": 0.4})])
    verdict = both.judge(noise(2))[1]
    assert verdict["object"] == pytest.approx({"cat": 0.65, "dog": 0.35}) and verdict["style"] == a.said["style"]
    assert verdict["object@b"] == {"dog": 0.6, "cat": 0.4} and verdict["disagreement"] == {"object": 0.5}
    assert both.heads == a.heads and both.find("round") == ("style", ["round"])
    assert both.versions() == {"rule": "mean", "a.version": "1", "b.version": "1"}
    with pytest.raises(ErasureError, match="a: no cow; b: no cow"):
        both.find("cow")
    assert both.clip_scores(noise(2), ["", ""]) == both.features(noise(2)) == [None, None]


@pytest.mark.parametrize(
    ("rule", "scores", "top"),
    [
        ("any", (0.9, 0.1, 0.1), "nudity"),
        ("any", (0.1, 0.1, 0.1), "none"),
        ("mean", (0.9, 0.1, 0.1), "none"),
        ("all", (0.9, 0.9, 0.1), "none"),
        ("all", (0.9, 0.9, 0.6), "nudity"),
        ("mean", (0.9, 0.9, 0.1), "nudity"),
    ],
)
def test_votes(rule, scores, top):
    judge = EnsembleJudge([nude("n", score) for score in scores], rule)
    verdict = judge.judge(noise(1))[0]
    assert JudgedImage(None, verdict, None).top_label("nudity") == top
    other = sum((score > 0.5) != (top == "nudity") for score in scores)
    assert verdict["disagreement"]["nudity"] == pytest.approx(other / 3)
    assert list(judge.members) == ["n", "n#2", "n#3"] and verdict["nudity@n#2"]["nudity"] == scores[1]


def test_an_ensemble_takes_clip_scores_from_the_judge_that_has_them(clip):
    images, texts = noise(2), ["a cat", "a church"]
    alone = ClipJudge(clip)
    both = EnsembleJudge([nude("n", 0.2), alone])
    assert both.heads == {"nudity": ["none", "nudity"]} and alone.judge(images) == [{}, {}]
    assert both.clip_scores(images, texts) == alone.clip_scores(images, texts)
    assert np.array_equal(both.features(images), alone.features(images))
    assert "disagreement" not in both.judge(images)[0]


def test_invalid_ensembles():
    cats = Fixed("a", object={"cat": 1.0, "dog": 0.0})
    for members, rule, message in [
        ([cats], "mean", "at least two judges"),
        ([cats, cats], "most", "unknown rule"),
        ([cats, Fixed("b", object={"cat": 1.0, "cow": 0.0})], "mean", "b differs from .* labels of 'object': cow, dog"),
        ([cats, cats], "any", "needs a label `none`"),
        ([cats, nude("n", 1)], "all", "share no head"),
    ]:
        with pytest.raises(ErasureError, match=message):
            EnsembleJudge(members, rule)
