"""How much each pixel attends to each token of the prompt, in every layer of cross-attention of a UNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_SPREAD = 1e-6  # of a map that is the same everywhere


class AttentionMaps:
    """A context that holds the attention probabilities of the UNet's last call inside it, with their graph.

    They are computed again from each layer's inputs, by its own queries and keys with whatever acts on them, so that
    it does not matter which attention kernel the UNet uses.

    Args:
        unet: the UNet.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.layers: dict[str, Tensor] = {}  # path -> [n, heads, pixels, tokens]
        self._unet, self._handles = unet, ExitStack()

    def __enter__(self) -> AttentionMaps:
        """Start recording."""
        for path, module in self._unet.named_modules():
            if path.endswith("attn2"):
                handle = module.register_forward_hook(self._hook(path), with_kwargs=True)
                self._handles.callback(handle.remove)
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop recording, and forget the maps."""
        self._handles.close()
        self.layers = {}

    def _hook(self, path: str) -> Any:
        def keep(attention: Any, inputs: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
            pixels = inputs[0] if inputs else named["hidden_states"]
            text = inputs[1] if len(inputs) > 1 else named["encoder_hidden_states"]
            query = attention.head_to_batch_dim(attention.to_q(pixels))
            key = attention.head_to_batch_dim(attention.to_k(text))
            scores = attention.scale * query.float() @ key.float().transpose(1, 2)
            self.layers[path] = scores.softmax(-1).unflatten(0, (len(pixels), attention.heads))

        return keep


def sides(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Return height and width of a layer with so many pixels, for latents of a size."""
    shrunk = math.sqrt(height * width / pixels)
    return round(height / shrunk), round(width / shrunk)


def masks(maps: Sequence[Tensor], first: int, end: int, size: tuple[int, int], threshold: float) -> Tensor:
    """Return where the pixels of each sample attend to tokens [n, height, width], true on the object.

    Maps are averaged over heads, tokens, layers and calls, each layer scaled to the latents' size, and then stretched
    to [0, 1] for each sample.

    Args:
        maps: attention probabilities [n, heads, pixels, tokens], of all layers and calls.
        first: the first of the tokens.
        end: the place behind the last.
        size: height and width of the latents.
        threshold: from which share of the largest value on a pixel belongs to the object.
    """
    planes = []
    for layer in maps:
        plane = layer[..., first:end].mean((1, 3)).unflatten(1, sides(layer.shape[2], *size))
        planes.append(F.interpolate(plane[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0])
    mean = torch.stack(planes).mean(0)
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    return (mean - low) >= threshold * (high - low).clamp_min(LEAST_SPREAD)


def attended(maps: Sequence[Tensor], first: int, end: int, where: Tensor) -> Tensor:
    """Return sum over layers of || A[pixels of the mask, tokens] ||_F, a mean over samples (MACE, eq. 7).

    Args:
        maps: attention probabilities of each layer [n, heads, pixels, tokens].
        first: the first of the tokens.
        end: the place behind the last.
        where: the masks [n, height, width], of the latents' size; each layer takes the nearest pixels.
    """
    total = torch.zeros((), device=where.device)
    for layer in maps:
        near = F.interpolate(where[:, None].float(), sides(layer.shape[2], *where.shape[1:]), mode="nearest")
        shown = layer[..., first:end] * near.flatten(1)[:, None, :, None]
        total = total + shown.flatten(1).norm(dim=1).mean()
    return total


def outside(outputs: Sequence[Tensor], where: Tensor) -> Tensor:
    """Return the mean square of layers' outputs on the pixels outside of the mask (Receler, arXiv 2311.17717).

    The mean is over channels and pixels, then over samples and layers; a sample that is all object counts as 0.

    Args:
        outputs: of each layer [n, pixels, channels].
        where: the masks [n, height, width], of the latents' size; each layer takes the nearest pixels.
    """
    total = torch.zeros((), device=where.device)
    for layer in outputs:
        near = F.interpolate((~where[:, None]).float(), sides(layer.shape[1], *where.shape[1:]), mode="nearest")
        away = near.flatten(1)
        squares = layer.float().square().mean(2)
        total = total + ((away * squares).sum(1) / away.sum(1).clamp_min(1)).mean() / len(outputs)
    return total
