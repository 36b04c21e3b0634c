"""Parameter names of the original Stable Diffusion code (CompVis, later Stability's SGM), from diffusers' names.

Single-file checkpoints and the published masks of SalUn use the original names. For the UNet and for CLIP only the
names differ. In the autoencoder's attention the original layers are 1x1 convolutions [out, in, 1, 1]. OpenCLIP, the
text encoder of Stable Diffusion 2 and the second text encoder of XL, stores query, key and value as one tensor, and
its projection transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def compvis_names(unet: Any) -> dict[str, str]:
    """Map the parameter names of a UNet (Stable Diffusion 1, 2 or XL) to the original names.

    The prefix `model.diffusion_model.` of single-file checkpoints is left out.
    """
    layers = unet.config.layers_per_block

    def attends(level: int) -> bool:
        return bool(getattr(unet.up_blocks[level], "attentions", None))

    return {name: original_name(name, layers, attends) for name, _ in unet.named_parameters()}


def original_name(name: str, layers: int, attends: Callable[[int], bool]) -> str:
    """Return the original name of one parameter of a UNet.

    Args:
        name: the name in diffusers.
        layers: `layers_per_block` of the UNet.
        attends: tells for a level of the upward half whether its blocks have attention; only asked for upsamplers.
    """
    path, _, leaf = name.rpartition(".")
    if path in ENDS:
        return f"{ENDS[path]}.{leaf}"
    parts = name.split(".")
    if parts[0] == "mid_block":
        place = "middle_block.1" if parts[1] == "attentions" else f"middle_block.{2 * int(parts[2])}"
        return f"{place}.{_inner(parts[1], parts[3:])}"
    level, kind, number = int(parts[1]), parts[2], int(parts[3])
    if parts[0] == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{leaf}"
        return f"input_blocks.{(layers + 1) * level + number + 1}.{int(kind == 'attentions')}.{_inner(kind, parts[4:])}"
    start = (layers + 1) * level
    if kind == "upsamplers":
        return f"output_blocks.{start + layers}.{1 + attends(level)}.conv.{leaf}"
    return f"output_blocks.{start + number}.{int(kind == 'attentions')}.{_inner(kind, parts[4:])}"


def _inner(kind: str, parts: list[str]) -> str:
    return ".".join([RESNET[parts[0]], *parts[1:]]) if kind == "resnets" else ".".join(parts)


def vae_names(vae: Any) -> dict[str, str]:
    """Map the parameter names of an autoencoder to the original names.

    The prefix `first_stage_model.` of single-file checkpoints is left out.
    """
    levels = len(vae.config.block_out_channels)
    return {name: _vae(name, levels) for name, _ in vae.named_parameters()}


ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae(name: str, levels: int) -> str:
    path, _, leaf = name.rpartition(".")
    parts = path.split(".")
    if len(parts) == 1:  # quant_conv, post_quant_conv
        return name
    half, inside = parts[0], parts[1:]  # encoder or decoder, and the path in it
    if inside[0] == "mid_block":
        inner = ".".join(inside[3:])
        place = (
            f"attn_1.{ATTENTION[inner]}" if inside[1] == "attentions" else f"block_{int(inside[2]) + 1}.{_short(inner)}"
        )
        return f"{half}.mid.{place}.{leaf}"
    if inside[0] in ("down_blocks", "up_blocks"):
        side = inside[0].removesuffix("_blocks")
        level = int(inside[1]) if side == "down" else levels - 1 - int(inside[1])
        inner = f"block.{inside[3]}.{_short(inside[4])}" if inside[2] == "resnets" else f"{side}sample.conv"
        return f"{half}.{side}.{level}.{inner}.{leaf}"
    return f"{half}.{inside[0].replace('conv_norm_out', 'norm_out')}.{leaf}"


def _short(layer: str) -> str:
    return "nin_shortcut" if layer == "conv_shortcut" else layer


OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    """Return an autoencoder's weights by their original names and in their original shapes."""
    names, tensors = vae_names(vae), {}
    for name, value in vae.named_parameters():
        flat = ".attentions." in name and value.dim() == 2
        tensors[names[name]] = value[:, :, None, None] if flat else value
    return tensors


def clip_tensors(encoder: Any) -> dict[str, Tensor]:
    """Return a CLIP text encoder's weights by their original names, all of which begin with `text_model.`."""
    return {f"text_model.{_bare(name)}": value for name, value in encoder.named_parameters()}


def open_clip_tensors(encoder: Any) -> dict[str, Tensor]:
    """Return a CLIP text encoder's weights as OpenCLIP names and packs them."""
    weights = {_bare(name): value for name, value in encoder.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in OPEN_CLIP:
            tensors[OPEN_CLIP[name]] = value
        elif name == "text_projection.weight":
            tensors["text_projection"] = value.T
        else:
            _, _, number, layer = name.split(".", 3)
            layer, _, leaf = layer.rpartition(".")
            block = f"transformer.resblocks.{number}"
            if layer == "self_attn.q_proj":
                start = name.removesuffix(f"q_proj.{leaf}")
                packed = [weights[f"{start}{letter}_proj.{leaf}"].detach() for letter in "qkv"]
                tensors[f"{block}.attn.in_proj_{leaf}"] = torch.cat(packed)
            elif layer in OPEN_CLIP_LAYER:
                tensors[f"{block}.{OPEN_CLIP_LAYER[layer]}.{leaf}"] = value
    return tensors


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")
