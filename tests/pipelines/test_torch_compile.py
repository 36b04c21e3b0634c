"""Compiled networks: folded patches act in them, and they run uncompiled while a gated patch acts."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.torch_compile import compiled
from tests.patch.making import delta_patch, low_rank_patch, same, weights
from tests.pipelines.making import LATENT, TEXT, draw, strengths
from tests.tiny import tiny_pipeline


@pytest.fixture
def pipe():
    torch._dynamo.reset()
    yield tiny_pipeline(ErasedStableDiffusionPipeline)
    torch._dynamo.reset()


def near(image, expected):
    return torch.allclose(image, expected, atol=1e-5)


def test_a_wrapped_unet_with_folded_and_gated_patches(pipe):
    base, before = weights(pipe), draw(pipe)
    always, text = delta_patch(pipe), low_rank_patch(pipe, gate=TEXT)
    pipe.load_patch(text)
    gated = draw(pipe)
    pipe.unload_patches()
    name = pipe.load_patch(always)
    folded = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert near(draw(pipe), folded)
    pipe.delete_patches(name)
    closed = draw(pipe)
    assert near(closed, before)
    pipe.load_patch(text)
    assert near(draw(pipe), gated) and strengths(pipe) == [1.0, 0.0]
    # No compiled graph contains the hooks.
    pipe.unload_patches()
    assert torch.equal(draw(pipe), closed)
    pipe.load_patch(always)
    assert near(draw(pipe), folded)
    pipe.unload_patches()
    pipe.unet = pipe.unet._orig_mod
    assert same(weights(pipe), base) and torch.equal(draw(pipe), before)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_both_gates_and_a_folded_patch_in_a_unet_compiled_block_by_block(pipe, backend):
    kinds = {"folded": {"kind": "always"}, "text": TEXT, "latent": {**LATENT, "ratio": 1e-3}}
    patches = {kind: low_rank_patch(pipe, part="mid_block.attentions", gate=gate) for kind, gate in kinds.items()}
    base, expected, logs = draw(pipe), {}, {}
    for kind, patch in patches.items():
        pipe.load_patch(patch)
        expected[kind], logs[kind] = draw(pipe), pipe.gate_log
        pipe.unload_patches()
        assert not near(expected[kind], base)
    pipe.unet.mid_block.attentions[0].compile(backend=backend)
    closed = draw(pipe)
    assert near(closed, base)
    for kind, patch in patches.items():
        pipe.load_patch(patch)
        assert near(draw(pipe), expected[kind]) and pipe.gate_log == logs[kind]
        pipe.unload_patches()
        assert torch.equal(draw(pipe), closed)
    assert logs["latent"][1] == {"van gogh": 2.0}  # decided from the effect of the patch


def test_every_way_of_compiling_is_detected(pipe):
    assert not compiled(pipe)
    own = pipe.unet.forward
    pipe.unet.forward = torch.compile(own, backend="eager")
    assert compiled(pipe)
    pipe.unet.forward = own
    assert not compiled(pipe)
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    assert compiled(pipe)


def test_an_older_torch_is_refused_with_advice(pipe, monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance")
    pipe.unet.compile(backend="eager")
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    with pytest.raises(ErasureError, match="compiled network with torch .*Update to torch 2.6"):
        draw(pipe)
    pipe.fuse_patches()
