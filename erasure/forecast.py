"""Forecast of a run before it is started: forwards and backwards, seconds, memory.

The run itself is gone through with a UNet that answers at once (zeros, joined to the graph): every call is counted
as in the real run, so the forecast needs no second formula of a method's cost. One real call is timed. Memory is
that of the largest calls, gone through with tensors that have shapes but no values, in the engine of the real run.
A UNet on the `meta` device (a configuration without weights) has counts and memory, but no seconds.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from erasure.concepts.concept import Concept
from erasure.distributed import ProcessGroup
from erasure.errors import ErasureError
from erasure.methods import configured
from erasure.model.base import Base
from erasure.model.diffusion import Counts, counting
from erasure.training.adapters import Adapter
from erasure.training.compute import Computing, Engine, Rows, by_rows, cast
from erasure.training.loop import GradientMethod
from erasure.training.run import Run

PROBE = 4  # samples in the timed call
STATE = 16  # bytes a trained number: master, gradient, two Adam moments; what it was stays with the model
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of the UNet


@dataclass(frozen=True)
class Forecast:
    """What a run will cost.

    Args:
        F: forwards, a sample each.
        B: backwards, a sample each.
        seconds: on this machine, of the UNet's calls alone; 0 without weights.
        model_bytes: the checkpoint in memory while it trains.
        training_bytes: masters, gradients and two Adam moments of what trains.
        activation_bytes: what the largest call that goes backward holds at most.
        prepare_bytes: the checkpoint and the largest call without gradients, before what trains is known.
        precision: of the UNet.
        processes: that share the work; memory is of each, seconds are of all together.
        modules: how many modules train.
        weights: numbers that train in them.
    """

    F: int
    B: int
    seconds: float
    model_bytes: int
    training_bytes: int
    activation_bytes: int
    prepare_bytes: int = 0
    precision: str = "fp32"
    processes: int = 1
    modules: int = 0
    weights: int = 0

    @property
    def peak_bytes(self) -> int:
        """Memory that a process needs, without what the libraries take for themselves."""
        return max(self.prepare_bytes, self.model_bytes + self.training_bytes + self.activation_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}

    def text(self) -> str:
        """For people."""
        parts = (
            f"model {_size(self.model_bytes)}, training state {_size(self.training_bytes)}, "
            f"activations {_size(self.activation_bytes)}, while preparing {_size(self.prepare_bytes)}"
        )
        timed = f"about {self.seconds:,.1f} s here, " if self.seconds else ""
        shared = f" in each of {self.processes} processes" if self.processes > 1 else ""
        total = f"{_size(self.peak_bytes)} of memory{shared} in {self.precision}"
        what = f"{self.modules} modules train, {self.weights:,} numbers"
        return f"{what}; {self.F:,} F + {self.B:,} B, {timed}{total} ({parts})"


def plan(model: Any, concept: Any, method: str, *, seed: int = 0, processes: int = 1, **overrides: Any) -> Forecast:
    """Forecast `erase(model, concept, method, **overrides)`; the model is left as it was.

    Raises:
        ErasureError: as `erase`; the UNet has no weights and the method looks at them before it starts.
    """
    if processes < 1:
        raise ErasureError(f"processes={processes}: at least 1")
    computing, (rest,) = Computing.split(overrides)
    configured(method, Concept.list_of(concept), rest)  # bad input is refused before the model is loaded
    base = Base.of(model)
    concepts = Concept.list_of(concept, base.vocabulary)
    built = configured(method, concepts, rest)
    computing = computing.on(base.device)
    walk = _dry(built, base, concepts, seed)
    counts, bare = walk.counts, base.device.type == "meta"
    seconds = 0.0
    if not bare:
        forward, both = _timed(base, walk.backward, computing)
        seconds = ((counts.forward - counts.backward) * forward + counts.backward * both) / processes
    bytes_of = _weighed(base, walk, computing, processes)
    params = walk.adapter.parameters()
    trained = sum(param.numel() for param in params.values())
    return Forecast(
        counts.forward,
        counts.backward,
        seconds,
        bytes_of["model"],
        STATE * trained,
        bytes_of["backward"],
        bytes_of["wide"] + bytes_of["forward"],
        computing.precision or "fp32",
        processes,
        len({name.rpartition(".")[0] for name in params}),
        trained,
    )


@dataclass
class Walk:
    """What a dry run met: its counts, its adapter, the largest calls with and without gradients."""

    counts: Counts
    adapter: Adapter | Any = None
    backward: Call = ((), {})
    forward: Call = ((), {})

    def see(self, call: Call) -> None:
        """Keep a call if it is the largest of its kind."""
        kind = "backward" if torch.is_grad_enabled() else "forward"
        known = getattr(self, kind)[0]
        if not known or call[0][0].numel() > known[0].numel():
            setattr(self, kind, call)


class _Elsewhere(Base):
    """A base whose UNet has no weights: everything else is computed on the CPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def _dry(method: GradientMethod, base: Base, concepts: list[Concept], seed: int) -> Walk:
    bare = base.device.type == "meta"
    base = _Elsewhere(base.name, base.pipe) if bare else base
    walk = Walk(Counts())
    with _answering_at_once(base.unet, walk), counting(base.unet, walk.counts):
        try:
            state = method.prepare(base, concepts, Run(seed=seed, progress=False))
        except (NotImplementedError, RuntimeError) as fault:
            if not bare:
                raise
            raise ErasureError(
                f"a UNet without weights cannot be planned for: this method looks at them first ({fault})"
            ) from None
        walk.adapter = state.adapter
        try:
            for step in range(method.iterations):
                torch.stack(list(method.loss(state, step).values())).sum().backward()
            method.gate(state)
        finally:
            state.adapter.remove()
    return walk


