"""Offloaded pipelines: networks that come and go, and weights that rest beside them."""

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
    """All weights of the UNet, also those that sequential offload keeps beside the network."""
    found = {}
    for path, module in pipe.unet.named_modules():
        for name, value in module.named_parameters(recurse=False):
            found[f"{path}.{name}"] = (module._hf_hook.weights_map[name] if value.is_meta else value).detach().clone()
    return found


def hooked(pipe):
    """What enable_sequential_cpu_offload does, without its refusal of a machine that has a CPU alone."""
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=False)


def test_model_offload_gives_the_network_its_forward_back(pipe):
    """diffusers takes its hooks off the network and puts new ones on at the end of each call."""
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
def test_an_offloaded_base_computes_where_its_hooks_bring_it(kind):
    """Nothing computes here: there is no such device on this machine, or there is."""
    base = Base("tiny", tiny_pipeline(kind=kind))
    assert base.device == torch.device("cpu")
    base.pipe.enable_model_cpu_offload(device="cuda:0")
    assert next(base.unet.parameters()).device.type == "cpu" and base.device == torch.device("cuda:0")
    before = weights(base.pipe)
    with pytest.raises(ErasureError, match="UNet is offloaded: .*not lie on cuda:0.*remove_all_hooks"):
        erase(base.pipe, "cat", "esd", progress=False)
    assert same(weights(base.pipe), before)
    base.pipe.remove_all_hooks()
    assert base.device == torch.device("cpu")
    base.pipe.unet = base.unet.to("meta")  # by hand: a model without weights, for forecasts
    assert base.device.type == "meta"


@pytest.mark.parametrize("measure", ["norm", "guidance"])
def test_a_latent_gate_decides_alike_where_weights_rest_beside_the_networks(pipe, measure, monkeypatch):
    """Sequential offload leaves the networks on `meta` between calls, the text encoder too."""
    monkeypatch.undo()  # the gate is to decide itself
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


def test_a_hook_that_a_callback_takes_off_stays_off(pipe):
    before = draw(pipe)
    pipe.load_patch(low_rank_patch(pipe, gate=LATENT))
    _, hook = cpu_offload_with_hook(pipe.unet, torch.device("cpu"))

    def drop(pipe, step, time, given):
        remove_hook_from_module(pipe.unet)
        return given

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
    hooked(pipe)
    assert all(value.is_meta for value in pipe.unet.conv_in.parameters())
    if not first:
        pipe.load_patch(patch)
    assert torch.equal(draw(pipe), expected) and not torch.equal(expected, before)
    pipe.unload_patches()
    assert torch.equal(draw(pipe), before)
    assert same(resting(pipe), base)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert same(resting(pipe), base)


def test_weights_that_are_nowhere_are_refused(pipe):
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
def test_offload_to_a_true_accelerator(pipe, offload):
    pipe.to(DEVICE)
    before = draw(pipe)
    pipe.to("cpu")
    getattr(pipe, offload)()
    for gate in GATES:
        pipe.load_patch(low_rank_patch(tiny_pipeline(), gate=gate))
        assert not torch.equal(draw(pipe), before)
        pipe.unload_patches()
        assert torch.equal(draw(pipe), before)
