"""Compiled UNets: folded patches act in them; while a gate is open the network runs uncompiled."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.patch.making import delta_patch, low_rank_patch, same, weights
from tests.pipelines.making import LATENT, TEXT, draw, strengths
from tests.tiny import tiny_pipeline


def wrap(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def in_place(pipe):
    pipe.unet.compile(backend="eager")


def forward_alone(pipe):
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")


@pytest.fixture
def pipe():
    torch._dynamo.reset()
    yield tiny_pipeline(ErasedStableDiffusionPipeline)
    torch._dynamo.reset()


@pytest.mark.parametrize("compile_it", [wrap, in_place, forward_alone])
def test_gates_open_and_close_on_a_compiled_unet(pipe, compile_it, monkeypatch):
    monkeypatch.setattr("erasure.pipelines.latent.Decider.present", lambda self, key, gate, text, _: "gogh" in text)
    base, text, latent = draw(pipe), low_rank_patch(pipe, gate=TEXT), low_rank_patch(pipe, gate=LATENT)
    expected = []
    for patch in (text, latent):
        pipe.load_patch(patch)
        expected.append(draw(pipe))
        pipe.unload_patches()
    compile_it(pipe)
    closed = draw(pipe)
    assert torch.allclose(closed, base, atol=1e-5)
    for patch, image in zip((text, latent), expected, strict=True):
        pipe.load_patch(patch)
        assert torch.allclose(draw(pipe), image, atol=1e-5)
        # No compiled graph has kept the hooks.
        assert torch.equal(draw(pipe, ["a cat", "a cat"])[1], closed[1])
        pipe.unload_patches()
        assert torch.equal(draw(pipe), closed)


def test_the_latent_gate_decides_uncompiled(pipe):
    patch = low_rank_patch(pipe, gate={**LATENT, "ratio": 1e-3})
    pipe.load_patch(patch)
    draw(pipe)
    log = strengths(pipe)
    assert log == [2.0, 2.0]  # the patch moves every prompt
    pipe.unload_patches()
    wrap(pipe)
    draw(pipe)
    pipe.load_patch(patch)
    draw(pipe)
    assert strengths(pipe) == log


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_folding_before_and_after(pipe, backend):
    base, before = weights(pipe), draw(pipe)
    patch = delta_patch(pipe)
    first = pipe.load_patch(patch)
    folded = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend=backend)
    assert torch.allclose(draw(pipe), folded, atol=1e-5)
    pipe.delete_patches(first)
    assert torch.allclose(draw(pipe), before, atol=1e-5)
    pipe.load_patch(patch)
    assert torch.allclose(draw(pipe), folded, atol=1e-5)
    pipe.unload_patches()
    pipe.unet = pipe.unet._orig_mod
    assert same(weights(pipe), base) and torch.equal(draw(pipe), before)


def test_an_older_torch_is_told(pipe, monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance")
    in_place(pipe)
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    with pytest.raises(ErasureError, match="compiled network with this torch.*torch 2.6"):
        draw(pipe)
    pipe.fuse_patches()
