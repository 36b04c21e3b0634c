"""The forecast of a run that calls the UNet: forward and backward passes, seconds, memory.

The run is simulated with a UNet that answers at once (with zeros that are part of the graph). Every call is counted as
in the real run, so a method's cost is written down nowhere else. One real call is timed. Memory is that of the largest
calls (`memory.py`), computed as the real run computes them; calls whose graphs wait for the same backward pass are held
together. A UNet on the `meta` device (a configuration without weights) has counts and memory, but no seconds.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.diffusion import Counts, counting
from erasure.training.compute import Computing, Engine, by_rows
from erasure.training.loop import Trainable, check_shared, observe
from erasure.training.memory import Call, peaks
from erasure.training.objective import Objective, kernels
from erasure.training.run import FitResult, Run
from erasure.training.sparsity import held_bytes

PROBE = 4  # samples in the timed call
COPY = 4  # bytes per trained parameter: fp32 weights that the stopping rule can go back to, or a second gradient
STATE = 16  # bytes per trained parameter: fp32 master, gradient, two Adam moments; the base's own stay with the model


@dataclass(frozen=True)
class Forecast:
    """The cost of a run, before it is started.

    Args:
        F: forward passes, counted in samples.
        B: backward passes, counted in samples.
        seconds: on this machine, of the UNet's calls alone (of a closed form: of the whole solve); 0 without weights.
        model_bytes: the checkpoint in memory during the run.
        training_bytes: masters, gradients and two Adam moments of what trains, and what else its adapter holds; of a
            closed form its matrices.
        activation_bytes: what the calls of a backward pass hold at most, beyond the gradients of what trains.
        prepare_bytes: the checkpoint and the largest call without gradients, before training starts.
        precision: of the UNet.
        processes: number of processes that share the work; memory is per process, seconds are of all together.
        modules: number of modules whose weights change, or that a runtime term acts on.
        weights: number of parameters that train, or that the runtime term has; of a closed form, of the weights that
            it solves for.
        method: the name of the method.
        settings: each setting of the method: name -> `value` and `source`.
        sources: where the method, if none was named, and the settings came from, as lines for people.
        at_most: whether the run may end earlier (`stop=auto`); F, B and seconds are then the largest possible.
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
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    at_most: bool = False

    @property
    def peak_bytes(self) -> int:
        """Return the memory that a process needs, apart from that of the libraries themselves."""
        return max(self.prepare_bytes, self.model_bytes + self.training_bytes + self.activation_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return the forecast as plain data, with the peak."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}

    def text(self) -> str:
        """Return the forecast as one sentence for people."""
        sizes = {
            "model": self.model_bytes,
            "working state": self.training_bytes,
            "activations": self.activation_bytes,
            "while preparing": self.prepare_bytes,
        }
        parts = ", ".join(f"{name} {_size(count)}" for name, count in sizes.items() if count)
        timed = f"about {self.seconds:,.1f} s here, " if self.seconds else ""
        shared = f" in each of {self.processes} processes" if self.processes > 1 else ""
        total = f"{_size(self.peak_bytes)} of memory{shared} in {self.precision}"
        what = f"{self.modules} modules change, {self.weights:,} parameters" if self.modules else "no weight changes"
        most = "at most " if self.at_most else ""
        return f"{what}; {most}{self.F:,} F + {self.B:,} B, {timed}{total} ({parts})"


@dataclass
class Walk:
    """What a simulated run did: its counts, its adapter (None if nothing trains), and its largest calls.

    `forward` is the largest call without gradients; `backward` holds the calls with gradients whose graphs existed at
    the same time, where they were largest together.
    """

    counts: Counts
    adapter: Any = None
    backward: tuple[Call, ...] = ()
    forward: Call = ((), {})
    graphs: list[tuple[weakref.ref[Mark], Call]] = field(default_factory=list)

    def see(self, call: Call) -> Mark:
        """Keep a call if it is the largest of its kind so far; return what must live as long as its graph."""
        mark = Mark()
        if torch.is_grad_enabled():
            alive = [(other, earlier) for other, earlier in self.graphs if other() is not None]
            self.graphs = [*alive, (weakref.ref(mark), call)]
            together = tuple(held for _, held in self.graphs)
            if _numbers(together) > _numbers(self.backward):
                self.backward = together
        elif _numbers((call,)) > _numbers((self.forward,)):
            self.forward = call
        return mark


class Mark:
    """A mark on the graph of a call: it is gone when the graph is."""


class _Marked(torch.autograd.Function):
    """The identity; its graph holds a mark."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, mark: Mark) -> Tensor:
        ctx.mark = mark
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _numbers(calls: tuple[Call, ...]) -> int:
    """Return how many numbers enter calls of the network together."""
    return sum(args[0].numel() for args, _ in calls if args)


class _Elsewhere(Base):
    """A base whose UNet has no weights; everything else is computed on the CPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


class Gated(Trainable, Protocol):
    """The part of a gradient method that a forecast uses: what the loop calls, what follows it, and the gate."""

    def conclude(self, state: Any, run: Run) -> None:
        """Do what follows the last update."""

    def gate(self, state: Any) -> dict[str, Any]:
        """Return the gate of the patch."""


class Collecting(Protocol):
    """The part of a runtime method that a forecast uses."""

    def collect(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Return the data that the patch holds."""


def forecast_training(
    method: Gated, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
) -> Forecast:
    """Forecast a run of a gradient method; the base is left as it was.

    Raises:
        ErasureError: the UNet has no weights, and the method reads them before it starts; or several processes cannot
            share the run.
    """
    check_shared(method, processes)
    ends = method.stop == "auto"
    held: list[int] = []

    def train(walk: Walk, base: Base) -> None:
        run = Run(seed=seed, progress=False)
        state = method.prepare(base, concepts, run)
        walk.adapter = state.adapter
        try:
            if ends:
                observe(method, base, concepts, state, run, Counts())  # `_walk` counts all calls
            objective = Objective(method, base.scheduler.config.num_train_timesteps)
            params = state.adapter.parameters()
            held.append(held_bytes(method.sparsity, params))
            for step in range(method.iterations):
                with kernels(method):
                    objective.backward(objective.reduce(method.loss(state, step)), params, run.scaler())
                run.measure(step + 1)
            method.conclude(state, run)
            method.gate(state)
        finally:
            state.adapter.remove()

    again = method.surgery == "uno"
    forecast = _forecast(_walk(base, train), base, computing, processes, again)
    more = COPY * forecast.weights * (ends + (method.surgery != "none") + again) + held[0]
    return replace(forecast, at_most=ends, training_bytes=forecast.training_bytes + more)


def forecast_runtime(
    method: Collecting, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
) -> Forecast:
    """Forecast a run of a runtime method; the base is left as it was.

    Raises:
        ErasureError: the UNet has no weights, and the method reads them before it starts.
    """

    results: list[FitResult] = []

    def collect(_: Walk, base: Base) -> None:
        results.append(method.collect(base, concepts, Run(seed=seed, progress=False)))

    forecast = _forecast(_walk(base, collect), base, computing, processes)
    payload = results[0].payload
    return replace(
        forecast,
        modules=sum(len(payload.names(component)) for component in payload.components),
        weights=sum(tensor.numel() for tensor in payload.tensors()),
    )


def _forecast(walk: Walk, base: Base, computing: Computing, processes: int, twice: bool = False) -> Forecast:
    computing = computing.on(base.device)
    counts, seconds = walk.counts, 0.0
    largest = max(walk.backward, key=lambda call: call[0][0].numel(), default=walk.forward)
    if base.device.type != "meta" and largest[0]:
        forward, both = _timed(base, largest, computing)
        seconds = ((counts.forward - counts.backward) * forward + counts.backward * both) / processes
    sizes = peaks(base, walk.forward, walk.backward, walk.adapter, computing, processes, twice)
    params = walk.adapter.parameters() if walk.adapter is not None else {}
    trained = sum(param.numel() for param in params.values())
    return Forecast(
        counts.forward,
        counts.backward,
        seconds,
        sizes["model"],
        STATE * trained + getattr(walk.adapter, "held_bytes", 0),
        sizes["backward"],
        sizes["wide"] + sizes["forward"],
        computing.precision or "fp32",
        processes,
        len({name.rpartition(".")[0] for name in params if "." in name}),  # a word belongs to no module
        trained,
    )


def _walk(base: Base, go: Callable[[Walk, Base], None]) -> Walk:
    """Simulate a run with a UNet that answers at once, and return its counts and its largest calls."""
    bare = base.device.type == "meta"
    base = _Elsewhere(base.name, base.pipe) if bare else base
    walk = Walk(Counts())
    with _answering_at_once(base.network, walk), counting(base.network, walk.counts):
        try:
            go(walk, base)
        except (NotImplementedError, RuntimeError) as fault:
            if not bare or walk.adapter is not None:
                raise
            raise ErasureError(
                f"this UNet has no weights, and the method reads them before it trains: it cannot be planned ({fault})"
            ) from None
    return walk


@contextmanager
def _answering_at_once(unet: nn.Module, walk: Walk) -> Iterator[None]:
    """Let the network answer with (nearly) zeros whose gradients reach its inputs and what trains in it."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    leaf = torch.zeros((), requires_grad=True)  # stands for adapters next to the weights

    def answer(sample: Tensor, *rest: Any, **named: Any) -> Any:
        mark = walk.see(((sample, *rest), named))
        states: Tensor = named["encoder_hidden_states"] if "encoder_hidden_states" in named else rest[1]
        out = sample * 0 + states.sum() * 0
        if torch.is_grad_enabled():
            out = out + leaf.to(out.device) * 0
            beside = walk.adapter.parameters().values() if walk.adapter is not None else ()
            trained = {id(param): param for param in (*unet.parameters(), *beside) if param.requires_grad}
            first = [param.reshape(-1)[0] * 1e-6 for param in trained.values() if not param.is_meta]
            out = _Marked.apply(out + sum(first), mark)
        return (out,) if named.get("return_dict") is False else Transformer2DModelOutput(sample=out)

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
    """Return the seconds per sample of a forward pass, and of a forward and backward pass."""
    index = torch.arange(PROBE) % len(call[0][0])
    rest, named = by_rows(call, len(call[0][0]), lambda value: torch.zeros_like(value)[index.to(value.device)])
    x = rest[0].requires_grad_(True)
    with Engine(base, replace(computing, compile=False)) as engine:
        engine.settle({}, inside=True)
        with torch.no_grad():
            base.network(*rest, **named)
            begun = _now(base.device)
            base.network(*rest, **named)
            forward = _now(base.device) - begun
        begun = _now(base.device)
        base.network(x, *rest[1:], **named).sample.sum().backward()
        both = _now(base.device) - begun
    return forward / PROBE, both / PROBE


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
