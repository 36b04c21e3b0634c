"""Patches folded into the weights of a real (tiny) diffusers pipeline."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig

from erasure.errors import ErasureError
from erasure.patch import Delta, LowRank, Patch
from erasure.pipelines import (
    ErasedStableDiffusionImg2ImgPipeline,
    ErasedStableDiffusionInpaintPipeline,
    ErasedStableDiffusionPipeline,
    load_patch,
    patch_stack,
)
from tests.patch.making import delta_patch, gap, low_rank_patch, patch_of, same, weights
from tests.tiny import latents, tiny_pipeline, write_tiny

PROMPTS = ["a painting of van gogh", "a cat"]


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.mark.parametrize("make", [low_rank_patch, delta_patch])
def test_on_off_unload_is_bit_exact(pipe, make):
    base, image = weights(pipe), latents(pipe, PROMPTS)
    name = pipe.load_patch(make(pipe))
    assert name == "van gogh"
    assert not torch.equal(latents(pipe, PROMPTS), image)
    pipe.set_patches({name: 0.0})
    assert same(weights(pipe), base)
    assert torch.equal(latents(pipe, PROMPTS), image)
    pipe.set_patches({name: -1.5})
    assert not same(weights(pipe), base)
    pipe.unload_patches()
    assert same(weights(pipe), base)
    assert pipe.get_list_patches() == {}


@pytest.mark.parametrize("make", [low_rank_patch, delta_patch])
def test_weights_are_base_plus_strength_times_change(pipe, make):
    base, patch = weights(pipe), make(pipe)
    pipe.load_patch(patch, strength=0.7)
    now, changes = weights(pipe), patch.deltas("unet")
    for name, value in base.items():
        change = changes.get(name.removeprefix("unet."), torch.zeros(()))
        assert torch.allclose(now[name], value + 0.7 * change, atol=1e-6), name


def test_text_encoder_patch(pipe):
    base = weights(pipe)
    patch = delta_patch(pipe, part="layers.0.mlp", component="text_encoder")
    pipe.load_patch(patch)
    changed = {name for name, value in weights(pipe).items() if not torch.equal(value, base[name])}
    assert changed == {f"text_encoder.{name}" for name in patch.deltas("text_encoder")}
    pipe.unload_patches()
    assert same(weights(pipe), base)


def test_order_of_loading_changes_no_bit():
    donor = tiny_pipeline()
    patches = {
        "one": low_rank_patch(donor, seed=1),
        "two": low_rank_patch(donor, seed=2),
        "three": delta_patch(donor, seed=3, part="attn2"),
    }
    strengths = {"one": 0.3, "two": 1.1, "three": -0.7}
    seen = []
    for order in (["one", "two", "three"], ["three", "one", "two"], ["two", "three", "one"]):
        pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
        for name in order:
            pipe.load_patch(patches[name], name=name, strength=strengths[name])
        seen.append(weights(pipe))
    assert same(seen[0], seen[1])
    assert same(seen[0], seen[2])


def test_two_patches_on_the_same_weights_are_unloaded_one_by_one(pipe):
    base, first, second = weights(pipe), low_rank_patch(pipe, seed=1), low_rank_patch(pipe, seed=2)
    assert pipe.load_patch(first) == "van gogh"
    alone = weights(pipe)
    # The base fingerprint is checked without the first patch, which is folded in.
    assert pipe.load_patch(second) == "van gogh-2"
    assert list(pipe.get_list_patches()) == ["van gogh", "van gogh-2"]
    assert not same(weights(pipe), alone)
    pipe.delete_patches("van gogh-2")
    assert same(weights(pipe), alone)
    pipe.delete_patches(["van gogh"])
    assert same(weights(pipe), base)


def test_set_patches_takes_names_and_strengths(pipe):
    first, second = low_rank_patch(pipe, seed=1), low_rank_patch(pipe, seed=2)
    pipe.load_patch(first, name="one", strength=0.5)
    pipe.load_patch(second, name="two")

    def strengths():
        return {name: entry["strength"] for name, entry in pipe.get_list_patches().items()}

    assert strengths() == {"one": 0.5, "two": 1.0}
    pipe.set_patches({"two": 2})
    assert strengths() == {"one": 0.0, "two": 2.0}
    pipe.set_patches("one")
    assert strengths() == {"one": 1.0, "two": 0.0}
    pipe.set_patches(["one", "two"])
    assert strengths() == {"one": 1.0, "two": 1.0}
    before = weights(pipe)
    with pytest.raises(ErasureError, match="unknown patch 'thre'"):
        pipe.set_patches({"one": 0.2, "thre": 1.0})
    for strength in (float("nan"), float("inf"), "1", None, True):
        with pytest.raises(ErasureError, match="finite number"):
            pipe.set_patches({"one": strength})
    with pytest.raises(ErasureError, match="unknown patch 'x'"):
        pipe.delete_patches(["one", "x"])
    assert strengths() == {"one": 1.0, "two": 1.0}
    assert same(weights(pipe), before)


def test_a_name_that_is_taken_lists_the_loaded_patches(pipe):
    pipe.load_patch(low_rank_patch(pipe), name="art")
    with pytest.raises(ErasureError, match="named 'art' is already loaded. Loaded patches: art"):
        pipe.load_patch(delta_patch(pipe), name="art")
    with pytest.raises(ErasureError, match="must be a non-empty string"):
        pipe.load_patch(delta_patch(pipe), name="")


def test_another_base_is_refused_by_name_unless_forced(pipe, tmp_path):
    other = tiny_pipeline(seed=1)
    path = delta_patch(other, base="somewhere/other-base").save(tmp_path / "p.safetensors")
    base = weights(pipe)
    with pytest.raises(ErasureError, match="somewhere/other-base.*this pipeline is.*force"):
        pipe.load_patch(path)
    assert same(weights(pipe), base)
    assert pipe.get_list_patches() == {}
    pipe.load_patch(path, force=True)
    assert not same(weights(pipe), base)
    pipe.unload_patches()
    with pytest.raises(ErasureError, match="does not record"):
        pipe.load_patch(delta_patch(pipe, base_fingerprint={}))


@pytest.mark.parametrize("force", [False, True])
def test_misfits_are_refused_even_with_force(pipe, force):
    base = weights(pipe)
    pair = (torch.ones(1, 4), torch.ones(4, 1), 1.0)
    misfits = [
        (Delta({"unet": {"nothing.weight": torch.ones(2)}}), "0 of the 1 layers"),
        (Delta({"unet": {"conv_in.bias": torch.ones(8), "nothing.weight": torch.ones(2)}}), "1 of the 2 layers"),
        (Delta({"unet": {"conv_in.bias": torch.ones(9)}}), r"has shape \[8\] in the pipeline and \[9\] in the patch"),
        (LowRank({"unet": {"conv_in": pair}}), "does not fit"),
        (LowRank({"unet": {"conv_norm_out": pair}}), "does not fit"),
        (Delta({"text_encoder_2": {"a.weight": torch.ones(1)}}), "has no text_encoder_2"),
    ]
    for payload, message in misfits:
        with pytest.raises(ErasureError, match=message):
            pipe.load_patch(Patch(payload, "random", [{"name": "x"}]), force=force)
    assert same(weights(pipe), base)
    assert pipe.get_list_patches() == {}


def test_a_damaged_file_changes_nothing(pipe, tmp_path):
    path = delta_patch(pipe).save(tmp_path / "p.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    base = weights(pipe)
    with pytest.raises(ErasureError, match="truncated"):
        pipe.load_patch(path)
    assert same(weights(pipe), base)


@pytest.mark.parametrize("alpha", [2.0, 0.5, 3.0])
def test_diffusers_loads_the_file_with_the_same_effect(tmp_path, alpha):
    ours, theirs = tiny_pipeline(ErasedStableDiffusionPipeline), tiny_pipeline()
    image = latents(ours, PROMPTS)
    for part in ("attn", ""):
        parts = ("unet", "text_encoder")
        patch = low_rank_patch(ours, part=part, alpha=alpha, components=parts, size=0.05)
        path = patch.save(tmp_path / "p.safetensors")
        theirs.load_lora_weights(path)
        ours.load_patch(patch)
        patched = latents(ours, PROMPTS)
        assert gap(patched, image) > 1e-3
        assert gap(latents(theirs, PROMPTS), patched) < 1e-5
        theirs.unload_lora_weights()
        ours.unload_patches()


def test_any_diffusers_pipeline_takes_patches():
    plain, erased = tiny_pipeline(), tiny_pipeline(ErasedStableDiffusionPipeline)
    base, patch = weights(plain), low_rank_patch(plain)
    name = load_patch(plain, patch, strength=0.5)
    erased.load_patch(patch, strength=0.5)
    assert torch.equal(latents(plain, PROMPTS), latents(erased, PROMPTS))
    patch_stack(plain).set_patches({name: 0.0})
    assert same(weights(plain), base)
    patch_stack(plain).unload_patches()
    assert patch_stack(plain).get_list_patches() == {}
    with pytest.raises(ErasureError, match="not into a UNet2DConditionModel"):
        load_patch(plain.unet, patch)


def test_a_patch_and_a_lora_of_the_user(pipe):
    base, patch = weights(pipe), low_rank_patch(pipe)
    pipe.load_patch(patch)
    alone = latents(pipe, PROMPTS)
    pipe.unload_patches()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    # A new LoRA changes nothing, but it wraps the layers.
    pipe.load_patch(patch)
    assert torch.allclose(latents(pipe, PROMPTS), alone, atol=1e-5)
    pipe.unload_patches()
    pipe.unload_lora_weights()
    pipe.unet.delete_adapters("default")
    kept = weights(pipe)
    assert all(
        torch.equal(value, kept.get(name, kept.get(name.replace(".weight", ".base_layer.weight"))))
        for name, value in base.items()
    )


def test_change_of_dtype_while_loaded(pipe):
    expected = {name: value.to(torch.bfloat16) for name, value in weights(pipe).items()}
    name = pipe.load_patch(delta_patch(pipe))
    pipe.to(dtype=torch.bfloat16)
    pipe.set_patches({name: 2.0})
    assert {value.dtype for value in weights(pipe).values()} == {torch.bfloat16}
    pipe.unload_patches()
    assert same(weights(pipe), expected)


def test_patch_from_fp32_loads_into_half_precision(pipe):
    patch = delta_patch(pipe)
    pipe.to(dtype=torch.bfloat16)
    base = weights(pipe)
    pipe.load_patch(patch)
    assert not same(weights(pipe), base)


def test_shared_components_share_their_patches(pipe):
    base = weights(pipe)
    pipe.load_patch(low_rank_patch(pipe))
    twin = ErasedStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    assert twin.load_patch(low_rank_patch(tiny_pipeline(), seed=2)) == "van gogh-2"
    assert list(pipe.get_list_patches()) == ["van gogh", "van gogh-2"]
    twin.unload_patches()
    assert same(weights(pipe), base)


def test_a_replaced_component_is_refused(pipe):
    pipe.load_patch(low_rank_patch(pipe))
    old, pipe.unet = pipe.unet, tiny_pipeline(seed=1).unet
    with pytest.raises(ErasureError, match="unet was replaced"):
        pipe.unload_patches()
    pipe.unet = old
    pipe.unload_patches()
    assert same(weights(pipe), weights(tiny_pipeline()))


def test_copy_and_pickle_carry_the_stack(pipe):
    base = weights(pipe)
    name = pipe.load_patch(delta_patch(pipe))
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert same(weights(twin), weights(pipe))
        twin.delete_patches(name)
        assert same(weights(twin), base)
    assert not same(weights(pipe), base)


def test_save_pretrained_names_the_diffusers_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline
    reloaded = ErasedStableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(reloaded) is ErasedStableDiffusionPipeline
    assert same(weights(reloaded), weights(pipe))


def test_from_pretrained(tmp_path):
    folder = write_tiny(tmp_path / "tiny")
    pipe = ErasedStableDiffusionPipeline.from_pretrained(folder)
    assert pipe.safety_checker is None
    assert not pipe.config.requires_safety_checker
    pipe.load_patch(delta_patch(pipe))
    with pytest.raises(ErasureError, match="unknown model 'glyhp'"):
        ErasedStableDiffusionPipeline.from_pretrained("glyhp")


def test_image_to_image_and_inpainting():
    image = torch.rand(1, 3, 16, 16)
    for cls, more in (
        (ErasedStableDiffusionImg2ImgPipeline, {}),
        (ErasedStableDiffusionInpaintPipeline, {"mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16}),
    ):
        pipe = tiny_pipeline(cls)

        def run(pipe=pipe, more=more):
            generator = torch.Generator().manual_seed(0)
            options = {"image": image, "strength": 1.0, "num_inference_steps": 2, "output_type": "latent", **more}
            return pipe("a painting of van gogh", generator=generator, **options).images

        base = run()
        pipe.load_patch(low_rank_patch(pipe, gate={"kind": "text"}))
        assert not torch.equal(run(), base)
        assert pipe.gate_log == [{"van gogh": 1.0}]
        pipe.unload_patches()
        assert torch.equal(run(), base)


def test_only_the_parameters_of_the_patch_change(pipe):
    base = weights(pipe)
    pipe.load_patch(patch_of(pipe, Delta({"unet": {"conv_in.bias": torch.ones(8)}})))
    now = weights(pipe)
    assert {name for name in base if not torch.equal(base[name], now[name])} == {"unet.conv_in.bias"}
