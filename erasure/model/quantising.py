"""Quantised layers: how they are recognised, and loading a model with its large layers in 8 bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from erasure.errors import ErasureError, unknown

KINDS = ("int8",)
SUBCLASSES = ("torchao", "optimum")  # packages whose tensors say that they are floating-point


def is_quantised(value: Tensor | None) -> bool:
    """Return whether a parameter holds quantised numbers (8 or 4 bits: torchao, bitsandbytes, quanto, GGUF)."""
    if value is None:
        return False
    return not value.is_floating_point() or type(value.data).__module__.partition(".")[0] in SUBCLASSES


def check_quantising(kind: str | None) -> None:
    """Check how a model is to be quantised, before it is loaded.

    Args:
        kind: `int8`; None quantises nothing.

    Raises:
        ErasureError: another kind, or torchao is not installed.
    """
    if kind is None:
        return
    if kind not in KINDS:
        raise unknown("quantize", kind, KINDS)
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as fault:
        raise ErasureError(
            f"quantize={kind} needs torchao (pip install torchao): {fault}. Nothing was loaded"
        ) from None


def quantise(pipe: Any) -> None:
    """Turn the linear layers of the network, and of text encoders other than CLIP, into 8-bit layers, in place.

    Each row of a weight becomes whole numbers from -127 to 127 with one factor (torchao's int8 weight-only layers).
    CLIP stays as it is: it is small, and some methods train it.

    Args:
        pipe: a diffusers pipeline.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    for name, part in pipe.components.items():
        encodes = name.startswith("text_encoder") and not isinstance(part, CLIPTextModel | CLIPTextModelWithProjection)
        if part is not None and (encodes or name in ("unet", "transformer")):
            quantize_(part, Int8WeightOnlyConfig())
