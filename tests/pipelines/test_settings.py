"""Patches act, and are unloaded without a trace, under the settings that diffusers pipelines have."""

from __future__ import annotations

import diffusers
import pytest
import torch

from erasure.errors import ErasureError
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.patch.making import delta_patch, gap, low_rank_patch, same, weights
from tests.pipelines.making import LATENT, PROMPTS, TEXT, Unchanged, draw, hooks, strengths, task
from tests.tiny import WIDTH, tiny_pipeline

SCHEDULERS = {
    "DDIMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {},
    "DDPMScheduler": {},
}


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.fixture
def known(monkeypatch):
    """Replace the decision of the latent gate by whether the prompt names Van Gogh."""
    monkeypatch.setattr(
        "erasure.pipelines.gates.latent.Decider.present", lambda self, key, gate, text, _: "gogh" in text
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(pipe, name, known):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **SCHEDULERS[name])
    check_every_kind(pipe)


def check_every_kind(pipe, tolerance=1e-5, **more):
    """Check that each kind of patch acts on the prompts that it should, and leaves no trace."""
    with Unchanged(pipe, **more) as base:
        images = {}
        for kind, gate in (("always", {"kind": "always"}), ("text", TEXT), ("latent", {**LATENT, "on": 0.0})):
            pipe.load_patch(low_rank_patch(pipe, gate=gate))
            images[kind] = draw(pipe, **more)
            assert hooks(pipe) == 0
            if kind != "always":
                assert strengths(pipe) == [1.0, 0.0]
                assert torch.equal(images[kind][1], base[1]), kind
            pipe.unload_patches()
        assert (images["always"] - base).abs().amax((1, 2, 3)).min() > 1e-4
        assert gap(images["text"][0], images["always"][0]) < tolerance
        assert gap(images["latent"][0], images["always"][0]) < tolerance


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler"])
def test_the_decision_does_not_depend_on_the_scheduler(pipe, name):
    patch = low_rank_patch(pipe, gate=LATENT)
    pipe.load_patch(patch)
    draw(pipe)
    log = pipe.gate_log
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    draw(pipe)
    assert pipe.gate_log == log  # the noise schedule is the same


SETTINGS = {
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "VAE slicing": lambda pipe: pipe.vae.enable_slicing(),
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "freeu": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "plain attention": lambda pipe: pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor()),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(pipe, name, known):
    SETTINGS[name](pipe)
    check_every_kind(pipe)


CALLS = {
    "no guidance": {"guidance_scale": 1.0},
    "guidance rescale": {"guidance_rescale": 0.7},
    "timesteps": {"timesteps": [601, 201]},
    "negative prompts": {"negative_prompt": ["van gogh", "van gogh"]},
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(pipe, name, known):
    if name == "timesteps":
        pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    check_every_kind(pipe, **CALLS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe, dtype, known):
    pipe.to(dtype=dtype)
    assert {value.dtype for value in weights(pipe).values()} == {dtype}
    check_every_kind(pipe, tolerance=0.1)


def test_layers_stored_in_float8(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: value.view(torch.uint8) for name, value in pipe.unet.state_dict().items() if value.itemsize == 1}
    kept, base = {name: value.clone() for name, value in stored.items()}, draw(pipe)
    assert kept
    for gate in ({"kind": "always"}, TEXT):
        pipe.load_patch(low_rank_patch(pipe, gate=gate), force=True)
        assert not torch.equal(draw(pipe)[0], base[0])
        pipe.unload_patches()
        assert same(stored, kept) and torch.equal(draw(pipe), base)


def test_several_images_of_mixed_prompts(pipe):
    more = {"num_images_per_prompt": 2, "negative_prompt": ["a dog", "van gogh"]}
    with Unchanged(pipe, **more) as base:
        pipe.load_patch(low_rank_patch(pipe, gate=TEXT, components=("unet", "text_encoder"), part="", size=0.05))
        patched = draw(pipe, **more)
        assert torch.equal(patched[2:], base[2:])
        assert (patched[:2] - base[:2]).abs().amax((1, 2, 3)).min() > 1e-4
        pipe.unload_patches()


def test_callbacks_and_interrupt(pipe):
    steps = []

    def half_without_guidance(pipe, step, time, tensors):
        steps.append(step)
        if step == 0:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    def stop(pipe, step, time, tensors):
        pipe._interrupt = True
        return tensors

    for callback in (half_without_guidance, stop):
        more = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        act = {**more, "num_inference_steps": 3}
        with Unchanged(pipe, **act) as base:
            pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
            patched = draw(pipe, **act)
            assert torch.equal(patched[1], base[1]) and not torch.equal(patched[0], base[0])
            pipe.unload_patches()
    assert steps


def embedded(pipe, prompts):
    positive, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative}


