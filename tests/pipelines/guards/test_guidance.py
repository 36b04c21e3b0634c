"""Guidance away from a text against diffusers' StableDiffusionPipelineSafe and the formula, number by number."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers.pipelines.deprecated.stable_diffusion_safe.pipeline_stable_diffusion_safe import (
    StableDiffusionPipelineSafe,
)

from erasure.errors import ErasureError
from erasure.model.diffusion import to_eps
from erasure.patch import Guard, Patch
from erasure.pipelines import ErasedSanaPipeline, ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline
from erasure.pipelines.guards.guidance import Guidance
from tests.patch.making import low_rank_patch
from tests.tiny import SIDE, latents, tiny_pipeline
from tests.tiny_transformers import tiny_transformer

# Such that the limit, the threshold, the warm-up and the momentum all decide something in five steps.
SETTINGS = {"safety_scale": 30.0, "threshold": 0.02, "warm_up": 0.4, "momentum": 0.4, "momentum_decay": 0.6}
PROMPTS = ["a cat", "a red car"]
STRONG = {"safety_scale": 5000.0, "threshold": 1.0, "warm_up": 0.0, "momentum": 0.5, "momentum_decay": 0.7}


def guard(text="dog", scale=1.0, gate=None, **settings) -> Patch:
    fields = {} if gate is None else {"gate": gate}
    payload = Guard("guidance", (text,), {**STRONG, **settings}, scale)
    return Patch(payload=payload, method="test", concepts=[{"name": text}], **fields)


def published(pipe, steps, **settings) -> torch.Tensor:
    """The latents of diffusers' own pipeline for this guidance, from the same noise as `latents`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ("vae", "text_encoder", "tokenizer", "unet")
        safe = StableDiffusionPipelineSafe(
            **{name: getattr(pipe, name) for name in names},
            scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        safe.set_progress_bar_config(disable=True)
        safe.safety_concept = "dog"
        noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(row)) for row in (0, 1)])
        seen: list[torch.Tensor] = []
        safe(
            PROMPTS,
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=7.5,
            callback=lambda step, time, x: seen.append(x),
            sld_guidance_scale=settings["safety_scale"],
            sld_warmup_steps=round(settings["warm_up"] * steps),
            sld_threshold=settings["threshold"],
            sld_momentum_scale=settings["momentum"],
            sld_mom_beta=settings["momentum_decay"],
        )
    return seen[-1]


@pytest.mark.parametrize(
    "changed",
    [{}, {"warm_up": 0.0}, {"threshold": 5.0}, {"threshold": -0.02}, {"momentum": 0.0}, {"safety_scale": 1000.0}],
    ids=str,
)
def test_it_is_the_published_guidance(changed):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    settings = {**SETTINGS, **changed}
    wanted = published(pipe, 5, **settings)
    pipe.load_patch(guard(**settings))
    found = latents(pipe, PROMPTS, steps=5)
    assert torch.allclose(found, wanted, atol=1e-4)
    if changed:  # each of the settings decides something here
        pipe.unload_patches()
        pipe.load_patch(guard(**SETTINGS))
        assert not torch.allclose(latents(pipe, PROMPTS, steps=5), wanted, atol=1e-3)


def test_the_term_element_by_element():
    draw = torch.Generator().manual_seed(3)
    prompt, concept, empty = (torch.randn(2, 3, 2, 2, generator=draw) for _ in range(3))
    form = Guidance(safety_scale=0.8, threshold=0.1)
    found = form.term(prompt, concept, empty, unit=0.5).flatten()
    rows = list(zip(*(x.flatten().tolist() for x in (prompt, concept, empty)), strict=True))
    wanted = []
    for p, s, e in rows:
        distance = 0.5 * (p - s)
        wanted.append((min(1.0, 0.8 * abs(distance)) if distance < 0.1 else 0.0) * (s - e))
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-6)
    unlimited = [0.8 * abs(0.5 * (p - s)) * (s - e) if 0.5 * (p - s) < 0.1 else 0.0 for p, s, e in rows]
    unmasked = [min(1.0, 0.4 * abs(p - s)) * (s - e) for p, s, e in rows]
    for twin in (unlimited, unmasked, [-value for value in wanted]):
        assert not torch.allclose(found, torch.tensor(twin), atol=1e-3)


