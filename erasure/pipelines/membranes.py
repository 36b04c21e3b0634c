"""Membranes: low-rank terms beside a layer, with a strength for each row of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from erasure.errors import ErasureError


class Membrane:
    """A forward hook that adds s_b * (alpha / rank) * up(down(x_b)) to the output of one Linear or Conv2d.

    Args:
        down: factor [rank, in] or [rank, in, height, width].
        up: factor [out, rank] or [out, rank, 1, 1].
        scale: alpha / rank.
        strengths: s [rows], one per image. A batch of several times as many rows, as guidance makes of [uncond; cond],
            takes them again for each part.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float, strengths: Tensor) -> None:
        self.down, self.up, self.strengths = down, up * scale, strengths
        self.calls = 0

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Hook onto `module` until the handle is removed."""
        return module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The output of the layer with the term added."""
        self.calls += 1
        given = args[0] if args else kwargs["input"]
        rows = len(self.strengths)
        if given.shape[0] % rows:
            raise ErasureError(f"a gated patch expects batches of {rows} rows or a multiple, and met {given.shape[0]}")
        if self.up.device != given.device or self.up.dtype != given.dtype:
            self.down, self.up = self.down.to(given.device, given.dtype), self.up.to(given.device, given.dtype)
            self.strengths = self.strengths.to(given.device, given.dtype)
        if isinstance(module, nn.Conv2d):
            term = functional.conv2d(module._conv_forward(given, self.down, None), self.up)
        else:
            term = functional.linear(functional.linear(given, self.down), self.up)
        strengths = self.strengths.repeat(given.shape[0] // rows).view(-1, *[1] * (term.dim() - 1))
        # Rows of strength 0 keep the bits of the base, also where the term would overflow.
        return torch.where(strengths == 0, output, (output + strengths * term).to(output.dtype))
