"""One file for each kind of network: what its modules are called, how it is told the text, what it predicts."""

from __future__ import annotations

from typing import Any

from erasure.errors import ErasureError
from erasure.model.architectures.architecture import Architecture
from erasure.model.architectures.counted import Flux2, ZImage
from erasure.model.architectures.dit import PixArt, Sana
from erasure.model.architectures.mmdit import SD3, Flux
from erasure.model.architectures.qwen import QwenImage
from erasure.model.architectures.unet import UNet

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "of_network", "pipelines"]

ARCHITECTURES: tuple[Architecture, ...] = (UNet(), SD3(), Flux(), PixArt(), Sana(), QwenImage(), Flux2(), ZImage())


def pipelines() -> tuple[str, ...]:
    """Return the names of the pipeline classes that concepts can be erased from."""
    return tuple(name for architecture in ARCHITECTURES for name in architecture.pipelines)


def of_network(kind: str) -> Architecture | None:
    """Return the architecture of a class of networks, by the name of the class; None if it is not known."""
    return next((architecture for architecture in ARCHITECTURES if architecture.network == kind), None)


def architecture_of(pipe: Any) -> Architecture:
    """Return the architecture of a pipeline's network; a pipeline with a `unet` has that of the UNet.

    Raises:
        ErasureError: the pipeline has no network of a known architecture.
    """
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        return ARCHITECTURES[0]
    transformer = getattr(transformer, "_orig_mod", transformer)
    for parent in type(transformer).__mro__:
        if (found := of_network(parent.__name__)) is not None:
            return found
    known = ", ".join(architecture.network for architecture in ARCHITECTURES)
    raise ErasureError(
        f"{type(pipe).__name__}: its network is a {type(transformer).__name__}, which is not supported. "
        f"Supported: {known}"
    )
