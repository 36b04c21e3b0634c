"""Diffusers pipelines that load patches, gate them by the prompt, and restore the base weights bit for bit."""

from erasure.pipelines.classes import (
    ErasedFluxImg2ImgPipeline,
    ErasedFluxInpaintPipeline,
    ErasedFluxPipeline,
    ErasedPixArtSigmaPipeline,
    ErasedQwenImagePipeline,
    ErasedSanaPipeline,
    ErasedStableDiffusion3Img2ImgPipeline,
    ErasedStableDiffusion3InpaintPipeline,
    ErasedStableDiffusion3Pipeline,
    ErasedStableDiffusionImg2ImgPipeline,
    ErasedStableDiffusionInpaintPipeline,
    ErasedStableDiffusionPipeline,
    ErasedStableDiffusionXLImg2ImgPipeline,
    ErasedStableDiffusionXLInpaintPipeline,
    ErasedStableDiffusionXLPipeline,
    load_pipeline,
)
from erasure.pipelines.mixin import PatchMixin, load_patch, load_patches, sibling
from erasure.pipelines.stack import PatchStack, patch_stack

__all__ = [
    "ErasedFluxImg2ImgPipeline",
    "ErasedFluxInpaintPipeline",
    "ErasedFluxPipeline",
    "ErasedPixArtSigmaPipeline",
    "ErasedQwenImagePipeline",
    "ErasedSanaPipeline",
    "ErasedStableDiffusion3Img2ImgPipeline",
    "ErasedStableDiffusion3InpaintPipeline",
    "ErasedStableDiffusion3Pipeline",
    "ErasedStableDiffusionImg2ImgPipeline",
    "ErasedStableDiffusionInpaintPipeline",
    "ErasedStableDiffusionPipeline",
    "ErasedStableDiffusionXLImg2ImgPipeline",
    "ErasedStableDiffusionXLInpaintPipeline",
    "ErasedStableDiffusionXLPipeline",
    "PatchMixin",
    "PatchStack",
    "load_patch",
    "load_patches",
    "load_pipeline",
    "patch_stack",
    "sibling",
]
