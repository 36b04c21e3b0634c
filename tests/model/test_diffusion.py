"""Noise schedules and predictions against their definitions, and counts of UNet calls against known work."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from erasure.model.diffusion import Counts, add_noise, count_metadata, count_stored, counting, guide, to_eps, to_x0
from tests.tiny import tiny_pipeline, tiny_unet


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_clean_latents_are_recovered_from_every_prediction_type(kind):
    schedule = DDIMScheduler.from_config(tiny_pipeline().scheduler.config, prediction_type=kind)
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(2))
    t = torch.tensor([1, 400, 980])
    x = add_noise(schedule, x0, eps, t)
    assert torch.allclose(x, schedule.add_noise(x0, eps, t), atol=1e-6)
    output = {"epsilon": eps, "sample": x0, "v_prediction": schedule.get_velocity(x0, eps, t)}[kind]
    assert torch.allclose(to_eps(schedule, output, x, t), eps, atol=2e-3)
    assert torch.allclose(to_x0(schedule, output, x, t), x0, atol=2e-3 if kind != "epsilon" else 2e-2)
    assert not torch.allclose(to_eps(schedule, -output, x, t), eps, atol=1e-1)


def test_guidance_is_an_extrapolation():
    empty, full = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    assert torch.equal(guide(empty, full, 7.5), 7.5 * full)
    assert torch.equal(guide(empty, full, 1.0), full)


def test_counts_are_samples_through_the_unet():
    unet = tiny_unet()
    x, t, states = torch.randn(5, 4, 8, 8), torch.tensor(10), torch.randn(5, 12, 32)
    with counting(unet) as counts:
        with torch.no_grad():
            unet(x, t, states)
        unet(x[:2], t, states[:2]).sample.sum().backward()
        unet(x[:3], t, states[:3])  # never backward
    assert (counts.forward, counts.backward) == (10, 2)
    unet(x, t, states)
    assert counts.forward == 10


def test_the_costs_in_a_file_are_added_to_the_open_counts_of_its_network(tmp_path):
    unet, other, tensors = tiny_unet(), tiny_unet(), {"x": torch.zeros(1)}
    save_file(tensors, tmp_path / "old.safetensors")
    save_file(tensors, tmp_path / "new.safetensors", count_metadata(Counts(7, 3, 1.5)))
    with counting(unet) as outer, counting(other) as elsewhere, counting(unet) as inner:
        for name in ("old", "new"):
            count_stored(unet, tmp_path / f"{name}.safetensors")
    assert [(c.forward, c.backward, c.seconds > 1.5) for c in (outer, inner)] == [(7, 3, True)] * 2
    assert elsewhere.forward == 0
    count_stored(unet, tmp_path / "new.safetensors")  # nobody counts now
    assert outer.forward == 7
