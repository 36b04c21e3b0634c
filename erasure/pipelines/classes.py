"""The diffusers pipelines of Stable Diffusion, with patches. Any other: `class Mine(PatchMixin, ItsPipeline)`."""

from __future__ import annotations

from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines import auto_pipeline

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
