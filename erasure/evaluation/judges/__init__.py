"""Judges: images to labels and scores. One file a judge."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from PIL import Image

Verdict = dict[str, dict[str, float]]  # head -> label -> probability


class Judge(Protocol):
    """Says what images show.

    `heads` maps a head (object, style) to its labels; `none` among them means: none of the others.
    """

    name: str
    heads: dict[str, list[str]]

    def find(self, name: str) -> tuple[str, list[str]]:
        """The head and the labels that a name stands for; raises ErasureError for a name it does not know."""

    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Probabilities for each image."""

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        """100 times the cosine of each image and its text (Hessel et al. 2021, without the cut at 0)."""

    def features(self, images: list[Image.Image]) -> np.ndarray:
        """Features [n, d] for distances between sets of images."""

    def versions(self) -> dict[str, str]:
        """Name, version and hash of what judges, for the report."""
