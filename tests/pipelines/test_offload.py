"""Patches on offloaded pipelines, whose weights are moved to the device only when they are needed."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.patch.making import delta_patch, low_rank_patch, same, weights
from tests.pipelines.making import LATENT, TEXT, draw, hooks
from tests.tiny import tiny_pipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATES = [{"kind": "always"}, TEXT, LATENT]
accelerator = pytest.mark.skipif(DEVICE == "cpu", reason="needs an accelerator")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(
        "erasure.pipelines.gates.latent.Decider.present", lambda self, key, gate, text, _: "gogh" in text
    )


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def resting(pipe):
    """Return all weights of the UNet, also those that sequential offload keeps outside of the network."""
    values = {}
    for path, module in pipe.unet.named_modules():
        for name, value in module.named_parameters(recurse=False):
            values[f"{path}.{name}"] = (module._hf_hook.weights_map[name] if value.is_meta else value).detach().clone()
    return values


def offload_sequentially(pipe):
    """Offload as enable_sequential_cpu_offload does, which refuses to run on a machine without an accelerator."""
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=False)


def test_model_offload_restores_the_forward_of_the_network(pipe):
    """At the end of each call, diffusers removes its hooks from the network and adds new ones."""
    base, before = weights(pipe), draw(pipe)
    for gate in GATES:
        pipe.enable_model_cpu_offload(device=DEVICE)
        pipe.load_patch(low_rank_patch(pipe, gate=gate))
        first = draw(pipe)
        assert torch.equal(draw(pipe), first) and not torch.equal(first, before)
        assert pipe.unet._hf_hook is not None and hooks(pipe) == 0
        pipe.unload_patches()
        assert torch.equal(draw(pipe), before)
        pipe.remove_all_hooks()
        assert same(weights(pipe.to("cpu")), base) and torch.equal(draw(pipe), before)
        assert "_old_forward" not in vars(pipe.unet)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_an_offloaded_base_computes_on_the_device_of_its_hooks(kind):
    """Nothing is computed, so the test passes with and without the device."""
    base = Base("tiny", tiny_pipeline(kind=kind))
    assert base.device == torch.device("cpu")
    base.pipe.enable_model_cpu_offload(device="cuda:0")
    assert next(base.unet.parameters()).device.type == "cpu" and base.device == torch.device("cuda:0")
    before = weights(base.pipe)
    with pytest.raises(ErasureError, match="unet is offloaded: .*not on cuda:0.*remove_all_hooks"):
        erase(base.pipe, "cat", "esd", progress=False)
    assert same(weights(base.pipe), before)
    base.pipe.remove_all_hooks()
    assert base.device == torch.device("cpu")
    base.pipe.unet = base.unet.to("meta")  # a model without weights, as forecasts use it
    assert base.device.type == "meta"


@pytest.mark.parametrize("measure", ["norm", "guidance"])
def test_a_latent_gate_decides_the_same_under_sequential_offload(pipe, measure, monkeypatch):
    """Between calls, sequential offload leaves all networks on `meta`, including the text encoder."""
    monkeypatch.undo()  # the decision must be the real one
    patch = low_rank_patch(pipe, gate={**LATENT, "measure": measure, "ratio": 1e-6, "on": 0.5, "off": 0.25}, size=0.3)
    pipe.load_patch(patch)
    expected = draw(pipe)
    log = pipe.gate_log
    pipe.unload_patches()
    for module in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(module, torch.device("cpu"), offload_buffers=False)
    assert all(value.is_meta for value in pipe.text_encoder.parameters())
    assert Base("tiny", pipe).device == torch.device("cpu")
    pipe.load_patch(patch)
    assert torch.equal(draw(pipe), expected)
    assert pipe.gate_log == log


def test_a_hook_that_a_callback_removes_stays_removed(pipe):
    before = draw(pipe)
    pipe.load_patch(low_rank_patch(pipe, gate=LATENT))
    _, hook = cpu_offload_with_hook(pipe.unet, torch.device("cpu"))

    def drop(pipe, step, time, tensors):
        remove_hook_from_module(pipe.unet)
        return tensors

    draw(pipe, callback_on_step_end=drop)
    pipe.unload_patches()
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_sequential_offload(pipe, gate, first):
    patch, before = low_rank_patch(pipe, gate=gate), draw(pipe)
    pipe.load_patch(patch)
    expected = draw(pipe)
    pipe.unload_patches()
    base = resting(pipe)
    if first:
        pipe.load_patch(patch)
    offload_sequentially(pipe)
    assert all(value.is_meta for value in pipe.unet.conv_in.parameters())
    if not first:
        pipe.load_patch(patch)
    assert torch.equal(draw(pipe), expected) and not torch.equal(expected, before)
    pipe.unload_patches()
    assert torch.equal(draw(pipe), before)
    assert same(resting(pipe), base)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert same(resting(pipe), base)


def test_weights_that_are_not_in_memory_are_refused(pipe):
    patch = delta_patch(pipe)
    pipe.unet.to("meta")
    with pytest.raises(ErasureError, match="not in memory.*before you offload"):
        pipe.load_patch(patch)


def test_group_offload(pipe):
    base, before = weights(pipe), draw(pipe)
    pipe.unet.enable_group_offload(
        onload_device=torch.device(DEVICE), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    for gate in GATES:
        pipe.load_patch(low_rank_patch(pipe, gate=gate))
        assert not torch.equal(draw(pipe), before)
        pipe.unload_patches()
        assert torch.equal(draw(pipe), before) and same(weights(pipe), base)


@accelerator
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_from_an_accelerator(pipe, offload):
    pipe.to(DEVICE)
    before = draw(pipe)
    pipe.to("cpu")
    getattr(pipe, offload)()
    for gate in GATES:
        pipe.load_patch(low_rank_patch(tiny_pipeline(), gate=gate))
        assert not torch.equal(draw(pipe), before)
        pipe.unload_patches()
        assert torch.equal(draw(pipe), before)
