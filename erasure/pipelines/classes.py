"""Erased versions of diffusers' pipelines of Stable Diffusion, FLUX.1, PixArt, SANA and Qwen-Image.

For any other diffusers pipeline class, derive one with `class MyPipeline(PatchMixin, OtherPipeline)`.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
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


class ErasedStableDiffusion3Pipeline(PatchMixin, StableDiffusion3Pipeline):
    """The text-to-image pipeline of Stable Diffusion 3 and 3.5, with patches."""


class ErasedStableDiffusion3Img2ImgPipeline(PatchMixin, StableDiffusion3Img2ImgPipeline):
    """The image-to-image pipeline of Stable Diffusion 3 and 3.5, with patches."""


class ErasedStableDiffusion3InpaintPipeline(PatchMixin, StableDiffusion3InpaintPipeline):
    """The inpainting pipeline of Stable Diffusion 3 and 3.5, with patches."""


class FluxPatchMixin(PatchMixin):
    """What patches need on the pipelines of FLUX.1: a negative prompt that does nothing is refused.

    These pipelines encode the negative prompt in a call of its own, which evaluates no gates.
    """

    _erasure_negative_apart = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate images as `PatchMixin` does.

        Raises:
            ErasureError: a negative prompt without a `true_cfg_scale` above 1, which diffusers would ignore.
        """
        negative = [key for key in ("negative_prompt", "negative_prompt_2") if kwargs.get(key)]
        if negative and kwargs.get("true_cfg_scale", 1.0) <= 1:
            raise ErasureError(
                f"{negative[0]} does nothing without true_cfg_scale above 1, and FLUX.1-dev and -schnell are distilled "
                "not to need it. To keep a concept out of their images, load a patch. Nothing was drawn"
            )
        return super().__call__(*args, **kwargs)


class ErasedFluxPipeline(FluxPatchMixin, FluxPipeline):
    """The text-to-image pipeline of FLUX.1, with patches."""


class ErasedFluxImg2ImgPipeline(FluxPatchMixin, FluxImg2ImgPipeline):
    """The image-to-image pipeline of FLUX.1, with patches."""


class ErasedFluxInpaintPipeline(FluxPatchMixin, FluxInpaintPipeline):
    """The inpainting pipeline of FLUX.1, with patches."""


class ErasedPixArtSigmaPipeline(PatchMixin, PixArtSigmaPipeline):
    """The text-to-image pipeline of PixArt-Sigma, with patches."""


class ErasedSanaPipeline(PatchMixin, SanaPipeline):
    """The text-to-image pipeline of SANA, with patches."""


class ErasedQwenImagePipeline(PatchMixin, QwenImagePipeline):
    """The text-to-image pipeline of Qwen-Image, with patches; guidance that does nothing is refused.

    It encodes the negative prompt in a call of its own, which evaluates no gates.
    """

    _erasure_negative_apart = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate images as `PatchMixin` does.

        Raises:
            ErasureError: a negative prompt without a `true_cfg_scale` above 1, such a scale without a negative prompt,
                or a `guidance_scale`, all of which diffusers would ignore.
        """
        given = inspect.signature(QwenImagePipeline.__call__).bind(self, *args, **kwargs).arguments
        negative = any(given.get(key) is not None for key in ("negative_prompt", "negative_prompt_embeds"))
        scale = given.get("true_cfg_scale")
        advice = "guidance takes both true_cfg_scale above 1 and a negative_prompt, which may be ' '. Nothing was drawn"
        if negative and scale is not None and scale <= 1:
            raise ErasureError(f"negative_prompt does nothing at true_cfg_scale={scale:g}: {advice}")
        if not negative and scale is not None and scale > 1:
            raise ErasureError(f"true_cfg_scale={scale:g} does nothing without a negative prompt: {advice}")
        if given.get("guidance_scale") is not None:
            raise ErasureError(f"guidance_scale does nothing, as Qwen-Image is not told a scale: {advice}")
        return super().__call__(*args, **kwargs)


# AutoPipelineFor...from_pipe looks up the class for each task in these tables, so the erased classes are added there.
for _table, _task in (
    (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, ""),
    (auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, "Img2Img"),
    (auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING, "Inpaint"),
):
    for _key, _line in (
        ("stable-diffusion", "StableDiffusion"),
        ("stable-diffusion-xl", "StableDiffusionXL"),
        ("stable-diffusion-3", "StableDiffusion3"),
        ("flux", "Flux"),
    ):
        _table.setdefault(f"erased-{_key}", globals()[f"Erased{_line}{_task}Pipeline"])


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
