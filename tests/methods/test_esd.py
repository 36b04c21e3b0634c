"""ESD's objective against its formula, and what trains."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.concepts.concept import KINDS, Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configure
from erasure.methods.esd import ESD
from erasure.model.architectures import of_network
from erasure.model.base import Base
from erasure.model.diffusion import away, counting
from erasure.model.trajectories import build_pool
from erasure.training.run import Run
from tests.tiny import tiny_pipeline

TARGETS = of_network("UNet2DConditionModel").variants
SMALL = {"iterations": 3, "batch_size": 2, "trajectories": 2, "sample_steps": 4, "learning_rate": 1e-3}


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def test_new_form_with_eta_2_is_the_papers_form_with_eta_1():
    draw = torch.Generator().manual_seed(0)
    neutral, concept = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
    new_form = concept - 2 * (concept - neutral)
    assert torch.allclose(away(neutral, concept, 1.0), new_form, atol=1e-6)
    assert not torch.allclose(away(neutral, concept, -1.0), new_form, atol=1e-2)


def test_eta_0_is_the_neutral_prediction():
    neutral, concept = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    assert torch.equal(away(neutral, concept, 0.0), neutral)


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_loss_is_the_formula_over_the_samplers_own_states(base, eta):
    method = dataclasses.replace(ESD(), **SMALL, negative_guidance=eta)
    run = Run(seed=3, progress=False)
    state = method.prepare(base, [Concept("cat")], run)
    with torch.no_grad():  # move off the base, so that student and teacher differ
        for param in state.adapter.parameters().values():
            param.mul_(1.3)
    loss = method.loss(state, 1)["esd"]
    batch = method.tuples(state, 1)
    empty, cat = base.encode([""]), base.encode(["cat"])
    with torch.no_grad(), state.adapter.off():
        e_0 = base.unet(batch.x, batch.t, empty.repeat(2, 1, 1)).sample
        e_c = base.unet(batch.x, batch.t, cat.repeat(2, 1, 1)).sample
    output = base.unet(batch.x, batch.t, cat.repeat(2, 1, 1)).sample
    expected = ((output - (e_0 - eta * (e_c - e_0))) ** 2).mean()
    assert torch.allclose(loss, expected, rtol=1e-4)
    wrong = ((output - (e_0 + (eta + 1) * (e_c - e_0))) ** 2).mean()
    assert not torch.allclose(loss, wrong, rtol=1e-4)
    state.adapter.remove()


@pytest.mark.parametrize("parity", [False, True])
def test_erase_from_takes_the_concept_out_of_the_other_prompt_and_keeps_the_rest(base, parity):
    """On states of c_f, the target is e(c_f) - (eta + 1) (e(c) - e("")), which for eta = 1 is the script's own."""
    if parity:
        method = configure("esd", "object", {"parity": True, "erase_from": "dog", "sample_steps": 4})
    else:
        method = dataclasses.replace(ESD(), **SMALL, erase_from="dog", negative_guidance=1.5)
    run, eta = Run(seed=3, progress=False), method.negative_guidance
    with counting(base.unet) as counts:
        state = method.prepare(base, [Concept("cat", kind="style")], run)
    assert parity or counts.forward == 3 * 2 * 4
    assert state.pairs == [("cat", "")]  # the names as they are: the other prompt has a subject of its own
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.mul_(1.3)
    loss, batch = method.loss(state, 1)["esd"], method.tuples(state, 1)
    n = len(batch)
    dog, cat, empty = (base.encode([text] * n) for text in ("dog", "cat", ""))
    with torch.no_grad():
        output = base.unet(batch.x, batch.t, dog).sample
        with state.adapter.off():
            e_f, e_c, e_0 = (base.unet(batch.x, batch.t, texts).sample for texts in (dog, cat, empty))
            pool = build_pool(base, [("dog", "")], trajectories=2, seed=3, steps=4, guidance=3.0)
    assert parity or all((pool.x == x).flatten(1).all(1).any() for x in batch.x)
    assert torch.allclose(loss, ((output - (e_f - (eta + 1) * (e_c - e_0))) ** 2).mean(), rtol=1e-4)
    assert not torch.allclose(loss, ((output - (e_0 - eta * (e_c - e_0))) ** 2).mean(), rtol=1e-3)
    state.adapter.remove()


def test_parity_takes_names_as_they_are_and_the_papers_modules():
    variants = {kind: configure("esd", kind, {"parity": True}).variant for kind in KINDS}
    assert variants == {"object": "u", "content": "u", "style": "x", "identity": "x"}
    assert configure("esd", "object", {"parity": True, "variant": "x"}).variant == "x"
    base = Base("tiny", tiny_pipeline())
    concepts = [Concept("van gogh", kind="style"), Concept("cat", aliases=("red cat",), anchor="dog")]
    state = configure("esd", "mixed", {"parity": True}).prepare(base, concepts, Run(progress=False))
    assert state.pairs == [("van gogh", ""), ("cat", "dog"), ("red cat", "dog")]
    state.adapter.remove()


