"""ESD on SD3, FLUX and PixArt: the objective against its formula, computed apart with diffusers' own calls."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods.esd import ESD
from erasure.model.base import Base
from erasure.training.run import Run
from tests.tiny_transformers import KINDS, asked, tiny_transformer

SMALL = {"iterations": 2, "batch_size": 2, "trajectories": 2, "sample_steps": 3, "learning_rate": 1e-3}
SAMPLER = {"sd3": "euler", "flux": "euler", "pixart": "ddim"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("rank", [None, 2])
def test_loss_is_the_formula_over_the_samplers_own_states(kind, rank):
    """v* = v_0(n) - eta (v_0(c) - v_0(n)), with the teacher's outputs and states those of the untrained network."""
    pipe, eta = tiny_transformer(kind), 1.5
    base = Base("tiny", pipe)
    method = dataclasses.replace(ESD(), **SMALL, negative_guidance=eta, rank=rank, sampler=SAMPLER[kind])
    state = method.prepare(base, [Concept("cat")], Run(seed=3, progress=False))
    batch = method.tuples(state, 1)
    with torch.no_grad(), state.adapter.off():
        v_0, v_c = (asked(pipe, kind, batch.x, batch.t, prompt) for prompt in ("", "cat"))
    assert torch.allclose(batch.neutral, v_0, atol=1e-5) and torch.allclose(batch.concept, v_c, atol=1e-5)
    with torch.no_grad():  # move off the base, so that student and teacher differ
        for param in state.adapter.parameters().values():
            param.add_(0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    loss = method.loss(state, 1)["esd"]
    v = asked(pipe, kind, batch.x, batch.t, "cat")
    assert not torch.allclose(v, v_c, atol=1e-3)
    assert torch.allclose(loss, ((v - (v_0 - eta * (v_c - v_0))) ** 2).mean(), rtol=1e-4)
    assert not torch.allclose(loss, ((v - (v_0 + eta * (v_c - v_0))) ** 2).mean(), rtol=1e-2)
    loss.backward()
    trained = state.adapter.parameters()
    # The last block of SD3 does not use its text queries' outputs; everything else must get a gradient.
    idle = [name for name, param in trained.items() if param.grad is None or not param.grad.any()]
    assert all("add_q_proj" in name for name in idle), idle
    state.adapter.remove()


def test_a_run_trains_attention_alone_and_leaves_the_base_as_it_was(kind, tmp_path):
    base = Base("tiny", tiny_transformer(kind))
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    settings = {**SMALL, "sampler": SAMPLER[kind], "measure_every": 2}
    forecast = plan(base, {"name": "cat", "keep": ["dog"]}, "esd", **settings)
    target = tmp_path / "p.safetensors"
    patch = erase(base, {"name": "cat", "keep": ["dog"]}, "esd", out=target, progress=False, **settings)
    assert patch.components == ["transformer"] and patch.payload.kind == "delta"
    names = patch.payload.names("transformer")
    assert {name.rpartition(".")[0] for name in names} == set(base.targets("x"))
    assert any(patch.payload.change("transformer", name).abs().max() > 0 for name in names)
    assert all(torch.equal(before[name], value) for name, value in base.network.state_dict().items())
    assert (forecast.F, forecast.B) == (patch.costs["F"], patch.costs["B"]) == (2 * 2 * 3 + 2 * 2, 2 * 2)
    assert forecast.modules == len(base.targets("x"))
    assert patch.curves["erased"][0] and patch.base_fingerprint.keys() == {"transformer"}


def test_flow_models_have_no_ddim_sampler():
    with pytest.raises(ErasureError, match="unknown sampler 'ddim'"):
        erase(Base("tiny", tiny_transformer("sd3")), "cat", "esd", progress=False, **SMALL)


def test_parity_and_other_layouts_are_refused():
    base = Base("tiny", tiny_transformer("sd3"))
    with pytest.raises(ErasureError, match="parity follows"):
        erase(base, "cat", "esd", progress=False, parity=True, iterations=1, learning_rate=1e-4)
    with pytest.raises(ErasureError, match="channels_last is a layout for convolutions"):
        erase(base, "cat", "esd", progress=False, **SMALL, sampler="euler", channels_last=True)


@pytest.mark.parametrize(
    ("method", "kind", "reason"),
    [
        ("uce", "sd3", "share one attention"),
        ("rece", "flux", "share one attention"),
        ("advunlearn", "pixart", "not been carried over"),
        ("advunlearn", "flux", "not been carried over"),
    ],
)
def test_other_methods_refuse_with_the_reason(method, kind, reason):
    base = Base("tiny", tiny_transformer(kind))
    with pytest.raises(ErasureError, match=rf"{method} cannot erase from tiny.*{reason}.*can: .*esd"):
        erase(base, "cat", method, progress=False)


def test_a_distilled_model_is_trained_at_guidance_1_alone():
    base = Base("tiny", tiny_transformer("flux", guidance_embeds=True))
    settings = {**SMALL, "sampler": "euler"}
    with pytest.raises(ErasureError, match="guidance 3 for a guidance-distilled model"):
        erase(base, "cat", "esd", progress=False, **settings)
    patch = erase(base, "cat", "esd", progress=False, **settings, trajectory_guidance=1.0)
    assert patch.components == ["transformer"]


def test_presets_of_the_families_are_found():
    from erasure.model.meta import load_meta

    found = {
        name: load_meta(name).family().preset for name in ("sd3-medium", "flux-dev", "flux-schnell", "pixart-sigma")
    }
    assert {name: preset and preset.name for name, preset in found.items()} == {
        "sd3-medium": "sd3",
        "flux-dev": "flux-dev",
        "flux-schnell": "flux-schnell",
        "pixart-sigma": "pixart",
    }
    assert Base("tiny", tiny_transformer("sd3")).family().preset is None
    base = Base("tiny", tiny_transformer("sd3"))
    patch = erase(base, "cat", "esd", progress=False, preset="sd3", iterations=1, trajectories=1, sample_steps=1)
    assert patch.config["learning_rate"] == 1e-4 and patch.config["sampler"] == "euler"


def test_stop_auto_measures_and_ends_on_a_flow_model():
    base = Base("tiny", tiny_transformer("sd3"))
    concept = {"name": "cat", "keep": ["dog"]}
    settings = {
        **SMALL,
        "iterations": 60,
        "learning_rate": 3e-2,
        "sampler": "euler",
        "batch_size": 1,
        "trajectories": 1,
    }
    patch = erase(base, concept, "esd", progress=False, **settings, stop="auto")
    assert patch.curves["steps"] and all(len(row) == len(patch.curves["timesteps"]) for row in patch.curves["drift"])
