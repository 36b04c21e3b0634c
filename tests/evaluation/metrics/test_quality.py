"""Picture quality and what is drawn instead: counts, intervals, and the twins that must differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation.generate import Record
from erasure.evaluation.judges import qualities
from erasure.evaluation.metrics.measure import measure, outcomes
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
    kept = [image(10 + i, "dog", "dog", 0.9) for i in range(8)]
    found = [
        {metric.name: metric.value for metric in measure(run, TARGET, run)}
        for quality in (0.9, 0.0)
        for run in [[*(image(i, "cat", "none", quality) for i in range(8)), *kept]]
    ]
    assert [values["UA"] for values in found] == [1, 1] and [values["quality"] for values in found] == [1, 0]
    # H counts the quality, so that it tells the two apart; without a judge of quality it is as published.
    assert [values["H"] for values in found] == [1, 0]
    plain = [image(0, "cat", "none", None), image(1, "dog", "dog", None)]
    assert next(metric for metric in measure(plain, TARGET, plain) if metric.name == "H").value == 1


def test_images_of_one_prompt_widen_the_interval():
    """Eight images of eight prompts, and of four prompts: the image's prompt says which are alike."""
    apart = [image(i, "cat", "cat" if i % 4 > 1 else "none", 0.9) for i in range(8)]
    alike = [replace(one, record=replace(one.record, prompt=f"a cat {i // 2}")) for i, one in enumerate(apart)]
    apart = [replace(one, record=replace(one.record, prompt=f"a cat {i}")) for i, one in enumerate(apart)]
    (wide, narrow) = (
        next(metric for metric in measure(run, TARGET, run) if metric.name == "UA") for run in (alike, apart)
    )
    assert wide.value == narrow.value == 0.5 and wide.n == narrow.n == 8
    assert wide.low < narrow.low and wide.effective_n < 8 and narrow.effective_n is None
    assert "effective_n" in wide.to_json() and "effective_n" not in narrow.to_json()


def test_outcomes_are_kept_by_the_id_of_the_image():
    found = outcomes(RUN, TARGET)
    assert found["UA"] == {"0": True, "1": True, "2": True, "3": False}
    assert found["quality"] == {"0": True, "1": False, "2": True, "3": False}
    assert found["leak"] == {"4": True} and found["IRA"] == {"5": True, "6": False}
    assert "CRA" not in found and "neighbours" not in found


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


def test_the_anchor_is_counted_among_the_images_of_the_concept_that_has_one():
    target = Target("object", ("cat", "cow"), None, anchors={"cat": ("dog", "wolf")})
    run = [*RUN, image(7, "cow", "dog", 0.9), image(8, "cat", "dog", 0.9, role="synonym")]
    found = {metric.name: metric for metric in measure(run, target, run)}["anchor"]
    assert (found.value, found.n) == (0.25, 4) and found.higher_is_better  # the one that was not judged counts
    assert found.meaning == "target images that show the anchor, dog, wolf"
    assert "anchor" not in {metric.name for metric in measure(run, TARGET, run)}
