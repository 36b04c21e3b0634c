"""The user's own LoRAs, loaded, weighted, fused and unloaded before and after patches."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.pipelines import ErasedStableDiffusionPipeline, load_patch, patch_stack
from tests.patch.making import delta_patch, gap, low_rank_patch, same, weights
from tests.pipelines.making import LATENT, TEXT, Unchanged, draw, strengths
from tests.tiny import tiny_pipeline


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    donor = tiny_pipeline()
    patch = low_rank_patch(donor, seed=8, part="attn", components=("unet", "text_encoder"), size=0.15)
    return patch.save(tmp_path_factory.mktemp("lora") / "lora.safetensors")


def tensors(pipe):
    """Return all weights by name, whether or not peft wraps the layers."""
    return {name.replace(".base_layer", ""): value for name, value in weights(pipe).items() if "lora_" not in name}


@pytest.mark.parametrize("gate", [{"kind": "always"}, {"kind": "text"}])
def test_the_order_of_lora_and_patch_does_not_matter(pipe, lora, gate):
    patch = low_rank_patch(pipe, part="", gate=gate, components=("unet", "text_encoder"), size=0.03)
    images = []
    with Unchanged(pipe) as base:
        for first in (True, False):
            if first:
                pipe.load_lora_weights(lora, adapter_name="mine")
            pipe.load_patch(patch)
            if not first:
                pipe.load_lora_weights(lora, adapter_name="mine")
            images.append(draw(pipe))
            pipe.set_adapters(["mine"], [0.0])
            alone = draw(pipe)
            if first:
                pipe.unload_patches()
                pipe.unload_lora_weights()
            else:
                pipe.unload_lora_weights()
                images.append(draw(pipe))
                pipe.unload_patches()
    assert torch.equal(images[0], images[1])
    assert gap(images[0], base) > 1e-3 and gap(images[0], alone) > 1e-3
    assert gap(images[2], alone) < 1e-5  # a LoRA of weight 0 is like none


def test_patches_and_adapters_have_separate_methods(pipe, lora):
    pipe.load_lora_weights(lora, adapter_name="mine")
    with_lora = draw(pipe)
    name = pipe.load_patch(low_rank_patch(pipe))
    pipe.set_adapters("mine", 0.5)
    pipe.set_patches({name: 0.3})
    assert pipe.get_active_adapters() == ["mine"] and pipe.get_list_patches()[name]["strength"] == 0.3
    pipe.disable_lora()
    pipe.enable_lora()
    pipe.set_adapters("mine", 1.0)
    pipe.delete_patches(name)
    assert torch.equal(draw(pipe), with_lora)
    pipe.delete_adapters("mine")


@pytest.mark.parametrize("kind", ["folded", "gated"])
def test_fusing_in_every_order_gives_the_same_weights(pipe, lora, kind):
    plain = tiny_pipeline(ErasedStableDiffusionPipeline)
    patch = low_rank_patch(pipe, gate=TEXT) if kind == "gated" else delta_patch(pipe, part="attn")
    weights_by_order = {}

    def act(pipe, steps):
        for step in steps:
            if step == "patch":
                pipe.load_patch(patch, force=True)
            elif step == "off":
                pipe.unload_patches()
            elif step == "lora":
                pipe.load_lora_weights(lora)
            else:
                getattr(pipe, {"fuse": "fuse_lora", "unfuse": "unfuse_lora", "drop": "unload_lora_weights"}[step])()

    act(plain, ["lora", "fuse"])
    fused = tensors(plain)
    act(plain, ["unfuse"])
    unfused = tensors(plain)
    for order in (
        ("patch", "lora", "fuse"),
        ("lora", "patch", "fuse"),
        ("lora", "fuse", "patch"),
    ):
        pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
        act(pipe, order)
        weights_by_order[order] = tensors(pipe)
        image = draw(pipe)
        act(pipe, ["off"])
        assert same(tensors(pipe), fused), order
        act(pipe, ["patch"])
        assert torch.equal(draw(pipe), image), order
        act(pipe, ["unfuse", "off"])
        assert same(tensors(pipe), unfused), order
    assert all(same(values, weights_by_order["patch", "lora", "fuse"]) for values in weights_by_order.values())
    # Unloading a fused LoRA frees its memory, and what was fused stays in the weights.
    act(pipe, ["fuse", "patch", "drop", "off"])
    assert (
        gap(
            tensors(pipe)["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"],
            fused["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"],
        )
        < 1e-6
    )


def test_fusing_on_a_plain_pipeline_is_refused_until_undone(lora):
    plain = tiny_pipeline()
    patch = low_rank_patch(plain, part="attn")
    plain.load_lora_weights(lora)
    base = tensors(plain)
    load_patch(plain, patch)
    plain.fuse_lora()
    with pytest.raises(ErasureError, match="LoRA was fused into unet"):
        patch_stack(plain).unload_patches()
    assert list(patch_stack(plain).get_list_patches()) == ["van gogh"]
    plain.unfuse_lora()
    patch_stack(plain).unload_patches()
    kept = {name: value for name, value in tensors(plain).items() if "unet" in name and "attn" in name}
    assert kept and all(torch.equal(value, base[name]) for name, value in kept.items())
    # Fused before the patch was loaded, then unloaded: that changes no weight under the patch.
    plain.fuse_lora()
    fused = tensors(plain)
    load_patch(plain, patch, force=True)
    plain.unload_lora_weights()
    patch_stack(plain).unload_patches()
    assert same(tensors(plain), fused)


def test_the_latent_gate_decides_again_with_another_lora(pipe, lora, monkeypatch):
    seen = []

    def shifts(base, prompt, seeds, patched, **options):
        seen.append(prompt)
        return [1.0 if prompt else 0.5] * len(seeds)

    monkeypatch.setattr("erasure.pipelines.gates.latent.shifts", shifts)
    pipe.load_patch(low_rank_patch(pipe, gate=LATENT))
    draw(pipe, ["a cat"])
    draw(pipe, ["a cat"])
    assert seen == ["a cat", ""] and strengths(pipe) == [2.0]
    for change in (
        lambda: pipe.load_lora_weights(lora, adapter_name="mine"),
        lambda: pipe.set_adapters("mine", 0.5),
        lambda: pipe.disable_lora(),
        lambda: pipe.enable_lora(),
        lambda: pipe.fuse_lora(),
        lambda: pipe.unfuse_lora(),
        lambda: pipe.unload_lora_weights(),
    ):
        seen.clear()
        change()
        draw(pipe, ["a cat"])
        assert seen == ["a cat", ""]
