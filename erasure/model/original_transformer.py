"""Names of the layers and weights of FLUX.1 and Stable Diffusion 3 in their original code, from diffusers' names.

Checkpoints in one file use them, and kohya's and ComfyUI's LoRAs. The original code has one layer for queries, keys and
values, and in FLUX's single-stream blocks one for these and the first layer of the feed-forward network; diffusers has
one for each. Where a norm has a scale and a shift alone, their halves are in the other order.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError

FLUX, SD3 = "flux", "sd3"
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
# Weights that no LoRA changes: norms of queries and keys, and modulations that LoRA loaders do not know.
_NORMS = {
    "attn.norm_q": "query_norm",
    "attn.norm_k": "key_norm",
    "attn.norm_added_q": "query_norm",
    "attn.norm_added_k": "key_norm",
}
WEIGHTS: dict[str, dict[str, dict[str, str]]] = {
    FLUX: {
        "transformer_blocks": {
            path: f"{'txt' if 'added' in path else 'img'}_attn.norm.{name}" for path, name in _NORMS.items()
        },
        "single_transformer_blocks": {path: f"norm.{name}" for path, name in _NORMS.items() if "added" not in path},
    },
    SD3: {
        "transformer_blocks": {
            "attn.norm_q": "x_block.attn.ln_q",
            "attn.norm_k": "x_block.attn.ln_k",
            "attn2.norm_q": "x_block.attn2.ln_q",
            "attn2.norm_k": "x_block.attn2.ln_k",
            "attn.norm_added_q": "context_block.attn.ln_q",
            "attn.norm_added_k": "context_block.attn.ln_k",
            "norm1.linear": "x_block.adaLN_modulation.1",
            "norm1_context.linear": "context_block.adaLN_modulation.1",
        },
    },
}
WEIGHT_ENDS = {
    FLUX: {"norm_out.linear": "final_layer.adaLN_modulation.1"},
    SD3: {
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "pos_embed.proj": "x_embedder.proj",
        "pos_embed": "",
    },
}
CLASSES = {"FluxTransformer2DModel": FLUX, "SD3Transformer2DModel": SD3}
_BLOCK = re.compile(r"(\w+_blocks|transformer_blocks)\.(\d+)\.(.+)")


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


def transformer_tensors(transformer: Any) -> dict[str, Tensor]:
    """Return the weights of a transformer by their original names and in their original shapes.

    Args:
        transformer: diffusers' transformer of FLUX.1 or Stable Diffusion 3.

    Raises:
        ErasureError: it is another transformer.
    """
    kind = CLASSES.get(type(transformer).__name__)
    if kind is None:
        raise ErasureError(
            f"{type(transformer).__name__} has no original names here; those of {', '.join(CLASSES)} are known"
        )
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}.norm1_context.linear"
    found: dict[str, dict[int, Tensor]] = {}
    for name, value in transformer.state_dict().items():
        path, _, leaf = name.rpartition(".")
        layer, part = _original(kind, path)
        # The last block of Stable Diffusion 3 only scales and shifts its text states.
        if path == "norm_out.linear" or (kind == SD3 and path == last):
            value = torch.cat(value.chunk(2)[::-1])
        if kind == FLUX and layer.endswith("_norm"):
            leaf = "scale"
        found.setdefault(f"{layer}.{leaf}".lstrip("."), {})[part] = value
    return {
        name: torch.cat([parts[number] for number in sorted(parts)]) if len(parts) > 1 else parts[0]
        for name, parts in found.items()
    }


def _original(kind: str, path: str) -> tuple[str, int]:
    """Return the original layer of a layer, and the number of its part in it."""
    if path in WEIGHT_ENDS[kind]:
        return WEIGHT_ENDS[kind][path], 0
    if (match := _BLOCK.fullmatch(path)) and (name := WEIGHTS[kind].get(match[1], {}).get(match[3])):
        return f"{BLOCKS[kind][match[1]][0]}.{match[2]}.{name}", 0
    return original_layer(kind, path)[:2]
