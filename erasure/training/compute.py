"""How the UNet computes during a run: in which precision and layout, and shared by how many processes.

Methods need not know. They call one UNet with one whole batch; the engine gives each process its rows, computes them
in the chosen precision, and gathers the outputs, so that every process sees the same losses. So losses that are not a
mean over samples (weights per sample, a retain term with its own batch, an attack within a step) stay what they are in
one process, and each call is counted once, in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erasure.config import build, check_settings
from erasure.distributed import ProcessGroup
from erasure.dtypes import DTYPES
from erasure.errors import ErasureError
from erasure.model.base import Base

# Scale of gradients that only pass through a UNet in fp16: at its output they are about 1e-6.
INNER_SCALE = 4096.0


@dataclass(frozen=True)
class Computing:
    """Settings of how a run computes; a patch records them, and a resumed run must agree with them.

    Args:
        precision: of the UNet's layers. What trains stays in fp32, and so do the losses and the text encoder. None:
            bf16 on GPUs that support it, else fp32.
        channels_last: use the channels-last memory layout, which is faster for convolutions on GPUs.
        compile: compile the UNet with torch.compile once the pools are made; pays off in long runs.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    """

    precision: Literal["fp32", "fp16", "bf16"] | None = None
    channels_last: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the choices; raises ErasureError."""
        check_settings(self)

    @classmethod
    def split(cls, *layers: Mapping[str, Any]) -> tuple[Computing, list[dict[str, Any]]]:
        """Split layers of settings: return those of computing, built from all layers, and the rest of each layer."""
        names = {field.name for field in fields(cls)}
        own = [{key: value for key, value in layer.items() if key in names} for layer in layers]
        rest = [{key: value for key, value in layer.items() if key not in names} for layer in layers]
        return build(cls, *own), rest

    def on(self, device: torch.device) -> Computing:
        """Return the same settings with a precision: where none is set, the one that suits the device."""
        if self.precision is not None:
            return self
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return replace(self, precision="bf16" if half else "fp32")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)


