"""Paired counts of two runs: image quality, and each label apart."""

from __future__ import annotations

import pytest

from erasure.evaluation.metrics.statistics import mcnemar
from erasure.evaluation.metrics.target import Target
from erasure.evaluation.score import paired_labels, paired_quality
from tests.evaluation.metrics.test_quality import image

TARGET = Target("object", ("cat",), None)


def run(*images: tuple[str, str | None, float | None]) -> list:
    return [image(number, *entry) for number, entry in enumerate(images)]


BASE = run(
    *[("cat", "cat", 0.9)] * 5, ("cat", "cat", 0.2), ("dog", "dog", 0.9), ("dog", "cat", 0.9), ("cow", "cow", 0.1)
)
PATCHED = run(
    *[("cat", "none", 0.1)] * 3, ("cat", None, None), ("cat", "cat", 0.9), ("cat", "dog", 0.9), ("dog", "cat", 0.3),
    ("dog", "dog", 0.9), ("cow", "cow", 0.8)
)  # fmt: skip


def test_quality_is_paired_for_target_and_kept_images():
    found = paired_quality({"base": BASE, "patched": PATCHED[::-1]}, TARGET)
    assert found == {
        "quality": {"only_base": 4, "only_patched": 1, "p": pytest.approx(mcnemar(4, 1))},
        "quality_kept": {"only_base": 1, "only_patched": 1, "p": 1.0},
    }
    synonyms = [image(99, "cat", "cat", 0.9, role="synonym")], [image(99, "cat", "cat", 0.1, role="synonym")]
    assert paired_quality({"base": BASE + synonyms[0], "patched": PATCHED + synonyms[1]}, TARGET) == found
    assert paired_quality(dict.fromkeys(("base", "patched"), run(("cat", "cat", None))), TARGET) == {}


def test_each_label_is_paired_apart():
    found = paired_labels({"base": BASE, "patched": PATCHED[::-1]}, "object")
    assert {label: (pair["only_base"], pair["only_patched"]) for label, pair in found.items()} == {
        "cat": (5, 0),
        "dog": (1, 1),
        "cow": (0, 0),
    }
    assert found["cat"]["p"] == pytest.approx(mcnemar(5, 0)) and found["cow"]["p"] == 1.0
    assert paired_labels({"base": BASE, "patched": PATCHED[2:]}, "object")["cat"]["only_base"] == 3
    assert paired_labels({"base": BASE, "patched": PATCHED}, "style") == {}
