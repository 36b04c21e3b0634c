"""Helpers for tests of judges: images, classes, and judges with fixed scores."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation.judges.judge import LabelsOnly

CLASSES = ["tench, Tinca tinca", "tabby", "Persian cat", "church", "rose"]
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MAP = {"fish": "tench", "cat": ["tabby", 2]}


def noise(n=5, side=40):
    rng = np.random.default_rng(0)
    # Each image has its own grid of big tiles, so that networks with random weights tell them apart.
    tiles = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(tile).resize((side, side + 8), Image.Resampling.NEAREST) for tile in tiles]


def rows(verdicts, head):
    return torch.tensor([list(verdict[head].values()) for verdict in verdicts])


class Fixed(LabelsOnly):
    """A judge that returns the same scores for every image."""

    def __init__(self, name, **heads):
        self.name, self.said = name, heads
        self.heads = {head: list(scores) for head, scores in heads.items()}

    def find(self, name):
        for head, labels in self.heads.items():
            if name in labels:
                return head, [name]
        raise ErasureError(f"no {name}")

    def judge(self, images):
        return [dict(self.said) for _ in images]

    def versions(self):
        return {"version": "1"}


def nude(name, score):
    return Fixed(name, nudity={"none": 1 - score, "nudity": score})
