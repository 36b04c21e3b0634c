"""Glyph's judges: the classifier with an object and a style head, and its CLIP."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError
from erasure.evaluation.judges.judge import Verdict
from erasure.evaluation.judges.labels import unknown_label
from erasure.glyph import JUDGES, VOCABULARY, objects, styles
from erasure.glyph.vision import load_classifier, load_clip

BATCH = 64


class GlyphJudge:
    """The judge for the embedded checkpoint: 64 px images of its objects in its styles."""

    name = "glyph"

    def __init__(self) -> None:
        self.heads = {"object": [*objects(), "none"], "style": styles()}
        self._classifier = load_classifier()
        self._clip = load_clip()

    def find(self, name: str) -> tuple[str, list[str]]:
        """A label, another word for one, or a family of objects.

        Raises:
            ErasureError: glyph has no such word.
        """
        known = Vocabulary.read(VOCABULARY).meanings
        if name not in known:
            fault = unknown_label("concept for glyph's judge", name, known)
            raise ErasureError(f"{fault}; it knows what glyph was taught to draw, and another --judge may know more")
        return known[name]

    @torch.no_grad()
    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Probabilities of both heads for each image."""
        found: list[Verdict] = []
        for start in range(0, len(images), BATCH):
            out = self._classifier(_tensor(images[start : start + BATCH]))
            shares = {head: logits.softmax(1).tolist() for head, logits in out.items()}
            for i in range(len(images[start : start + BATCH])):
                found.append({head: dict(zip(self.heads[head], shares[head][i], strict=True)) for head in shares})
        return found

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        """100 cos(image, text), by glyph's own CLIP."""
        found: list[float] = []
        for start in range(0, len(images), BATCH):
            seen = self._clip.image_features(_tensor(images[start : start + BATCH]))
            said = self._clip.text_features(texts[start : start + BATCH])
            found += (100 * (seen * said).sum(1)).tolist()
        return found

    @torch.no_grad()
    def features(self, images: list[Image.Image]) -> np.ndarray:
        """Features [n, 128] of the image tower of glyph's CLIP, of root mean square 1."""
        parts = [self._clip.image_features(_tensor(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        found = torch.cat(parts)
        return (found * found.shape[1] ** 0.5).numpy()

    def versions(self) -> dict[str, str]:
        """Hashes of both networks."""
        return {
            path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(JUDGES.glob("*.safetensors"))
        }


def _tensor(images: list[Image.Image]) -> Tensor:
    """[n, 3, 64, 64] in [-1, 1]."""
    side = 64
    arrays = [np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
