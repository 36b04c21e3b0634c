"""The diffusers pipelines of Stable Diffusion, with patches. Any other: `class Mine(PatchMixin, ItsPipeline)`."""

from __future__ import annotations

from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from erasure.pipelines.mixin import PatchMixin


class ErasedStableDiffusionPipeline(PatchMixin, StableDiffusionPipeline):
    """Text to image, Stable Diffusion 1 and 2."""


class ErasedStableDiffusionImg2ImgPipeline(PatchMixin, StableDiffusionImg2ImgPipeline):
    """Image to image, Stable Diffusion 1 and 2."""


class ErasedStableDiffusionInpaintPipeline(PatchMixin, StableDiffusionInpaintPipeline):
    """Inpainting, Stable Diffusion 1 and 2."""


class ErasedStableDiffusionXLPipeline(PatchMixin, StableDiffusionXLPipeline):
    """Text to image, Stable Diffusion XL."""
