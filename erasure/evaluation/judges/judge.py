"""The interface of a judge, which looks at images and scores every label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from erasure.errors import ErasureError

# head -> label -> probability or score; the label with the highest score wins. Keys that are not heads of the judge
# hold the raw scores behind the decision (`nudity_parts`, `object_classes`) and decide nothing.
Verdict = dict[str, dict[str, float]]


class Judge(Protocol):
    """A classifier of images with one or more heads.

    `heads` maps each head (object, style) to its labels; the label `none` means "none of the other labels". If a judge
    fails on an image, it raises an exception, and the caller counts the image as a failure of the erasure.
    """

    name: str
    heads: dict[str, list[str]]

    def find(self, name: str) -> tuple[str, list[str]]:
        """Return the head and the labels that a name stands for.

        Raises:
            ErasureError: the judge does not know the name.
        """

    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Return the scores of all labels for each image."""

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> Sequence[float | None]:
        """Return 100 times the cosine between each image and its text, or None for each image without CLIP.

        The score is that of Hessel et al. (2021), without the cut at 0.

        Args:
            images: n images.
            texts: n texts.
        """

    def features(self, images: list[Image.Image]) -> np.ndarray | list[None]:
        """Return features [n, d] for distances between image sets, or None for each image if there are none."""

    def quality(self, images: list[Image.Image]) -> Sequence[float | None]:
        """Return the probability that each image is well formed, whatever it shows, or None without CLIP."""

    def versions(self) -> dict[str, str]:
        """Return versions, hashes, labels and thresholds of the judge, for the report."""


class LabelsOnly:
    """Base class for judges without CLIP, which have no scores for texts and no features."""

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> list[None]:
        """Return None for each image."""
        return [None] * len(images)

    def features(self, images: list[Image.Image]) -> list[None]:
        """Return None for each image."""
        return [None] * len(images)

    def quality(self, images: list[Image.Image]) -> list[None]:
        """Return None for each image."""
        return [None] * len(images)


def qualities(judge: Judge, images: list[Image.Image]) -> Sequence[float | None]:
    """Return the image quality by a judge, or None for each image if the judge has no method `quality`.

    Judges of other packages may have been written before that method existed.

    Args:
        judge: the judge.
        images: the images to judge.

    Raises:
        ErasureError: the judge did not return one value in [0, 1], or None, for each image.
    """
    method = getattr(judge, "quality", None)
    values: Sequence[float | None] = [None] * len(images) if method is None else method(images)
    if len(values) != len(images) or any(value is not None and not 0 <= value <= 1 for value in values):
        raise ErasureError(f"{judge.name} returned image qualities that are not one number in [0, 1] for each image")
    return values


def verdicts(judge: Judge, images: list[Image.Image]) -> list[Verdict]:
    """Return a judge's verdicts after checking that they are complete.

    Without the check, a missing answer could pass as an image without the concept.

    Args:
        judge: the judge.
        images: the images to judge.

    Raises:
        ErasureError: the number of verdicts differs from the number of images, or a verdict lacks a finite score for a
            label.
    """
    judged = judge.judge(images)
    if len(judged) != len(images):
        raise ErasureError(f"{judge.name} returned {len(judged)} verdicts for {len(images)} images")
    for verdict in judged:
        for head, labels in judge.heads.items():
            scores = (verdict or {}).get(head, {})
            if any(not math.isfinite(scores.get(label, math.nan)) for label in labels):
                raise ErasureError(f"{judge.name} returned no finite score for some labels of {head}")
    return judged
