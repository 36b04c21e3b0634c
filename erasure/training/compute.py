"""How the UNet is computed while a run trains: precision, layout, and by how many processes.

The methods know nothing of it. They call one UNet with one whole batch; the engine hands each process its rows, runs
them in the wanted precision, and puts the outputs of all together, so that every process sees the same losses. A loss
that is no mean over samples (weights a sample, a retain term with a batch of its own, an attack within a step) so
stays what it is in one process, and each call is counted once, in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from erasure.config import build
from erasure.distributed import ProcessGroup
from erasure.dtypes import DTYPES
from erasure.errors import ErasureError, unknown
from erasure.model.base import Base

INNER_SCALE = 4096.0  # of gradients that only pass through the UNet in fp16: theirs are about 1e-6 at its output


@dataclass(frozen=True)
class Computing:
    """How a run computes; part of what a patch records and of what a resumed run must agree with.

    Args:
        precision: of the UNet's layers: fp32, bf16, fp16. What trains stays fp32, and so do the losses and the text
            encoder. None: bf16 on GPUs that have it, else fp32.
        channels_last: lay images out channels last, which convolutions on GPUs like.
        compile: compile the UNet with torch.compile when the pools are made: worth it for long runs.
        gradient_checkpointing: compute activations anew on the way back: less memory, about a third more time.
    """

    precision: str | None = None
    channels_last: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown precision."""
        if self.precision is not None and self.precision not in DTYPES:
            raise unknown("precision", self.precision, DTYPES)

    @classmethod
    def split(cls, *layers: Mapping[str, Any]) -> tuple[Computing, list[dict[str, Any]]]:
        """Take the settings of computing out of `layers` of settings, the later ones winning; gives the rest too."""
        own = {field.name for field in fields(cls)}
        given = [{key: value for key, value in layer.items() if key in own} for layer in layers]
        rest = [{key: value for key, value in layer.items() if key not in own} for layer in layers]
        return build(cls, *given), rest

    def on(self, device: torch.device) -> Computing:
        """With the precision that this device likes, where none is given."""
        if self.precision is not None:
            return self
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return replace(self, precision="bf16" if half else "fp32")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Engine:
    """A context in which the UNet of `base` computes as wanted; afterwards it is as it was, bit for bit.

    Alone and in fp32 with nothing else asked for, it touches nothing.
    """

    def __init__(self, base: Base, computing: Computing, group: ProcessGroup | None = None) -> None:
        self.base, self.group = base, group or ProcessGroup()
        self.computing = computing.on(base.device)
        self.dtype = DTYPES[self.computing.precision or "fp32"]
        self._inner: Callable[..., Any] = base.unet.forward
        self._settled = self._alone = self._between = False
        self._scale = 1.0
        self._undo = ExitStack()

    def __enter__(self) -> Engine:
        """Put the UNet into the wanted form; what trains is not known yet."""
        unet, asked = self.base.unet, self.computing
        with ExitStack() as undo:  # what is done is undone if the next step fails
            if self.half:
                # The first layer too: its dtype is what diffusers takes for the UNet's, and so for the latents'.
                kept = {name for name, _ in unet.named_parameters()} - _narrowed(unet)
                undo.callback(cast(unet, kept, torch.float32))
            else:
                undo.callback(cast(unet, None, torch.float32))
            for encoder in _encoders(self.base):
                undo.callback(cast(encoder, None, torch.float32))
            if asked.channels_last:
                unet.to(memory_format=torch.channels_last)
                undo.callback(unet.to, memory_format=torch.contiguous_format)
            if asked.gradient_checkpointing and not unet.is_gradient_checkpointing:
                unet.enable_gradient_checkpointing()
                undo.callback(unet.disable_gradient_checkpointing)
            if self.half or self.group.count > 1 or asked.channels_last:
                undo.callback(_replaced(unet, self._forward))
                self._between = True
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the UNet back."""
        self.close()

    def close(self) -> None:
        """Give the UNet back before the context ends; the adapter must be off it."""
        self._undo.close()

    @property
    def half(self) -> bool:
        """Whether the UNet computes in half precision."""
        return self.dtype != torch.float32

    def settle(self, params: Mapping[str, nn.Parameter], inside: bool) -> None:
        """What trains is known: share the backward calls out, narrow what is frozen, compile.

        Args:
            params: the trained tensors.
            inside: they act in the UNet; else gradients only pass through it.
        """
        unet = self.base.unet
        for param in params.values():
            if param.dtype != torch.float32:
                raise ErasureError(f"trained tensors are fp32, not {param.dtype}")
            if self.group.count > 1:
                self._undo.callback(param.register_hook(self.group.mean).remove)
        if self.half:
            frozen = {name for name, param in unet.named_parameters() if not param.requires_grad}
            self._undo.callback(cast(unet, frozen & _narrowed(unet), self.dtype, aside=True))
        if self.computing.precision == "fp16" and not inside:
            self._scale = INNER_SCALE
        if self.computing.compile:
            # Not before: a compiled UNet does not see hooks that are put on it later.
            compiled = torch.compile(self._inner)
            if self._between:
                self._inner = compiled
            else:
                self._undo.callback(_replaced(unet, compiled))
        self._settled = True

    def scaler(self) -> torch.amp.GradScaler:
        """What keeps gradients of fp16 from vanishing; in other precisions it does nothing."""
        return torch.amp.GradScaler(self.base.device.type, enabled=self.computing.precision == "fp16")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let this process use the UNet for itself, as the others do not."""
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    def _forward(self, sample: Tensor, *rest: Any, **named: Any) -> Any:
        n = len(sample)
        # Before what trains is known, gradients could not be put together: every process then computes all of them.
        shared = self.group.count > 1 and not self._alone and (self._settled or not torch.is_grad_enabled())
        rows = Rows(self.group if shared else ProcessGroup(), n, self._scale)
        sample, rest, named = (by_rows(value, n, rows.take) for value in (sample, rest, named))
        if self.computing.channels_last:
            sample = sample.contiguous(memory_format=torch.channels_last)
        with torch.autocast(sample.device.type, self.dtype, enabled=self.half, cache_enabled=False):
            out = self._inner(sample, *rest, **named)
        made = rows.put((out[0] if isinstance(out, tuple) else out.sample).float())
        return (made,) if isinstance(out, tuple) else type(out)(sample=made)