@contextmanager
def _answering_at_once(unet: nn.Module, walk: Walk) -> Iterator[None]:
    """The UNet answers with (all but) zeros that hang on its inputs and on what trains in it."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    leaf = torch.zeros((), requires_grad=True)  # stands for adapters beside the weights

    def answer(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        walk.see(((sample, timestep, encoder_hidden_states, *rest), named))
        out = sample * 0 + encoder_hidden_states.sum() * 0
        if torch.is_grad_enabled():
            out = out + leaf.to(out.device) * 0
            trained = [param for param in unet.parameters() if param.requires_grad and not param.is_meta]
            out = out + sum(param.reshape(-1)[0] * 1e-6 for param in trained)
        return (out,) if named.get("return_dict") is False else UNet2DConditionOutput(sample=out)

    real = unet.__dict__.get("forward")
    unet.forward = answer
    try:
        yield
    finally:
        if real is None:
            del unet.forward
        else:
            unet.forward = real


def _timed(base: Base, call: Call, computing: Computing) -> tuple[float, float]:
    """Seconds a sample forward, and forward and backward."""
    index = torch.arange(PROBE) % len(call[0][0])
    rest, named = by_rows(call, len(call[0][0]), lambda value: torch.zeros_like(value)[index.to(value.device)])
    x = rest[0].requires_grad_(True)
    with Engine(base, replace(computing, compile=False)) as engine:
        engine.settle({}, inside=True)
        with torch.no_grad():
            base.unet(*rest, **named)
            begun = _now(base.device)
            base.unet(*rest, **named)
            forward = _now(base.device) - begun
        begun = _now(base.device)
        base.unet(x, *rest[1:], **named).sample.sum().backward()
        both = _now(base.device) - begun
    return forward / PROBE, both / PROBE


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _weighed(base: Base, walk: Walk, computing: Computing, processes: int) -> dict[str, int]:
    """Bytes: `wide`, the model before it is narrowed; `model`, after; `forward` and `backward`, held by the calls."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    forward, backward = (_shapes(call, processes) for call in (walk.forward, walk.backward))
    others = 0  # the text encoders are fp32 while a run trains
    for name, part in base.pipe.components.items():
        if isinstance(part, nn.Module) and name != "unet":
            wide = name.startswith("text_encoder")
            others += sum(p.numel() * (4 if wide else p.element_size()) for p in part.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = type(base.unet).from_config(dict(base.unet.config)).requires_grad_(False)
        cast(unet, None, base.unet.dtype)
        shell = Base(base.name, SimpleNamespace(unet=unet))
        with Engine(shell, replace(computing, compile=False, channels_last=False)) as engine:
            found = {"wide": others + _bytes(unet), "forward": 0, "backward": 0}
            for norm in unet.modules():  # what autocast does on a GPU, and not on a CPU
                if engine.half and isinstance(norm, nn.GroupNorm | nn.LayerNorm):
                    norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
            if walk.forward[0]:
                with torch.no_grad():
                    found["forward"] = _held(unet, forward)
            was = _bytes(unet)
            inside = walk.adapter.component == "unet"
            twin = walk.adapter.twin(unet) if inside and hasattr(walk.adapter, "twin") else None
            engine.settle(twin.parameters() if twin else {}, inside=inside)
            own = {id(param) for param in twin.parameters().values()} if twin else set()
            found["model"] = others + sum(4 * p.numel() if id(p) in own else _bytes(p) for p in unet.parameters())
            found["model"] = min(found["model"], others + was)
            found["backward"] = _held(unet, backward)
            if twin:
                twin.remove()
    return found


@dataclass(frozen=True)
class _Shape:
    """What is known of a tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    trained: bool


def _shapes(call: Call, processes: int) -> Any:
    """The shapes of one process's share of a call."""
    if not call[0]:
        return call
    n = len(call[0][0])
    rows = Rows(ProcessGroup(0, processes), n).size
    share = by_rows(call, n, lambda value: value[:rows])
    return tree_map_only(Tensor, lambda value: _Shape(value.shape, value.dtype, value.requires_grad), share)


def _held(unet: nn.Module, call: Any) -> int:
    """The most bytes that lie about, beside the weights, in a call of these shapes (and back again)."""

    def bare(of: _Shape) -> Tensor:
        made = torch.zeros(of.shape, dtype=of.dtype)
        return made.requires_grad_(torch.is_grad_enabled() and of.trained)

    rest, named = tree_map_only(_Shape, bare, call)
    with _Tally() as tally:
        out = unet(*rest, **named)
        if torch.is_grad_enabled():
            (out[0] if isinstance(out, tuple) else out.sample).sum().backward()
    return tally.most


class _Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, and lets go of."""

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


def _bytes(what: nn.Module | Tensor) -> int:
    parts = what.parameters() if isinstance(what, nn.Module) else [what]
    return sum(part.numel() * part.element_size() for part in parts)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