def test_embeddings_with_the_texts_that_they_encode(pipe):
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    expected, embeddings = draw(pipe), embedded(pipe, PROMPTS)
    assert torch.equal(draw(pipe, **embeddings, erasure_prompts=PROMPTS), expected)
    assert strengths(pipe) == [1.0, 0.0]
    first_embedding = embedded(pipe, PROMPTS[:1])
    assert torch.equal(draw(pipe, **first_embedding, erasure_prompts=PROMPTS[0]), draw(pipe, PROMPTS[:1]))
    with pytest.raises(ErasureError, match="erasure_prompts=\\[...\\]"):
        draw(pipe, **embeddings)
    for wrong in (PROMPTS[:1], "a cat", [1, 2]):
        with pytest.raises(ErasureError, match="must be 2 texts, one for each row"):
            draw(pipe, **embeddings, erasure_prompts=wrong)
    with pytest.raises(ErasureError, match="cannot be combined with a prompt"):
        draw(pipe, erasure_prompts=PROMPTS)
    # The texts that one call declares do not carry over to the next.
    with pytest.raises(ErasureError, match="only prompt_embeds were given"):
        draw(pipe, **embeddings)


def test_embeddings_and_a_gated_patch_of_the_text_encoder(pipe):
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT, components=("unet", "text_encoder")))
    embeddings = embedded(pipe, PROMPTS)
    with pytest.raises(ErasureError, match="text encoder, which prompt_embeds bypass"):
        draw(pipe, **embeddings, erasure_prompts=PROMPTS)
    draw(
        pipe, **embedded(pipe, PROMPTS[1:]), erasure_prompts=PROMPTS[1:]
    )  # the patch does not act, so nothing is bypassed
    pipe.fuse_patches()
    draw(pipe, **embeddings)


@pytest.mark.parametrize("more", [{"clip_skip": 1}, {"negative_prompt": "van gogh", "negative_prompt_2": "a dog"}])
def test_calls_of_xl(more):
    pipe = task("ErasedStableDiffusionXLPipeline")
    with Unchanged(pipe, **more) as base:
        pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
        patched = draw(pipe, **more)
        assert torch.equal(patched[1], base[1]) and gap(patched[0], base[0]) > 1e-4
        pipe.unload_patches()


def test_embeddings_on_xl():
    pipe = task("ErasedStableDiffusionXLPipeline")
    pipe.load_patch(low_rank_patch(pipe, gate=TEXT))
    expected = draw(pipe)
    names = "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds".split()
    embeddings = dict(zip(names, pipe.encode_prompt(PROMPTS, device="cpu"), strict=True))
    assert torch.equal(draw(pipe, **embeddings, erasure_prompts=PROMPTS), expected)


def adapter(pipe):
    """Return an IP-Adapter with random weights and one image token."""
    draw_ = torch.Generator().manual_seed(3)
    layers = {}
    sites = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for number, name in enumerate(sites):
        hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for leaf in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * number + 1}.{leaf}.weight"] = torch.randn(hidden, WIDTH, generator=draw_)
    image = {"proj.weight": torch.randn(4 * WIDTH, 6, generator=draw_), "proj.bias": torch.zeros(4 * WIDTH)}
    image |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    return {"ip_adapter": layers, "image_proj": image}


def test_patches_and_an_ip_adapter(pipe):
    plain, text, latent = draw(pipe), low_rank_patch(pipe, gate=TEXT), low_rank_patch(pipe, gate=LATENT)
    pipe.unet._load_ip_adapter_weights([adapter(pipe)])
    more = {"ip_adapter_image_embeds": [torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(4))]}
    with Unchanged(pipe, **more) as base:
        assert not torch.allclose(plain, base, atol=1e-3)
        pipe.load_patch(text)
        gated = draw(pipe, **more)
        assert torch.equal(gated[1], base[1]) and not torch.equal(gated[0], base[0])
        pipe.fuse_patches()
        assert gap(draw(pipe, **more)[0], gated[0]) < 1e-5
        pipe.unload_patches()
        pipe.load_patch(latent)
        with pytest.raises(ErasureError, match="IP-Adapter"):
            draw(pipe, **more)
        pipe.unload_patches()


def test_fused_projections_are_refused_while_folded_patches_change(pipe):
    base, before = weights(pipe), draw(pipe)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ErasureError, match="unfuse_qkv_projections"):
        pipe.load_patch(delta_patch(pipe))
    pipe.unet.unfuse_qkv_projections()
    pipe.load_patch(delta_patch(pipe))
    folded = draw(pipe)
    pipe.unet.fuse_qkv_projections()
    assert torch.allclose(draw(pipe), folded, atol=1e-4)
    with pytest.raises(ErasureError, match="unfuse_qkv_projections"):
        pipe.unload_patches()
    pipe.unet.unfuse_qkv_projections()
    pipe.unload_patches()
    after = weights(pipe)
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert torch.equal(draw(pipe), before)
