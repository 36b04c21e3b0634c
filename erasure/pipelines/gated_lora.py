"""Gated low-rank terms: LoRA layers whose strength is set for each patch and each row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from erasure.errors import ErasureError
from erasure.patch.module_keys import NETWORKS, find_module
from erasure.patch.payload import Delta, Layer, LowRank, stack_layers


class Membrane:
    """A forward hook that adds sum_i s_bi * scale_i * up_i(down_i(x_b)) to the output of one Linear or Conv2d.

    The name is that of SPM (semi-permeable membrane, Lyu et al. 2024, arXiv 2312.16145). The factors of all patches i
    that act on the layer are stacked, so that any number of them costs two thin matrix products. The strengths scale
    the channels between the two factors, and the product is added in place where memory allows it. All rows are
    computed alike; a row in which a patch has strength 0 has zeros in the patch's channels, and so has what is added
    to it.

    Args:
        down: stacked factors [rank, in] or [rank, in, height, width]; rank is that of all patches together.
        up: stacked factors [out, rank], multiplied by scale = alpha / rank of each patch.
        strengths: s [rows, rank], one row per image and one column per channel. For a batch of several times as many
            rows, such as the [uncond; cond] of classifier-free guidance, the strengths are repeated for each part.
        component: name of the component that the layer belongs to.
    """

    def __init__(self, down: Tensor, up: Tensor, strengths: Tensor, component: str = "unet") -> None:
        self.down, self.up, self.strengths, self.component = down, up, strengths, component
        self.calls = 0
        self._placement: tuple[Any, ...] = ()
        self._columns: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        self._overflowing: list[tuple[int, Tensor]] = []  # channels whose `up` is infinite in the layer's dtype

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Register this hook on `module`, and return the handle that removes it."""
        return module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return the output of the layer with the low-rank terms added.

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
            inner, axis = module._conv_forward(x, self.down, None), 1
        else:
            inner, axis = functional.linear(x, self.down), -1
        column, is_zero = self._column(inner, axis)
        inner = inner * column
        if is_zero is not None:
            # 0 times infinity is NaN: no inner channel that overflows may reach a row of strength 0.
            inner = inner.masked_fill(is_zero, 0.0)
        result = _add(output, inner, self.up)
        for channel, up in self._overflowing:
            term = _add(result.clone(), inner.narrow(axis, channel, 1), up)
            result = torch.where(column.narrow(axis, channel, 1) == 0, result, term)
        return result

    def _move(self, output: Tensor) -> None:
        """Move the factors to the device and dtype of the layer, which offloading and casts change between calls."""
        self._placement, self._columns = (output.device, output.dtype), {}
        up = self.up.to(output.dtype)
        infinite = ~torch.isfinite(up).all(0)
        self._overflowing = [
            (channel, up[:, [channel]].to(output.device)) for channel in infinite.nonzero().flatten().tolist()
        ]
        self.down, self.up = self.down.to(*self._placement), up.masked_fill(infinite, 0.0).to(output.device)

    def _column(self, inner: Tensor, axis: int) -> tuple[Tensor, Tensor | None]:
        """Return the strengths, shaped to scale `inner`, and a mask of those that are 0, if any."""
        key = inner.shape[0], inner.dim()
        if key not in self._columns:
            rows, rank = self.strengths.shape
            if key[0] % rows:
                raise ErasureError(
                    f"a gated patch was opened for {rows} rows, but the network was called with a batch of {key[0]}, "
                    f"which is not a multiple of {rows}"
                )
            shape = [key[0], *[1] * (key[1] - 1)]
            shape[axis] = rank
            column = self.strengths.repeat(key[0] // rows, 1).view(shape)
            is_zero = (column == 0).to(inner.device) if bool((column == 0).any()) else None
            self._columns[key] = column.to(inner.device, inner.dtype), is_zero
        return self._columns[key]


def membranes(
    terms: Sequence[tuple[LowRank | Delta, Tensor]], component: Callable[[str], nn.Module], images: int
) -> list[tuple[Membrane, nn.Module]]:
    """Build one membrane for each layer that payloads change, with the layer; none is attached yet.

    Args:
        terms: low-rank payloads, and for each one strength per prompt [prompts]; whole-weight differences are left out.
        component: function from the name of a component to its module.
        images: number of images per prompt.

    Raises:
        ErasureError: a component no longer has one of the layers.
    """
    stacks: dict[tuple[str, str], list[tuple[Layer, int]]] = {}
    for number, (payload, _) in enumerate(terms):
        for name, factors in payload.layers.items() if isinstance(payload, LowRank) else ():
            for path, layer in factors.items():
                stacks.setdefault((name, path), []).append((layer, number))
    pairs: list[tuple[Membrane, nn.Module]] = []
    columns: dict[tuple[Any, ...], Tensor] = {}
    for (name, path), stack in stacks.items():
        module = find_module(component(name), path)
        if module is None:
            raise ErasureError(f"{name} no longer has the layer {path}; it had it when patches were loaded")
        # Text encoders see one row per prompt, the network that denoises one per image.
        repeats = images if name in NETWORKS else 1
        key = repeats, *((number, down.shape[0]) for (down, _, _), number in stack)
        if key not in columns:
            parts = [terms[number][1].unsqueeze(1).expand(-1, down.shape[0]) for (down, _, _), number in stack]
            columns[key] = torch.cat(parts, 1).repeat_interleave(repeats, 0)
        pairs.append((Membrane(*stack_layers([layer for layer, _ in stack]), columns[key], name), module))
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
