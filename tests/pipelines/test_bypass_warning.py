"""One warning for calls that bypass the gates of an erased pipeline, and none for any other call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import StableDiffusionPipeline

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Victim
from erasure.pipelines import ErasedStableDiffusionImg2ImgPipeline, ErasedStableDiffusionPipeline
from tests.patch.making import low_rank_patch
from tests.pipelines.making import LATENT, TEXT, draw
from tests.tiny import tiny_pipeline

GATES = [TEXT, {**LATENT, "ratio": 1e-3}]


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.fixture
def warnings(caplog):
    """Return a function that returns the bypass warnings logged since it was last called."""

    def collect() -> list[str]:
        messages = [
            record.getMessage() for record in caplog.records if record.name == "erasure.pipelines.bypass_warning"
        ]
        caplog.clear()
        return messages

    return collect


def call_unet(pipe):
    with torch.no_grad():
        return pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 12, 32)).sample


@pytest.mark.parametrize("gate", GATES)
def test_a_plain_pipeline_that_shares_the_networks_warns_once(pipe, warnings, gate):
    base = draw(pipe)
    pipe.load_patch(low_rank_patch(pipe, gate=gate))
    plain = StableDiffusionPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    assert not torch.equal(draw(pipe), base) and warnings() == []
    assert torch.equal(draw(plain), base)
    (text,) = warnings()
    assert text.startswith("van gogh: gated, but this call of UNet2DConditionModel") and "fuse_patches()" in text
    draw(plain)
    draw(pipe)
    assert warnings() == [], "warns once"
    pipe.set_patches("van gogh")
    call_unet(pipe)
    assert len(warnings()) == 1, "warns again after the patches change"


def test_no_warning_where_no_gate_is_bypassed(pipe, warnings):
    always, patch = (low_rank_patch(pipe, gate=gate) for gate in ({"kind": "always"}, TEXT))
    pipe.load_patch(always)
    call_unet(pipe)
    pipe.load_patch(patch)
    pipe.fuse_patches()
    call_unet(pipe)
    pipe.unload_patches()
    pipe.load_patch(patch)
    draw(pipe, "the car")  # a gate that stays closed was still evaluated
    draw(ErasedStableDiffusionImg2ImgPipeline.from_pipe(pipe))
    with Victim(pipe, lambda pipe: pytest.fail("not asked for")).folded():
        call_unet(pipe)
    pipe.set_patches({})
    call_unet(pipe)
    erase(pipe, "cat", "esd", progress=False, iterations=1, trajectories=1, sample_steps=2, learning_rate=1e-4)
    pipe.unload_patches()
    call_unet(pipe)
    assert warnings() == []
    assert not pipe.unet._forward_pre_hooks and not pipe.text_encoder._forward_pre_hooks


def test_a_failed_call_does_not_suppress_later_warnings(pipe, warnings):
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, callback_on_step_end=fail)
    with pytest.raises(ErasureError, match="only prompt_embeds"):
        draw(pipe, prompt_embeds=torch.zeros(1, 12, 32), negative_prompt_embeds=torch.zeros(1, 12, 32))
    assert warnings() == []
    call_unet(pipe)
    assert len(warnings()) == 1


def test_text_encoders_are_watched_too(pipe, warnings):
    pipe.load_patch(low_rank_patch(pipe, components=("text_encoder",), gate=TEXT))
    draw(pipe)
    call_unet(pipe)  # no patch changes the UNet
    assert warnings() == []
    pipe.encode_prompt("van gogh", "cpu", 1, False)
    assert "CLIPTextModel" in warnings()[0]


def test_only_the_whole_network_is_hooked_and_copies_keep_the_hook(pipe, warnings):
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    assert [path for path, module in pipe.unet.named_modules() if module._forward_pre_hooks] == [""]
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        draw(twin)
        assert warnings() == []
        call_unet(twin)
        assert len(warnings()) == 1
        twin.unload_patches()
        call_unet(twin)
        assert not twin.unet._forward_pre_hooks and warnings() == []
    call_unet(pipe)
    assert len(warnings()) == 1


def test_a_compiled_network_keeps_a_full_graph(pipe, warnings):
    torch._dynamo.reset()
    never = low_rank_patch(pipe, 2, gate={**TEXT, "threshold": 2.0})
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    open_ = draw(pipe)
    pipe.load_patch(never)
    pipe.set_patches("van gogh-2")
    closed = draw(pipe)
    assert warnings() == [] and not torch.equal(open_, closed)
    torch._dynamo.reset()
