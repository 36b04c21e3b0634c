"""The UNet of Stable Diffusion 1, 2 and XL: cross-attention (`attn2`) to text states that do not change with depth.

It predicts noise, v or clean latents, as the scheduler's configuration says, and is told integer timesteps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.model import conditioning
from erasure.model.architectures.architecture import Architecture, Options, ends, holds
from erasure.model.conditioning import Conditions


class UNet(Architecture):
    """The UNet2DConditionModel of Stable Diffusion 1, 2 and XL."""

    name = "unet"
    component = "unet"
    network = "UNet2DConditionModel"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    samplers = ("ddim", "pndm")
    roles = {
        "self-attention": holds("attn1"),
        "cross-attention": holds("attn2"),
        "text entry": ends("attn2.to_k", "attn2.to_v"),
        "feed-forward": holds(".ff."),
        "modulation": holds("time_emb_proj"),
    }
    variants = {
        "x": ("cross-attention: query, key, value and output", holds("attn2")),
        "x-strict": ("cross-attention: key and value", ends("attn2.to_k", "attn2.to_v")),
        "qk": ("cross-attention: query and key", ends("attn2.to_q", "attn2.to_k")),
        "attention": ("self- and cross-attention", holds("attn1", "attn2")),
        "selfattn": ("self-attention", holds("attn1")),
        "u": ("all but cross-attention", lambda path: "attn2" not in path),
        "transformer": ("every layer of the transformer blocks", holds(".attentions.")),
        "linear": (
            "linear layers of self-attention, feed-forward and time projections",
            holds("attn1", ".ff.", "time_emb_proj"),
        ),
        "full": ("every Linear and Conv2d", lambda path: True),
    }

    def check(self, pipe: Any) -> None:
        """Refuse a pipeline without tokenizers or text encoders, or whose UNet reads more than latents."""
        if not hasattr(pipe, "unet") or not hasattr(pipe, "text_encoder"):
            raise ErasureError(
                f"{type(pipe).__name__} is not a Stable Diffusion pipeline: it has no unet or no text_encoder"
            )
        conditioning.text_encoders(pipe)  # raises an error if a tokenizer or text encoder is missing
        channels, vae = pipe.unet.config.in_channels, getattr(pipe, "vae", None)
        latents = vae.config.latent_channels if vae is not None else channels
        if channels != latents:
            raise ErasureError(
                f"{type(pipe).__name__}: its UNet reads {channels} channels, {latents} of them latents (inpainting, "
                "depth or editing). Erase from the text-to-image model of the family, and load the patch into this one"
            )

    def encode(self, pipe: Any, prompt: str, options: Options) -> Conditions:
        """Return the states of the text encoders, and on XL the pooled text."""
        return conditioning.encode_prompt(pipe, prompt)

    def unconditional(self, pipe: Any, empty: Conditions) -> Conditions:
        """Return zeros on XL if the pipeline is so configured, else the encoding."""
        return conditioning.unconditional(pipe, empty)

    def predict(self, pipe: Any, x: Tensor, t: Any, conditions: Conditions, options: Options) -> Tensor:
        """Return noise, v or clean latents, depending on the checkpoint."""
        return conditioning.predict(pipe, x, t, conditions)

    def still(self, pipe: Any, paths: Iterable[str]) -> bool:
        """Tell whether all modules belong to cross-attention and the empty prompt's states are all zeros, as on XL.

        Keys and values of cross-attention are then zero whatever the weights are, so cross-attention adds nothing.
        """
        return conditioning.blank(pipe) and all("attn2" in path for path in paths)

    def latent_shape(self, pipe: Any, options: Options) -> tuple[int, int, int]:
        """Return the shape that the UNet's configuration states."""
        config = pipe.unet.config
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return config.in_channels, height, width

    def sampler(self, pipe: Any, kind: str) -> Any:
        """Return a DDIM or PNDM sampler."""
        from diffusers import DDIMScheduler, PNDMScheduler

        config = pipe.scheduler.config
        # Schedulers such as XL's do not clip and have no such entry, while DDIM clips by default.
        extra = {"clip_sample": False} if kind == "ddim" and "clip_sample" not in config else {}
        classes = {"ddim": DDIMScheduler, "pndm": PNDMScheduler}
        return classes[self.checked_sampler(kind)].from_config(config, **extra)

    def schedule(self, pipe: Any, kind: str, steps: int, shape: tuple[int, int, int], device: torch.device) -> Any:
        """Return the sampler with its timesteps, which do not depend on the size."""
        sampler = self.sampler(pipe, kind)
        sampler.set_timesteps(steps, device=device)
        return sampler
