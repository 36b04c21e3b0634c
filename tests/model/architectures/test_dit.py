"""SANA as the toolkit calls it, against diffusers' own pipeline; erasing from it, and its files in plain diffusers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FluxPipeline, SanaPipeline

from erasure.concepts import neighbors
from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods.esd import ESD
from erasure.model.base import Base
from erasure.model.loading import open_pipeline
from erasure.model.trajectories import walk
from erasure.pipelines import ErasedSanaPipeline, load_pipeline
from erasure.training.run import Run
from tests import tiny_transformers
from tests.tiny import SIDE
from tests.tiny_transformers import tiny_sana

SMALL = {"iterations": 2, "batch_size": 2, "trajectories": 2, "sample_steps": 3, "learning_rate": 1e-2}
RUNS = {
    "esd": {**SMALL, "sampler": "euler"},
    "gem": {
        "iterations": 2,
        "early_steps": 2,
        "sample_steps": 3,
        "learning_rate": 1e-2,
        "retain_trajectories": 2,
        "retain_batch_size": 3,
    },
    "eraseflow": {**SMALL, "last_steps": 1, "random_steps": 1, "retain_trajectories": 2, "retain_batch_size": 3},
}
CAT = Concept("cat", anchor="dog", keep=("car",))
PLAIN = {"height": 4 * SIDE, "width": 4 * SIDE, "use_resolution_binning": False, "output_type": "latent"}


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car", "red cat"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)


def asked(pipe, x, t, prompt):
    """The transformer's output, with the text encoded and the time scaled as the pipeline does."""
    return tiny_transformers.asked(pipe, "sana", x, t, prompt)


