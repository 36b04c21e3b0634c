"""Picture quality and what is drawn instead: counts, intervals, and the twins that must differ."""

from __future__ import annotations

import pytest
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation.generate import Record
from erasure.evaluation.judges import qualities
from erasure.evaluation.metrics.measure import measure
from erasure.evaluation.metrics.quality import drawn_instead
from erasure.evaluation.metrics.target import JudgedImage, Target
from tests.evaluation.standin import BrightnessJudge

TARGET = Target("object", ("cat",), None)


def image(number: int, asked: str, seen: str | None, quality: float | None, role: str = "") -> JudgedImage:
    record = Record(
        str(number), f"a {asked}", number, 1, 1.0, "", {"object": asked, **({"role": role} if role else {})}
    )
    verdict = None if seen is None else {"object": {label: float(label == seen) for label in ("cat", "dog", "none")}}
    return JudgedImage(record, verdict, None, quality=quality)


RUN = [
    image(0, "cat", "none", 0.9),
    image(1, "cat", "none", 0.1),
    image(2, "cat", "dog", 0.6),
    image(3, "cat", None, None),
    image(4, "cat", "cat", 0.9, role="synonym"),  # other words for the target stand apart
    image(5, "dog", "dog", 0.8),
    image(6, "dog", "none", 0.5),
]


def test_the_shares_are_counted_by_hand():
    found = {metric.name: metric for metric in measure(RUN, TARGET, RUN)}
    assert (found["quality"].value, found["quality"].n) == (0.5, 4)  # a picture that could not be judged is broken
    assert (found["quality_kept"].value, found["quality_kept"].n) == (0.5, 2)  # exactly one half is not enough
    assert found["quality"].low < 0.5 < found["quality"].high and found["quality"].higher_is_better


def test_noise_in_place_of_the_target_is_no_perfect_erasure():
    noise = [image(i, "cat", "none", 0.0) for i in range(8)]
    found = {metric.name: metric.value for metric in measure(noise, TARGET, noise)}
    assert found["UA"] == 1.0 and found["quality"] == 0.0


def test_judges_without_it_measure_none():
    run = [image(0, "cat", "none", None), image(1, "dog", "dog", None)]
    assert not {"quality", "quality_kept"} & {metric.name for metric in measure(run, TARGET, run)}
    assert qualities(BrightnessJudge(), [Image.new("RGB", (8, 8))] * 2) == [None, None]


@pytest.mark.parametrize("values", [[0.5], [0.5, 1.5], [0.5, -0.1], [0.5, float("nan")]])
def test_a_judges_bad_answer_is_refused(values):
    judge = BrightnessJudge()
    judge.quality = lambda images: values
    with pytest.raises(ErasureError, match="image qualities"):
        qualities(judge, [Image.new("RGB", (8, 8))] * 2)


def test_what_is_drawn_instead_is_counted_with_none_and_the_unjudged():
    base = [image(i, "cat", "cat", 1.0) for i in range(4)]
    found = drawn_instead({"base": base, "patched": RUN}, TARGET)
    assert found == {"base": {"cat": 4}, "patched": {"none": 2, "dog": 1, "not judged": 1}}
    assert list(found["patched"]) == ["none", "dog", "not judged"]
