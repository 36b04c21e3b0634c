"""Guards on calls of the network from outside the pipeline."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.guarding import guarding
from tests.patch.making import low_rank_patch
from tests.pipelines.guards.test_tokens import guard
from tests.tiny import tiny_pipeline


def test_guards_act_inside_alone_and_nothing_is_left(caplog):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    call = torch.ones(1, 4, 8, 8), torch.tensor(500), torch.ones(1, 12, 32)
    with torch.no_grad():
        base = pipe.unet(*call).sample
        pipe.load_patch(guard("cat", padding=True), name="cat")
        with guarding(pipe, 1, [["a red cat"]]):
            assert not torch.allclose(pipe.unet(*call).sample, base, atol=1e-4)
        assert not caplog.records  # the network is called outside the pipeline, and still guarded
        pipe.set_patches({})
        with guarding(pipe, 1):
            assert torch.equal(pipe.unet(*call).sample, base)
        pipe.unload_patches()
        pipe.load_patch(low_rank_patch(pipe, gate={"kind": "text", "texts": ["a cat"]}))
        with guarding(pipe, 1):  # gated patches are none
            assert torch.equal(pipe.unet(*call).sample, base)
    assert "forward" not in vars(pipe.unet)


def test_a_guard_that_reads_words_needs_them():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(guard("cat"), name="cat")
    with pytest.raises(ErasureError, match="'cat': reads the words of the prompt"), guarding(pipe, 1):
        pass
