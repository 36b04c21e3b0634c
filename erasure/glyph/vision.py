"""The judges' networks: a small residual CNN, as the classifier and as the image tower of glyph's CLIP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from erasure.glyph import CHECKPOINT, JUDGES, objects, styles

WIDTHS = (24, 48, 96, 160)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; the first halves the sides."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, out, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.short = nn.Conv2d(inside, out, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, out), nn.GroupNorm(8, out)])

    def forward(self, x: Tensor) -> Tensor:
        """[n, inside, h, w] to [n, out, h/2, w/2]."""
        y = F.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        return F.relu(y + self.short(F.avg_pool2d(x, 2)))


class Trunk(nn.Module):
    """[n, 3, 64, 64] in [-1, 1] to [n, 160] features."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in zip((widths[0], *widths), widths, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        """Global mean and maximum of the last map, added."""
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3)) + x.amax((2, 3))


class Classifier(nn.Module):
    """Object (the last class is "none") and style of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.heads = nn.ModuleDict(
            {"object": nn.Linear(WIDTHS[-1], len(objects()) + 1), "style": nn.Linear(WIDTHS[-1], len(styles()))}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [n, 3, 64, 64] in [-1, 1] to logits by head."""
        features = F.dropout(self.trunk(x), 0.1, self.training)
        return {name: head(features) for name, head in self.heads.items()}


class Quality(nn.Module):
    """Tells well-formed pictures from broken ones; a smaller trunk of its own, so that it shares no error."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk((16, 32, 48, 64))
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, 3, 64, 64] in [-1, 1] to logits [n]; above 0 a picture is well formed."""
        return self.head(F.dropout(self.trunk(x), 0.1, self.training)).squeeze(1)


class ImageTower(nn.Module):
    """Image to a unit vector of the width of the text embedding."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.project = nn.Linear(WIDTHS[-1], width)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 3, 64, 64] in [-1, 1] to [n, width], each of norm 1."""
        return F.normalize(self.project(self.trunk(x)), dim=-1)


class Clip(nn.Module):
    """Glyph's CLIP: image tower, the checkpoint's text encoder with a projection, and the logit's scale and bias."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.image = ImageTower()
        self.text = text_encoder
        self.project = nn.Linear(128, 128, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-6.0))
        self.tokenizer: Any = None

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [n, length] to unit vectors [n, 128], from the end-of-text position."""
        return F.normalize(self.project(self.text(ids).pooler_output), dim=-1)

    @torch.no_grad()
    def image_features(self, x: Tensor) -> Tensor:
        """Images [n, 3, 64, 64] in [-1, 1] to unit vectors [n, 128]."""
        return self.image(x)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Texts to unit vectors [n, 128]."""
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return self.embed(batch.input_ids.to(self.project.weight.device))


def load_classifier() -> Classifier:
    """The shipped classifier, in evaluation mode."""
    model = Classifier()
    model.load_state_dict({key: value.float() for key, value in load_file(JUDGES / "classifier.safetensors").items()})
    return model.eval()


def load_quality() -> Quality:
    """Load the shipped judge of picture quality, in evaluation mode."""
    model = Quality()
    model.load_state_dict({key: value.float() for key, value in load_file(JUDGES / "quality.safetensors").items()})
    return model.eval()


def load_clip() -> Clip:
    """The shipped CLIP: the checkpoint's text encoder and tokenizer beside the judge's image tower."""
    from transformers import CLIPTextModel, CLIPTokenizer

    model = Clip(CLIPTextModel.from_pretrained(CHECKPOINT / "text_encoder", dtype=torch.float32))
    state = {key: value.float() for key, value in load_file(JUDGES / "clip.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(not key.startswith("text.") for key in missing):
        raise RuntimeError(f"clip.safetensors does not fit: missing {missing}, unexpected {unexpected}")
    model.tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    return model.eval()