@pytest.mark.parametrize("variant", TARGETS)
def test_a_variant_trains_its_modules_and_no_others(base, variant):
    patch = erase(base, "cat", "esd", progress=False, **SMALL, variant=variant)
    names = patch.payload.names("unet")
    for name in names:
        test = {
            "x": "attn2" in name,
            "x-strict": "attn2.to_k" in name or "attn2.to_v" in name,
            "qk": "attn2.to_q" in name or "attn2.to_k" in name,
            "attention": "attn1" in name or "attn2" in name,
            "selfattn": "attn1" in name,
            "u": "attn2" not in name,
            "linear": "attn1" in name or ".ff." in name or "time_emb_proj" in name,
            "transformer": ".attentions." in name,
            "full": True,
        }[variant]
        assert test, name
    assert any(patch.payload.change("unet", name).abs().max() > 0 for name in names)
    if variant == "full":
        assert any("attn2" in name for name in names) and any("conv_in" in name for name in names)
        assert not any("norm" in name for name in names)


def test_low_rank_variant_gives_a_low_rank_patch(base):
    patch = erase(base, "cat", "esd", progress=False, **SMALL, rank=2, alpha=4.0)
    assert patch.payload.kind == "low-rank" and patch.payload.ranks == [2]
    assert patch.payload.change("unet", patch.payload.names("unet")[0]).abs().max() > 0


def test_styles_are_erased_from_a_subject_and_not_from_nothing():
    pairs = Concept("ink", kind="style").prompt_pairs()
    assert ("a dog in ink style", "a dog") in pairs
    assert Concept("cat").prompt_pairs() == [("cat", "")]
    assert Concept("cat", anchor="dog").prompt_pairs() == [("cat", "dog")]


def test_pool_counts_two_forwards_a_state_and_one_pair_an_update(base):
    run = Run(progress=False)
    ESD(**SMALL).fit(base, [Concept("cat")], run)
    assert run.costs.forward == 2 * 4 * 2 + 3 * 2
    assert run.costs.backward == 3 * 2


def test_parity_follows_the_official_script(base):
    method = configure("esd", "object", {"parity": True, "iterations": 2})
    assert (method.batch_size, method.learning_rate, method.sampler, method.resolution_scale) == (1, 5e-5, "pndm", 2.0)
    method = dataclasses.replace(method, sample_steps=6)
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    with counting(base.unet) as counts:
        batch = method.tuples(state, 0)
    assert batch.x.shape[-1] == 2 * base.latent_shape()[-1]
    assert len(batch) == 1 and 2 <= counts.forward <= 2 * 7
    state.adapter.remove()
    patch = erase(base, "cat", "esd", progress=False, parity=True, iterations=2, sample_steps=4)
    assert patch.config["parity"] is True


def test_the_published_trajectory_and_teacher_are_the_bases_and_not_the_students(base):
    method = configure("esd", "object", {"parity": True, "sample_steps": 4, "resolution_scale": 1.0})
    state = method.prepare(base, [Concept("cat")], Run(seed=3, progress=False))
    step = next(step for step in range(20) if method.tuples(state, step).t < 900)  # at least one step walked
    before = method.tuples(state, step)
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.mul_(1.5)
    batch, loss = method.tuples(state, step), method.loss(state, step)["esd"]
    cat, empty = base.encode(["cat"]), base.encode([""])
    with torch.no_grad():
        output = base.unet(batch.x, batch.t, cat).sample
        with state.adapter.off():
            e_c, e_0 = (base.unet(batch.x, batch.t, texts).sample for texts in (cat, empty))
    assert torch.equal(batch.x, before.x) and torch.equal(batch.t, before.t)
    assert torch.allclose(batch.concept, e_c, atol=1e-5) and torch.allclose(batch.neutral, e_0, atol=1e-5)
    assert not torch.allclose(output, e_c, atol=1e-2)  # the student has left the base
    assert torch.allclose(loss, ((output - (e_c - 2 * (e_c - e_0))) ** 2).mean(), rtol=1e-4)  # the script's own form
    state.adapter.remove()


def test_bf16_rounding_loses_small_updates(base):
    settings = {**SMALL, "iterations": 1, "learning_rate": 1e-5, "variant": "x-strict"}
    fine = erase(base, "cat", "esd", progress=False, **settings)
    coarse = erase(base, "cat", "esd", progress=False, **settings, weight_rounding="bf16")
    name = fine.payload.names("unet")[0]
    weight = dict(base.unet.named_parameters())[name]
    trained = weight + coarse.payload.change("unet", name)
    assert torch.allclose(trained, trained.bfloat16().float(), atol=1e-7)
    assert not torch.allclose(fine.payload.change("unet", name), coarse.payload.change("unet", name), atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"variant": "xattn"}, "x-strict"),
        ({"rank": 0}, "at least 1"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"iterationz": 5}, "did you mean 'iterations'"),
        ({"iterations": "many"}, "expected int"),
        ({"sampler": "euler9"}, "ddim"),
        ({"weight_rounding": "fp7"}, "bf16"),
    ],
)
def test_bad_settings_say_what_is_allowed(base, setting, says):
    with pytest.raises(ErasureError, match=says):
        erase(base, "cat", "esd", progress=False, **{**SMALL, **setting})


def test_nan_stops_the_run_and_leaves_the_model_as_it_was(base, tmp_path):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    with pytest.raises(ErasureError, match="not a number"):
        erase(
            base,
            "cat",
            "esd",
            out=tmp_path / "p.safetensors",
            progress=False,
            **{**SMALL, "iterations": 60, "learning_rate": 0.99, "negative_guidance": 1e38},
        )
    assert not (tmp_path / "p.safetensors").exists()
    assert all(torch.equal(before[name], value) for name, value in base.unet.state_dict().items())
