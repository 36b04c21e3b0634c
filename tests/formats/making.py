"""Files as other codes publish them, made from a tiny pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erasure.patch import Patch


def changed(pipe: Any, component: str, part: str, seed: int = 3) -> dict[str, Tensor]:
    """All weights of a component; those whose name contains `part` moved at random."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: value.detach().clone() for name, value in getattr(pipe, component).state_dict().items()}
    for name, value in weights.items():
        if part in name:
            weights[name] = value + 0.1 * torch.randn(value.shape, generator=generator)
    return weights


def close(one: Patch, other: Patch, tolerance: float = 1e-6) -> bool:
    """Whether two patches change the same parameters by the same, to a tolerance of the largest change."""
    if one.components != other.components:
        return False
    for component in one.components:
        here, there = one.deltas(component), other.deltas(component)
        if here.keys() != there.keys():
            return False
        largest = max(float(value.abs().max()) for value in here.values())
        if any(float((here[name] - there[name]).abs().max()) > tolerance * largest for name in here):
            return False
    return True
