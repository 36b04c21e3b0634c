"""Full-size Stable Diffusion 1, 2 and XL on the meta device, and the names of their layers in ComfyUI and A1111.

The names were read in the sources of the two programs: comfy/lora.py, comfy/utils.py and
extensions-builtin/Lora/networks.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erasure.training.saliency import compvis_names

XL_BLOCKS = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        **XL_BLOCKS,
    },
}
# Width, number of layers and class of the text encoders.
TEXTS = {
    "sd1": {"text_encoder": (768, 12, CLIPTextModel)},
    "sd2": {"text_encoder": (1024, 23, CLIPTextModel)},
    "sdxl": {"text_encoder": (768, 12, CLIPTextModel), "text_encoder_2": (1280, 32, CLIPTextModelWithProjection)},
}


@cache
def pipeline(kind: str) -> Any:
    """Return an object with `unet`, `text_encoder` and for XL `text_encoder_2`, whose weights take no memory."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"unet": UNet2DConditionModel(sample_size=64, **UNETS[kind])}
        for name, (width, layers, cls) in TEXTS[kind].items():
            config = CLIPTextConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                intermediate_size=4 * width,
                projection_dim=width,
            )
            parts[name] = cls(config)
    return SimpleNamespace(**parts)


def modules(kind: str) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield component, path and module of every layer with a weight."""
    for component, root in vars(pipeline(kind)).items():
        for path, module in root.named_modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                yield component, path, module


def originals(kind: str) -> dict[str, str]:
    """Map diffusers' module paths of the UNet to the original ones."""
    names = compvis_names(pipeline(kind).unet)
    return {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in names.items()}


LINEAR = ("mlp_fc1", "mlp_fc2", *(f"self_attn_{leaf}_proj" for leaf in ("q", "k", "v", "out")))


def comfy(kind: str) -> set[str]:
    """Return every kohya key that ComfyUI has a layer for.

    In the UNet, these are all modules by their original and by diffusers' paths; in the text encoders, the six linear
    layers of each block.
    """
    keys = {f"lora_unet_{path.replace('.', '_')}" for pair in originals(kind).items() for path in pair}
    prefixes = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
    for component, (_, layers, _) in TEXTS[kind].items():
        for prefix in prefixes[component]:
            keys |= {f"{prefix}text_model_encoder_layers_{n}_{leaf}" for n in range(layers) for leaf in LINEAR}
    return keys | ({"lora_te2_text_projection"} if kind == "sdxl" else set())


OPEN_CLIP = ("ln_1", "attn", "attn_out_proj", "ln_2", "mlp_c_fc", "mlp_c_proj")


@cache
def a1111_layers(kind: str) -> set[str]:
    """Return the names that A1111 gives to the layers of a model, which it builds with the original code."""
    names = {f"diffusion_model_{path.replace('.', '_')}" for path in originals(kind).values()}
    starts = {"sd1": {"text_encoder": "transformer_"}, "sdxl": {"text_encoder": "0_transformer_"}}
    for component, start in starts.get(kind, {}).items():
        for part, path, _ in modules(kind):
            if part == component:
                names.add(f"{start}text_model_{path.removeprefix('text_model.').replace('.', '_')}")
    for start, layers in {"sd2": {"model_": 23}, "sdxl": {"1_model_": 32}}.get(kind, {}).items():
        names |= {f"{start}transformer_resblocks_{n}_{leaf}" for n in range(layers) for leaf in OPEN_CLIP}
        names |= {f"{start}token_embedding", f"{start}ln_final"}
    return names


RESNETS = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def a1111_name(key: str, kind: str) -> str:
    """Return the name that A1111 converts a kohya key to; it numbers blocks as in Stable Diffusion 1, three a level."""
    if match := re.fullmatch(r"lora_unet_conv_(in|out)", key):
        return {"in": "diffusion_model_input_blocks_0_0", "out": "diffusion_model_out_2"}[match[1]]
    if match := re.fullmatch(r"lora_unet_time_embedding_linear_(\d)", key):
        return f"diffusion_model_time_embed_{2 * int(match[1]) - 2}"
    if match := re.fullmatch(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", key):
        number = 3 * int(match[2]) + int(match[4]) + (match[1] == "down")
        side = {"down": "input", "up": "output"}[match[1]]
        return f"diffusion_model_{side}_blocks_{number}_{a1111_leaf(match[3], match[5])}"
    if match := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", key):
        attends, leaf = a1111_leaf(match[1], match[3]).split("_", 1)
        return f"diffusion_model_middle_block_{1 if int(attends) else 2 * int(match[2])}_{leaf}"
    if match := re.fullmatch(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", key):
        return f"diffusion_model_input_blocks_{3 + 3 * int(match[1])}_0_op"
    if match := re.fullmatch(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", key):
        return f"diffusion_model_output_blocks_{2 + 3 * int(match[1])}_{2 if int(match[1]) else 1}_conv"
    if match := re.fullmatch(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)", key):
        if not match[1] and kind != "sd2":
            return "transformer_" + key.removeprefix("lora_te_")
        leaf = match[3]
        for theirs, ours in {"mlp_fc1": "mlp_c_fc", "mlp_fc2": "mlp_c_proj", "self_attn": "attn"}.items():
            leaf = leaf.replace(theirs, ours)
        return f"{'1_' if match[1] else ''}model_transformer_resblocks_{match[2]}_{leaf}"
    return key


def a1111_leaf(sort: str, leaf: str) -> str:
    return f"0_{RESNETS.get(leaf, leaf)}" if sort == "resnets" else f"1_{leaf}"


def a1111(key: str, kind: str) -> bool:
    """Return whether A1111 has a layer for a kohya key, by its table or by the original name after the prefix."""
    layers, name = a1111_layers(kind), a1111_name(key, kind)
    candidates = [name, re.sub(r"_[qkv]_proj$", "", name), key.replace("lora_unet", "diffusion_model")]
    candidates += [key.replace("lora_te1_text_model", start + "transformer_text_model") for start in ("0_", "")]
    return any(candidate in layers for candidate in candidates)
