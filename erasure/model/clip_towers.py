"""The CLIP that a checkpoint's text encoder was trained in: its image tower, and the way from text states to its space.

The text tower is the checkpoint's own: its parameters take the place of CLIP's, so that a change of the encoder shows
in the similarity of texts and images. An encoder may have fewer layers than CLIP's (that of Stable Diffusion 2 lacks
the last one, whose states its UNet does not read); those that it lacks stay CLIP's.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.conditioning import place, text_encoders

LOG = logging.getLogger("erasure")
BUNDLED = re.compile(r"erasure(\.\w+)+:\w+")  # a function of this package, as presets of bundled checkpoints name it
CHANGED = 0.02  # relative difference of the weights from which the encoder counts as another one than CLIP's
BATCH = 16


@dataclass
class ClipTowers:
    """Both towers of a CLIP.

    Args:
        source: where it comes from, for messages.
        text: the text tower, a module whose parameters are named as those of transformers' CLIPTextModel.
        embed: maps token ids [n, length] to unit vectors [n, d], with gradients.
        look: maps images [n, 3, h, w] in [-1, 1] to unit vectors [n, d].
        scale: factor on the cosines in CLIP's own loss.
    """

    source: str
    text: nn.Module
    embed: Callable[[Tensor], Tensor]
    look: Callable[[Tensor], Tensor]
    scale: float

    def share(self, encoder: nn.Module) -> dict[str, nn.Parameter]:
        """Let the text tower read a checkpoint's text encoder: its parameters take the place of those of the same name.

        Args:
            encoder: the checkpoint's text encoder.

        Returns:
            The encoder's parameters that the tower now reads, by their names in the encoder.

        Raises:
            ErasureError: a parameter has another shape, or none has the same name.
        """
        own = {_bare(name): name for name, _ in self.text.named_parameters()}
        shared, away, size = {}, 0.0, 0.0
        for name, param in encoder.named_parameters():
            if _bare(name) not in own:
                continue
            path, _, leaf = own[_bare(name)].rpartition(".")
            module = self.text.get_submodule(path)
            theirs = module.get_parameter(leaf)
            if theirs.shape != param.shape:
                raise ErasureError(
                    f"{self.source} is another CLIP than that of the text encoder: {_bare(name)} has shape "
                    f"{list(theirs.shape)} there and {list(param.shape)} here. Name the right one with clip; nothing "
                    "was changed"
                )
            away += float((theirs.detach().cpu().float() - param.detach().cpu().float()).square().sum())
            size += float(param.detach().float().square().sum())
            module.register_parameter(leaf, param)
            shared[name] = param
        if not shared:
            raise ErasureError(
                f"{self.source} has no parameter in common with the text encoder; name the CLIP that it was trained "
                "in with clip. Nothing was changed"
            )
        if away > CHANGED**2 * size:
            LOG.warning(
                "the text encoder is not the one that %s was trained with: the weights differ by %.0f %%",
                self.source,
                100 * (away / size) ** 0.5,
            )
        return shared

    def texts(self, pipe: Any, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [n, d] of texts, with gradients.

        Args:
            pipe: the checkpoint's pipeline, for its tokenizer.
            texts: n texts; they are padded only as far as needed, because no token reads those after it.
        """
        ((tokenizer, encoder),) = text_encoders(pipe)
        ids = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").input_ids
        return self.embed(ids.to(place(pipe, encoder)))

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Return unit vectors [n, d] of images [n, 3, h, w] in [-1, 1]."""
        return torch.cat([self.look(part) for part in pixels.split(BATCH)])


def contrastive(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Return CLIP's symmetric loss of n pairs of unit vectors [n, d] (Radford et al. 2021, arXiv 2103.00020)."""
    logits = scale * images.to(texts.device) @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def load_towers(base: Base, source: str | None = None) -> ClipTowers:
    """Load the CLIP of a checkpoint's text encoder; nothing is downloaded.

    Args:
        base: the checkpoint, which must have one text encoder.
        source: a folder or the hub id of a CLIP of transformers; None: the one that the preset of the family names.

    Raises:
        ErasureError: no CLIP is named, or it is not on this machine.
    """
    preset = base.family().preset
    named = None if preset is None else preset.clip
    if source is None and named is not None and BUNDLED.fullmatch(named):
        module, _, function = named.partition(":")
        return getattr(importlib.import_module(module), function)()
    source = source or named
    if source is None:
        raise ErasureError(
            f"no CLIP is known whose text tower is the text encoder of {base.name}, and without its image tower texts "
            "and images cannot be compared. Name one with clip (--set clip=FOLDER). Nothing was changed"
        )
    return _transformers(source, base.device)


def _transformers(source: str, device: torch.device) -> ClipTowers:
    from transformers import CLIPModel
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    try:
        clip = CLIPModel.from_pretrained(source, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as fault:
        raise ErasureError(
            f"the image tower of CLIP is needed, and {source} is not on this machine as a CLIP of transformers "
            f"({str(fault).splitlines()[0]}). Download it first, or name its folder with clip (--set clip=FOLDER). "
            "Nothing was changed"
        ) from None
    clip = clip.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    side = clip.config.vision_config.image_size

    def embed(ids: Tensor) -> Tensor:
        return F.normalize(clip.text_projection(clip.text_model(ids).pooler_output), dim=-1)

    def look(pixels: Tensor) -> Tensor:
        x = F.interpolate(pixels.to(device).float(), (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        pooled = clip.vision_model(((x + 1) / 2 - mean) / std).pooler_output
        return F.normalize(clip.visual_projection(pooled), dim=-1)

    return ClipTowers(source, clip.text_model, embed, look, float(clip.logit_scale.exp()))


def _bare(name: str) -> str:
    """Return a parameter's name without the prefix that some versions of transformers put before it."""
    return name.removeprefix("text_model.")
