"""The memory that a run will need: that of its largest calls, made with tensors that have shapes but no values."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from erasure.distributed import ProcessGroup
from erasure.model.base import Base
from erasure.training.compute import Computing, Engine, Rows, by_rows, cast
from erasure.training.orthogonality import twice_differentiable

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of the UNet


def peaks(
    base: Base,
    forward: Call,
    backward: tuple[Call, ...],
    adapter: Any,
    computing: Computing,
    processes: int,
    twice: bool = False,
) -> dict[str, int]:
    """Return the bytes of the model and of its largest calls.

    Args:
        base: the checkpoint; its weights are not touched.
        forward: the largest call without gradients; empty if there is none.
        backward: the calls that one backward pass goes through; none if nothing trains.
        adapter: what trains, or None where nothing does.
        computing: precision and layout of the run.
        processes: how many processes share each call.
        twice: whether the gradients of what trains are differentiated once more (`orthogonality.py`).

    Returns:
        `wide`, the model before it is narrowed to the run's precision; `model`, after; `forward` and `backward`, held
        at most during the calls, the latter beyond the gradients of what trains.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    forward, *together = (_shapes(call, processes) for call in (forward, *backward))
    others = 0  # the text encoders are fp32 while a run trains
    for name, part in base.pipe.components.items():
        if isinstance(part, nn.Module) and name != base.component:
            wide = name.startswith("text_encoder")
            others += sum(p.numel() * (4 if wide else p.element_size()) for p in part.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = type(base.network).from_config(dict(base.network.config)).requires_grad_(False)
        cast(unet, None, base.network.dtype)
        shell = Base(base.name, SimpleNamespace(**{base.component: unet}))
        with Engine(shell, replace(computing, compile=False, channels_last=False)) as engine:
            sizes = {"wide": others + size_of(unet), "forward": 0, "backward": 0}
            for norm in unet.modules():  # what autocast does on a GPU, and not on a CPU
                if engine.half and isinstance(norm, nn.GroupNorm | nn.LayerNorm):
                    norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
            if forward[0]:
                with torch.no_grad():
                    sizes["forward"] = _held(unet, [forward])
            before = size_of(unet)
            inside = adapter is not None and adapter.component == base.component
            twin = adapter.twin(unet) if inside and hasattr(adapter, "twin") else None
            engine.settle(twin.parameters() if twin else {}, inside=inside)
            trained = {id(param) for param in twin.parameters().values()} if twin else set()
            after = sum(4 * p.numel() if id(p) in trained else size_of(p) for p in unet.parameters())
            sizes["model"] = others + min(after, before)
            if together:
                own = list(twin.parameters().values()) if twin else []  # their gradients belong to the working state
                most = _held(unet, together, own if twice else None)
                sizes["backward"] = max(0, most - (1 + twice) * sum(4 * p.numel() for p in own))
            if twin:
                twin.remove()
    return sizes


@dataclass(frozen=True)
class _Shape:
    """What a forecast knows of a tensor: everything but its values."""

    shape: torch.Size
    dtype: torch.dtype
    trained: bool


def _shapes(call: Call, processes: int) -> Any:
    """Return the shapes of one process's share of a call."""
    if not call[0]:
        return call
    n = len(call[0][0])
    rows = Rows(ProcessGroup(0, processes), n).size
    share = by_rows(call, n, lambda value: value[:rows])
    return tree_map_only(Tensor, lambda value: _Shape(value.shape, value.dtype, value.requires_grad), share)


def _held(unet: nn.Module, calls: Sequence[Any], twice: Sequence[Tensor] | None = None) -> int:
    """Return the most bytes held at once, besides the weights, in calls of these shapes (and their backward pass).

    Args:
        unet: the network.
        calls: the shapes of their arguments.
        twice: tensors whose gradients are differentiated once more, where there are any, else the calls' own that have
            gradients; None: the backward pass is the last.
    """

    def bare(of: _Shape) -> Tensor:
        value = torch.zeros(of.shape, dtype=of.dtype)
        return value.requires_grad_(torch.is_grad_enabled() and of.trained)

    given = [tree_map_only(_Shape, bare, call) for call in calls]
    with _Tally() as tally:
        with nullcontext() if twice is None else twice_differentiable():
            outs = [unet(*rest, **named) for rest, named in given]
            if not torch.is_grad_enabled():
                return tally.most
            samples = [out[0] if isinstance(out, tuple) else out.sample for out in outs]
            if twice is None:
                torch.stack([sample.sum() for sample in samples]).sum().backward()
                return tally.most
            leaves = [leaf for leaf in twice or tree_leaves(given) if isinstance(leaf, Tensor) and leaf.requires_grad]
            loss = torch.stack([sample.square().sum() for sample in samples]).sum()
            found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            gradients = [gradient for gradient in found if gradient is not None]
            torch.autograd.backward(gradients, [torch.zeros_like(gradient) for gradient in gradients])
    return tally.most


class _Tally(TorchDispatchMode):
    """A dispatch mode that adds up the bytes of the tensors that operations make, less those that are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    size = storage.nbytes()
                    self._known.add(storage._cdata)
                    self.live += size
                    self.most = max(self.most, self.live)
                    weakref.finalize(storage, self._free, storage._cdata, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def size_of(what: nn.Module | Tensor) -> int:
    """Return the bytes of a tensor, or of all parameters of a module."""
    parts = what.parameters() if isinstance(what, nn.Module) else [what]
    return sum(part.numel() * part.element_size() for part in parts)
