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

    The strengths scale the few inner channels, and the product is added in place where memory allows it: a membrane
    costs two thin products. Every row is computed alike, so that the bits of a picture do not depend on the strengths
    beside it; where a row's strength is 0 its inner channels are 0, and so is what is added.

    Args:
        down: factor [rank, in] or [rank, in, height, width].
        up: factor [out, rank] or [out, rank, 1, 1].
        scale: alpha / rank.
        strengths: s [rows], one per image. A batch of several times as many rows, as guidance makes of [uncond; cond],
            takes them again for each part.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float, strengths: Tensor) -> None:
        self.down, self.up, self.strengths = down, up.flatten(1) * scale, strengths
        self.calls = 0
        self._kind: tuple[Any, ...] = ()
        self._columns: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Hook onto `module` until the handle is removed."""
        return module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The output of the layer with the term added.

        Raises:
            ErasureError: a batch that is no multiple of the rows of strengths.
        """
        self.calls += 1
        given = args[0] if args else kwargs["input"]
        if self._kind != (output.device, output.dtype):
            self._move(output)
        if given.dtype != output.dtype:
            given = given.to(output.dtype)
        if isinstance(module, nn.Conv2d):
            inner = module._conv_forward(given, self.down, None)
        else:
            inner = functional.linear(given, self.down)
        column, silent = self._column(inner)
        inner = inner * column
        if silent is None:
            return _add(output, inner, self.up)
        # 0 times infinity is no 0: neither an inner channel nor a factor that overflows may reach a silent row.
        inner = inner.masked_fill(silent, 0.0)
        if self._finite:
            return _add(output, inner, self.up)
        return torch.where(silent.view(-1, *[1] * (output.dim() - 1)), output, _add(output.clone(), inner, self.up))

    def _move(self, output: Tensor) -> None:
        """Bring the factors to the layer's own place and precision: offloading and casts change them between calls."""
        self._kind, self._columns = (output.device, output.dtype), {}
        up = self.up.to(dtype=output.dtype)
        self._finite = bool(torch.isfinite(up).all())
        self.down, self.up = self.down.to(*self._kind), up.to(output.device)

    def _column(self, inner: Tensor) -> tuple[Tensor, Tensor | None]:
        """Strengths for the rows of a batch, shaped to scale `inner`, and which of them are 0; None where none is."""
        key = inner.shape[0], inner.dim()
        if key not in self._columns:
            n = len(self.strengths)
            if key[0] % n:
                raise ErasureError(f"a gated patch expects batches of {n} rows or a multiple, and met {key[0]}")
            column = self.strengths.repeat(key[0] // n).view(-1, *[1] * (key[1] - 1))
            silent = (column == 0).to(inner.device) if bool((column == 0).any()) else None
            self._columns[key] = column.to(inner.device, inner.dtype), silent
        return self._columns[key]


def _add(output: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """`output` + up(inner), in place where `output` lies in one piece; channels are last, or second of four."""
    wide, rank = up.shape
    if output.dim() == 4 and output.shape[1] == wide and inner.shape[1] == rank:
        n, pixels = output.shape[0], output.shape[2] * output.shape[3]
        if output.is_contiguous():
            output.view(n, wide, pixels).baddbmm_(up.expand(n, wide, rank), inner.reshape(n, rank, pixels))
            return output
        output, inner = output.permute(0, 2, 3, 1), inner.permute(0, 2, 3, 1)
        return _add_last(output, inner, up).permute(0, 3, 1, 2)
    return _add_last(output, inner, up)


def _add_last(output: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    if output.is_contiguous():
        output.view(-1, up.shape[0]).addmm_(inner.reshape(-1, up.shape[1]), up.T)
        return output
    return output + functional.linear(inner, up)
