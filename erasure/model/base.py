"""The checkpoint that concepts are erased from: its components, its text encodings, and its modules by type."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import ErasureError, unknown
from erasure.model import presets
from erasure.model.conditioning import (
    Conditions,
    blank,
    encode_prompt,
    place,
    predict,
    text_encoders,
    unconditional,
)
from erasure.model.loading import PIPELINES, best_device, look, name_of, open_pipeline, resolve
from erasure.model.targets import TARGETS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Base:
    """A loaded checkpoint: the components that erasing needs, each of them in memory once.

    Args:
        name: the model's name, as the user gave it.
        pipe: the diffusers pipeline that holds the components.
        about: the detected type of the model, in words.
    """

    name: str
    pipe: Any
    about: str = ""
    _texts: dict[str, Conditions] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls, model: str | os.PathLike[str] = "glyph", *, device: str | torch.device | None = None, **options: Any
    ) -> Base:
        """Load a checkpoint as the plain diffusers pipeline of its type.

        Args:
            model: the name of a bundled checkpoint, a diffusers folder, a `.safetensors` file or a hub id.
            device: where to compute; None means `best_device()`.
            options: arguments of diffusers' `from_pretrained`, and `config` for a single file (see
                `single_file.identify`).

        Raises:
            ErasureError: the model is unknown or cannot be loaded, or there is no such device.
        """
        import diffusers

        detected = look(resolve(model), **options)
        if detected.pipeline not in PIPELINES:
            raise ErasureError(
                f"{model}: {detected.about}. Concepts can be erased from {' and '.join(PIPELINES)}; their patches load "
                "into the other pipelines of the family. Nothing was loaded"
            )
        pipe = open_pipeline(getattr(diffusers, detected.pipeline), model, **options)
        try:
            return cls(os.fspath(model), pipe.to(device or best_device()), detected.about)
        except (RuntimeError, AssertionError) as fault:
            raise ErasureError(f"{model} cannot be put on {device or best_device()}: {fault}") from None

    @classmethod
    def of(cls, value: Base | str | os.PathLike[str] | Any) -> Base:
        """Return a base for a base, a model's name, or a diffusers pipeline, whose components it shares.

        Raises:
            ErasureError: a pipeline that concepts cannot be erased from, or one with active patches.
        """
        if isinstance(value, Base):
            return value
        if isinstance(value, str | os.PathLike):
            return cls.load(value)
        if not hasattr(value, "unet") or not hasattr(value, "text_encoder"):
            raise ErasureError(
                f"{type(value).__name__} is not a Stable Diffusion pipeline: it has no unet or no text_encoder"
            )
        text_encoders(value)  # refuses what lacks one
        channels, vae = value.unet.config.in_channels, getattr(value, "vae", None)
        latents = vae.config.latent_channels if vae is not None else channels
        if channels != latents:
            raise ErasureError(
                f"{type(value).__name__}: its UNet reads {channels} channels, {latents} of them latents (inpainting, "
                "depth or editing). Erase from the text-to-image model of the family and load the patch here"
            )
        listed = value.get_list_patches() if hasattr(value, "get_list_patches") else {}
        if acting := [name for name, entry in listed.items() if entry["strength"]]:
            raise ErasureError(
                f"This pipeline has active patches ({', '.join(acting)}); the new erasure would depend on them. "
                "Unload or disable them first (unload_patches(), or set_patches({})). Nothing was changed"
            )
        return cls(name_of(value), value)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Return the words that this checkpoint was taught, or None where they are not known."""
        return presets.vocabulary(self.name)

    @property
    def unet(self) -> Any:
        """Return the UNet; there is only one copy of it."""
        return self.pipe.unet

    @property
    def scheduler(self) -> Any:
        """Return the checkpoint's own scheduler, whose configuration all samplers are made from."""
        return self.pipe.scheduler

    @property
    def device(self) -> torch.device:
        """Return the device that the UNet computes on; an offloaded UNet keeps its weights elsewhere between calls."""
        return place(self.pipe, self.unet)

    def sampler(self, kind: str = "ddim") -> Any:
        """Return a new sampler, `ddim` or `pndm`, on the checkpoint's noise schedule.

        Raises:
            ErasureError: an unknown kind of sampler.
        """
        from diffusers import DDIMScheduler, PNDMScheduler

        classes = {"ddim": DDIMScheduler, "pndm": PNDMScheduler}
        if kind not in classes:
            raise unknown("sampler", kind, classes)
        config = self.scheduler.config
        # XL's and other users' schedulers do not clip and may not say so; DDIM would, where it is not told.
        more = {"clip_sample": False} if kind == "ddim" and "clip_sample" not in config else {}
        return classes[kind].from_config(config, **more)

    def latent_shape(self, scale: float | tuple[float, float] = 1.0) -> tuple[int, int, int]:
        """Return channels, height and width of latents at `scale` times the native size (one factor, or two)."""
        config = self.unet.config
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        tall, wide = scale if isinstance(scale, tuple) else (scale, scale)
        return config.in_channels, round(height * tall), round(width * wide)

    def encode(self, prompts: list[str]) -> Tensor:
        """Return the text encoder's states for prompts [n, tokens, width]; each prompt is encoded only once.

        Raises:
            ErasureError: a prompt has more tokens than the text encoder reads.
        """
        return self._encoded(prompts).states

    def conditions(self, prompts: list[str]) -> Conditions:
        """Return the UNet's conditions for prompts; the empty prompt gives guidance's unconditional input.

        Raises:
            ErasureError: a prompt has more tokens than the text encoder reads.
        """
        encoded = self._encoded(prompts)
        if "" not in prompts or encoded.pooled is None:
            return encoded
        parts = [encoded[i : i + 1] for i in range(len(prompts))]
        return Conditions.cat(
            [part if text else unconditional(self.pipe, part) for text, part in zip(prompts, parts, strict=True)]
        )

    def predict(self, x: Tensor, t: Any, conditions: Conditions) -> Tensor:
        """Return the UNet's output [n, c, h, w] for latents x at timesteps t: noise, v or clean latents, as trained."""
        return predict(self.pipe, x, t, conditions)

    def _encoded(self, prompts: list[str]) -> Conditions:
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                self._texts[prompt] = encode_prompt(self.pipe, prompt)
        return Conditions.cat([self._texts[prompt] for prompt in prompts])

    def targets(self, variant: str) -> dict[str, nn.Module]:
        """Return the Linear and Conv2d modules of the UNet that a variant trains, by path.

        Raises:
            ErasureError: an unknown variant, or one that matches no module of this checkpoint.
        """
        if variant not in TARGETS:
            raise unknown("variant", variant, TARGETS)
        test = TARGETS[variant][1]
        modules: dict[str, nn.Module] = {
            path: module
            for path, module in self.unet.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and test(path)
        }
        if not modules:
            raise ErasureError(f"variant {variant!r} matches no module of this {type(self.unet).__name__}")
        return modules

    def still(self, paths: Iterable[str]) -> bool:
        """Tell whether no change of these modules can move the UNet's answer to the empty prompt.

        On XL the empty prompt is all zeros: keys and values of cross-attention are 0 and add nothing, whatever the
        weights.
        """
        return blank(self.pipe) and all("attn2" in path for path in paths)