def test_unloading_leaves_no_trace():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    base = latents(pipe, PROMPTS)
    pipe.load_patch(guard(), name="dog")
    assert not torch.equal(latents(pipe, PROMPTS), base)
    assert pipe.gate_log == [{"dog": 1.0}] * 2
    pipe.set_patches({"dog": 0.0})
    assert torch.equal(latents(pipe, PROMPTS), base)
    pipe.unload_patches()
    assert torch.equal(latents(pipe, PROMPTS), base)
    assert "forward" not in vars(pipe.unet) and not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks
    assert all(torch.equal(state[name], value) for name, value in pipe.unet.state_dict().items())


def test_a_prompt_that_a_gate_keeps_out_keeps_every_bit():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base = latents(pipe, ["a dog", "a red car"])
    pipe.load_patch(guard(gate={"kind": "text", "texts": ["a dog"], "power": 0.0, "threshold": 0.999}), name="dog")
    found = latents(pipe, ["a dog", "a red car"])
    assert pipe.gate_log == [{"dog": 1.0}, {"dog": 0.0}]
    assert torch.equal(found[1], base[1]) and not torch.equal(found[0], base[0])
    pipe.fuse_patches()  # a guard cannot be folded: it goes on, without its gate
    assert not torch.equal(latents(pipe, ["a dog", "a red car"])[1], base[1])
    pipe.unfuse_patches()
    assert torch.equal(latents(pipe, ["a dog", "a red car"]), found)


def test_strength_and_scale_multiply_the_term_in_one_step():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base = latents(pipe, PROMPTS, steps=1)
    moves = []
    for strength, scale in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (-1.0, 1.0)):
        name = pipe.load_patch(guard(scale=scale), strength=strength)
        moves.append(latents(pipe, PROMPTS, steps=1) - base)
        pipe.delete_patches(name)
    whole, half, scaled, back = moves
    assert whole.abs().max() > 1e-3
    for move, factor in ((half, 0.5), (scaled, 0.5), (back, -1.0)):
        assert torch.allclose(move, factor * whole, atol=1e-4)


def test_two_guards_add_up_in_any_order_and_next_to_other_patches():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    gated = low_rank_patch(pipe, gate={"kind": "text", "texts": ["a cat"], "threshold": 0.99})
    folded = low_rank_patch(pipe, seed=2)
    found = []
    for order in ((guard(), guard("car"), gated, folded), (folded, guard("car"), gated, guard())):
        for patch in order:
            pipe.load_patch(patch)
        found.append(latents(pipe, PROMPTS))
        pipe.unload_patches()
    assert torch.equal(*found)
    base = latents(pipe, PROMPTS, steps=1)
    moves = []
    for texts in (["dog"], ["car"], ["dog", "car"]):
        for text in texts:
            pipe.load_patch(guard(text))
        moves.append(latents(pipe, PROMPTS, steps=1) - base)
        pipe.unload_patches()
    assert torch.allclose(moves[0] + moves[1], moves[2], atol=1e-4)


def test_rows_do_not_depend_on_their_batch_and_images_share_the_prompts_strength():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(guard())
    both = latents(pipe, PROMPTS, num_images_per_prompt=2)
    alone = latents(pipe, PROMPTS[1:], seed=2, num_images_per_prompt=2)
    assert torch.allclose(both[2:], alone, atol=1e-4)


