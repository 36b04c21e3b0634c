"""Names of the layers of FLUX.1 and Stable Diffusion 3 in the original code, which kohya's and ComfyUI's LoRAs use.

The original code has one layer for queries, keys and values, and in FLUX's single-stream blocks one for these and the
first layer of the feed-forward network; diffusers has one for each. `join` stacks the factors of several of its layers
into those of one original layer, `cut` takes them apart again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.patch.payload import Layer

FLUX, SD3 = "flux", "sd3"
HIDDEN = {3072: FLUX, 1536: SD3, 2432: SD3}  # widths of FLUX.1, of SD 3 and 3.5 medium, and of SD 3.5 large
PREFIXES = ("lora_unet_", "lora_transformer_")
_IMAGE, _TEXT = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# diffusers' block -> the original block, and its layers: the original one -> those of diffusers, in its order.
BLOCKS: dict[str, dict[str, tuple[str, dict[str, tuple[str, ...]]]]] = {
    FLUX: {
        "transformer_blocks": (
            "double_blocks",
            {
                "img_attn.qkv": _IMAGE,
                "txt_attn.qkv": _TEXT,
                "img_attn.proj": ("attn.to_out.0",),
                "txt_attn.proj": ("attn.to_add_out",),
                "img_mod.lin": ("norm1.linear",),
                "txt_mod.lin": ("norm1_context.linear",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {
                "linear1": (*_IMAGE, "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation.lin": ("norm.linear",),
            },
        ),
    },
    SD3: {
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block.attn.qkv": _IMAGE,
                "context_block.attn.qkv": _TEXT,
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "context_block.attn.proj": ("attn.to_add_out",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
            },
        ),
    },
}
# Layers outside the blocks. norm_out is left out: its halves are in the other order.
ENDS = {
    FLUX: {
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "proj_out": "final_layer.linear",
    },
    SD3: {
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
    },
}
_BLOCK = re.compile(r"(\w+_blocks|transformer_blocks)\.(\d+)\.(.+)")


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
    widths = {down.shape[1] for path, (down, _, _) in layers.items() if path.endswith(("attn.to_q", "attn.to_k"))}
    kinds = {HIDDEN.get(width, "") for width in widths}
    if len(kinds) == 1 and "" not in kinds:
        return kinds.pop()
    raise ErasureError(
        "has names for the transformers of FLUX.1 and Stable Diffusion 3 alone, and the layers of this patch belong to "
        "neither or do not tell which: --format peft holds a low-rank patch under the names that diffusers reads"
    )


def original_layer(kind: str, path: str) -> tuple[str, int, int]:
    """Return the original layer of one of diffusers' layers, its number among those in it, and how many these are.

    Args:
        kind: `flux` or `sd3`.
        path: module path in diffusers' transformer.

    Raises:
        ErasureError: the original code has no such layer.
    """
    if path in ENDS[kind]:
        return ENDS[kind][path], 0, 1
    match = _BLOCK.fullmatch(path)
    if match and match[1] in BLOCKS[kind]:
        block, table = BLOCKS[kind][match[1]]
        for name, parts in table.items():
            if match[3] in parts:
                return f"{block}.{match[2]}.{name}", parts.index(match[3]), len(parts)
    raise ErasureError(f"has no name for the layer transformer.{path}")


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
