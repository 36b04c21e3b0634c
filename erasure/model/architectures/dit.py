"""Transformers with cross-attention to text that is constant over depth: PixArt and SANA.

PixArt predicts noise, and beside it a variance that is left out here, and is told integer timesteps. SANA predicts the
velocity of rectified flow and is told 1000 sigma, times the scale that its configuration states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.model.architectures.architecture import (
    Architecture,
    Options,
    default,
    ends,
    holds,
    missing,
    sides,
    starts,
    times,
)
from erasure.model.architectures.flow import flow_sampler, flow_schedule, solver_grid
from erasure.model.architectures.text_length import check_length
from erasure.model.conditioning import Conditions, place


class CrossAttention(Architecture):
    """What the transformers with cross-attention have in common."""

    component = "transformer"
    masked_text = True
    roles = {
        "self-attention": holds(".attn1."),
        "cross-attention": holds(".attn2."),
        "text entry": starts("caption_projection."),
        "feed-forward": holds(".ff."),
        "modulation": holds("adaln_single", "time_embed"),
    }
    variants = {
        "x": ("cross-attention: query, key, value and output", holds(".attn2.")),
        "x-strict": ("cross-attention: key and value", ends("attn2.to_k", "attn2.to_v")),
        "qk": ("cross-attention: query and key", ends("attn2.to_q", "attn2.to_k")),
        "attention": ("self- and cross-attention", holds(".attn1.", ".attn2.")),
        "selfattn": ("self-attention", holds(".attn1.")),
        "u": ("all but cross-attention", lambda path: ".attn2." not in path),
        "transformer": ("every layer of the transformer blocks", starts("transformer_blocks.")),
        "linear": ("linear layers of self-attention and feed-forward", holds(".attn1.", ".ff.")),
        "full": ("every Linear and Conv2d", lambda path: True),
    }

    def check(self, pipe: Any) -> None:
        """Refuse a pipeline without the text encoder that its prompts need."""
        if absent := missing(pipe, ("tokenizer", "text_encoder")):
            raise ErasureError(
                f"{type(pipe).__name__} lacks {', '.join(absent)}: a transformer without its text encoder cannot be "
                "told what to erase. Give the whole diffusers folder, or load the encoder into the pipeline"
            )

    @torch.no_grad()
    def rows(self, pipe: Any, conditions: Conditions) -> Tensor:
        """Return the states that keys and values read, of those tokens that the mask of the padding leaves."""
        weight = pipe.transformer.caption_projection.linear_1.weight
        states = conditions.states[0] if conditions.mask is None else conditions.states[0][conditions.mask[0].bool()]
        if not weight.is_meta:  # a module that is loaded for its call alone takes states of any device
            states = states.to(weight.device)
        return self.captioned(pipe.transformer, states.to(weight.dtype))

    def captioned(self, transformer: Any, states: Tensor) -> Tensor:
        """Return text states [tokens, width] as the blocks read them, behind the caption projection."""
        return transformer.caption_projection(states)

    def as_read(self, pipe: Any, prompt: str, options: Options) -> str:
        """Return the prompt in lower case, and cleaned if the pipeline cleans captions."""
        (text,) = pipe._text_preprocessing(prompt, clean_caption=cleans(pipe, options))
        return str(text)

    def latent_shape(self, pipe: Any, options: Options) -> tuple[int, int, int]:
        """Return the shape that the transformer's configuration states, or that of the options' height and width."""
        config = pipe.transformer.config
        return (config.in_channels, *sides(pipe, options, config.sample_size))


class PixArt(CrossAttention):
    """PixArt-alpha and PixArt-Sigma: one T5 (or another encoder of that place), padding masked."""

    name = "pixart"
    network = "PixArtTransformer2DModel"
    pipelines = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    samplers = ("ddim",)
    causal_text = False

    def encode(self, pipe: Any, prompt: str, options: Options) -> Conditions:
        """Return the states of the text encoder and the mask of its padding."""
        alpha = type(pipe).__name__.endswith("PixArtAlphaPipeline")
        length = default(pipe, options, "max_sequence_length", 120 if alpha else 300)
        return encoded(pipe, prompt, options, length)

    def predict(self, pipe: Any, x: Tensor, t: Any, conditions: Conditions, options: Options) -> Tensor:
        """Return the noise; the variance in the other half of the output is left out."""
        transformer = pipe.transformer
        dtype, n = transformer.dtype, len(x)
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.config.use_additional_conditions:
            height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
            added = {
                "resolution": torch.tensor([[height, width]] * n, device=x.device, dtype=dtype),
                "aspect_ratio": torch.tensor([[height / width]] * n, device=x.device, dtype=dtype),
            }
        out = transformer(
            x.to(dtype),
            encoder_hidden_states=conditions.states.to(dtype),
            encoder_attention_mask=conditions.mask,
            timestep=times(t, x),
            added_cond_kwargs=added,
        ).sample
        return out[:, : x.shape[1]]

    def sampler(self, pipe: Any, kind: str) -> Any:
        """Return a DDIM sampler with the checkpoint's noise schedule."""
        from diffusers import DDIMScheduler

        self.checked_sampler(kind)
        return DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)

    def schedule(self, pipe: Any, kind: str, steps: int, shape: tuple[int, int, int], device: torch.device) -> Any:
        """Return the sampler with its timesteps, which do not depend on the size."""
        sampler = self.sampler(pipe, kind)
        sampler.set_timesteps(steps, device=device)
        return sampler


