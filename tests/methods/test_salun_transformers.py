"""SalUn on SD3, FLUX, PixArt and SANA: its noisy states, mask and terms against their formulas, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

from erasure.concepts import neighbors
from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods.salun import SalUn
from erasure.model.base import Base
from erasure.model.noising import draw_times
from erasure.pipelines import (
    ErasedFluxPipeline,
    ErasedPixArtSigmaPipeline,
    ErasedSanaPipeline,
    ErasedStableDiffusion3Pipeline,
)
from erasure.training.image_latents import drawn, read_folder
from erasure.training.run import Run
from tests.tiny import SIDE
from tests.tiny_transformers import asked, tiny_transformer

SMALL = {
    "iterations": 2,
    "batch_size": 2,
    "forget_count": 3,
    "retain_count": 4,
    "sample_steps": 2,
    "learning_rate": 1e-3,
}
CAT = Concept("cat", anchor="dog", keep=("car",))
FLOW = ("sd3", "flux", "sana")
ERASED = {"sd3": ErasedStableDiffusion3Pipeline, "flux": ErasedFluxPipeline, "pixart": ErasedPixArtSigmaPipeline}
ERASED["sana"] = ErasedSanaPipeline


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)


def started(kind, **settings):
    pipe = tiny_transformer(kind)
    method = dataclasses.replace(SalUn(), **{**SMALL, **settings})
    return pipe, method, method.prepare(Base("tiny", pipe), [CAT], Run(seed=1, progress=False))


def truth(kind, z, eps):
    return eps - z if kind in FLOW else eps


def each(pipe, kind, x, t, texts):
    return torch.cat([asked(pipe, kind, x[i : i + 1], t[i : i + 1], text) for i, text in enumerate(texts)])


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_times_are_those_of_the_sampler_with_its_shift(kind):
    """x = (1 - sigma) z + sigma eps at t = 1000 sigma, with sigma from the pipeline's own grid for this size."""
    pipe, method, state = started(kind, density=1.0)
    z = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    x, t, eps = method.noised(state.base, z, torch.Generator().manual_seed(1))
    sigma = (t / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(x, (1 - sigma) * z + sigma * eps, atol=1e-6)
    assert not torch.allclose(x, sigma * z + (1 - sigma) * eps, atol=1e-2)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if kind == "sd3":
        scheduler.set_timesteps(1000)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 1000), mu=calculate_shift((SIDE // 2) ** 2))
    times = draw_times(state.base, 4000, torch.Generator().manual_seed(2))
    assert set(times.tolist()) <= set(scheduler.timesteps.tolist())
    assert abs(float(times.mean()) - float(scheduler.timesteps.mean())) < 15
    assert float(scheduler.timesteps.mean()) > (600 if kind == "sd3" else 550)  # uniform times would have 500
    state.adapter.remove()


@pytest.mark.parametrize("kind", ERASED)
def test_both_terms_are_their_formulas(kind):
    pipe, method, state = started(kind, retain_weight=0.3, density=1.0, target="base")
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.mul_(1.1)
    terms = method.loss(state, 2)
    draw = torch.Generator().manual_seed(1_000_003 + 2)
    forget, retain = (torch.randint(n, (2,), generator=draw) for n in (3, 4))
    x, t, _ = method.noised(state.base, state.forget.sample(forget, draw), draw)
    z_r = state.retain.sample(retain, draw)
    x_r, t_r, eps = method.noised(state.base, z_r, draw)
    kept = [state.retain.prompts[int(i)] for i in retain]
    with torch.no_grad():
        output, held = each(pipe, kind, x, t.float(), ["cat"] * 2), each(pipe, kind, x_r, t_r.float(), kept)
        with state.adapter.off():
            target = each(pipe, kind, x, t.float(), ["dog"] * 2)
    assert torch.allclose(terms["relabel"], ((output - target) ** 2).mean(), rtol=1e-3)
    assert torch.allclose(terms["retain"], 0.3 * ((held - truth(kind, z_r, eps)) ** 2).mean(), rtol=1e-3)
    twin = z_r - eps if kind in FLOW else eps - z_r  # the velocity's sign; a velocity where noise is predicted
    assert not torch.allclose(terms["retain"], 0.3 * ((held - twin) ** 2).mean(), rtol=1e-2)
    state.adapter.remove()


@pytest.mark.parametrize("kind", ERASED)
def test_the_saliency_is_of_the_guided_error(kind):
    pipe, method, state = started(kind, mask_guidance=2.0, density=1.0)
    scores = method.saliency(state)
    draw, total = torch.Generator().manual_seed(30_011), {}
    for index in (torch.tensor([0, 1]), torch.tensor([2])):
        z = state.forget.sample(index, draw)
        x, t, eps = method.noised(state.base, z, draw)
        named, empty = (asked(pipe, kind, x, t.float(), text) for text in ("cat", ""))
        loss = ((truth(kind, z, eps) - (3 * named - 2 * empty)) ** 2).mean()
        grads = torch.autograd.grad(loss, list(state.adapter.parameters().values()), allow_unused=True)
        for name, grad in zip(state.adapter.parameters(), grads, strict=True):
            total[name] = total.get(name, 0) + (0 if grad is None else grad)
    for name, value in total.items():
        assert torch.allclose(scores[name], torch.as_tensor(value).abs(), rtol=1e-2, atol=1e-4), name
    state.adapter.remove()


@pytest.mark.parametrize("kind", ERASED)
def test_a_run_trains_half_of_the_weights_and_its_patch_unloads(kind, tmp_path):
    pipe = tiny_transformer(kind, ERASED[kind])
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    target = tmp_path / "p.safetensors"
    forecast = plan(pipe, CAT, "salun", **SMALL)
    patch = erase(pipe, CAT, "salun", out=target, progress=False, save_mask=str(tmp_path / "m.safetensors"), **SMALL)
    assert all(torch.equal(before[name], value) for name, value in pipe.transformer.state_dict().items())
    assert patch.components == ["transformer"] and (forecast.F, forecast.B) == (patch.costs["F"], patch.costs["B"])
    changes = [patch.payload.change("transformer", name) for name in patch.payload.names("transformer")]
    share = sum(int((change != 0).sum()) for change in changes) / sum(change.numel() for change in changes)
    assert 0.3 < share <= 0.5
    pipe.load_patch(target)
    pipe.fuse_patches()
    assert any(not torch.equal(before[name], value) for name, value in pipe.transformer.state_dict().items())
    pipe.unload_patches()
    assert all(torch.equal(before[name], value) for name, value in pipe.transformer.state_dict().items())
    if kind != "pixart":
        return
    again = erase(pipe, CAT, "salun", progress=False, mask=str(tmp_path / "m.safetensors"), **SMALL)
    assert all(
        torch.equal(again.payload.change("transformer", name), patch.payload.change("transformer", name))
        for name in patch.payload.names("transformer")
    )


def test_drawn_images_are_the_end_of_the_flow():
    """Two guided Euler steps by hand, on the pipeline's own sigmas."""
    pipe = tiny_transformer("sd3")
    images = drawn(Base("tiny", pipe), ["cat"], 1, seed=2, steps=2, guidance=3.0)
    x = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(2 * 20_011))
    pipe.scheduler.set_timesteps(2)
    sigmas = pipe.scheduler.sigmas
    for here, there in zip(sigmas, sigmas[1:], strict=False):
        with torch.no_grad():
            v_c, v_0 = (asked(pipe, "sd3", x, (1000 * here).view(1), text) for text in ("cat", ""))
        x = x + (there - here) * (v_0 + 3 * (v_c - v_0))
    assert torch.allclose(images.mean, x, atol=1e-4)


def test_latents_of_a_folder_have_the_shift_of_the_autoencoder(tmp_path):
    pipe = tiny_transformer("sd3")
    Image.new("RGB", (20, 20), (200, 30, 90)).save(tmp_path / "one.png")
    latents = read_folder(Base("tiny", pipe), tmp_path).mean
    pixels = torch.tensor([200, 30, 90]).view(1, 3, 1, 1).float().expand(1, 3, 2 * SIDE, 2 * SIDE) / 127.5 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(pixels).latent_dist.mean
    assert pipe.vae.config.shift_factor == 0.1
    assert torch.allclose(latents, (mean - 0.1) * pipe.vae.config.scaling_factor, atol=1e-5)


def test_latents_of_sanas_autoencoder_have_no_spread(tmp_path):
    pipe = tiny_transformer("sana")
    Image.new("RGB", (20, 20), (200, 30, 90)).save(tmp_path / "one.png")
    images = read_folder(Base("tiny", pipe), tmp_path)
    pixels = torch.tensor([200, 30, 90]).view(1, 3, 1, 1).float().expand(1, 3, 4 * SIDE, 4 * SIDE) / 127.5 - 1
    with torch.no_grad():
        latent = pipe.vae.encode(pixels).latent
    assert torch.allclose(images.mean, latent * pipe.vae.config.scaling_factor, atol=1e-5) and not images.std.any()


def test_what_cannot_be_is_refused():
    with pytest.raises(ErasureError, match="parity follows.*trains a UNet"):
        erase(Base("tiny", tiny_transformer("sd3")), CAT, "salun", progress=False, parity=True)
    distilled = Base("tiny", tiny_transformer("flux", guidance_embeds=True))
    with pytest.raises(ErasureError, match="guidance 3 for a guidance-distilled model"):
        erase(distilled, CAT, "salun", progress=False, **SMALL)
    settings = {**SMALL, "sample_guidance": 1.0, "mask_guidance": 0.0}
    assert erase(distilled, CAT, "salun", progress=False, **settings).components == ["transformer"]
