"""What the UNet is told beside latents and time: text states, and on XL pooled text and sizes too.

Stable Diffusion 1 and 2 read the last hidden states of one text encoder. XL (Podell et al. 2023, arXiv 2307.01952,
sections 2.1 and 2.2) reads the penultimate states of two, side by side, the second one's pooled embedding, and six
numbers (h, w, 0, 0, h, w): size of the original, corner of the crop, size of the picture, in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError


@dataclass(frozen=True)
class Conditions:
    """Conditions of n samples.

    Args:
        states: what cross-attention reads, [n, tokens, width].
        pooled: on XL the pooled text, [n, width]; None elsewhere.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Conditions:
        """Some of the samples, as conditions of their own."""
        return Conditions(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def expand(self, count: int) -> Conditions:
        """One sample's conditions for `count` samples."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return Conditions(self.states.expand(count, -1, -1), pooled)

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """The samples of all parts, one after the other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditions(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


def text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """(tokenizer, encoder), two on XL.

    Raises:
        ErasureError: a part is missing, or the pipeline has more encoders than are known.
    """
    if getattr(pipe, "text_encoder_3", None) is not None:
        raise ErasureError(f"{type(pipe).__name__} has three text encoders: Stable Diffusion 1, 2 and XL are known")
    ends = ("", "_2") if hasattr(pipe, "text_encoder_2") else ("",)
    pairs = [(getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)) for end in ends]
    if any(None in pair for pair in pairs):
        raise ErasureError(
            f"{type(pipe).__name__} lacks a tokenizer or a text encoder: prompts cannot be encoded as its UNet expects"
        )
    return pairs


def place(pipe: Any, module: Any) -> torch.device:
    """Where a network of the pipeline computes: where it lies, unless its weights rest elsewhere between calls.

    Hooks bring them there: accelerate's, which the network has itself, or those of diffusers' group offloading, which
    the pipeline knows.
    """
    lies = next(module.parameters()).device
    if hasattr(module, "_hf_hook"):
        hooks = (getattr(each, "_hf_hook", None) for each in module.modules())
        found = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in found if device is not None), lies))
    computes = getattr(pipe, "_execution_device", lies)
    return computes if computes != getattr(pipe, "device", lies) else lies


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Conditions:
    """Conditions of one prompt, as the pipeline itself makes them.

    Raises:
        ErasureError: the prompt is longer than the text encoders read.
    """
    ids = []
    for tokenizer, _ in text_encoders(pipe):
        length = tokenizer.model_max_length
        count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if count > length:
            raise ErasureError(f"{prompt[:40]!r}... has {count} tokens; the text encoder reads {length}")
        ids.append(token_ids(tokenizer, [prompt]))
    return read(pipe, ids)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Tokens [n, length] of texts, filled up as pipelines do; what is too long is cut off."""
    length = tokenizer.model_max_length
    filled = {"padding": "max_length", "max_length": length, "truncation": True}
    return tokenizer(list(texts), return_tensors="pt", **filled).input_ids


def read(pipe: Any, ids: Sequence[Tensor]) -> Conditions:
    """What the text encoders say of tokens [n, length], a tensor for each of them; gradients flow."""
    states, pooled = [], None
    for (_, encoder), row in zip(text_encoders(pipe), ids, strict=True):
        row = row.to(place(pipe, encoder))
        if len(ids) == 1:
            return Conditions(encoder(row)[0])
        answer = encoder(row, output_hidden_states=True)
        pooled = answer[0]  # the second one's is the pooled text; the first one's is overwritten
        states.append(answer.hidden_states[-2])
    return Conditions(torch.cat(states, dim=-1), pooled)


def blank(pipe: Any) -> bool:
    """Whether guidance's empty prompt is all zeros: on XL pipelines that say so."""
    return hasattr(pipe, "text_encoder_2") and bool(pipe.config.get("force_zeros_for_empty_prompt"))


def unconditional(pipe: Any, empty: Conditions) -> Conditions:
    """What the empty prompt stands for in guidance: zeros where it is `blank`, its encoding elsewhere."""
    if empty.pooled is not None and blank(pipe):
        return Conditions(torch.zeros_like(empty.states), torch.zeros_like(empty.pooled))
    return empty


def sizes(pipe: Any, x: Tensor) -> Tensor:
    """XL's time ids (h, w, 0, 0, h, w) [n, 6] in pixels, for latents x [n, c, h, w] of whole, uncropped pictures."""
    height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
    return torch.tensor([height, width, 0, 0, height, width], device=x.device).expand(len(x), -1)


def predict(pipe: Any, x: Tensor, t: Any, conditions: Conditions) -> Tensor:
    """The UNet's output [n, c, h, w] for latents x at timesteps t (one, or [n]); for v-prediction that is v."""
    unet = pipe.unet
    kind = unet.dtype
    x, states = x.to(kind), conditions.states.to(kind)
    if conditions.pooled is None:
        return unet(x, t, states).sample
    more = {"text_embeds": conditions.pooled.to(kind), "time_ids": sizes(pipe, x).to(kind)}
    return unet(x, t, states, added_cond_kwargs=more).sample
