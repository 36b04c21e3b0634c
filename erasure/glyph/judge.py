"""The judge for glyph: a classifier with an object head and a style head, and glyph's own CLIP."""

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
from erasure.glyph.vision import load_classifier, load_clip, load_quality

BATCH = 64


class GlyphJudge:
    """The judge for images of the embedded checkpoint, which are resized to 64x64 pixels.

    It names one of glyph's objects, or `none`, and one of its styles. It also scores texts against images and provides
    features for distances between sets of images.
    """

    name = "glyph"

    def __init__(self) -> None:
        self.heads = {"object": [*objects(), "none"], "style": styles()}
        self._classifier = load_classifier()
        self._clip = load_clip()
        self._quality = load_quality()

    def find(self, name: str) -> tuple[str, list[str]]:
        """Return the head and the labels that a name stands for.

        Args:
            name: a label, a synonym of one, or a family of objects.

        Raises:
            ErasureError: glyph's vocabulary does not contain the name.
        """
        known = Vocabulary.read(VOCABULARY).meanings
        if name not in known:
            fault = unknown_label("concept for glyph's judge", name, known)
            raise ErasureError(
                f"{fault}; this judge knows only what glyph was trained to draw: choose another one with --judge"
            )
        return known[name]

    @torch.no_grad()
    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Return the probabilities of all labels of both heads for each image."""
        verdicts: list[Verdict] = []
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            logits = self._classifier(_tensor(batch))
            probabilities = {head: values.softmax(1).tolist() for head, values in logits.items()}
            for i in range(len(batch)):
                verdicts.append(
                    {head: dict(zip(self.heads[head], rows[i], strict=True)) for head, rows in probabilities.items()}
                )
        return verdicts

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        """Return 100 times the cosine similarity of each image and its text, by glyph's own CLIP."""
        scores: list[float] = []
        for start in range(0, len(images), BATCH):
            image_features = self._clip.image_features(_tensor(images[start : start + BATCH]))
            text_features = self._clip.text_features(texts[start : start + BATCH])
            scores += (100 * (image_features * text_features).sum(1)).tolist()
        return scores

    @torch.no_grad()
    def features(self, images: list[Image.Image]) -> np.ndarray:
        """Return features [n, 128] from the image tower of glyph's CLIP, scaled to a root mean square of 1."""
        parts = [self._clip.image_features(_tensor(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        vectors = torch.cat(parts)
        return (vectors * vectors.shape[1] ** 0.5).numpy()

    @torch.no_grad()
    def quality(self, images: list[Image.Image]) -> list[float]:
        """Return the probability that each image is a well-formed picture of something, by a network of its own."""
        logits = [self._quality(_tensor(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        return torch.cat(logits).sigmoid().tolist()

    def versions(self) -> dict[str, str]:
        """Return the SHA-256 hashes, cut to 16 digits, of the weight files of its networks."""
        return {
            path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(JUDGES.glob("*.safetensors"))
        }


def _tensor(images: list[Image.Image]) -> Tensor:
    """Convert images to a tensor [n, 3, 64, 64] in [-1, 1]."""
    side = 64
    arrays = [np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
