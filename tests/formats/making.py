"""Files as other codes publish them, made from a tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from erasure.errors import ErasureError
from erasure.formats import import_patch
from erasure.model.base import Base
from erasure.patch import Patch

# Settings of a run that takes no time.
SMALL = {"iterations": 3, "batch_size": 2, "trajectories": 2, "sample_steps": 4, "learning_rate": 5e-2}


def changed(pipe: Any, component: str, part: str, seed: int = 3) -> dict[str, Tensor]:
    """Return all weights of a component; those whose names contain `part` are changed at random."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: value.detach().clone() for name, value in getattr(pipe, component).state_dict().items()}
    for name, value in weights.items():
        if part in name:
            weights[name] = value + 0.1 * torch.randn(value.shape, generator=generator)
    return weights


def refused(
    cases: Mapping[str, tuple[Any, str]],
    folder: Path,
    base: Base,
    form: str = "auto",
    write: Callable[[Any, Path], object] = save_file,
    **options: Any,
) -> None:
    """Check for each case that the file which `write` makes of its content is refused with its message (a pattern)."""
    for name, (content, message) in cases.items():
        path = folder / f"{name}.safetensors"
        write(content, path)
        with pytest.raises(ErasureError, match=message):
            import_patch(path, form, base, **options)


def close(patch: Patch, other: Patch, tolerance: float = 1e-6) -> bool:
    """Return whether two patches change the same parameters equally, to a tolerance relative to the largest change."""
    if patch.components != other.components:
        return False
    for component in patch.components:
        changes, others = patch.deltas(component), other.deltas(component)
        if changes.keys() != others.keys():
            return False
        largest = max(float(value.abs().max()) for value in changes.values())
        if any(float((changes[name] - others[name]).abs().max()) > tolerance * largest for name in changes):
            return False
    return True
