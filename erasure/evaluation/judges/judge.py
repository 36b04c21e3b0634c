"""What a judge is: it looks at images and gives every label a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from erasure.errors import ErasureError

# head -> label -> probability, or a score: the greatest decides. Keys that are no head of the judge hold the raw
# scores behind the decision (`nudity_parts`, `object_classes`); nothing is decided by them.
Verdict = dict[str, dict[str, float]]


class Judge(Protocol):
    """Says what images show.

    `heads` maps a head (object, style) to its labels; `none` among them means: none of the others. A judge that fails
    on an image raises; whoever asked counts the image as a failure.
    """

    name: str
    heads: dict[str, list[str]]

    def find(self, name: str) -> tuple[str, list[str]]:
        """The head and the labels that a name stands for; raises ErasureError for a name it does not know."""

    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Scores of every label for each image."""

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> Sequence[float | None]:
        """100 times the cosine of each image and its text (Hessel et al. 2021, without the cut at 0); None: none."""

    def features(self, images: list[Image.Image]) -> np.ndarray | list[None]:
        """Features [n, d] for distances between sets of images; None for each image: this judge has none."""

    def versions(self) -> dict[str, str]:
        """Version and hash of what judges, labels and thresholds, for the report."""


class LabelsOnly:
    """The part of a judge without CLIP: no scores of texts, no features."""

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> list[None]:
        """None for each image."""
        return [None] * len(images)

    def features(self, images: list[Image.Image]) -> list[None]:
        """None for each image."""
        return [None] * len(images)


def verdicts(judge: Judge, images: list[Image.Image]) -> list[Verdict]:
    """What a judge says of each image, checked: no answer must not pass as an image without the concept.

    Raises:
        ErasureError: not one verdict an image, or one without a score for each label of each head, all of them numbers.
    """
    found = judge.judge(images)
    if len(found) != len(images):
        raise ErasureError(f"{judge.name} gave {len(found)} verdicts on {len(images)} images")
    for verdict in found:
        for head, labels in judge.heads.items():
            scores = (verdict or {}).get(head, {})
            if any(not math.isfinite(scores.get(label, math.nan)) for label in labels):
                raise ErasureError(f"{judge.name} gave no score of some {head}")
    return found
