"""The networks of glyph's judges: a small residual CNN, used by the classifier and by the image tower of CLIP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from erasure.glyph import CHECKPOINT, JUDGES, objects, styles
from erasure.model.clip_towers import ClipTowers

WIDTHS = (24, 48, 96, 160)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut, of which the first halves height and width."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, out, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.short = nn.Conv2d(inside, out, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, out), nn.GroupNorm(8, out)])

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inside, h, w] to [n, out, h/2, w/2]."""
        y = F.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        return F.relu(y + self.short(F.avg_pool2d(x, 2)))


class Trunk(nn.Module):
    """The shared feature extractor, from images [n, 3, 64, 64] in [-1, 1] to features of the last width [n, 160]."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in zip((widths[0], *widths), widths, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the spatial mean and the spatial maximum of the last feature map."""
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3)) + x.amax((2, 3))


class Classifier(nn.Module):
    """The classifier of objects and styles; the last class of the object head is "none"."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.heads = nn.ModuleDict(
            {"object": nn.Linear(WIDTHS[-1], len(objects()) + 1), "style": nn.Linear(WIDTHS[-1], len(styles()))}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images [n, 3, 64, 64] in [-1, 1] to logits [n, classes] for each head."""
        features = F.dropout(self.trunk(x), 0.1, self.training)
        return {name: head(features) for name, head in self.heads.items()}


class Quality(nn.Module):
    """The judge of image quality, which tells well-formed images from broken ones.

    It has a smaller trunk of its own, so that its errors are independent of the classifier's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk((16, 32, 48, 64))
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, 3, 64, 64] in [-1, 1] to logits [n]; above 0 an image is well formed."""
        return self.head(F.dropout(self.trunk(x), 0.1, self.training)).squeeze(1)


class ImageTower(nn.Module):
    """The image tower of CLIP, whose output has the width of the text embedding."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.project = nn.Linear(WIDTHS[-1], width)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, 3, 64, 64] in [-1, 1] to vectors [n, width] of norm 1."""
        return F.normalize(self.project(self.trunk(x)), dim=-1)


class Clip(nn.Module):
    """Glyph's CLIP: an image tower, the checkpoint's text encoder with a projection, and the logits' scale and bias."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.image = ImageTower()
        self.text = text_encoder
        self.project = nn.Linear(128, 128, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-6.0))
        self.tokenizer: Any = None

    def embed(self, ids: Tensor) -> Tensor:
        """Map token ids [n, length] to unit vectors [n, 128], from the state at the end-of-text token."""
        return F.normalize(self.project(self.text(ids).pooler_output), dim=-1)

    @torch.no_grad()
    def image_features(self, x: Tensor) -> Tensor:
        """Map images [n, 3, 64, 64] in [-1, 1] to unit vectors [n, 128], without gradients."""
        return self.image(x)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Map texts to unit vectors [n, 128], without gradients."""
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return self.embed(batch.input_ids.to(self.project.weight.device))


def load_classifier() -> Classifier:
    """Load the shipped classifier of objects and styles, in evaluation mode."""
    model = Classifier()
    model.load_state_dict({key: value.float() for key, value in load_file(JUDGES / "classifier.safetensors").items()})
    return model.eval()


def load_quality() -> Quality:
    """Load the shipped judge of image quality, in evaluation mode."""
    model = Quality()
    model.load_state_dict({key: value.float() for key, value in load_file(JUDGES / "quality.safetensors").items()})
    return model.eval()


def load_clip() -> Clip:
    """Load the shipped CLIP, in evaluation mode.

    It consists of the checkpoint's text encoder and tokenizer and the judge's image tower.

    Raises:
        RuntimeError: the judge's weights do not fit the network.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    model = Clip(CLIPTextModel.from_pretrained(CHECKPOINT / "text_encoder", dtype=torch.float32))
    state = {key: value.float() for key, value in load_file(JUDGES / "clip.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(not key.startswith("text.") for key in missing):
        raise RuntimeError(
            f"{JUDGES / 'clip.safetensors'} does not fit glyph's CLIP: missing {missing}, unexpected {unexpected}"
        )
    model.tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    return model.eval()


def clip_towers() -> ClipTowers:
    """Return both towers of the shipped CLIP, for methods that compare texts with images."""
    clip = load_clip().requires_grad_(False)
    return ClipTowers("glyph's CLIP", clip.text, clip.embed, clip.image, float(clip.scale.exp()))
