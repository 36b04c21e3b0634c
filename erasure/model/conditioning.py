"""What the UNet is given besides latents and time: text states, and on XL also the pooled text and sizes.

Stable Diffusion 1 and 2 read the last hidden states of one text encoder. XL (Podell et al. 2023, arXiv 2307.01952,
sections 2.1 and 2.2) reads the concatenated penultimate states of two, the second one's pooled embedding, and six
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
    """The conditions of n samples, as the UNet reads them.

    Args:
        states: text states for cross-attention [n, tokens, width].
        pooled: on XL the pooled text [n, width]; None elsewhere.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Conditions:
        """Return the conditions of some of the samples."""
        return Conditions(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def expand(self, count: int) -> Conditions:
        """Repeat one sample's conditions for `count` samples."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return Conditions(self.states.expand(count, -1, -1), pooled)

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """Concatenate the samples of all parts."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditions(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


def text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """Return the pairs (tokenizer, text encoder) of a pipeline: one, or two on XL.

    Raises:
        ErasureError: a part is missing, or the pipeline has more encoders than are known.
    """
    if getattr(pipe, "text_encoder_3", None) is not None:
        raise ErasureError(
            f"{type(pipe).__name__} has three text encoders; only Stable Diffusion 1, 2 and XL are supported"
        )
    ends = ("", "_2") if hasattr(pipe, "text_encoder_2") else ("",)
    pairs = [(getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)) for end in ends]
    if any(None in pair for pair in pairs):
        raise ErasureError(
            f"{type(pipe).__name__} lacks a tokenizer or a text encoder: prompts cannot be encoded as its UNet expects"
        )
    return pairs


def place(pipe: Any, module: Any) -> torch.device:
    """Return the device that a network of the pipeline computes on, also where its weights are offloaded.

    Offloading hooks move the weights there for each call: accelerate's, which the network itself carries, or those of
    diffusers' group offloading, which the pipeline knows.
    """
    lies = next(module.parameters()).device
    if hasattr(module, "_hf_hook"):
        hooks = (getattr(each, "_hf_hook", None) for each in module.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in devices if device is not None), lies))
    computes = getattr(pipe, "_execution_device", lies)
    return computes if computes != getattr(pipe, "device", lies) else lies


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Conditions:
    """Return the conditions of one prompt, made as the pipeline itself makes them.

    Raises:
        ErasureError: the prompt has more tokens than the text encoders read.
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
    """Return the tokens of texts [n, length], padded as pipelines do; longer texts are cut off."""
    length = tokenizer.model_max_length
    filled = {"padding": "max_length", "max_length": length, "truncation": True}
    return tokenizer(list(texts), return_tensors="pt", **filled).input_ids


def read(pipe: Any, ids: Sequence[Tensor]) -> Conditions:
    """Return the conditions for tokens, one tensor [n, length] for each text encoder; gradients flow through them."""
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
    """Tell whether guidance's empty prompt is all zeros, as on XL pipelines that are configured so."""
    return hasattr(pipe, "text_encoder_2") and bool(pipe.config.get("force_zeros_for_empty_prompt"))


def unconditional(pipe: Any, empty: Conditions) -> Conditions:
    """Return guidance's unconditional input: zeros where it is `blank`, else the empty prompt's encoding."""
    if empty.pooled is not None and blank(pipe):
        return Conditions(torch.zeros_like(empty.states), torch.zeros_like(empty.pooled))
    return empty


def sizes(pipe: Any, x: Tensor) -> Tensor:
    """Return XL's time ids (h, w, 0, 0, h, w) [n, 6] in pixels, for latents x [n, c, h, w] of uncropped pictures."""
    height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
    return torch.tensor([height, width, 0, 0, height, width], device=x.device).expand(len(x), -1)


def predict(pipe: Any, x: Tensor, t: Any, conditions: Conditions) -> Tensor:
    """Return the UNet's output [n, c, h, w] for latents x at timesteps t (one, or [n]); for v-prediction that is v."""
    unet = pipe.unet
    kind = unet.dtype
    x, states = x.to(kind), conditions.states.to(kind)
    if conditions.pooled is None:
        return unet(x, t, states).sample
    more = {"text_embeds": conditions.pooled.to(kind), "time_ids": sizes(pipe, x).to(kind)}
    return unet(x, t, states, added_cond_kwargs=more).sample