def noise(count=1):
    return torch.randn(count, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def drawn(pipe, prompts, seed=5, guidance=4.0, steps=3):
    draws = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    latents = torch.stack([torch.randn(4, SIDE, SIDE, generator=draw) for draw in draws])
    return pipe(prompts, latents=latents, num_inference_steps=steps, guidance_scale=guidance, **PLAIN).images


def test_trajectories_end_where_the_pipeline_ends():
    """A solver of the first order on flow is an Euler step: noise, both texts, sigmas, shift and guidance agree.

    The solver tells the network whole numbers, up to 1 below 1000 sigma; the small scale makes that matter little.
    """
    pipe = tiny_sana(timestep_scale=0.001)
    base = Base("tiny", pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    theirs = drawn(pipe, ["a cat"])
    options = {"seeds": [5], "steps": 3, "judged": False, "stop": 3}
    ours = walk(base, [("a cat", "")], guidance=4.0, **options).x
    assert (ours - theirs).abs().max() < 1e-3
    schedule = base.schedule(None, 3, base.latent_shape())
    assert torch.allclose(schedule.sigmas, pipe.scheduler.sigmas, atol=1e-6)
    assert (schedule.timesteps - pipe.scheduler.timesteps).abs().max() <= 1
    assert (ours - walk(base, [("a cat", "")], guidance=2.0, **options).x).abs().max() > 1e-2
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=1.0)
    assert (ours - walk(base, [("a cat", "")], guidance=4.0, **options).x).abs().max() > 1e-2


def test_it_is_told_the_pipelines_text_and_predicts_a_velocity():
    pipe = tiny_sana()
    base, x, t = Base("tiny", pipe), noise(), torch.tensor([700.0])
    assert base.architecture.flow and base.latent_shape() == (4, SIDE, SIDE) and base.as_read("A CAT ") == "a cat"
    with torch.no_grad():
        for prompt in ("a cat", ""):
            ours = base.predict(x, t, base.conditions([prompt]))
            assert torch.allclose(ours, asked(pipe, x, t, prompt), atol=1e-6), prompt
        states, mask, _, _ = pipe.encode_prompt("a cat", complex_human_instruction=None)
        bare = pipe.transformer(x, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=t).sample
    assert not torch.allclose(base.predict(x, t, base.conditions(["a cat"])), bare, atol=1e-4)


@pytest.mark.parametrize("method", RUNS)
def test_a_run_leaves_the_base_as_it_was_and_costs_what_was_planned(method):
    base = Base("tiny", tiny_sana())
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    forecast = plan(base, CAT, method, **RUNS[method])
    patch = erase(base, CAT, method, progress=False, **RUNS[method])
    assert all(torch.equal(before[name], value) for name, value in base.network.state_dict().items())
    assert (forecast.F, forecast.B) == (patch.costs["F"], patch.costs["B"]) and patch.costs["B"] > 0
    assert patch.components == ["transformer"]
    assert {name.rpartition(".")[0] for name in patch.payload.names("transformer")} == set(base.targets("x"))


@pytest.mark.parametrize("rank", [None, 2])
def test_esds_objective_is_its_formula(rank):
    """|v(c) - (v_0(n) - eta (v_0(c) - v_0(n)))|^2 of velocities, at states of the base."""
    pipe, eta = tiny_sana(timestep_scale=0.5), 1.5
    method = dataclasses.replace(ESD(), **RUNS["esd"], rank=rank, negative_guidance=eta)
    state = method.prepare(Base("tiny", pipe), [CAT], Run(seed=3, progress=False))
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    batch, terms = method.tuples(state, 1), method.loss(state, 1)
    with torch.no_grad():
        found, before, neutral = [], [], []
        for x, t in zip(batch.x.split(1), batch.t.split(1), strict=True):
            found.append(asked(pipe, x, t, "cat"))
            with state.adapter.off():
                before.append(asked(pipe, x, t, "cat"))
                neutral.append(asked(pipe, x, t, "dog"))
    v, v_c, v_n = (torch.cat(part) for part in (found, before, neutral))
    assert torch.allclose(terms["esd"], (v - (v_n - eta * (v_c - v_n))).square().mean(), rtol=1e-4)
    assert not torch.allclose(terms["esd"], (v - (v_n + eta * (v_c - v_n))).square().mean(), rtol=1e-2)
    terms["esd"].backward()
    assert all(param.grad is not None for param in state.adapter.parameters().values())
    state.adapter.remove()


@pytest.mark.parametrize("rank", [None, 2])
def test_patches_load_as_weights_and_as_a_lora_of_plain_diffusers(rank, tmp_path):
    target = tmp_path / "cat.safetensors"
    erase(Base("tiny", tiny_sana()), CAT, "esd", out=target, progress=False, **RUNS["esd"], rank=rank)
    pipe = tiny_sana(ErasedSanaPipeline)
    plain = drawn(pipe, ["a cat"])
    pipe.load_patch(target)
    erased = drawn(pipe, ["a cat"])
    assert not torch.allclose(erased, plain, atol=1e-4)
    if rank is not None:
        theirs = tiny_sana()
        theirs.load_lora_weights(str(target))
        assert torch.allclose(drawn(theirs, ["a cat"]), erased, atol=1e-4)
    pipe.unload_patches()
    assert torch.equal(drawn(pipe, ["a cat"]), plain)


def test_its_folder_opens_as_a_base_and_as_an_erased_pipeline(tmp_path):
    tiny_sana().save_pretrained(tmp_path)
    base = Base.load(tmp_path, device="cpu")
    assert base.architecture.name == "sana" and type(base.pipe) is SanaPipeline
    assert type(load_pipeline(tmp_path, device="cpu")) is ErasedSanaPipeline
    with pytest.raises(ErasureError, match="FluxPipeline cannot hold it"):
        open_pipeline(FluxPipeline, tmp_path)
    with pytest.raises(ErasureError, match="settings for this checkpoint"):
        erase(base, CAT, "esd", progress=False)


def test_what_cannot_be_is_refused():
    with pytest.raises(ErasureError, match="SANA-Sprint"):
        Base.of(tiny_sana(guidance_embeds=True))
    pipe = tiny_sana()
    refused = {"adavd": "values", "safree": "end token", "receler": "not been carried over"}
    for method, reason in refused.items():
        with pytest.raises(ErasureError, match=f"{method} cannot erase from.*{reason}"):
            erase(Base("tiny", pipe), CAT, method, progress=False)
    pipe.text_encoder = None
    with pytest.raises(ErasureError, match="lacks text_encoder"):
        Base.of(pipe)
