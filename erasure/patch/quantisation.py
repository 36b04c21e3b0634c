"""Quantised weights (8 or 4 bits: torchao, bitsandbytes, quanto, GGUF): how they are recognised."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from erasure.patch.module_keys import find_parameter

SUBCLASSES = ("torchao", "optimum")  # packages whose tensors say that they are floating-point
QUANTISED = "quantised"  # stands for the fingerprint of weights that do not tell the base


def is_quantised(value: Tensor | None) -> bool:
    """Return whether a parameter holds quantised numbers."""
    if value is None:
        return False
    return not value.is_floating_point() or type(value.data).__module__.partition(".")[0] in SUBCLASSES


def quantised_names(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Return those of the named parameters of a component that are quantised."""
    return [name for name in names if is_quantised(find_parameter(module, name))]
