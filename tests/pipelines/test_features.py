"""Features that are switched off while drawing, against numbers computed one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.errors import ErasureError
from erasure.patch import fingerprint
from erasure.patch.features import TENSORS
from erasure.patch.module_keys import find_module
from erasure.pipelines import ErasedStableDiffusionPipeline, load_patch
from erasure.pipelines.features import FeatureHooks, nearest, switched
from tests.patch.making import features, features_patch, low_rank_patch
from tests.tiny import latents, tiny_pipeline

PROMPTS = ["a cat", "a red car"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def acting(pipe, **changed):
    """A patch whose features are active in about half of the outputs, and that fits the pipeline."""
    payload = features(**changed)
    prints = {"unet": fingerprint(pipe.unet, payload.names("unet"))}
    return dataclasses.replace(features_patch(), payload=payload, base_fingerprint=prints)


def test_the_change_pixel_by_pixel():
    payload, draw = features(), torch.Generator().manual_seed(3)
    x = torch.randn(2, 1, 6, 16, generator=draw)
    tensors = {name: getattr(payload, name) for name in TENSORS}
    found, active = switched(x, tensors, torch.tensor([1, 0]))
    seen = set()
    for sample, row in ((0, 1), (1, 0)):
        for pixel in range(6):
            output = x[sample, 0, pixel].tolist()
            wanted, any_active = [0.0] * 16, False
            for i in range(payload.count):
                z = sum(a * b for a, b in zip(payload.encoder[i].tolist(), output, strict=True)) + float(
                    payload.bias[i]
                )
                gain = float(payload.gains[row, i])
                if z > float(payload.limits[row, i]) and gain:
                    any_active = True
                    wanted = [w + gain * z * d for w, d in zip(wanted, payload.decoder[i].tolist(), strict=True)]
            assert found[sample, 0, pixel].tolist() == pytest.approx(wanted, abs=1e-5)
            assert bool(active[sample, 0, pixel]) == any_active
            seen.add(any_active)
    assert seen == {True, False}


def test_the_row_of_a_timestep_is_the_nearest():
    assert nearest((900.0, 500.0, 100.0), torch.tensor([999.0, 601.0, 299.0, 0.0])).tolist() == [0, 1, 2, 2]
    assert nearest((100.0, 200.0), torch.tensor([150.0])).tolist() == [0]


def test_an_output_without_active_features_keeps_every_bit(pipe):
    base = latents(pipe, PROMPTS)
    pipe.load_patch(acting(pipe, limits=torch.full((2, 2), 1e6)))
    assert torch.equal(latents(pipe, PROMPTS), base)
    pipe.unload_patches()
    block, x = torch.nn.Identity(), torch.full((1, 16, 1, 1), -0.0)
    network = torch.nn.Sequential(block)
    for limit, same in ((1e6, True), (-1e6, False)):
        hooks = FeatureHooks(network, block, [(features(limits=torch.full((2, 2), limit)), torch.ones(1))])
        hooks._see_time(network, (), {"timestep": 3})
        result = block((x,))[0]
        assert torch.equal(torch.signbit(result), torch.signbit(x)) == same
        hooks.remove()


def test_it_acts_by_timestep_strength_and_row(pipe):
    base = latents(pipe, PROMPTS)
    pipe.load_patch(acting(pipe), name="cat")
    full = latents(pipe, PROMPTS)
    assert not torch.equal(full, base) and pipe.gate_log == [{"cat": 1.0}] * 2
    assert pipe.get_list_patches()["cat"]["kind"] == "features"
    pipe.set_patches({"cat": 0.5})
    half = latents(pipe, PROMPTS)
    assert not torch.equal(half, base) and not torch.equal(half, full)
    pipe.set_patches({"cat": 0.0})
    assert torch.equal(latents(pipe, PROMPTS), base)
    pipe.unload_patches()
    assert torch.equal(latents(pipe, PROMPTS), base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    # Only the row of low noise has gains: the first of two steps, at t = 501, keeps every bit.
    gains = torch.tensor([[0.0, 0.0], [-3.0, -3.0]])
    pipe.load_patch(acting(pipe, gains=gains, timesteps=(501.0, 1.0)))
    late = latents(pipe, PROMPTS, steps=2)
    pipe.unload_patches()
    pipe.load_patch(acting(pipe, gains=gains.flip(0), timesteps=(501.0, 1.0)))
    early = latents(pipe, PROMPTS, steps=2)
    assert not torch.equal(late, early) and not torch.equal(early, base) and not torch.equal(late, base)
    pipe.unload_patches()


def test_a_text_gate_leaves_far_prompts_every_bit_and_guidance_has_both_halves(pipe):
    base = latents(pipe, PROMPTS)
    gate = {"kind": "text", "texts": ["a cat"], "power": 0.0, "threshold": 0.999}
    pipe.load_patch(dataclasses.replace(acting(pipe), gate=gate), name="cat")
    found = latents(pipe, PROMPTS)
    assert pipe.gate_log == [{"cat": 1.0}, {"cat": 0.0}]
    assert torch.equal(found[1], base[1]) and not torch.equal(found[0], base[0])
    pipe.fuse_patches()  # without the gate
    assert not torch.equal(latents(pipe, PROMPTS)[1], base[1])
    pipe.unload_patches()
    seen = []
    block = find_module(pipe.unet, features().block)
    plain = block.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    pipe.load_patch(acting(pipe), name="cat")
    after = []
    wrapped = pipe.unet.register_forward_pre_hook(
        lambda *_: after.append(block.register_forward_hook(lambda m, a, output: seen.append(output[0].clone())))
    )
    latents(pipe, ["a cat"], steps=1)
    plain.remove(), wrapped.remove(), [handle.remove() for handle in after]
    changed = (seen[1] != seen[0]).flatten(1).any(1)
    assert len(seen[0]) == 2 and changed.all()
    pipe.unload_patches()


def test_images_of_one_prompt_share_its_strength(pipe):
    gate = {"kind": "text", "texts": ["a cat"], "power": 0.0, "threshold": 0.999}
    base = latents(pipe, PROMPTS, num_images_per_prompt=2)
    pipe.load_patch(dataclasses.replace(acting(pipe), gate=gate))
    found = latents(pipe, PROMPTS, num_images_per_prompt=2)
    assert [torch.equal(a, b) for a, b in zip(found, base, strict=True)] == [False, False, True, True]
    pipe.unload_patches()


def test_the_order_of_loading_changes_no_bit_and_two_patches_add_up(pipe):
    one, two = acting(pipe), acting(pipe, gains=torch.tensor([[-0.5, -2.0], [-1.0, 0.5]]))
    three = low_rank_patch(pipe, seed=4)
    found = []
    for order in ((one, two), (two, one)):
        for patch in (*order, three):
            pipe.load_patch(patch)
        found.append(latents(pipe, PROMPTS))
        pipe.unload_patches()
    assert torch.equal(*found)
    block, x = torch.nn.Identity(), torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Sequential(block)

    def output(*payloads):
        hooks = FeatureHooks(network, block, [(payload, torch.ones(1)) for payload in payloads])
        hooks._see_time(network, (), {"timestep": 501})
        result = block((x,))[0]
        hooks.remove()
        return result - x

    both = output(one.payload, two.payload)
    assert torch.allclose(both, output(one.payload) + output(two.payload), atol=1e-6) and both.abs().max() > 0.1


def test_what_cannot_be_done_is_refused(pipe):
    patch = acting(pipe)
    with pytest.raises(ErasureError, match="holds features, which StableDiffusionPipeline cannot run"):
        load_patch(tiny_pipeline(), patch)
    with pytest.raises(ErasureError, match="guards and features change no weight"):
        pipe.load_patch(dataclasses.replace(patch, gate={"kind": "latent"}))
    with pytest.raises(ErasureError, match="was made from"):
        tiny_pipeline(ErasedStableDiffusionPipeline, seed=5).load_patch(patch)
    other = features(made_on={"up_blocks.0.attentions.1.proj_out.weight": [8, 8, 1, 1]})
    with pytest.raises(ErasureError, match=r"shape \[16, 16, 1, 1\] in the pipeline and \[8, 8, 1, 1\]"):
        pipe.load_patch(dataclasses.replace(patch, payload=other))
    assert not pipe.get_list_patches()
