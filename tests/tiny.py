"""Stable Diffusion pipelines with random weights, small enough for a test: about 100k parameters, no network.

Kinds: sd1; sd2-v, with linear projections, OpenCLIP's activation and v-prediction; sdxl, with two text encoders of
unlike width, pooled text and sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from erasure.model.clip_tokenizer import END, clip_tokenizer
from erasure.model.single_file import carried

LENGTH = 12  # tokens in a prompt, the two special ones included
WIDTH = 32  # of the text embedding
WIDTH_2 = 24  # of the second one, on XL
SIDE = 8  # latent pixels; images are 16 x 16
WORDS = "a an the of in by at photo painting style cat dog car tree church van gogh monet red blue starry night".split()


def tiny_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE that knows each of WORDS as one token."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
            parts[-2:] = ["".join(pair)]
            if parts[-1] not in tokens:
                tokens.append(parts[-1])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def tiny_tokenizer(**options: Any) -> CLIPTokenizer:
    """A CLIPTokenizer of LENGTH tokens."""
    vocabulary, merges = tiny_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH, **options)


def tiny_text_encoder(cls: type[Any] = CLIPTextModel, width: int = WIDTH, activation: str = "quick_gelu") -> Any:
    """A CLIPTextModel, or one with a projection, of two layers."""
    vocabulary, _ = tiny_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        hidden_act=activation,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return cls(config)


XL = {
    "cross_attention_dim": WIDTH + WIDTH_2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH_2 + 6 * 8,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}
KINDS = ("sd1", "sd2-v", "sdxl")
DIFFERS = {"sd1": {}, "sd2-v": {"use_linear_projection": True}, "sdxl": XL}  # the UNets


def tiny_unet(kind: str = "sd1") -> UNet2DConditionModel:
    """A UNet of two levels with cross-attention in the lower one and in the middle."""
    config = {
        "sample_size": SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **DIFFERS[kind]})


def tiny_vae() -> AutoencoderKL:
    """An autoencoder that halves each side."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=2 * SIDE,
    )


def tiny_pipeline(cls: type[Any] | None = None, seed: int = 0, kind: str = "sd1") -> Any:
    """A pipeline of class `cls` (any that takes the kind's components) with random weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        activation = "gelu" if kind == "sd2-v" else "quick_gelu"
        parts = {"unet": tiny_unet(kind), "text_encoder": tiny_text_encoder(activation=activation), "vae": tiny_vae()}
        if kind == "sdxl":
            parts["text_encoder_2"] = tiny_text_encoder(CLIPTextModelWithProjection, WIDTH_2, "gelu")
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction" if kind == "sd2-v" else "epsilon",
        "steps_offset": 1,
    }
    if kind == "sdxl":
        more = {"tokenizer_2": tiny_tokenizer(pad_token="!"), "scheduler": EulerDiscreteScheduler(**schedule)}
    else:
        more = {
            "scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **schedule),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    cls = cls or (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline)
    pipe = cls(**{name: part.eval() for name, part in parts.items()}, tokenizer=tiny_tokenizer(), **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shrunk_pipeline(kind: str = "sd1", seed: int = 0) -> Any:
    """The true architecture of Stable Diffusion 1 or 2 with random weights, at about a tenth of its width.

    The numbers of blocks, layers and tokens are the true ones, and so is the tokenizer.
    """
    detected = carried(kind)
    files = {name: dict(values) for name, values in detected.files.items()}
    text, unet, vae = (files[f"{part}/config.json"] for part in ("text_encoder", "unet", "vae"))
    heads = text["num_attention_heads"]
    text |= {"hidden_size": 10 * heads, "intermediate_size": 40 * heads, "projection_dim": 10 * heads}
    unet |= {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 10 * heads, "attention_head_dim": 4}
    vae |= {"block_out_channels": [32, 32, 64, 64]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "unet": UNet2DConditionModel.from_config(unet),
            "vae": AutoencoderKL.from_config(vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(text)),
        }
    return StableDiffusionPipeline(
        **{name: part.eval() for name, part in parts.items()},
        tokenizer=clip_tokenizer(detected.pads.get("tokenizer", END)),
        scheduler=DDIMScheduler.from_config(files["scheduler/scheduler_config.json"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_tiny(folder: str | Path, seed: int = 0, kind: str = "sd1") -> Path:
    """Write the tiny pipeline as an ordinary diffusers folder; returns the folder."""
    target = Path(folder)
    tiny_pipeline(seed=seed, kind=kind).save_pretrained(target)
    index = json.loads((target / "model_index.json").read_text())
    if index["_class_name"] != f"StableDiffusion{'XL' if kind == 'sdxl' else ''}Pipeline":
        raise RuntimeError(f"unexpected class in model_index.json: {index['_class_name']}")
    return target


def latents(pipe: Any, prompts: list[str], seed: int = 0, steps: int = 2, guidance: float = 7.5, **more: Any) -> Any:
    """Final latents [prompts x images, 4, SIDE, SIDE] for `prompts`; the noise of row i is drawn from `seed` + i."""
    rows = len(prompts) * more.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    noise = torch.stack([torch.randn(4, SIDE, SIDE, generator=generator) for generator in generators])
    return pipe(
        prompts, latents=noise, num_inference_steps=steps, guidance_scale=guidance, output_type="latent", **more
    ).images


def write_tiny_clip(folder: str | Path, seed: int = 0, layers: int = 2, width: int = WIDTH) -> Path:
    """Write a CLIP of transformers with random weights, whose text tower has the shapes of the tiny text encoder.

    Returns the folder.
    """
    text = {**tiny_text_encoder(width=width).config.to_dict(), "num_hidden_layers": layers}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 2 * SIDE,
        "patch_size": SIDE,
        "projection_dim": width,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    clip.save_pretrained(folder)
    return Path(folder)


def with_words(letters: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return a vocabulary of the letters and of what WORDS are merged from, end first, and the merges."""
    vocabulary, merges = list(letters), list[tuple[str, str]]()
    for word in WORDS:
        parts = list(word)
        while len(parts) > 1:
            pair = (parts[-2], parts[-1])
            parts[-2:] = ["".join(pair)]
            merges += [pair] if pair not in merges else []
            vocabulary += [parts[-1]] if parts[-1] not in vocabulary else []
    return vocabulary, merges
