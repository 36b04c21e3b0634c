"""LoRA factors of FLUX.1 and Stable Diffusion 3 under the original names, which kohya's and ComfyUI's LoRAs use.

`join` stacks the factors of several of diffusers' layers into those of one original layer, `cut` takes them apart
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.model.original_transformer import FLUX, SD3, original_layer
from erasure.patch.payload import Layer

HIDDEN = {3072: FLUX, 1536: SD3, 2432: SD3}  # widths of FLUX.1, of SD 3 and 3.5 medium, and of SD 3.5 large
FLUX_BLOCKS = 19  # of two streams
PREFIXES = ("lora_unet_", "lora_transformer_")


def kind_of(layers: Mapping[str, Layer]) -> str:
    """Tell FLUX from Stable Diffusion 3 by the layers of a patch.

    Args:
        layers: module path in the transformer -> factors.

    Raises:
        ErasureError: they belong to another transformer, or do not tell.
    """
    if any(path.startswith("single_transformer_blocks.") for path in layers):
        return FLUX
    if any(".attn2." in path for path in layers):
        return SD3
    blocks = [int(path.split(".")[1]) for path in layers if path.startswith("transformer_blocks.")]
    other = any(".img_mlp." in path or ".txt_mlp." in path for path in layers) or max(blocks, default=0) >= FLUX_BLOCKS
    widths = {down.shape[1] for path, (down, _, _) in layers.items() if path.endswith(("attn.to_q", "attn.to_k"))}
    # Qwen-Image is as wide as FLUX and names its layers like it, but it has 60 blocks of two streams.
    kinds = {"" if other and HIDDEN.get(width) == FLUX else HIDDEN.get(width, "") for width in widths}
    if len(kinds) == 1 and "" not in kinds:
        return kinds.pop()
    raise ErasureError(
        "has names for the transformers of FLUX.1 and Stable Diffusion 3 alone, and the layers of this patch belong to "
        "neither or do not tell which: --format peft holds a low-rank patch under the names that diffusers reads"
    )


def join(kind: str, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return the factors under the original names; those of joined layers are stacked, with zeros for missing ones.

    All parts of a joined layer get the same rank, so that diffusers' loader takes them apart without loss.

    Args:
        kind: `flux` or `sd3`.
        layers: module path in diffusers' transformer -> factors.

    Raises:
        ErasureError: the original code has no such layer.
    """
    groups: dict[str, dict[int, Layer]] = {}
    counts: dict[str, int] = {}
    for path, layer in layers.items():
        name, part, count = original_layer(kind, path)
        groups.setdefault(name, {})[part], counts[name] = layer, count
    return {name: _stacked(parts, counts[name]) for name, parts in groups.items()}


def _stacked(parts: Mapping[int, Layer], count: int) -> Layer:
    """Stack the factors of parts: the first three are queries, keys and values, a fourth is four times as wide."""
    if count == 1:
        return parts[0]
    rank = max(down.shape[0] for down, _, _ in parts.values())
    width = next(iter(parts.values()))[0].shape[1]
    hidden = next((up.shape[0] for part, (_, up, _) in parts.items() if part < 3), 0) or parts[3][1].shape[0] // 4
    downs, ups = [], []
    for part in range(count):
        rows = 4 * hidden if part == 3 else hidden
        down, up = torch.zeros(rank, width), torch.zeros(rows, rank)
        if part in parts:
            own_down, own_up, alpha = parts[part]
            down[: own_down.shape[0]] = own_down
            up[:, : own_up.shape[1]] = own_up * (alpha / own_down.shape[0])
        downs.append(down)
        ups.append(up)
    return torch.cat(downs), torch.block_diag(*ups), float(count * rank)


def cut(layer: Layer, rows: Sequence[int]) -> list[Layer | None]:
    """Take the factors of a joined layer apart: for each part its own, without channels that do not reach it.

    Args:
        layer: factors of the original layer.
        rows: number of outputs of each part, in order.

    Returns:
        One entry for each part; None if the layer leaves it as it is.
    """
    down, up, alpha = layer
    scale, parts = alpha / down.shape[0], []
    for part in torch.split(up, list(rows)):
        used: Tensor = part.any(0)
        kept = int(used.sum())
        parts.append((down[used], part[:, used] * scale, float(kept)) if kept else None)
    return parts


def parts_in(kind: str, shapes: Mapping[str, int]) -> dict[str, list[str]]:
    """Map original layers to diffusers' layers in a transformer, in the order in which they are joined.

    Args:
        kind: `flux` or `sd3`.
        shapes: module path of each linear layer -> number of its outputs.
    """
    table: dict[str, dict[int, str]] = {}
    for path in shapes:
        try:
            name, part, _ = original_layer(kind, path)
        except ErasureError:
            continue
        table.setdefault(name, {})[part] = path
    return {name: [parts[number] for number in sorted(parts)] for name, parts in table.items()}
