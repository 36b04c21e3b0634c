"""Erasure: make a text-to-image diffusion model forget a concept, and prove it.

The public names are imported on first use: `from erasure import erase, Patch, ErasedStableDiffusionPipeline`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from erasure.version import __version__ as __version__

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept as Concept
    from erasure.erasing import erase as erase
    from erasure.errors import ErasureError as ErasureError
    from erasure.evaluation import evaluate as evaluate
    from erasure.formats.hub import pull as pull
    from erasure.formats.hub import push as push
    from erasure.model.base import Base as Base
    from erasure.patch import Patch as Patch
    from erasure.pipelines import ErasedFluxImg2ImgPipeline as ErasedFluxImg2ImgPipeline
    from erasure.pipelines import ErasedFluxInpaintPipeline as ErasedFluxInpaintPipeline
    from erasure.pipelines import ErasedFluxPipeline as ErasedFluxPipeline
    from erasure.pipelines import ErasedPixArtSigmaPipeline as ErasedPixArtSigmaPipeline
    from erasure.pipelines import ErasedQwenImagePipeline as ErasedQwenImagePipeline
    from erasure.pipelines import ErasedSanaPipeline as ErasedSanaPipeline
    from erasure.pipelines import ErasedStableDiffusion3Img2ImgPipeline as ErasedStableDiffusion3Img2ImgPipeline
    from erasure.pipelines import ErasedStableDiffusion3InpaintPipeline as ErasedStableDiffusion3InpaintPipeline
    from erasure.pipelines import ErasedStableDiffusion3Pipeline as ErasedStableDiffusion3Pipeline
    from erasure.pipelines import ErasedStableDiffusionImg2ImgPipeline as ErasedStableDiffusionImg2ImgPipeline
    from erasure.pipelines import ErasedStableDiffusionInpaintPipeline as ErasedStableDiffusionInpaintPipeline
    from erasure.pipelines import ErasedStableDiffusionPipeline as ErasedStableDiffusionPipeline
    from erasure.pipelines import (
        ErasedStableDiffusionXLImg2ImgPipeline as ErasedStableDiffusionXLImg2ImgPipeline,
    )
    from erasure.pipelines import (
        ErasedStableDiffusionXLInpaintPipeline as ErasedStableDiffusionXLInpaintPipeline,
    )
    from erasure.pipelines import ErasedStableDiffusionXLPipeline as ErasedStableDiffusionXLPipeline
    from erasure.pipelines import load_patch as load_patch
    from erasure.pipelines import load_pipeline as load_pipeline

_MODULES = {
    "Base": "erasure.model.base",
    "Concept": "erasure.concepts.concept",
    "ErasedFluxImg2ImgPipeline": "erasure.pipelines",
    "ErasedFluxInpaintPipeline": "erasure.pipelines",
    "ErasedFluxPipeline": "erasure.pipelines",
    "ErasedPixArtSigmaPipeline": "erasure.pipelines",
    "ErasedQwenImagePipeline": "erasure.pipelines",
    "ErasedSanaPipeline": "erasure.pipelines",
    "ErasedStableDiffusion3Img2ImgPipeline": "erasure.pipelines",
    "ErasedStableDiffusion3InpaintPipeline": "erasure.pipelines",
    "ErasedStableDiffusion3Pipeline": "erasure.pipelines",
    "ErasedStableDiffusionImg2ImgPipeline": "erasure.pipelines",
    "ErasedStableDiffusionInpaintPipeline": "erasure.pipelines",
    "ErasedStableDiffusionPipeline": "erasure.pipelines",
    "ErasedStableDiffusionXLImg2ImgPipeline": "erasure.pipelines",
    "ErasedStableDiffusionXLInpaintPipeline": "erasure.pipelines",
    "ErasedStableDiffusionXLPipeline": "erasure.pipelines",
    "ErasureError": "erasure.errors",
    "Patch": "erasure.patch",
    "erase": "erasure.erasing",
    "evaluate": "erasure.evaluation",
    "load_patch": "erasure.pipelines",
    "load_pipeline": "erasure.pipelines",
    "pull": "erasure.formats.hub",
    "push": "erasure.formats.hub",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import erasure` and `erasure --help` stay fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'erasure' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
