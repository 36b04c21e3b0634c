"""Text gates: the strength for each prompt, and for each row of a batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from erasure.concepts.similarity import similarities
from erasure.errors import ErasureError
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline
from erasure.pipelines.gated_lora import Membrane
from tests.patch.making import delta_patch, gap, low_rank_patch, same, weights
from tests.pipelines.making import tiny_xl
from tests.tiny import latents, tiny_pipeline

PROMPTS = ["a painting of van gogh", "a cat", "the car by a tree"]
TEXT = {"kind": "text"}


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def strengths(pipe, name="van gogh"):
    return [entry[name] for entry in pipe.gate_log]


def test_similarity_follows_the_formula(pipe):
    def states(text):
        ids = pipe.tokenizer(text, padding="max_length", max_length=12, return_tensors="pt").input_ids
        with torch.no_grad():
            return pipe.text_encoder(ids).last_hidden_state.flatten()

    gammas = similarities(pipe, ["a painting of van gogh", "a van", "a cat"], ["van gogh", "monet"])
    for prompt, row, shared in (("a painting of van gogh", 0, 1.0), ("a van", 1, 0.5), ("a cat", 2, 0.0)):
        cosine = float(torch.cosine_similarity(states(prompt), states("van gogh"), dim=0))
        assert gammas[row][0] == pytest.approx(max(cosine, shared), abs=1e-5)
    assert gammas[0][1] == pytest.approx(
        float(torch.cosine_similarity(states(PROMPTS[0]), states("monet"), dim=0)), abs=1e-5
    )


def test_log_power_and_threshold(pipe):
    logs = {}
    for gate in (TEXT, {**TEXT, "power": 2}, {**TEXT, "threshold": 0.99}, {**TEXT, "texts": ["cat"]}):
        pipe.load_patch(low_rank_patch(pipe, gate=gate), strength=2.0)
        latents(pipe, PROMPTS)
        logs[str(gate)] = [value / 2.0 for value in strengths(pipe)]
        pipe.unload_patches()
    plain, squared, sharp, cat = logs.values()
    assert plain[0] == 1.0
    assert 0 < plain[1] < 1
    assert squared == pytest.approx([value**2 for value in plain])
    assert sharp == [1.0, 0.0, 0.0]
    assert cat[1] == 1.0
    assert cat[0] < 1.0


def test_aliases_of_the_header_are_gate_texts(pipe):
    concepts = [{"name": "van gogh", "aliases": ["monet"]}, {"name": "dog"}]
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT, concepts=concepts), name="p")
    latents(pipe, ["monet", "the dog", "cat"])
    acted = strengths(pipe, "p")
    assert acted[:2] == [1.0, 1.0]
    assert acted[2] < 1.0


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("components", [("unet",), ("unet", "text_encoder")])
def test_mixed_batch_equals_one_prompt_at_a_time(pipe, guidance, components):
    base = latents(pipe, PROMPTS, guidance=guidance)
    pipe.load_patch(low_rank_patch(pipe, part="", gate={**TEXT, "power": 3}, components=components, size=0.05))
    together = latents(pipe, PROMPTS, guidance=guidance)
    log = strengths(pipe)
    apart = torch.cat([latents(pipe, [prompt], seed=row, guidance=guidance) for row, prompt in enumerate(PROMPTS)])
    assert gap(together, apart) < 1e-5
    assert len(set(log)) == 3
    assert all((together - base).abs().amax((1, 2, 3)) > 1e-4)


def test_a_gated_patch_equals_a_folded_patch_of_that_strength(pipe):
    patch = low_rank_patch(pipe, gate={**TEXT, "power": 2})
    pipe.load_patch(patch, strength=1.5)
    gated = latents(pipe, ["a cat"])
    (strength,) = strengths(pipe)
    folded = tiny_pipeline(ErasedStableDiffusionPipeline)
    folded.load_patch(low_rank_patch(folded), strength=strength)
    assert gap(latents(folded, ["a cat"]), gated) < 1e-5
    folded.set_patches({"van gogh": 1.5})
    assert gap(latents(folded, ["a cat"]), gated) > 1e-4


def test_all_images_of_a_prompt_get_its_strength(pipe):
    pipe.load_patch(low_rank_patch(pipe, gate={**TEXT, "threshold": 0.99}))
    patched = latents(pipe, PROMPTS[:2], num_images_per_prompt=2)
    pipe.unload_patches()
    base = latents(pipe, PROMPTS[:2], num_images_per_prompt=2)
    assert torch.equal(patched[2:], base[2:])
    assert not torch.equal(patched[0], base[0])
    assert not torch.equal(patched[1], base[1])


def test_rows_of_strength_0_and_calls_without_any_keep_the_bits_of_the_base(pipe):
    base, before = latents(pipe, PROMPTS), weights(pipe)
    name = pipe.load_patch(low_rank_patch(pipe, gate={**TEXT, "threshold": 0.99}))
    assert same(weights(pipe), before)
    patched = latents(pipe, PROMPTS)
    assert torch.equal(patched[1:], base[1:])
    assert not torch.equal(patched[0], base[0])
    alone = latents(pipe, PROMPTS[1:], seed=1)
    pipe.set_patches({name: 0.0})
    assert torch.equal(latents(pipe, PROMPTS[1:], seed=1), alone)
    assert torch.equal(latents(pipe, PROMPTS), base)
    assert pipe.gate_log == [{name: 0.0}] * 3
    pipe.unload_patches()
    assert torch.equal(latents(pipe, PROMPTS[1:], seed=1), alone)


def test_a_row_of_strength_0_keeps_its_bits_even_if_the_term_overflows():
    layer = torch.nn.Linear(4, 3)
    x = torch.rand(2, 4)
    base = layer(x)
    membrane = Membrane(torch.full((1, 4), 1e30), torch.full((3, 1), 1e30), torch.tensor([[0.0], [1.0]]))
    handle = membrane.attach(layer)
    output = layer(x)
    handle.remove()
    assert torch.equal(output[0], base[0])
    assert torch.isinf(output[1]).all()


def test_all_hooks_are_removed_after_a_call(pipe):
    def hooks():
        return sum(len(module._forward_hooks) for module in pipe.unet.modules())

    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    latents(pipe, PROMPTS)
    assert hooks() == 0

    def stop(pipe, step, time, tensors):
        assert hooks() > 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents(pipe, PROMPTS, callback_on_step_end=stop)
    assert hooks() == 0
    # Outside a call, no gate is evaluated.
    pipe.encode_prompt("a cat", "cpu", 1, False)
    assert hooks() == 0


def test_order_of_loading_gated_patches_changes_no_bit(pipe):
    patches = {
        str(seed): low_rank_patch(pipe, seed=seed, gate=TEXT, components=("unet", "text_encoder")) for seed in (1, 2, 3)
    }
    images = []
    for order in ("123", "312"):
        for name in order:
            pipe.load_patch(patches[name], name=name, strength=0.5)
        images.append(latents(pipe, PROMPTS))
        pipe.unload_patches()
    assert torch.equal(*images)


def test_fusing_ignores_the_gate_and_unfusing_restores_it(pipe):
    base, before = weights(pipe), latents(pipe, PROMPTS)
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    gated = latents(pipe, PROMPTS)
    pipe.fuse_patches()
    assert not same(weights(pipe), base)
    fused = latents(pipe, PROMPTS)
    assert strengths(pipe) == [1.0, 1.0, 1.0]
    ungated = tiny_pipeline(ErasedStableDiffusionPipeline)
    ungated.load_patch(low_rank_patch(ungated))
    assert torch.equal(fused, latents(ungated, PROMPTS))
    pipe.unfuse_patches()
    assert same(weights(pipe), base)
    assert torch.equal(latents(pipe, PROMPTS), gated)
    pipe.fuse_patches()
    pipe.unload_patches()
    assert torch.equal(latents(pipe, PROMPTS), before)


def test_embeddings_without_prompt(pipe):
    embeds, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    options = {"prompt_embeds": embeds, "guidance_scale": 1.0, "num_inference_steps": 1, "output_type": "latent"}
    gated = low_rank_patch(pipe, gate=TEXT)
    pipe.load_patch(delta_patch(pipe), name="always")
    pipe(**options)
    assert pipe.gate_log == [{"always": 1.0}]
    pipe.load_patch(gated, name="gated")
    with pytest.raises(ErasureError, match="'gated'.*prompt_embeds"):
        pipe(**options)
    pipe.fuse_patches()
    pipe(**options)


def test_layers_that_never_run_are_reported(pipe):
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ErasureError, match="gated layers never ran"):
        latents(pipe, PROMPTS)
    with pytest.raises(ErasureError, match="not in use.*unfuse_qkv_projections"):
        pipe.fuse_patches()
    pipe.unet.unfuse_qkv_projections()
    pipe.fuse_patches()
    latents(pipe, PROMPTS)


def test_xl_gates_both_prompts_and_loads_in_diffusers(tmp_path):
    pipe = tiny_xl(ErasedStableDiffusionXLPipeline)
    base = latents(pipe, PROMPTS[:2], height=16, width=16)
    parts = ("unet", "text_encoder", "text_encoder_2")
    patch = low_rank_patch(pipe, alpha=3.0, components=parts, size=0.05, gate={**TEXT, "threshold": 0.99})
    path = patch.save(tmp_path / "p.safetensors")
    pipe.load_patch(path)
    patched = latents(pipe, PROMPTS[:2], height=16, width=16)
    assert strengths(pipe) == [1.0, 0.0]
    assert torch.equal(patched[1], base[1])
    latents(pipe, PROMPTS[1:], prompt_2=["van gogh", "a dog"], height=16, width=16)
    assert strengths(pipe) == [1.0, 0.0]
    theirs = tiny_xl(StableDiffusionXLPipeline)
    theirs.load_lora_weights(path)
    pipe.fuse_patches()
    ours = latents(pipe, PROMPTS[:2], height=16, width=16)
    assert gap(latents(theirs, PROMPTS[:2], height=16, width=16), ours) < 1e-5
    assert gap(base, ours) > 1e-3


def test_a_gated_patch_acts_the_same_after_saving_and_loading(pipe, tmp_path):
    patch = low_rank_patch(pipe, gate={**TEXT, "power": 2, "threshold": 0.1})
    pipe.load_patch(Patch.load(patch.save(tmp_path / "p.safetensors")), name="file")
    from_file = latents(pipe, PROMPTS)
    pipe.unload_patches()
    pipe.load_patch(patch, name="memory")
    assert torch.equal(latents(pipe, PROMPTS), from_file)
