"""A pipeline of Qwen-Image with random weights of the true classes, small enough for a test."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from erasure.model.architectures.mmdit import pack, unpack
from tests.tiny import SIDE, WIDTH, WORDS, with_words

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE as Qwen's: no start or end token, and most of WORDS one token, another one behind a space."""
    vocabulary, merges = with_words(sorted(ByteLevel.alphabet()))
    merges += [("Ġ", word) for word in WORDS]
    numbers = {token: i for i, token in enumerate([*vocabulary, *("Ġ" + word for word in WORDS), *SPECIAL])}
    return Qwen2Tokenizer(vocab=numbers, merges=merges, extra_special_tokens=SPECIAL[1:])


def tiny_qwen(cls: type[Any] = QwenImagePipeline, seed: int = 0, **changes: Any) -> Any:
    """A pipeline of Qwen-Image, whose autoencoder halves each side.

    Args:
        cls: a class that takes its components.
        seed: of the weights.
        changes: of the transformer's configuration.
    """
    tokenizer = tiny_qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            **{
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": WIDTH,
                "axes_dims_rope": (2, 2, 4),
                **changes,
            }
        )
        encoder = Qwen2_5_VLForConditionalGeneration(config)
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 1.5, 0.5],
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    parts = {"transformer": transformer.eval(), "text_encoder": encoder.eval(), "vae": vae.eval()}
    pipe = cls(**parts, tokenizer=tokenizer, scheduler=scheduler)
    pipe.default_sample_size = SIDE
    pipe.prompt_template_encode_start_idx = len(tokenizer(pipe.prompt_template_encode.split("{}")[0]).input_ids)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asked(pipe: Any, x: torch.Tensor, t: torch.Tensor, prompt: str) -> torch.Tensor:
    """The network's output for a prompt, asked for as diffusers' pipeline does, without our code but `pack`."""
    states, mask = pipe.encode_prompt([prompt or " "] * len(x))
    out = pipe.transformer(
        hidden_states=pack(x),
        timestep=t / 1000,
        encoder_hidden_states=states,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, SIDE // 2, SIDE // 2)]] * len(x),
    ).sample
    return unpack(out, SIDE, SIDE)
