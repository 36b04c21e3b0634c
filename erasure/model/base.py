"""The checkpoint that concepts are erased from: its components, its text encodings, and its modules by type."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from erasure.concepts.vocabulary import Vocabulary
from erasure.concepts.word_lists import WordLists
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
            device: the device to compute on; None chooses `best_device()`.
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
        """Return a base from a base, from the name or path of a model, or from a diffusers pipeline.

        Args:
            value: a base is returned as it is; a name or path is loaded; a base made from a pipeline shares its
                components, which stay where they are.

        Raises:
            ErasureError: the model cannot be loaded, concepts cannot be erased from such a pipeline, or the pipeline
                has active patches.
        """
        if isinstance(value, Base):
            return value
        if isinstance(value, str | os.PathLike):
            return cls.load(value)
        if not hasattr(value, "unet") or not hasattr(value, "text_encoder"):
            raise ErasureError(
                f"{type(value).__name__} is not a Stable Diffusion pipeline: it has no unet or no text_encoder"
            )
        text_encoders(value)  # raises an error if a tokenizer or text encoder is missing
        channels, vae = value.unet.config.in_channels, getattr(value, "vae", None)
        latents = vae.config.latent_channels if vae is not None else channels
        if channels != latents:
            raise ErasureError(
                f"{type(value).__name__}: its UNet reads {channels} channels, {latents} of them latents (inpainting, "
                "depth or editing). Erase from the text-to-image model of the family, and load the patch into this one"
            )
        patches = value.get_list_patches() if hasattr(value, "get_list_patches") else {}
        if active := [name for name, entry in patches.items() if entry["strength"]]:
            raise ErasureError(
                f"This pipeline has active patches ({', '.join(active)}); the new erasure would depend on them. "
                "Unload or disable them first (unload_patches(), or set_patches({})). Nothing was changed"
            )
        return cls(name_of(value), value)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Return the words that this checkpoint was taught, or None if they are not known."""
        return presets.vocabulary(self.name)

    @property
    def words(self) -> Vocabulary | WordLists:
        """Return what says of which kind a concept is: the checkpoint's vocabulary if it is known, else our lists."""
        return self.vocabulary or WordLists()

    def family(self, given: str | None = None) -> presets.Family:
        """Return the family that the checkpoint belongs to, whose preset holds the settings that suit it.

        Args:
            given: the name of a preset to take instead.

        Raises:
            ErasureError: there is no such preset.
        """
        return presets.family(self.pipe, self.name, given)

    @property
    def unet(self) -> Any:
        """Return the checkpoint's UNet, of which only one copy is in memory."""
        return self.pipe.unet

    @property
    def scheduler(self) -> Any:
        """Return the checkpoint's own scheduler, from whose configuration all samplers are made."""
        return self.pipe.scheduler

    @property
    def device(self) -> torch.device:
        """Return the device that the UNet computes on, also where its weights are offloaded between calls."""
        return place(self.pipe, self.unet)

    def sampler(self, kind: str = "ddim") -> Any:
        """Return a new sampler with the checkpoint's noise schedule.

        Args:
            kind: `ddim` or `pndm`.

        Raises:
            ErasureError: an unknown kind of sampler.
        """
        from diffusers import DDIMScheduler, PNDMScheduler

        classes = {"ddim": DDIMScheduler, "pndm": PNDMScheduler}
        if kind not in classes:
            raise unknown("sampler", kind, classes)
        config = self.scheduler.config
        # Schedulers such as XL's do not clip and have no such entry, while DDIM clips by default.
        extra = {"clip_sample": False} if kind == "ddim" and "clip_sample" not in config else {}
        return classes[kind].from_config(config, **extra)

    def latent_shape(self, scale: float | tuple[float, float] = 1.0) -> tuple[int, int, int]:
        """Return the shape (channels, height, width) of latents, in latent pixels.

        Args:
            scale: factor on the native size, or two factors for height and width.
        """
        config = self.unet.config
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        tall, wide = scale if isinstance(scale, tuple) else (scale, scale)
        return config.in_channels, round(height * tall), round(width * wide)

    def encode(self, prompts: list[str]) -> Tensor:
        """Return the text encoder's states for prompts [n, tokens, width].

        Each prompt is encoded once and then kept in memory.

        Raises:
            ErasureError: a prompt has more tokens than the text encoder reads.
        """
        return self._encoded(prompts).states

    def conditions(self, prompts: list[str]) -> Conditions:
        """Return the UNet's text conditions for n prompts; for the empty prompt, those that guidance uses.

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
        """Return the UNet's output [n, c, h, w], which is noise, v or clean latents, depending on the checkpoint.

        Args:
            x: latents [n, c, h, w], scaled as the sampler scales them.
            t: timesteps, one number or [n].
            conditions: the text conditions of the n samples.
        """
        return predict(self.pipe, x, t, conditions)

    def _encoded(self, prompts: list[str]) -> Conditions:
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                self._texts[prompt] = encode_prompt(self.pipe, prompt)
        return Conditions.cat([self._texts[prompt] for prompt in prompts])

    def targets(self, variant: str) -> dict[str, nn.Module]:
        """Return the Linear and Conv2d modules of the UNet that a variant trains, by their paths.

        Args:
            variant: a name in `erasure.model.targets.TARGETS`, such as `x` or `x-strict`.

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
        """Tell whether training only these modules leaves the UNet's output for the empty prompt unchanged.

        On XL the states of the empty prompt are all zeros. Keys and values of cross-attention are then zero whatever
        the weights are, so cross-attention adds nothing.

        Args:
            paths: the paths of the modules in the UNet.
        """
        return blank(self.pipe) and all("attn2" in path for path in paths)
