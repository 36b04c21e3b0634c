"""Transformers whose attention joins text and image: Stable Diffusion 3 and FLUX.1.

Text states change with depth, image and time, and pooled text is a second route into every modulation layer. Both
predict the velocity of rectified flow, v = noise - image at x = (1 - sigma) image + sigma noise (arXiv 2403.03206,
section 2). At fixed x, image and noise are affine in v, so a target whose coefficients sum to 1 means the same in all
three. SD3 is told 1000 sigma, FLUX sigma itself.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

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
from erasure.model.architectures.flow import flow_sampler, flow_schedule
from erasure.model.architectures.text_length import check_length
from erasure.model.conditioning import Conditions, place

LOG = logging.getLogger("erasure")
ENCODERS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
TEXT_STREAM = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
KEYS_AND_VALUES = ("to_k", "to_v", "add_k_proj", "add_v_proj")
QUERIES_AND_KEYS = ("to_q", "to_k", "add_q_proj", "add_k_proj")
ATTENTION = (".attn.", ".attn2.")
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def joint_queries_and_keys(path: str) -> bool:
    """Tell whether a module makes queries or keys of an attention that both streams share."""
    return path.startswith("transformer_blocks.") and ".attn." in path and path.endswith(QUERIES_AND_KEYS)


class JointAttention(Architecture):
    """What the transformers with joint attention have in common."""

    component = "transformer"
    joint = True
    flow = True
    plain_sigmas: ClassVar[bool] = False  # the pipeline's grid of sigmas: see `flow_schedule`
    samplers = ("euler",)
    variants = {
        "x": ("attention: queries, keys, values and outputs of both streams", holds(*ATTENTION)),
        "x-strict": ("attention: keys and values of both streams", ends(*KEYS_AND_VALUES)),
        "qk": ("attention of the two-stream blocks: queries and keys of both streams", joint_queries_and_keys),
        "text": ("attention: the text stream's queries, keys, values and outputs", ends(*TEXT_STREAM)),
        "u": ("all but attention", lambda path: not holds(*ATTENTION)(path)),
        "transformer": ("every layer of the transformer blocks", starts(*BLOCKS)),
        "full": ("every Linear and Conv2d", lambda path: True),
    }

    def check(self, pipe: Any) -> None:
        """Refuse a pipeline without the text encoders that its prompts need."""
        if absent := missing(pipe, ENCODERS):
            raise ErasureError(
                f"{type(pipe).__name__} lacks {', '.join(absent)}: a transformer without its text encoders cannot be "
                "told what to erase. Give the whole diffusers folder, or load the encoders into the pipeline"
            )

    def sampler(self, pipe: Any, kind: str) -> Any:
        """Return an Euler sampler of the flow."""
        return flow_sampler(pipe.scheduler, self.checked_sampler(kind))

    def schedule(self, pipe: Any, kind: str, steps: int, shape: tuple[int, int, int], device: torch.device) -> Any:
        """Return the sampler with the sigmas that the pipeline would walk for images of this size."""
        return flow_schedule(
            self.sampler(pipe, kind),
            steps,
            device,
            (shape[1] // 2) * (shape[2] // 2),  # tokens of 2x2 latent pixels
            plain_sigmas=self.plain_sigmas,
        )


class SD3(JointAttention):
    """Stable Diffusion 3 and 3.5: two CLIPs and T5 in one sequence, the CLIPs' pooled text beside it."""

    name = "sd3"
    network = "SD3Transformer2DModel"
    pipelines = ("StableDiffusion3Pipeline",)
    roles = {
        "joint attention": holds(".attn."),
        "text stream": ends(*TEXT_STREAM),
        "self-attention": holds(".attn2."),
        "text entry": starts("context_embedder"),
        "pooled text entry": starts("time_text_embed.text_embedder.linear_1"),
        "feed-forward": holds(".ff.", ".ff_context."),
        "modulation": ends("norm1.linear", "norm1_context.linear", "norm_out.linear"),
    }
    optional = frozenset({"self-attention"})  # only in the first blocks of 3.5-medium

    def check(self, pipe: Any) -> None:
        """Refuse a pipeline without its CLIPs, and say so if it lacks T5."""
        super().check(pipe)
        if missing(pipe, ("tokenizer_3", "text_encoder_3")):
            LOG.warning(
                "no T5 (text_encoder_3) is loaded: zeros stand for its states, as in diffusers. What is trained like "
                "this fits a pipeline that draws without T5"
            )

    def encode(self, pipe: Any, prompt: str, options: Options) -> Conditions:
        """Return the states of the CLIPs and of T5 one after the other (zeros without T5), and the pooled text."""
        length = default(pipe, options, "max_sequence_length", 256)
        check_length(pipe, prompt, {"tokenizer": None, "tokenizer_2": None, "tokenizer_3": length})
        with torch.no_grad():
            states, _, pooled, _ = pipe.encode_prompt(
                prompt,
                prompt,
                prompt,
                device=place(pipe, pipe.transformer),
                do_classifier_free_guidance=False,
                max_sequence_length=length,
            )
        return Conditions(states, pooled)

    def predict(self, pipe: Any, x: Tensor, t: Any, conditions: Conditions, options: Options) -> Tensor:
        """Return the velocity that the transformer predicts."""
        dtype = pipe.transformer.dtype
        return pipe.transformer(
            x.to(dtype),
            encoder_hidden_states=conditions.states.to(dtype),
            pooled_projections=pooled(conditions).to(dtype),
            timestep=times(t, x),
        ).sample

    def latent_shape(self, pipe: Any, options: Options) -> tuple[int, int, int]:
        """Return the shape that the transformer's configuration states, or that of the options' height and width."""
        config = pipe.transformer.config
        return (config.in_channels, *sides(pipe, options, config.sample_size))


