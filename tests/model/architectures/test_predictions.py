"""Transformers as the toolkit calls them, against diffusers' own pipelines: text, trajectories, predictions."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from erasure.errors import ErasureError
from erasure.model.architectures.mmdit import pack, places, unpack
from erasure.model.base import Base
from erasure.model.trajectories import walk
from tests.tiny import SIDE
from tests.tiny_transformers import KINDS, tiny_transformer

GUIDANCE = {"sd3": "guidance_scale", "flux": "true_cfg_scale", "pixart": "guidance_scale"}


def drawn(pipe, kind, prompt, steps, guidance):
    """Final latents [1, 4, SIDE, SIDE] of the pipeline's own call, without an autoencoder."""
    options = {GUIDANCE[kind]: guidance, "height": 2 * SIDE, "width": 2 * SIDE}
    if kind == "flux":
        options["negative_prompt"] = ""
    if kind == "pixart":
        options |= {"use_resolution_binning": False, "clean_caption": False}
    noise = torch.randn((4, SIDE, SIDE), generator=torch.Generator().manual_seed(5))[None]
    noise = pack(noise) if kind == "flux" else noise
    out = pipe(prompt, latents=noise, num_inference_steps=steps, output_type="latent", **options).images
    return unpack(out, SIDE, SIDE) if kind == "flux" else out


@pytest.mark.parametrize("kind", KINDS)
def test_trajectories_end_where_the_pipeline_ends(kind):
    """Noise, text, timesteps, shift, guidance and the sampler are those of the pipeline's own call."""
    pipe = tiny_transformer(kind)
    base = Base("tiny", pipe)
    pipe.scheduler = base.sampler()  # PixArt's own is not the sampler of trajectories
    options = {"seeds": [5], "steps": 3, "judged": False, "stop": 3}
    ours = walk(base, [("a cat", "")], guidance=4.0, **options)
    assert torch.allclose(ours.x, drawn(pipe, kind, "a cat", 3, 4.0), atol=1e-5)
    assert not torch.allclose(ours.x, walk(base, [("a cat", "")], guidance=2.0, **options).x, atol=1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sd3_walks_the_pipelines_grid_of_sigmas(dynamic):
    pipe = tiny_transformer("sd3")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=dynamic)
    schedule = Base("tiny", pipe).schedule(None, 4, (4, SIDE, SIDE))
    pipe("a cat", num_inference_steps=4, output_type="latent")
    assert torch.allclose(schedule.timesteps, pipe.scheduler.timesteps)
    assert dynamic or not torch.allclose(schedule.timesteps, torch.linspace(1000, 1, 4), atol=10.0)


def test_latents_are_packed_as_flux_packs_them():
    x = torch.randn(2, 4, 6, 8)
    tokens = pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(tokens, 6, 8), x)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(places(3, 4).float(), ids)


def test_sd3_without_t5_reads_zeros_and_says_so():
    with_t5, without = (Base("tiny", tiny_transformer("sd3", t5=t5)) for t5 in (True, False))
    states = [base.conditions(["a cat"]).states for base in (with_t5, without)]
    assert states[0].shape == states[1].shape
    assert torch.equal(states[0][:, :12], states[1][:, :12])  # the CLIPs'
    assert states[0][:, 12:].abs().max() > 0 and not states[1][:, 12:].any()


def test_pixart_masks_the_padding_and_leaves_the_variance_out():
    base = Base("tiny", tiny_transformer("pixart"))
    conditions = base.conditions(["a cat", ""])
    assert conditions.mask is not None and conditions.mask.sum(1).tolist() == [3, 1]
    x = torch.randn(2, 4, SIDE, SIDE)
    out = base.predict(x, 500, conditions)
    whole = base.network(
        x, conditions.states, torch.tensor([500, 500]), {}, encoder_attention_mask=conditions.mask
    ).sample
    assert out.shape == x.shape and torch.allclose(out, whole[:, :4], atol=1e-6)


def test_a_prompt_that_an_encoder_would_cut_is_refused():
    base = Base("tiny", tiny_transformer("flux"))
    with pytest.raises(ErasureError, match="tokens"):
        base.conditions(["cat " * 40])


def test_a_distilled_model_refuses_guidance_and_takes_its_own_as_an_input():
    base = Base("tiny", tiny_transformer("flux", guidance_embeds=True))
    with pytest.raises(ErasureError, match=r"guidance-distilled.*negative prompt does nothing"):
        walk(base, [("a cat", "")], seeds=[0], steps=2, guidance=3.0)
    assert len(walk(base, [("a cat", "")], seeds=[0], steps=2, guidance=1.0)) == 2
    x, conditions = torch.randn(1, 4, SIDE, SIDE), base.conditions(["a cat"])
    architecture = base.architecture
    ours, strong = (
        architecture.predict(base.pipe, x, 500, conditions, options) for options in ({}, {"guidance_scale": 9.0})
    )
    assert not torch.allclose(ours, strong, atol=1e-4)
    assert torch.equal(ours, architecture.predict(base.pipe, x, 500, conditions, {"guidance_scale": 3.5}))


@pytest.mark.parametrize(
    ("kind", "lost"), [("sd3", "text_encoder_2"), ("flux", "text_encoder_2"), ("pixart", "text_encoder")]
)
def test_a_transformer_without_its_encoders_is_refused(kind, lost):
    pipe = tiny_transformer(kind)
    setattr(pipe, lost, None)
    with pytest.raises(ErasureError, match=rf"lacks {lost}"):
        Base.of(pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_of_other_models_are_refused(kind):
    base = Base("tiny", tiny_transformer(kind))
    with pytest.raises(ErasureError, match="unknown sampler 'pndm'"):
        base.sampler("pndm")
