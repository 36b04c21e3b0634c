"""A judge for the tiny pipeline that depends on brightness instead of content."""

from __future__ import annotations

import numpy as np
from PIL import Image

from erasure.errors import unknown


class BrightnessJudge:
    """A judge whose object depends on the mean brightness and whose style is always flat; it can fail on request."""

    name = "brightness"
    heads = {"object": ["cat", "dog", "none"], "style": ["flat", "round"]}

    def __init__(self, fail_above: float = 1e9) -> None:
        self.fail_above = fail_above
        self.seen = 0

    def find(self, name: str) -> tuple[str, list[str]]:
        for head, labels in self.heads.items():
            if name in labels:
                return head, [name]
        raise unknown("concept", name, ["cat", "dog", "flat", "round"])

    def judge(self, images: list[Image.Image]) -> list[dict]:
        verdicts = []
        for image in images:
            self.seen += 1
            light = float(np.asarray(image).mean())
            if light > self.fail_above:
                raise RuntimeError("too bright")
            cat = 1 / (1 + np.exp((light - 127) / 4))
            verdicts.append({"object": {"cat": cat, "dog": 1 - cat, "none": 0.0}, "style": {"flat": 0.9, "round": 0.1}})
        return verdicts

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        return [float(np.asarray(image).mean()) / 10 for image in images]

    def features(self, images: list[Image.Image]) -> np.ndarray:
        small = [np.asarray(image.convert("L").resize((4, 4)), np.float32).ravel() / 127.5 - 1 for image in images]
        return np.stack(small)

    def versions(self) -> dict[str, str]:
        return {"brightness": "1"}
