"""The forecast: what the settings of computing do to it, and a UNet without weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods.esd import ESD
from erasure.model.base import Base
from erasure.training.compute import Computing, Engine
from erasure.training.dry_run import forecast_training
from erasure.training.memory import _Tally
from erasure.training.run import Run
from tests.conformance.quick import QUICK
from tests.tiny import tiny_pipeline, tiny_unet


def bare():
    """The tiny pipeline with a UNet that has shapes and no weights."""
    pipe = tiny_pipeline()
    with torch.device("meta"):
        pipe.unet = tiny_unet()
    return pipe


def test_memory_follows_precision_checkpointing_and_processes():
    def memory(**options):
        return plan(bare(), "cat", "esd", **QUICK["esd"], **options)

    wide, half, lean = memory(), memory(precision="bf16"), memory(gradient_checkpointing=True)
    shared = memory(processes=2)
    assert half.precision == "bf16" and half.model_bytes < wide.model_bytes
    assert half.activation_bytes < wide.activation_bytes and half.training_bytes == wide.training_bytes
    assert lean.activation_bytes < 0.7 * wide.activation_bytes and lean.model_bytes == wide.model_bytes
    assert shared.activation_bytes < 0.7 * wide.activation_bytes and (shared.F, shared.B) == (wide.F, wide.B)
    assert wide.peak_bytes >= wide.model_bytes + wide.training_bytes + wide.activation_bytes
    assert "in fp32" in wide.text() and "2 processes" in shared.text()
    with pytest.raises(ErasureError, match="at least 1"):
        memory(processes=0)


def test_a_unet_without_weights_has_counts_and_memory_but_no_seconds():
    known, unknown = (plan(pipe, "cat", "esd", **QUICK["esd"]) for pipe in (tiny_pipeline(), bare()))
    assert known.seconds > 0 and unknown.seconds == 0
    same = {**known.to_json(), "seconds": 0}
    assert unknown.to_json() == same


def test_a_method_that_looks_at_the_weights_says_so():
    with pytest.raises(ErasureError, match="this UNet has no weights, and the method reads them"):
        plan(bare(), "cat", "salun", **QUICK["salun"])


def test_the_model_is_counted_as_it_lies():
    """By hand: the UNet, the text encoder and the autoencoder in fp32; what trains, 16 bytes a number."""
    pipe = tiny_pipeline()
    numbers = sum(p.numel() for part in (pipe.unet, pipe.text_encoder, pipe.vae) for p in part.parameters())
    forecast = plan(pipe, "cat", "esd", **QUICK["esd"])
    trained = sum(m.weight.numel() + (m.bias.numel() if m.bias is not None else 0) for m in targets(pipe))
    assert forecast.model_bytes == 4 * numbers and forecast.training_bytes == 16 * trained


def targets(pipe):
    return Base("tiny", SimpleNamespace(unet=pipe.unet)).targets("x").values()


@pytest.mark.parametrize("twice", (False, True))
def test_activations_are_those_of_a_real_update(twice):
    """Calls that wait for one backward pass are held together, and gradients are not counted a second time.

    ESD in all weights with checkpointing has more gradients than activations: tensors made in a real update, freed ones
    taken off, against the forecast.
    """

    class Twice(ESD):
        def loss(self, state, step):
            parts = [super(Twice, self).loss(state, step)["esd"] for _ in range(1 + twice)]
            return {"esd": torch.stack(parts).sum()}

    settings = {**QUICK["esd"], "variant": "full", "iterations": 1}
    method, computing = Twice(**settings), Computing(gradient_checkpointing=True)
    base, concepts = Base.of(tiny_pipeline()), [Concept("cat")]
    forecast = forecast_training(method, base, concepts, computing, 0, 1)
    with Engine(base, computing) as engine:
        state = method.prepare(base, concepts, Run(seed=0, progress=False, engine=engine))
        engine.settle(state.adapter.parameters(), inside=True)
        with _Tally() as tally:
            method.loss(state, 0)["esd"].backward()
        state.adapter.remove()
    gradients = 4 * forecast.weights
    assert tally.most > gradients  # the gradients are in the count
    assert forecast.activation_bytes == pytest.approx(tally.most - gradients, rel=0.1)
