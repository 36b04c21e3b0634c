"""The checkpoint that is erased from: where it lies, its components, its modules by type.

The only file that knows architectures.
"""

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
    """A loaded checkpoint: the components that erasing needs, in one copy.

    Args:
        name: as the user gave it.
        pipe: the diffusers pipeline that holds the components.
        about: what it was taken for.
    """

    name: str
    pipe: Any
    about: str = ""
    _texts: dict[str, Conditions] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls, model: str | os.PathLike[str] = "glyph", *, device: str | torch.device | None = None, **options: Any
    ) -> Base:
        """Load a checkpoint by the name of an embedded one, folder, file or hub id.

        Args:
            model: its name.
            device: where to compute; None: `best_device()`.
            options: those of diffusers' `from_pretrained`, and `config` for a file (see `checkpoints.identify`).

        Raises:
            ErasureError: the model is unknown or cannot be loaded; there is no such device.
        """
        import diffusers

        found = look(resolve(model), **options)
        if found.pipeline not in PIPELINES:
            raise ErasureError(
                f"{model}: {found.about}. Concepts are erased from {' and '.join(PIPELINES)}; what is erased there "
                "loads into the others of the family. Nothing was loaded"
            )
        pipe = open_pipeline(getattr(diffusers, found.pipeline), model, **options)
        try:
            return cls(os.fspath(model), pipe.to(device or best_device()), found.about)
        except (RuntimeError, AssertionError) as fault:
            raise ErasureError(f"{model} cannot be put on {device or best_device()}: {fault}") from None

    @classmethod
    def of(cls, value: Base | str | os.PathLike[str] | Any) -> Base:
        """A base from a base, a model's name, or a diffusers pipeline (whose components it shares)."""
        if isinstance(value, Base):
            return value
        if isinstance(value, str | os.PathLike):
            return cls.load(value)
        if not hasattr(value, "unet") or not hasattr(value, "text_encoder"):
            raise ErasureError(
                f"{type(value).__name__} is no Stable Diffusion pipeline: it has no unet or text_encoder"
            )
        text_encoders(value)  # refuses what lacks one
        channels, vae = value.unet.config.in_channels, getattr(value, "vae", None)
        latents = vae.config.latent_channels if vae is not None else channels
        if channels != latents:
            raise ErasureError(
                f"{type(value).__name__}: its UNet takes {channels} channels, {latents} of them latents (inpainting, "
                "depth or editing): erase from the text-to-image model of the family, and load the patch here"
            )
        listed = value.get_list_patches() if hasattr(value, "get_list_patches") else {}
        if acting := [name for name, entry in listed.items() if entry["strength"]]:
            raise ErasureError(
                f"patches act on this pipeline ({', '.join(acting)}): what is erased next would lean on them. "
                "Unload them, or set_patches({}), first; nothing was changed"
            )
        return cls(name_of(value), value)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Return the words that this checkpoint was taught, or None where they are not known."""
        return presets.vocabulary(self.name)

    @property
    def unet(self) -> Any:
        """The one UNet."""
        return self.pipe.unet

    @property
    def scheduler(self) -> Any:
        """The checkpoint's own scheduler; its configuration makes the others."""
        return self.pipe.scheduler

    @property
    def device(self) -> torch.device:
        """Where the UNet computes; offloaded, its weights rest elsewhere between calls."""
        return place(self.pipe, self.unet)

    def sampler(self, kind: str = "ddim") -> Any:
        """A fresh sampler on the checkpoint's noise schedule: `ddim` or `pndm`."""
        from diffusers import DDIMScheduler, PNDMScheduler

        classes = {"ddim": DDIMScheduler, "pndm": PNDMScheduler}
        if kind not in classes:
            raise unknown("sampler", kind, classes)
        config = self.scheduler.config
        # XL's and other users' schedulers do not clip and may not say so; DDIM would, where it is not told.
        more = {"clip_sample": False} if kind == "ddim" and "clip_sample" not in config else {}
        return classes[kind].from_config(config, **more)

    def latent_shape(self, scale: float | tuple[float, float] = 1.0) -> tuple[int, int, int]:
        """Channels, height, width of the latents at `scale` (of both, or of height and width) times the native size."""
        config = self.unet.config
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        tall, wide = scale if isinstance(scale, tuple) else (scale, scale)
        return config.in_channels, round(height * tall), round(width * wide)

    def encode(self, prompts: list[str]) -> Tensor:
        """What the text encoder says of each prompt [n, tokens, width]; each is encoded once.

        Raises:
            ErasureError: a prompt is longer than the text encoder reads.
        """
        return self._encoded(prompts).states

    def conditions(self, prompts: list[str]) -> Conditions:
        """What the UNet is told for each prompt; the empty one is guidance's unconditional.

        Raises:
            ErasureError: a prompt is longer than the text encoder reads.
        """
        found = self._encoded(prompts)
        if "" not in prompts or found.pooled is None:
            return found
        parts = [found[i : i + 1] for i in range(len(prompts))]
        return Conditions.cat(
            [part if text else unconditional(self.pipe, part) for text, part in zip(prompts, parts, strict=True)]
        )

    def predict(self, x: Tensor, t: Any, conditions: Conditions) -> Tensor:
        """The UNet's output [n, c, h, w] for latents x at timesteps t: noise, v or clean latents, as it was trained."""
        return predict(self.pipe, x, t, conditions)

    def _encoded(self, prompts: list[str]) -> Conditions:
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                self._texts[prompt] = encode_prompt(self.pipe, prompt)
        return Conditions.cat([self._texts[prompt] for prompt in prompts])

    def targets(self, variant: str) -> dict[str, nn.Module]:
        """The Linear and Conv2d modules of the UNet that a variant trains, by path.

        Raises:
            ErasureError: unknown variant, or no module of this checkpoint fits it.
        """
        if variant not in TARGETS:
            raise unknown("variant", variant, TARGETS)
        test = TARGETS[variant][1]
        found: dict[str, nn.Module] = {
            path: module
            for path, module in self.unet.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and test(path)
        }
        if not found:
            raise ErasureError(f"variant {variant!r} fits none of the {type(self.unet).__name__}'s modules")
        return found

    def still(self, paths: Iterable[str]) -> bool:
        """Whether no change of these modules can move the answer to the empty prompt.

        XL's is all zeros: cross-attention has keys and values of 0 there and adds nothing, whatever its weights.
        """
        return blank(self.pipe) and all("attn2" in path for path in paths)
