"""The UNet's text conditions, compared with the pipelines' own encoding and sampling, on every architecture."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.conditioning import Conditions, sizes
from erasure.model.diffusion import add_noise, signal_and_noise, to_eps, to_x0
from erasure.model.trajectories import walk
from erasure.training.image_latents import drawn
from tests.tiny import KINDS, LENGTH, WIDTH, WIDTH_2, tiny_pipeline


@pytest.fixture(params=KINDS)
def base(request) -> Base:
    return Base("tiny", tiny_pipeline(kind=request.param))


def test_a_single_encoder_supplies_only_its_last_states():
    base = Base("tiny", tiny_pipeline())
    conditions = base.conditions(["cat", ""])
    assert conditions.pooled is None and torch.equal(conditions.states, base.encode(["cat", ""]))


def test_conditions_of_xl_are_those_of_its_pipeline():
    base = Base("tiny", tiny_pipeline(kind="sdxl"))
    conditions = base.conditions(["a cat", "dog"])
    states, _, pooled, _ = base.pipe.encode_prompt(["a cat", "dog"], do_classifier_free_guidance=False)
    assert conditions.states.shape == (2, LENGTH, WIDTH + WIDTH_2) and conditions.pooled.shape == (2, WIDTH_2)
    assert torch.allclose(conditions.states, states, atol=1e-5)
    assert torch.allclose(conditions.pooled, pooled, atol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_guidances_unconditional(zeros):
    base = Base("tiny", tiny_pipeline(kind="sdxl"))
    base.pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    conditions = base.conditions(["dog", ""])
    _, states, _, pooled = base.pipe.encode_prompt("dog", do_classifier_free_guidance=True)
    assert torch.allclose(conditions.states[1], states[0], atol=1e-5)
    assert torch.allclose(conditions.pooled[1], pooled[0], atol=1e-5)
    assert bool(states.any()) is not zeros
    assert base.encode([""]).any()  # `encode` never returns zeros


def test_xl_receives_the_size_of_its_latents():
    pipe = tiny_pipeline(kind="sdxl")
    time_ids = sizes(pipe, torch.zeros(3, 4, 6, 8))
    own = pipe._get_add_time_ids((12, 16), (0, 0), (12, 16), torch.float32, text_encoder_projection_dim=WIDTH_2)
    assert time_ids.tolist() == own.repeat(3, 1).tolist() == [[12, 16, 0, 0, 12, 16]] * 3


def test_conditions_are_selected_repeated_and_concatenated():
    one = Conditions(torch.randn(3, 2, 4), torch.randn(3, 5))
    two = Conditions.cat([one[torch.tensor([2, 0])], one[1:2].expand(2)])
    assert len(two) == 4
    assert torch.equal(two.states, one.states[[2, 0, 1, 1]]) and torch.equal(two.pooled, one.pooled[[2, 0, 1, 1]])
    assert Conditions.cat([Conditions(one.states)]).pooled is None


def test_drawn_images_are_those_of_the_pipeline(base):
    """Our sampling loop makes the pipeline's latents; this covers encoding, guidance, prediction type and sizes."""
    latents = drawn(base, ["a cat"], 1, seed=0, steps=3, guidance=4.0)
    base.pipe.scheduler = base.sampler("ddim")
    images = base.pipe(
        "a cat",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert torch.allclose(latents.mean, images, atol=1e-4)
    base.pipe.scheduler = type(base.pipe.scheduler).from_config(base.scheduler.config, prediction_type="sample")
    other = drawn(base, ["a cat"], 1, seed=0, steps=3, guidance=4.0)
    assert not torch.allclose(latents.mean, other.mean, atol=1e-2)


def test_walks_record_the_outputs_of_the_unet_at_their_states(base):
    pool = walk(base, [("cat", "dog")], seeds=[3], steps=3, guidance=3.0)
    with torch.no_grad():
        for i in range(len(pool)):
            x, t = pool.x[i : i + 1], pool.t[i : i + 1]
            assert torch.allclose(base.predict(x, t, base.conditions(["cat"]))[0], pool.concept[i], atol=1e-4)
            assert torch.allclose(base.predict(x, t, base.conditions(["dog"]))[0], pool.neutral[i], atol=1e-4)


def test_v_is_converted_to_noise_and_clean_latents():
    """Known noise is recovered from v = sqrt(a) eps - sqrt(1 - a) x0, and affine combinations convert linearly."""
    scheduler, draw = tiny_pipeline(kind="sd2-v").scheduler, torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
    t = torch.tensor([100, 900])
    x = add_noise(scheduler, x0, eps, t)
    v = scheduler.get_velocity(x0, eps, t)
    assert torch.allclose(to_eps(scheduler, v, x, t), eps, atol=1e-5)
    assert torch.allclose(to_x0(scheduler, v, x, t), x0, atol=1e-5)
    other = torch.randn(v.shape, generator=draw)
    mixed = to_eps(scheduler, v - 2 * (other - v), x, t)
    e, f = to_eps(scheduler, v, x, t), to_eps(scheduler, other, x, t)
    assert torch.allclose(mixed, e - 2 * (f - e), atol=1e-5)
    signal, _ = signal_and_noise(scheduler, t)
    assert torch.allclose(e - f, signal * (v - other), atol=1e-5)  # the weight between the two objectives


def test_missing_encoders_and_long_prompts_are_refused():
    pipe = tiny_pipeline(kind="sdxl")
    pipe.text_encoder = None
    with pytest.raises(ErasureError, match="lacks a tokenizer or a text encoder"):
        Base.of(pipe)
    with pytest.raises(ErasureError, match="has 42 tokens"):
        Base("tiny", tiny_pipeline(kind="sdxl")).conditions(["cat " * 40])
