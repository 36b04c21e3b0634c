"""Networks with gated patches that are called past the erased pipeline: that is said, once, and nothing else is."""

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
def said(caplog):
    """What the watch has said since the last look."""

    def look() -> list[str]:
        found = [one.getMessage() for one in caplog.records if one.name == "erasure.pipelines.bypass_warning"]
        caplog.clear()
        return found

    return look


def ask(pipe):
    with torch.no_grad():
        return pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 12, 32)).sample


@pytest.mark.parametrize("gate", GATES)
def test_a_plain_pipeline_over_an_erased_ones_networks(pipe, said, gate):
    base = draw(pipe)
    pipe.load_patch(low_rank_patch(pipe, gate=gate))
    plain = StableDiffusionPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    assert not torch.equal(draw(pipe), base) and said() == []
    assert torch.equal(draw(plain), base)
    (text,) = said()
    assert text.startswith("van gogh: gated, and this call of the UNet2DConditionModel") and "fuse_patches()" in text
    draw(plain)
    draw(pipe)
    assert said() == [], "once"
    pipe.set_patches("van gogh")
    ask(pipe)
    assert len(said()) == 1, "once more when the patches change"


def test_where_there_is_nothing_to_say(pipe, said):
    always, patch = (low_rank_patch(pipe, gate=gate) for gate in ({"kind": "always"}, TEXT))
    pipe.load_patch(always)
    ask(pipe)
    pipe.load_patch(patch)
    pipe.fuse_patches()
    ask(pipe)
    pipe.unload_patches()
    pipe.load_patch(patch)
    draw(pipe, "the car")  # a gate that stays closed has been decided on
    draw(ErasedStableDiffusionImg2ImgPipeline.from_pipe(pipe))
    with Victim(pipe, lambda pipe: pytest.fail("not asked for")).folded():
        ask(pipe)
    pipe.set_patches({})
    ask(pipe)
    erase(pipe, "cat", "esd", progress=False, iterations=1, trajectories=1, sample_steps=2)
    pipe.unload_patches()
    ask(pipe)
    assert said() == []
    assert not pipe.unet._forward_pre_hooks and not pipe.text_encoder._forward_pre_hooks


def test_a_call_that_failed_has_decided_on_nothing_for_the_next(pipe, said):
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, callback_on_step_end=fail)
    with pytest.raises(ErasureError, match="only prompt_embeds"):
        draw(pipe, prompt_embeds=torch.zeros(1, 12, 32), negative_prompt_embeds=torch.zeros(1, 12, 32))
    assert said() == []
    ask(pipe)
    assert len(said()) == 1


def test_text_encoders_too(pipe, said):
    pipe.load_patch(low_rank_patch(pipe, components=("text_encoder",), gate=TEXT))
    draw(pipe)
    ask(pipe)  # the UNet is the base's
    assert said() == []
    pipe.encode_prompt("van gogh", "cpu", 1, False)
    assert "CLIPTextModel" in said()[0]


def test_it_stands_before_the_network_alone_and_is_copied_with_it(pipe, said):
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    assert [path for path, module in pipe.unet.named_modules() if module._forward_pre_hooks] == [""]
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        draw(twin)
        assert said() == []
        ask(twin)
        assert len(said()) == 1
        twin.unload_patches()
        ask(twin)
        assert not twin.unet._forward_pre_hooks and said() == []
    ask(pipe)
    assert len(said()) == 1


def test_a_compiled_network_stays_whole(pipe, said):
    torch._dynamo.reset()
    never = low_rank_patch(pipe, 2, gate={**TEXT, "threshold": 2.0})
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    open_ = draw(pipe)
    pipe.load_patch(never)
    pipe.set_patches("van gogh-2")
    closed = draw(pipe)
    assert said() == [] and not torch.equal(open_, closed)
    torch._dynamo.reset()