def test_without_guidance_the_term_is_that_of_scale_one():
    """e_p - gamma, with the empty prompt's prediction for e_0."""
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    base = latents(pipe, PROMPTS, steps=1, guidance=1.0)
    pipe.load_patch(guard())
    plain = latents(pipe, PROMPTS, steps=1, guidance=1.0)
    guided = latents(pipe, PROMPTS, steps=1, guidance=7.5)
    pipe.unload_patches()
    assert torch.allclose(7.5 * (plain - base), guided - latents(pipe, PROMPTS, steps=1), atol=1e-3)


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl"])
def test_it_acts_on_v_and_on_xl_and_compares_noises(kind):
    cls = ErasedStableDiffusionXLPipeline if kind == "sdxl" else ErasedStableDiffusionPipeline
    pipe = tiny_pipeline(cls, kind=kind)
    base = latents(pipe, PROMPTS)
    name = pipe.load_patch(guard())
    assert not torch.allclose(latents(pipe, PROMPTS), base, atol=1e-3)
    pipe.delete_patches(name)
    assert torch.equal(latents(pipe, PROMPTS), base)
    if kind == "sd2-v":
        draw = torch.Generator().manual_seed(0)
        x, one, two = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(3))
        from erasure.pipelines.guards.form import Acting, Drawing

        acting = Acting(Guidance(), ("dog",), torch.ones(1))
        start = Guidance.prepare(Drawing(pipe, pipe.unet, None, 1, False), [acting])
        hook, time = start(), torch.tensor(601)
        unit = hook._unit(time)
        hook.remove()
        noises = to_eps(pipe.scheduler, one, x, time[None]) - to_eps(pipe.scheduler, two, x, time[None])
        assert torch.allclose(noises, unit * (one - two), atol=1e-5) and unit < 0.9


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
def test_it_acts_on_transformers_with_guidance(kind):
    pipe = tiny_transformer(kind, erased(kind))
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    options |= {"use_resolution_binning": False} if kind == "pixart" else {}

    def draw():
        return pipe(["a cat"], generator=torch.Generator().manual_seed(0), **options).images

    base = draw()
    pipe.load_patch(guard())
    assert not torch.allclose(draw(), base, atol=1e-4)
    pipe.unload_patches()
    assert torch.equal(draw(), base)


def erased(kind):
    import erasure.pipelines as pipelines

    names = {"sd3": "StableDiffusion3", "pixart": "PixArtSigma", "flux": "Flux"}
    return getattr(pipelines, f"Erased{names[kind]}Pipeline")


def test_flux_is_refused():
    pipe = tiny_transformer("flux", erased("flux"))
    with pytest.raises(ErasureError, match="'dog' is a guard of the form guidance.*guidance is an input.*Nothing was"):
        pipe.load_patch(guard())
    assert not pipe.get_list_patches()


def test_another_batch_is_refused():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(guard())
    from contextlib import ExitStack

    from erasure.pipelines import patch_stack

    with ExitStack() as scope:
        patch_stack(pipe).open([["a cat"]], 1, 1, scope)
        with pytest.raises(ErasureError, match="opened for 1 images, but .* a batch of 3"):
            pipe.unet(torch.zeros(3, 4, 8, 8), torch.tensor(1), torch.zeros(3, 12, 32))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_on_sana_the_scaled_times_are_read_as_shares_of_the_schedule(scale):
    """One step at the noisy end lies in the warm-up, whatever the scale of the times that the network is told."""
    pipe = tiny_transformer("sana", ErasedSanaPipeline, timestep_scale=scale)

    def draw():
        size = {"height": 4 * SIDE, "width": 4 * SIDE, "num_inference_steps": 1, "output_type": "latent"}
        noise = torch.Generator().manual_seed(0)
        return pipe("a cat", generator=noise, guidance_scale=3.0, use_resolution_binning=False, **size).images

    plain = draw()
    pipe.load_patch(guard(warm_up=0.5), name="late")
    assert torch.equal(draw(), plain)
    pipe.delete_patches("late")
    pipe.load_patch(guard(warm_up=0.0), name="early")
    assert not torch.allclose(draw(), plain, atol=1e-4)
