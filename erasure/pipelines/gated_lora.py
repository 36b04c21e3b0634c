"""Gated low-rank terms: LoRA layers whose strength is set for each row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from erasure.errors import ErasureError
from erasure.patch.module_keys import NETWORKS, find_module
from erasure.patch.payload import Delta, LowRank


class Membrane:
    """A forward hook that adds s_b * (alpha / rank) * up(down(x_b)) to the output of one Linear or Conv2d.

    The name is that of SPM (semi-permeable membrane, Lyu et al. 2024, arXiv 2312.16145). The strengths scale the few
    channels between the two factors, and the product is added in place where memory allows it, so a membrane costs two
    thin matrix products. All rows are computed alike, so the bits of an image do not depend on the strengths of the
    other rows in its batch; a row of strength 0 has zeros between the factors, and so has what is added to it.

    Args:
        down: factor [rank, in] or [rank, in, height, width].
        up: factor [out, rank] or [out, rank, 1, 1].
        scale: alpha / rank.
        strengths: s [rows], one per image. For a batch of several times as many rows, such as the [uncond; cond] of
            classifier-free guidance, the strengths are repeated for each part.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float, strengths: Tensor) -> None:
        self.down, self.up, self.strengths = down, up.flatten(1) * scale, strengths
        self.calls = 0
        self._placement: tuple[Any, ...] = ()
        self._columns: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Register this hook on `module`, and return the handle that removes it."""
        return module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return the output of the layer with the low-rank term added.

        Raises:
            ErasureError: the batch is not a multiple of the number of strengths.
        """
        self.calls += 1
        x = args[0] if args else kwargs["input"]
        if self._placement != (output.device, output.dtype):
            self._move(output)
        if x.dtype != output.dtype:
            x = x.to(output.dtype)
        if isinstance(module, nn.Conv2d):
            inner = module._conv_forward(x, self.down, None)
        else:
            inner = functional.linear(x, self.down)
        column, is_zero = self._column(inner)
        inner = inner * column
        if is_zero is None:
            return _add(output, inner, self.up)
        # 0 times infinity is NaN: neither an inner channel nor a factor that overflows may reach a row of strength 0.
        inner = inner.masked_fill(is_zero, 0.0)
        if self._finite:
            return _add(output, inner, self.up)
        return torch.where(is_zero.view(-1, *[1] * (output.dim() - 1)), output, _add(output.clone(), inner, self.up))

    def _move(self, output: Tensor) -> None:
        """Move the factors to the device and dtype of the layer, which offloading and casts change between calls."""
        self._placement, self._columns = (output.device, output.dtype), {}
        up = self.up.to(dtype=output.dtype)
        self._finite = bool(torch.isfinite(up).all())
        self.down, self.up = self.down.to(*self._placement), up.to(output.device)

    def _column(self, inner: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the strengths of the rows, shaped to scale `inner`, and a mask of those that are 0, if any."""
        key = inner.shape[0], inner.dim()
        if key not in self._columns:
            rows = len(self.strengths)
            if key[0] % rows:
                raise ErasureError(
                    f"a gated patch was opened for {rows} rows, but the network was called with a batch of {key[0]}, "
                    f"which is not a multiple of {rows}"
                )
            column = self.strengths.repeat(key[0] // rows).view(-1, *[1] * (key[1] - 1))
            is_zero = (column == 0).to(inner.device) if bool((column == 0).any()) else None
            self._columns[key] = column.to(inner.device, inner.dtype), is_zero
        return self._columns[key]


def membranes(
    payload: LowRank | Delta, component: Callable[[str], nn.Module], strengths: Tensor, images: int
) -> list[tuple[Membrane, nn.Module]]:
    """Build the membranes of a payload, each with the layer that it belongs to; none is attached yet.

    Args:
        payload: the low-rank factors; whole-weight differences have no membranes.
        component: function from the name of a component to its module.
        strengths: one strength per prompt [prompts].
        images: number of images per prompt.

    Raises:
        ErasureError: a component no longer has one of the layers.
    """
    pairs: list[tuple[Membrane, nn.Module]] = []
    layers = payload.layers if isinstance(payload, LowRank) else {}
    for name, factors in layers.items():
        # Text encoders see one row per prompt, the network that denoises one per image.
        rows = strengths.repeat_interleave(images) if name in NETWORKS else strengths
        for path, (down, up, alpha) in factors.items():
            module = find_module(component(name), path)
            if module is None:
                raise ErasureError(f"{name} no longer has the layer {path}; it had it when patches were loaded")
            pairs.append((Membrane(down, up, alpha / down.shape[0], rows), module))
    return pairs


def attached(pairs: Iterable[tuple[Membrane, nn.Module]]) -> Callable[[], AbstractContextManager[None]]:
    """Return a function that opens a context in which the membranes act.

    The same membranes are attached every time, so that their factors stay on the device of the network.

    Args:
        pairs: membranes and their layers, as from `membranes`.
    """

    @contextmanager
    def context() -> Iterator[None]:
        handles = [membrane.attach(module) for membrane, module in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return context


def _add(output: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """Add up(inner) to `output`, in place if it is contiguous; channels are last, or second of four dimensions."""
    channels, rank = up.shape
    if output.dim() == 4 and output.shape[1] == channels and inner.shape[1] == rank:
        rows, pixels = output.shape[0], output.shape[2] * output.shape[3]
        if output.is_contiguous():
            factor = up.expand(rows, channels, rank)
            output.view(rows, channels, pixels).baddbmm_(factor, inner.reshape(rows, rank, pixels))
            return output
        output, inner = output.permute(0, 2, 3, 1), inner.permute(0, 2, 3, 1)
        return _add_last(output, inner, up).permute(0, 3, 1, 2)
    return _add_last(output, inner, up)


def _add_last(output: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    if output.is_contiguous():
        output.view(-1, up.shape[0]).addmm_(inner.reshape(-1, up.shape[1]), up.T)
        return output
    return output + functional.linear(inner, up)
