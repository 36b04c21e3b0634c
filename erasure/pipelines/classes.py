"""The diffusers pipelines of Stable Diffusion, with patches. Any other: `class Mine(PatchMixin, ItsPipeline)`."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines import auto_pipeline

from erasure.errors import ErasureError
from erasure.model.loading import best_device, look, resolve
from erasure.pipelines.mixin import PatchMixin


class ErasedStableDiffusionPipeline(PatchMixin, StableDiffusionPipeline):
    """Text to image, Stable Diffusion 1 and 2."""


class ErasedStableDiffusionImg2ImgPipeline(PatchMixin, StableDiffusionImg2ImgPipeline):
    """Image to image, Stable Diffusion 1 and 2."""


class ErasedStableDiffusionInpaintPipeline(PatchMixin, StableDiffusionInpaintPipeline):
    """Inpainting, Stable Diffusion 1 and 2."""


class ErasedStableDiffusionXLPipeline(PatchMixin, StableDiffusionXLPipeline):
    """Text to image, Stable Diffusion XL."""


class ErasedStableDiffusionXLImg2ImgPipeline(PatchMixin, StableDiffusionXLImg2ImgPipeline):
    """Image to image, Stable Diffusion XL."""


class ErasedStableDiffusionXLInpaintPipeline(PatchMixin, StableDiffusionXLInpaintPipeline):
    """Inpainting, Stable Diffusion XL."""


# AutoPipelineFor...from_pipe finds a pipeline's relatives by the name of its class in these tables.
for _table, _first, _large in (
    (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline),
    (
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        ErasedStableDiffusionImg2ImgPipeline,
        ErasedStableDiffusionXLImg2ImgPipeline,
    ),
    (
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
        ErasedStableDiffusionInpaintPipeline,
        ErasedStableDiffusionXLInpaintPipeline,
    ),
):
    _table.setdefault("erased-stable-diffusion", _first)
    _table.setdefault("erased-stable-diffusion-xl", _large)


def load_pipeline(
    model: str | os.PathLike[str] = "glyph", *, device: str | torch.device | None = None, **options: Any
) -> Any:
    """Load a checkpoint as the erased pipeline of its kind, ready for `load_patch`.

    Args:
        model: `glyph`, a diffusers folder, a `.safetensors` file or a hub id.
        device: where to compute; None: the accelerator if there is one, else the CPU.
        options: those of diffusers' `from_pretrained`, and `config` for a single file.

    Raises:
        ErasureError: the model is unknown, cannot be loaded, or has no erased class; there is no such device.
    """
    found = look(resolve(model), **options)
    kind = globals().get(f"Erased{found.pipeline}")
    if kind is None:
        known = ", ".join(name for name in globals() if name.startswith("Erased"))
        raise ErasureError(f"{model}: {found.about}, which no erased pipeline can hold; there are {known}")
    pipe = kind.from_pretrained(model, **options)
    try:
        return pipe.to(device or best_device())
    except (RuntimeError, AssertionError) as fault:
        raise ErasureError(f"{model} cannot be put on {device or best_device()}: {fault}") from None