class Flux(JointAttention):
    """FLUX.1: T5's states in two-stream and then one-stream blocks, CLIP's pooled text in every modulation."""

    name = "flux"
    network = "FluxTransformer2DModel"
    pipelines = ("FluxPipeline",)
    plain_sigmas = True
    guidance = "true_cfg_scale"
    roles = {
        "joint attention": lambda path: ".attn." in path and path.startswith("transformer_blocks."),
        "text stream": ends(*TEXT_STREAM),
        "single-stream attention": lambda path: ".attn." in path and path.startswith("single_"),
        "single-stream blocks": starts("single_transformer_blocks."),
        "text entry": starts("context_embedder"),
        "pooled text entry": starts("time_text_embed.text_embedder.linear_1"),
        "feed-forward": holds(".ff.", ".ff_context.", ".proj_mlp"),
        "modulation": ends("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"),
    }

    def encode(self, pipe: Any, prompt: str, options: Options) -> Conditions:
        """Return T5's states, padding included, and CLIP's pooled text."""
        length = default(pipe, options, "max_sequence_length", 512)
        check_length(pipe, prompt, {"tokenizer": None, "tokenizer_2": length})
        with torch.no_grad():
            states, pooled, _ = pipe.encode_prompt(
                prompt, prompt, device=place(pipe, pipe.transformer), max_sequence_length=length
            )
        return Conditions(states, pooled)

    def predict(self, pipe: Any, x: Tensor, t: Any, conditions: Conditions, options: Options) -> Tensor:
        """Return the velocity; the transformer reads and writes tokens of 2x2 latent pixels."""
        transformer, (n, _, height, width) = pipe.transformer, x.shape
        dtype, guidance = transformer.dtype, None
        if transformer.config.guidance_embeds:
            guidance = torch.full([n], float(default(pipe, options, "guidance_scale", 3.5)), device=x.device)
        out = transformer(
            pack(x).to(dtype),
            encoder_hidden_states=conditions.states.to(dtype),
            pooled_projections=pooled(conditions).to(dtype),
            timestep=times(t, x) / 1000,
            img_ids=places(height // 2, width // 2).to(x.device, dtype),
            txt_ids=torch.zeros(conditions.states.shape[1], 3, device=x.device, dtype=dtype),
            guidance=guidance,
        ).sample
        return unpack(out, height, width)

    def latent_shape(self, pipe: Any, options: Options) -> tuple[int, int, int]:
        """Return the shape of unpacked latents, of the options' height and width or else of the pipeline's."""
        native = getattr(pipe, "default_sample_size", 128)
        height, width = (side // 2 * 2 for side in sides(pipe, options, native))
        return pipe.transformer.config.in_channels // 4, height, width

    def distilled(self, pipe: Any) -> bool:
        """Tell whether guidance is an input of the network, as in FLUX.1-dev."""
        return bool(pipe.transformer.config.guidance_embeds)

    def call(self, pipe: Any, prompts: int, guidance: float, options: Options) -> dict[str, Any]:
        """Return the arguments of a call; guidance needs a negative prompt, the empty one, for every prompt."""
        self.check_guidance(pipe, guidance)
        guided = {self.guidance: guidance, "negative_prompt": [""] * prompts} if guidance != 1 else {}
        return {**options, **guided}


def pooled(conditions: Conditions) -> Tensor:
    """Return the pooled text of conditions that must have it [n, width].

    Raises:
        ErasureError: the conditions have none.
    """
    if conditions.pooled is None:
        raise ErasureError("the network reads pooled text, and these conditions have none")
    return conditions.pooled


def pack(x: Tensor) -> Tensor:
    """Return latents [n, c, h, w] as tokens of 2x2 pixels [n, h/2 * w/2, 4c], as FLUX orders them."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens of 2x2 pixels as latents [n, c, height, width], the inverse of `pack`."""
    n, _, channels = tokens.shape
    x = tokens.view(n, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(n, channels // 4, height, width)


def places(rows: int, columns: int) -> Tensor:
    """Return the positions (0, row, column) of image tokens [rows * columns, 3]."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)
