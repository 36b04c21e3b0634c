"""Every task and size, and pipelines that are made from other pipelines."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

import erasure
from erasure import pipelines
from erasure.errors import ErasureError
from erasure.pipelines import ErasedStableDiffusionImg2ImgPipeline, ErasedStableDiffusionPipeline, load_patch
from tests.patch.making import delta_patch, gap, low_rank_patch, same, weights
from tests.pipelines.making import LATENT, TASKS, TEXT, Unchanged, draw, strengths, task
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize("name", TASKS)
def test_folded_and_gated_in_every_task(name):
    pipe = task(name)
    assert getattr(erasure, name) is type(pipe)
    with Unchanged(pipe) as base:
        pipe.load_patch(low_rank_patch(pipe))
        folded = draw(pipe)
        assert gap(folded, base) > 1e-4
        pipe.unload_patches()
        pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
        gated = draw(pipe)
        assert strengths(pipe) == [1.0, 0.0]
        assert gap(gated[0], folded[0]) < 1e-5 and torch.equal(gated[1], base[1])
        pipe.unload_patches()


@pytest.mark.parametrize("name", [name for name in TASKS if "XL" not in name])
def test_the_latent_gate_in_every_task_of_sd(name, monkeypatch):
    monkeypatch.setattr(
        "erasure.pipelines.gates.latent.Decider.present", lambda self, key, gate, text, _: "gogh" in text
    )
    pipe = task(name)
    with Unchanged(pipe) as base:
        pipe.load_patch(low_rank_patch(pipe, gate=LATENT))
        patched = draw(pipe)
        assert strengths(pipe) == [2.0, 0.0]
        assert gap(patched[0], base[0]) > 1e-4 and torch.equal(patched[1], base[1])
        pipe.unload_patches()


def test_the_latent_gate_refuses_a_unet_that_needs_more_than_latents():
    pipe = task("ErasedStableDiffusionInpaintPipeline")
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ErasureError, match="takes 9 channels and returns 4"):
        pipe.load_patch(low_rank_patch(pipe, gate=LATENT))


def test_the_latent_gate_decides_on_xl():
    pipe = task("ErasedStableDiffusionXLPipeline")
    pipe.load_patch(low_rank_patch(pipe, gate={**LATENT, "measure": "guidance", "ratio": 1e6}))
    draw(pipe, ["a cat", "a dog"])
    assert strengths(pipe) == [0.0, 0.0]
    pipe.unload_patches()
    pipe.load_patch(low_rank_patch(pipe, gate=LATENT))
    with pytest.raises(ErasureError, match="does not affect the empty prompt"):
        draw(pipe, ["a cat"])


def test_second_prompt_of_xl():
    pipe = task("ErasedStableDiffusionXLPipeline")
    pipe.load_patch(low_rank_patch(pipe, gate={"kind": "text"}))
    draw(pipe, ["a cat", "a cat"], prompt_2=["van gogh", "a dog"])
    assert strengths(pipe)[0] == 1.0 > strengths(pipe)[1]
    draw(pipe, ["a cat"])
    alone = strengths(pipe)
    draw(pipe, ["a cat"], prompt_2="")  # diffusers replaces it by the prompt
    assert strengths(pipe) == alone


@pytest.mark.parametrize("gate", [{"kind": "always"}, TEXT])
def test_pipelines_made_from_an_erased_one_share_its_patches(gate):
    pipe = task("ErasedStableDiffusionPipeline")
    # A twin that has run before the patch was loaded shares it too.
    early = ErasedStableDiffusionImg2ImgPipeline.from_pipe(pipe)
    early.set_progress_bar_config(disable=True)
    base = draw(early)
    name = pipe.load_patch(low_rank_patch(pipe, gate=gate))
    makers = [
        lambda: early,
        lambda: ErasedStableDiffusionImg2ImgPipeline.from_pipe(pipe),
        lambda: AutoPipelineForImage2Image.from_pipe(pipe),
        lambda: ErasedStableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False),
    ]
    images = []
    for make in makers:
        twin = make()
        twin.set_progress_bar_config(disable=True)
        assert type(twin) is ErasedStableDiffusionImg2ImgPipeline
        assert list(twin.get_list_patches()) == [name]
        images.append(draw(twin))
        assert gap(images[-1][0], base[0]) > 1e-4 and torch.equal(images[-1], images[0])
    twin.unload_patches()
    assert pipe.get_list_patches() == {} and torch.equal(draw(early), base)


def test_the_stack_outlives_the_pipeline_it_was_made_on():
    pipe = task("ErasedStableDiffusionPipeline")
    base = weights(pipe)
    pipe.load_patch(delta_patch(pipe))
    twin = AutoPipelineForInpainting.from_pipe(pipe)
    del pipe
    twin.unload_patches()
    assert same(weights(twin), base)


@pytest.mark.parametrize("name", TASKS)
def test_auto_pipelines_find_the_erased_classes(name):
    pipe = task(name)
    size = "XL" if "XL" in name else ""
    for auto, kind in (
        (AutoPipelineForText2Image, ""),
        (AutoPipelineForImage2Image, "Img2Img"),
        (AutoPipelineForInpainting, "Inpaint"),
    ):
        assert type(auto.from_pipe(pipe)) is getattr(pipelines, f"ErasedStableDiffusion{size}{kind}Pipeline")


def test_from_a_plain_pipeline_and_back():
    plain = tiny_pipeline(StableDiffusionPipeline)
    base = weights(plain)
    load_patch(plain, delta_patch(plain), name="folded")
    pipe = ErasedStableDiffusionPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_patch(low_rank_patch(tiny_pipeline(), gate=TEXT), name="gated")
    draw(pipe)
    assert [set(entry) for entry in pipe.gate_log] == [{"folded", "gated"}] * 2
    # A plain class uses the patches in the weights, and ignores gated ones.
    plain_again = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert plain_again.unet is pipe.unet
    pipe.unload_patches()
    assert same(weights(plain), base)


def test_a_twin_with_another_unet_has_its_own_patches():
    pipe, other = task("ErasedStableDiffusionPipeline"), tiny_pipeline(seed=1)
    pipe.load_patch(low_rank_patch(pipe))
    twin = AutoPipelineForImage2Image.from_pipe(pipe)
    pipe.unload_patches()
    base = weights(pipe)
    twin.unet = other.unet
    twin.load_patch(low_rank_patch(twin))
    assert pipe.get_list_patches() == {} and same(weights(pipe), base)
    assert list(twin.get_list_patches()) == ["van gogh"]


def test_networks_shared_in_part_are_not_patched_twice():
    pipe, other = task("ErasedStableDiffusionPipeline"), tiny_pipeline(seed=1)
    pipe.load_patch(low_rank_patch(pipe, components=("unet", "text_encoder")))
    parts = {**pipe.components, "text_encoder": other.text_encoder}
    twin = ErasedStableDiffusionPipeline(**parts, requires_safety_checker=False)
    assert twin.get_list_patches() == {}
    with pytest.raises(ErasureError, match="shared with another pipeline.*van gogh"):
        twin.load_patch(low_rank_patch(tiny_pipeline(), seed=2))


def test_a_network_replaced_under_a_gate_is_refused():
    pipe = task("ErasedStableDiffusionPipeline")
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    pipe.unet = tiny_pipeline(seed=1).unet
    with pytest.raises(ErasureError, match="unet was replaced"):
        draw(pipe)


def test_copies_keep_their_own_patches():
    pipe = task("ErasedStableDiffusionPipeline")
    base = weights(pipe)
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT), name="gated")
    pipe.load_patch(delta_patch(pipe), name="folded")
    image = draw(pipe)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        again = AutoPipelineForText2Image.from_pipe(twin)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again), image)
        again.unload_patches()
        assert same(weights(twin), base)
    assert torch.equal(draw(pipe), image)


def test_saving_writes_folded_patches_and_warns(tmp_path, caplog):
    pipe = task("ErasedStableDiffusionPipeline")
    with caplog.at_level(logging.WARNING, "erasure"):
        pipe.save_pretrained(tmp_path / "base")
    assert not caplog.records
    gated = low_rank_patch(pipe, gate=TEXT)
    pipe.load_patch(delta_patch(pipe), name="folded")
    pipe.load_patch(gated, name="gated")
    with caplog.at_level(logging.WARNING, "erasure"):
        pipe.save_pretrained(tmp_path / "erased")
    assert "in which folded cannot be unloaded" in caplog.text and "leaves out gated" in caplog.text
    reloaded = ErasedStableDiffusionPipeline.from_pretrained(tmp_path / "erased")
    assert same(weights(reloaded), weights(pipe)) and reloaded.get_list_patches() == {}
    # The saved network is another base.
    with pytest.raises(ErasureError, match="was made from"):
        reloaded.load_patch(delta_patch(task("ErasedStableDiffusionPipeline")))