class Engine:
    """A context in which a base computes as its settings say; afterwards it is as it was, bit for bit.

    In one process, in fp32 and without further settings, it changes nothing of an fp32 base.

    Args:
        base: the checkpoint.
        computing: the settings.
        group: the processes that share the UNet's calls; None: this process alone.
        unet: whether the run calls the UNet; if not, only the text encoders are changed (to fp32).
    """

    def __init__(self, base: Base, computing: Computing, group: ProcessGroup | None = None, unet: bool = True) -> None:
        self.base, self.group, self._unet = base, group or ProcessGroup(), unet
        self.computing = computing.on(base.device)
        self.dtype = DTYPES[self.computing.precision or "fp32"]
        self._inner: Callable[..., Any] = base.network.forward
        self._settled = self._alone = self._between = False
        self._scale = 1.0
        self._undo = ExitStack()

    def __enter__(self) -> Engine:
        """Put the UNet into the chosen form; what trains is not known yet."""
        with ExitStack() as undo:  # if a step fails, those before it are undone
            if self._unet:
                self._enter_unet(undo)
            for encoder in _encoders(self.base):
                undo.callback(cast(encoder, None, torch.float32))
            self._undo = undo.pop_all()
        return self

    def _enter_unet(self, undo: ExitStack) -> None:
        unet, settings = self.base.network, self.computing
        # In half precision the first layer is cast too: diffusers takes its dtype for the UNet's, and so the latents'.
        names = {name for name, _ in unet.named_parameters()} - _narrowed(unet) if self.half else None
        undo.callback(cast(unet, names, torch.float32))
        if settings.channels_last and self.base.component != "unet":
            raise ErasureError("channels_last is a layout for convolutions, which a transformer does not have: omit it")
        if settings.channels_last:
            unet.to(memory_format=torch.channels_last)
            undo.callback(unet.to, memory_format=torch.contiguous_format)
        if settings.gradient_checkpointing and not unet.is_gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            undo.callback(unet.disable_gradient_checkpointing)
        if self.half or self.group.count > 1 or settings.channels_last:
            undo.callback(_replaced(unet, self._forward))
            self._between = True

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the base."""
        self.close()

    def close(self) -> None:
        """Restore the base before the context ends; the adapter must be removed by then."""
        self._undo.close()

    @property
    def half(self) -> bool:
        """Tell whether the UNet computes in half precision."""
        return self.dtype != torch.float32

    def settle(self, params: Mapping[str, nn.Parameter], inside: bool) -> None:
        """Prepare for training: share the backward calls, cast what is frozen to half precision, compile.

        Args:
            params: the trained tensors.
            inside: whether they act in the UNet; otherwise gradients only pass through it.
        """
        unet = self.base.network
        for param in params.values():
            if param.dtype != torch.float32:
                raise ErasureError(f"trained tensors must be fp32, and one is {param.dtype}")
            if self.group.count > 1:
                self._undo.callback(param.register_hook(self.group.mean).remove)
        if self.half:
            frozen = {name for name, param in unet.named_parameters() if not param.requires_grad}
            self._undo.callback(cast(unet, frozen & _narrowed(unet), self.dtype, aside=True))
        if self.computing.precision == "fp16" and not inside:
            self._scale = INNER_SCALE
        if self.computing.compile:
            # Not earlier: a compiled UNet ignores hooks that are registered later.
            compiled = torch.compile(self._inner)
            if self._between:
                self._inner = compiled
            else:
                self._undo.callback(_replaced(unet, compiled))
        self._settled = True

    def scaler(self) -> torch.amp.GradScaler:
        """Return the scaler that keeps fp16 gradients from vanishing; in other precisions it does nothing."""
        return torch.amp.GradScaler(self.base.device.type, enabled=self.computing.precision == "fp16")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let this process use the UNet on its own, without the other processes."""
        before, self._alone = self._alone, True
        try:
            yield
        finally:
            self._alone = before

    def _forward(self, sample: Tensor, *rest: Any, **named: Any) -> Any:
        n = len(sample)
        # Before `settle`, gradients cannot be averaged over the processes: each then computes all rows.
        shared = self.group.count > 1 and not self._alone and (self._settled or not torch.is_grad_enabled())
        rows = Rows(self.group if shared else ProcessGroup(), n, self._scale)
        sample, rest, named = (by_rows(value, n, rows.take) for value in (sample, rest, named))
        if self.computing.channels_last:
            sample = sample.contiguous(memory_format=torch.channels_last)
        with torch.autocast(sample.device.type, self.dtype, enabled=self.half, cache_enabled=False):
            out = self._inner(sample, *rest, **named)
        whole = rows.put((out[0] if isinstance(out, tuple) else out.sample).float())
        return (whole,) if isinstance(out, tuple) else type(out)(sample=whole)


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that one process computes: `size` each in turn, the last row repeated to fill the last share.

    Outside the UNet every process goes through the whole graph, inside it through its own rows. So that the mean of
    the processes' gradients is the gradient of the whole batch, a gradient is multiplied by the number of processes
    where it enters the UNet's output, and gathered and divided by it where it leaves at the inputs.

    Args:
        group: the processes.
        n: rows of the batch.
        scale: factor on gradients inside the UNet.
    """

    group: ProcessGroup
    n: int
    scale: float = 1.0

    @property
    def size(self) -> int:
        """Return the number of rows per process."""
        return -(-self.n // self.group.count)

    @property
    def whole(self) -> bool:
        """Return whether there is nothing to split or scale."""
        return self.group.count == 1 and self.scale == 1

    def own(self, device: torch.device) -> Tensor:
        """Return the indices of this process's rows [size]."""
        start = self.group.index * self.size
        return torch.arange(start, start + self.size, device=device).clamp(max=self.n - 1)

    def take(self, value: Tensor) -> Tensor:
        """Return this process's rows of [n, ...]."""
        return value if self.whole else _Take.apply(value, self)  # type: ignore[no-any-return]

    def put(self, part: Tensor) -> Tensor:
        """Gather the rows of all processes to [n, ...]."""
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
        share = whole[start : start + rows.size] * (rows.group.count * rows.scale)
        filled = whole.new_zeros((rows.size, *whole.shape[1:]))  # repeated rows get no gradient
        filled[: len(share)] = share
        return filled, None


def by_rows(value: Any, n: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with `change` applied to every tensor in it that has `n` rows."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() and len(value) == n else value
    if isinstance(value, dict):
        return {key: by_rows(entry, n, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(by_rows(entry, n, change) for entry in value)
    return value


def _narrowed(unet: nn.Module) -> set[str]:
    """Return the names of the parameters that autocast casts at every use anyway, except those of the first layer."""
    head = next(name for name, _ in unet.named_parameters()).rpartition(".")[0]
    return {
        f"{path}.{name}"
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and path != head
        for name, _ in module.named_parameters(recurse=False)
    }


def _encoders(base: Base) -> list[nn.Module]:
    """Return the text encoders that a run holds in fp32: a UNet's. A transformer's T5 would take 19 GB in fp32."""
    if base.component != "unet":
        return []
    encoders = (getattr(base.pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    return [encoder for encoder in encoders if encoder is not None]


def cast(module: nn.Module, names: set[str] | None, dtype: torch.dtype, *, aside: bool = False) -> Callable[[], None]:
    """Cast the named parameters (None: all) to `dtype`; return a function that puts their own tensors back.

    Args:
        module: owner of the parameters.
        names: which to cast.
        dtype: their new type.
        aside: whether their own tensors are kept in main memory meanwhile.
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
    """Replace the module's `forward`; return a function that restores its own."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign,assignment]

    def back() -> None:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own

    return back
