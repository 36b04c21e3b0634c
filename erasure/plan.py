"""Forecast of a run before it is started: forwards and backwards, seconds, memory.

The run itself is gone through with a UNet that answers at once (zeros, joined to the graph): every call is counted
as in the real run, so the forecast needs no second formula of a method's cost. One real call is timed and weighed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erasure.base import Base
from erasure.concept import Concept
from erasure.diffusion import Counts, counting
from erasure.methods import configured
from erasure.train import Gradient, Run

PROBE = 4  # samples in the timed call


@dataclass(frozen=True)
class Forecast:
    """What a run will cost.

    Args:
        F: forwards, a sample each.
        B: backwards, a sample each.
        seconds: on this machine, of the UNet's calls alone.
        model_bytes: the checkpoint in memory.
        training_bytes: masters, gradients, two Adam moments and the base copy of what trains.
        activation_bytes: what one backward of the largest batch keeps.
        modules: how many modules train.
        weights: numbers that train in them.
    """

    F: int
    B: int
    seconds: float
    model_bytes: int
    training_bytes: int
    activation_bytes: int
    modules: int
    weights: int

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        total = self.model_bytes + self.training_bytes + self.activation_bytes
        parts = (
            f"model {_size(self.model_bytes)}, training state {_size(self.training_bytes)}, "
            f"activations {_size(self.activation_bytes)}"
        )
        what = f"{self.modules} modules train, {self.weights:,} numbers"
        return (
            f"{what}; {self.F:,} F + {self.B:,} B, about {self.seconds:,.1f} s here, {_size(total)} of memory ({parts})"
        )


def plan(model: Any, concept: Any, method: str, *, seed: int = 0, **overrides: Any) -> Forecast:
    """Forecast `erase(model, concept, method, **overrides)`; the model is left as it was.

    Raises:
        ErasureError: as `erase`.
    """
    concepts = Concept.list_of(concept)
    built = configured(method, concepts, overrides)
    base = Base.of(model)
    counts, largest, modules, trained = _dry(built, base, concepts, seed)
    forward, backward, kept = _probe(base)
    seconds = (counts.forward - counts.backward) * forward + counts.backward * backward
    parts = [part for part in base.pipe.components.values() if isinstance(part, nn.Module)]
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    return Forecast(
        counts.forward, counts.backward, seconds, weights, 20 * trained, int(kept * largest), modules, trained
    )


def _dry(method: Gradient, base: Base, concepts: list[Concept], seed: int) -> tuple[Counts, int, int, int]:
    """Counts, the largest batch that goes backward, the modules that train, and the numbers in them."""
    counts, largest = Counts(), 0
    with _answering_at_once(base.unet), counting(base.unet, counts):
        state = method.prepare(base, concepts, Run(seed=seed, progress=False))
        try:
            params = state.adapter.parameters()
            modules = len({name.rpartition(".")[0] for name in params})
            trained = sum(param.numel() for param in params.values())
            for step in range(method.iterations):
                before = counts.backward
                torch.stack(list(method.loss(state, step).values())).sum().backward()
                largest = max(largest, counts.backward - before)
            method.gate(state)
        finally:
            state.adapter.remove()
    return counts, largest, modules, trained


@contextmanager
def _answering_at_once(unet: nn.Module) -> Iterator[None]:
    """The UNet answers with (all but) zeros that hang on its inputs and on what trains in it."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    leaf = torch.zeros((), requires_grad=True)  # stands for adapters beside the weights

    def answer(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        out = sample * 0 + encoder_hidden_states.sum() * 0
        if torch.is_grad_enabled():
            out = out + leaf.to(out.device) * 0
            out = out + sum(p.reshape(-1)[0] * 1e-6 for p in unet.parameters() if p.requires_grad)
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


def _probe(base: Base) -> tuple[float, float, float]:
    """Seconds a sample forward, seconds forward and backward, bytes a sample that a backward keeps."""
    shape = (PROBE, *base.latent_shape())
    x = torch.zeros(shape, device=base.device, dtype=base.unet.dtype)
    asked = base.conditions([""] * PROBE)
    t = torch.full((PROBE,), 500, device=base.device)
    seen: dict[int, int] = {}

    def weigh(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.no_grad():
        base.predict(x, t, asked)
        begun = time.perf_counter()
        base.predict(x, t, asked)
        forward = time.perf_counter() - begun
    weights = {p.untyped_storage().data_ptr() for p in base.unet.parameters()}
    x.requires_grad_(True)
    begun = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
        base.predict(x, t, asked).sum().backward()
    both = time.perf_counter() - begun
    kept = sum(size for at, size in seen.items() if at not in weights)
    return forward / PROBE, both / PROBE, kept / PROBE


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
