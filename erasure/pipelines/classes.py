"""Erased versions of diffusers' Stable Diffusion pipelines.

For any other diffusers pipeline class, derive one with `class MyPipeline(PatchMixin, OtherPipeline)`.
"""

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
    """The text-to-image pipeline of Stable Diffusion 1 and 2, with patches."""


class ErasedStableDiffusionImg2ImgPipeline(PatchMixin, StableDiffusionImg2ImgPipeline):
    """The image-to-image pipeline of Stable Diffusion 1 and 2, with patches."""


class ErasedStableDiffusionInpaintPipeline(PatchMixin, StableDiffusionInpaintPipeline):
    """The inpainting pipeline of Stable Diffusion 1 and 2, with patches."""


class ErasedStableDiffusionXLPipeline(PatchMixin, StableDiffusionXLPipeline):
    """The text-to-image pipeline of Stable Diffusion XL, with patches."""


class ErasedStableDiffusionXLImg2ImgPipeline(PatchMixin, StableDiffusionXLImg2ImgPipeline):
    """The image-to-image pipeline of Stable Diffusion XL, with patches."""


class ErasedStableDiffusionXLInpaintPipeline(PatchMixin, StableDiffusionXLInpaintPipeline):
    """The inpainting pipeline of Stable Diffusion XL, with patches."""


# AutoPipelineFor...from_pipe looks up the class for each task in these tables, so the erased classes are added there.
for _table, _sd_class, _sdxl_class in (
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
    _table.setdefault("erased-stable-diffusion", _sd_class)
    _table.setdefault("erased-stable-diffusion-xl", _sdxl_class)


def load_pipeline(
    model: str | os.PathLike[str] = "glyph", *, device: str | torch.device | None = None, **options: Any
) -> Any:
    """Load a checkpoint as the erased pipeline that matches its architecture, ready for `load_patch`.

    Args:
        model: `glyph`, a diffusers folder, a `.safetensors` file or a hub id.
        device: device to compute on (default: the accelerator if there is one, else the CPU).
        options: options of diffusers' `from_pretrained`; for a single file also `config`.

    Returns:
        The pipeline, an instance of one of the Erased classes.

    Raises:
        ErasureError: the model is unknown or cannot be loaded, no erased class matches it, or the device is missing.
    """
    detected = look(resolve(model), **options)
    pipeline_class = globals().get(f"Erased{detected.pipeline}")
    if pipeline_class is None:
        classes = ", ".join(name for name in globals() if name.startswith("Erased"))
        raise ErasureError(f"{model}: {detected.about}; no erased pipeline class matches it. Available: {classes}")
    pipe = pipeline_class.from_pretrained(model, **options)
    try:
        return pipe.to(device or best_device())
    except (RuntimeError, AssertionError) as fault:
        raise ErasureError(f"{model} cannot be moved to {device or best_device()}: {fault}") from None