def encoded(pipe: Any, prompt: str, options: Options, length: int, **more: Any) -> Conditions:
    """Return the states of the text encoder for one prompt, and the mask of its padding.

    Args:
        pipe: the diffusers pipeline.
        prompt: the prompt.
        options: of the checkpoint.
        length: number of tokens that are read.
        more: other arguments of the pipeline's `encode_prompt`.

    Raises:
        ErasureError: the prompt has more tokens.
    """
    check_length(pipe, prompt, {"tokenizer": length})
    how = {"clean_caption": cleans(pipe, options), "max_sequence_length": length, **more}
    device = place(pipe, pipe.transformer)
    with torch.no_grad():
        states, mask, _, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=device, **how)
    return Conditions(states, mask=mask)


def cleans(pipe: Any, options: Options) -> bool:
    """Tell whether the pipeline cleans captions: it has to be told so, and to have the libraries."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    return bool(default(pipe, options, "clean_caption", False)) and is_bs4_available() and is_ftfy_available()


DEPTHWISE = ".conv_depth"  # SANA's convolution of each channel by itself, which no low-rank term can change


class Sana(CrossAttention):
    """SANA 1 and 1.5: linear self-attention, the states of Gemma, flow matching."""

    name = "sana"
    network = "SanaTransformer2DModel"
    pipelines = ("SanaPipeline",)
    flow = True
    samplers = ("euler",)
    variants = {
        **CrossAttention.variants,
        "transformer": (
            "every layer of the transformer blocks but their depthwise convolutions",
            lambda path: path.startswith("transformer_blocks.") and not path.endswith(DEPTHWISE),
        ),
        "linear": (
            "linear layers of self-attention, and of the feed-forward layers what reads one pixel alone",
            lambda path: holds(".attn1.", ".ff.")(path) and not path.endswith(DEPTHWISE),
        ),
    }

    def check(self, pipe: Any) -> None:
        """Refuse a pipeline without its text encoder, and SANA-Sprint, which is told a guidance scale."""
        super().check(pipe)
        if pipe.transformer.config.guidance_embeds:
            raise ErasureError(
                f"{type(pipe).__name__}: its transformer was distilled to be told the guidance scale (SANA-Sprint), "
                "which is not supported. Give a SANA of classifier-free guidance"
            )

    def captioned(self, transformer: Any, states: Tensor) -> Tensor:
        """Return text states [tokens, width] as the blocks read them, behind the caption projection and its norm."""
        return transformer.caption_norm(transformer.caption_projection(states))

    def encode(self, pipe: Any, prompt: str, options: Options) -> Conditions:
        """Return the states of the text encoder and the mask of its padding.

        The pipeline writes its instruction before a prompt, and none before the empty one of guidance.
        """
        length = default(pipe, options, "max_sequence_length", 300)
        instruction = default(pipe, options, "complex_human_instruction") if prompt else None
        return encoded(pipe, prompt, options, length, complex_human_instruction=instruction)

    def predict(self, pipe: Any, x: Tensor, t: Any, conditions: Conditions, options: Options) -> Tensor:
        """Return the velocity that the transformer predicts."""
        transformer = pipe.transformer
        dtype = transformer.dtype
        return transformer(
            x.to(dtype),
            encoder_hidden_states=conditions.states.to(dtype),
            encoder_attention_mask=conditions.mask,
            timestep=times(t, x) * transformer.config.timestep_scale,
        ).sample

    def sampler(self, pipe: Any, kind: str) -> Any:
        """Return an Euler sampler of the flow, with the shift of the pipeline's scheduler."""
        return flow_sampler(pipe.scheduler, self.checked_sampler(kind))

    def schedule(self, pipe: Any, kind: str, steps: int, shape: tuple[int, int, int], device: torch.device) -> Any:
        """Return the sampler with the sigmas that the pipeline would walk, which do not depend on the size."""
        return flow_schedule(self.sampler(pipe, kind), steps, device, 0, grid=solver_grid(pipe.scheduler, steps))
