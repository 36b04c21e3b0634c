"""Cases for the tests of attacks, made without drawing anything."""

from __future__ import annotations

import torch

from erasure.evaluation.attacks.attack import Case
from tests.tiny import SIDE


def cases_of(count: int) -> list[Case]:
    """Return cases that ask for a cat, with random latents."""
    draw = torch.Generator().manual_seed(0)
    looks = ("red", "blue", "night", "style")[:count]
    return [
        Case(f"r{i}", f"a cat in {look}", i, "cat", torch.randn(4, SIDE, SIDE, generator=draw), "a", f"in {look}")
        for i, look in enumerate(looks)
    ]
