"""A network's inputs besides latents and timesteps: text states, and where it reads them pooled text and a mask.

Stable Diffusion 1 and 2 read the last hidden states of one text encoder. XL (Podell et al. 2023, arXiv 2307.01952,
sections 2.1 and 2.2) reads the concatenated penultimate states of two, the pooled embedding of the second, and six
numbers (h, w, 0, 0, h, w): original size, corner of the crop and target size, in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError


@dataclass(frozen=True)
class Conditions:
    """The text conditions of n samples, as the network reads them.

    Args:
        states: text states for attention [n, tokens, width].
        pooled: the pooled text [n, width] on XL, SD3 and FLUX; None on other models.
        mask: which tokens are no padding [n, tokens] on PixArt, SANA and Qwen-Image; None on models without a mask.
    """

    states: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Conditions:
        """Return the conditions of the selected samples."""
        pooled, mask = (None if part is None else part[rows] for part in (self.pooled, self.mask))
        return Conditions(self.states[rows], pooled, mask)

    def expand(self, count: int) -> Conditions:
        """Return the conditions of a single sample, repeated for `count` samples."""
        pooled, mask = (None if part is None else part.expand(count, -1) for part in (self.pooled, self.mask))
        return Conditions(self.states.expand(count, -1, -1), pooled, mask)

    def padded(self, length: int) -> Conditions:
        """Return the conditions with zeros behind the states up to a length, which the mask leaves out."""
        if self.mask is None:
            raise ErasureError(f"text states of {self.states.shape[1]} tokens without a mask cannot get {length}")
        more = (0, length - self.states.shape[1])
        states, mask = nn.functional.pad(self.states, (0, 0, *more)), nn.functional.pad(self.mask, more)
        return Conditions(states, self.pooled, mask)

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """Concatenate the samples of all parts, in their order; masked states are padded to the longest, with zeros."""
        if len(lengths := {part.states.shape[1] for part in parts}) > 1:
            parts = [part.padded(max(lengths)) for part in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        masks = [part.mask for part in parts if part.mask is not None]
        return Conditions(
            torch.cat([part.states for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(masks) if masks else None,
        )


def text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """Return the pairs (tokenizer, text encoder) of a pipeline: one pair, or two on XL.

    Raises:
        ErasureError: a tokenizer or text encoder is missing, or the pipeline has three text encoders, which are not
            supported.
    """
    if getattr(pipe, "text_encoder_3", None) is not None:
        raise ErasureError(
            f"{type(pipe).__name__} has three text encoders; only Stable Diffusion 1, 2 and XL are supported"
        )
    ends = ("", "_2") if hasattr(pipe, "text_encoder_2") else ("",)
    pairs = [(getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)) for end in ends]
    if any(None in pair for pair in pairs):
        raise ErasureError(
            f"{type(pipe).__name__} lacks a tokenizer or a text encoder, so prompts cannot be encoded for its UNet"
        )
    return pairs


def place(pipe: Any, module: Any) -> torch.device:
    """Return the device that a network of the pipeline computes on, also where its weights are offloaded.

    Offloading moves the weights to that device for each call. accelerate's hooks on the network name the device; with
    diffusers' group offloading, the pipeline does.

    Args:
        pipe: the diffusers pipeline.
        module: one of its networks.
    """
    # Of a UNet of which only some layers are loaded, these layers' device counts.
    devices_of = (param.device for param in module.parameters())
    stored = next((device for device in devices_of if device.type != "meta"), torch.device("meta"))
    if hasattr(module, "_hf_hook"):
        hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in devices if device is not None), stored))
    computing = getattr(pipe, "_execution_device", stored)
    return computing if computing != getattr(pipe, "device", stored) else stored


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Conditions:
    """Return the conditions of one prompt, encoded as the pipeline itself encodes it.

    Raises:
        ErasureError: the prompt has more tokens than the text encoders read.
    """
    ids = []
    for tokenizer, _ in text_encoders(pipe):
        length = tokenizer.model_max_length
        count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if count > length:
            raise ErasureError(f"the prompt {prompt[:40]!r}... has {count} tokens, and the text encoder reads {length}")
        ids.append(token_ids(tokenizer, [prompt]))
    return read(pipe, ids)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the token ids of texts [n, length], padded as pipelines do; texts that are too long are truncated."""
    length = tokenizer.model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    return tokenizer(list(texts), return_tensors="pt", **options).input_ids


def read(pipe: Any, ids: Sequence[Tensor]) -> Conditions:
    """Return the conditions for token ids; gradients flow through the text encoders.

    Args:
        pipe: the diffusers pipeline.
        ids: one tensor [n, length] for each text encoder.
    """
    states, pooled = [], None
    for (_, encoder), rows in zip(text_encoders(pipe), ids, strict=True):
        rows = rows.to(place(pipe, encoder))
        if len(ids) == 1:
            return Conditions(encoder(rows)[0])
        output = encoder(rows, output_hidden_states=True)
        pooled = output[0]  # only the second encoder's is the pooled text, and it overwrites the first one's
        states.append(output.hidden_states[-2])
    return Conditions(torch.cat(states, dim=-1), pooled)


def blank(pipe: Any) -> bool:
    """Tell whether guidance uses zeros for the empty prompt, as XL pipelines do if they are so configured."""
    return hasattr(pipe, "text_encoder_2") and bool(pipe.config.get("force_zeros_for_empty_prompt"))


def unconditional(pipe: Any, empty: Conditions) -> Conditions:
    """Return the conditions that guidance uses for the empty prompt: zeros or its encoding.

    Args:
        pipe: the diffusers pipeline; `blank` tells which of the two it uses.
        empty: the conditions of the empty prompt.
    """
    if empty.pooled is not None and blank(pipe):
        return Conditions(torch.zeros_like(empty.states), torch.zeros_like(empty.pooled))
    return empty


def sizes(pipe: Any, x: Tensor) -> Tensor:
    """Return XL's time ids (h, w, 0, 0, h, w) [n, 6], in pixels, for latents x [n, c, h, w] of uncropped images."""
    height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
    return torch.tensor([height, width, 0, 0, height, width], device=x.device).expand(len(x), -1)


def predict(pipe: Any, x: Tensor, t: Any, conditions: Conditions) -> Tensor:
    """Return the UNet's output [n, c, h, w], which is noise, v or clean latents, depending on the checkpoint.

    Args:
        pipe: the diffusers pipeline.
        x: latents [n, c, h, w], scaled as the sampler scales them.
        t: timesteps, one number or [n].
        conditions: the text conditions of the n samples.
    """
    unet = pipe.unet
    dtype = unet.dtype
    x, states = x.to(dtype), conditions.states.to(dtype)
    if conditions.pooled is None:
        return unet(x, t, states).sample
    added = {"text_embeds": conditions.pooled.to(dtype), "time_ids": sizes(pipe, x).to(dtype)}
    return unet(x, t, states, added_cond_kwargs=added).sample
