"""Helpers for tests of judges: images, classes, and judges with fixed scores."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation.judges.judge import LabelsOnly
from erasure.glyph import CHECKPOINT

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


def write_clip(folder):
    """Save a CLIP of transformers with random weights and glyph's tokenizer, and return its folder."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorFast, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_factor": 20.0, **TOWER}
    vision = {"image_size": 32, "patch_size": 8, "initializer_factor": 20.0, **TOWER}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    images = CLIPImageProcessorFast(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


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