@dataclass(frozen=True)
class Rows:
    """Which of `n` rows a process computes: the next `size` in its turn, the last row again where there are no more.

    Outside of the UNet every process goes through the whole graph, inside of it through its rows. So that the mean of
    the processes' gradients is the gradient, whichever way it took, a gradient is multiplied by the number of
    processes as it comes in from behind, and, gathered, divided by it as it leaves in front.

    Args:
        group: the processes.
        n: rows of the batch.
        scale: factor on gradients inside of the UNet.
    """

    group: ProcessGroup
    n: int
    scale: float = 1.0

    @property
    def size(self) -> int:
        """Rows a process."""
        return -(-self.n // self.group.count)

    @property
    def whole(self) -> bool:
        """Whether there is nothing to do."""
        return self.group.count == 1 and self.scale == 1

    def own(self, device: torch.device) -> Tensor:
        """Numbers of this process's rows [size]."""
        start = self.group.index * self.size
        return torch.arange(start, start + self.size, device=device).clamp(max=self.n - 1)

    def take(self, value: Tensor) -> Tensor:
        """This process's rows of [n, ...]."""
        return value if self.whole else _Take.apply(value, self)  # type: ignore[no-any-return]

    def put(self, part: Tensor) -> Tensor:
        """[n, ...] of every process's rows."""
        return part if self.whole else _Put.apply(part, self)  # type: ignore[no-any-return]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return value[rows.own(value.device)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows = ctx.rows
        return rows.group.gather(gradients[0])[: rows.n] / (rows.group.count * rows.scale), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return rows.group.gather(part)[: rows.n].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows, (whole,) = ctx.rows, gradients
        start = rows.group.index * rows.size
        mine = whole[start : start + rows.size] * (rows.group.count * rows.scale)
        filled = whole.new_zeros((rows.size, *whole.shape[1:]))  # rows that stand in for none get no gradient
        filled[: len(mine)] = mine
        return filled, None


def by_rows(value: Any, n: int, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it that has `n` rows changed."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() and len(value) == n else value
    if isinstance(value, dict):
        return {key: by_rows(one, n, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(by_rows(one, n, change) for one in value)
    return value


def _narrowed(unet: nn.Module) -> set[str]:
    """Names of the parameters that autocast narrows at every use anyway, but for the first layer's."""
    head = next(name for name, _ in unet.named_parameters()).rpartition(".")[0]
    return {
        f"{path}.{name}"
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and path != head
        for name, _ in module.named_parameters(recurse=False)
    }


def _encoders(base: Base) -> list[nn.Module]:
    found = (getattr(base.pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    return [encoder for encoder in found if encoder is not None]


def cast(module: nn.Module, names: set[str] | None, dtype: torch.dtype, *, aside: bool = False) -> Callable[[], None]:
    """Hold the named parameters (None: all) in `dtype`; what is returned puts their own tensors back.

    `aside`: their own tensors wait in main memory.
    """
    kept: list[tuple[nn.Parameter, Tensor, torch.device]] = []
    for name, param in module.named_parameters():
        if (names is None or name in names) and param.is_floating_point() and param.dtype != dtype:
            own = param.data
            kept.append((param, own.cpu() if aside else own, own.device))
            param.data = own.to(dtype)

    def back() -> None:
        for param, own, device in kept:
            param.data = own.to(device)

    return back


def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give the module another `forward`; what is returned gives it its own back."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign,assignment]

    def back() -> None:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own

    return back
