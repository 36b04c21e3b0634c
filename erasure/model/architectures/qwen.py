"""Qwen-Image: two-stream blocks as FLUX's, the states of Qwen2.5-VL, no pooled text (arXiv 2508.02324).

A prompt is written into a template, an instruction to a describing assistant, whose first tokens are dropped from the
states again; what closes the template stays. The states of a batch have the length of its longest prompt, and the rest
is masked. It predicts the velocity of rectified flow and is told sigma. Guidance needs a negative prompt, and what it
gives is, token by token, made as long as the prediction for the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.model.architectures.architecture import Options, default, ends, holds, missing, sides, starts, times
from erasure.model.architectures.mmdit import TEXT_STREAM, JointAttention, pack, unpack
from erasure.model.conditioning import Conditions, place
from erasure.model.diffusion import guide

EMPTY = " "  # what the pipeline's page gives as the empty negative prompt


class QwenImage(JointAttention):
    """Qwen-Image, text to image; not its editing and layered models, which read images too."""

    name = "qwen-image"
    network = "QwenImageTransformer2DModel"
    pipelines = ("QwenImagePipeline",)
    plain_sigmas = True
    guidance = "true_cfg_scale"
    roles = {
        "joint attention": holds(".attn."),
        "text stream": ends(*TEXT_STREAM),
        "text entry": starts("txt_in"),
        "feed-forward": holds(".img_mlp.", ".txt_mlp."),
        "modulation": holds(".img_mod.", ".txt_mod.", "norm_out.linear"),
    }

    def check(self, pipe: Any) -> None:
        """Refuse a pipeline without its text encoder, and a transformer that is told more than text and time."""
        if absent := missing(pipe, ("tokenizer", "text_encoder")):
            raise ErasureError(
                f"{type(pipe).__name__} lacks {', '.join(absent)}: a transformer without its text encoder cannot be "
                "told what to erase. Give the whole diffusers folder, or load the encoder into the pipeline"
            )
        config = pipe.transformer.config
        if more := [key for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond") if config.get(key)]:
            raise ErasureError(
                f"{type(pipe).__name__}: its transformer has {', '.join(more)}, which Qwen-Image has not (distilled, "
                "editing or layered models). Give the text-to-image model"
            )

    def encode(self, pipe: Any, prompt: str, options: Options) -> Conditions:
        """Return the states of the text encoder behind the template's first tokens, and their mask, all ones.

        The empty prompt is written as the one of guidance: see EMPTY.

        Raises:
            ErasureError: the prompt has more tokens than the pipeline reads.
        """
        length = default(pipe, options, "max_sequence_length", 512)
        with torch.no_grad():
            states, _ = pipe.encode_prompt(
                prompt or EMPTY, device=place(pipe, pipe.transformer), max_sequence_length=length + 1
            )
        if states.shape[1] > length:
            raise ErasureError(
                f"the prompt {prompt[:40]!r}... has more than the {length} tokens that the pipeline reads, the end of "
                "its template included"
            )
        return Conditions(states, mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device))

    def predict(self, pipe: Any, x: Tensor, t: Any, conditions: Conditions, options: Options) -> Tensor:
        """Return the velocity; the transformer reads and writes tokens of 2x2 latent pixels."""
        transformer, (n, _, height, width) = pipe.transformer, x.shape
        dtype, mask = transformer.dtype, conditions.mask
        out = transformer(
            pack(x).to(dtype),
            encoder_hidden_states=conditions.states.to(dtype),
            encoder_hidden_states_mask=None if mask is None or bool(mask.all()) else mask,
            timestep=times(t, x) / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * n,
        ).sample
        return unpack(out, height, width)

    def guided(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Return guidance whose tokens of 2x2 pixels are as long as those of the prediction for the prompt."""
        height, width = conditional.shape[-2:]
        combined, named = pack(guide(unconditional, conditional, scale)), pack(conditional)
        least = torch.finfo(combined.dtype).tiny
        lengths = named.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True).clamp_min(least)
        return unpack(combined * lengths, height, width)

    def latent_shape(self, pipe: Any, options: Options) -> tuple[int, int, int]:
        """Return the shape of unpacked latents, of the options' height and width or else of the pipeline's."""
        native = getattr(pipe, "default_sample_size", 128)
        height, width = (side // 2 * 2 for side in sides(pipe, options, native))
        return pipe.transformer.config.in_channels // 4, height, width

    def call(self, pipe: Any, prompts: int, guidance: float, options: Options) -> dict[str, Any]:
        """Return the arguments of a call; guidance needs a negative prompt, the empty one, for every prompt."""
        negative = {"negative_prompt": [EMPTY] * prompts} if guidance != 1 else {}
        return {**options, self.guidance: guidance, **negative}
