"""A Stable Diffusion 1.x pipeline with random weights, small enough for a test: about 100k parameters, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 12  # tokens in a prompt, the two special ones included
WIDTH = 32  # of the text embedding
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


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer of LENGTH tokens."""
    vocabulary, merges = tiny_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def tiny_text_encoder() -> CLIPTextModel:
    """A CLIPTextModel of two layers."""
    vocabulary, _ = tiny_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return CLIPTextModel(config)


def tiny_unet() -> UNet2DConditionModel:
    """A UNet of two levels with cross-attention in the lower one and in the middle."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


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


def tiny_pipeline(cls: type[Any] = StableDiffusionPipeline, seed: int = 0) -> Any:
    """A pipeline of class `cls` (any that takes SD 1.x components) with random weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder(), "vae": tiny_vae()}
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = cls(
        **{name: part.eval() for name, part in parts.items()},
        tokenizer=tiny_tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_tiny(folder: str | Path, seed: int = 0) -> Path:
    """Write the tiny pipeline as an ordinary diffusers folder; returns the folder."""
    target = Path(folder)
    tiny_pipeline(seed=seed).save_pretrained(target)
    index = json.loads((target / "model_index.json").read_text())
    if index["_class_name"] != "StableDiffusionPipeline":
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
