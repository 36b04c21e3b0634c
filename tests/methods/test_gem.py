"""GEM: states and objective against their formulas, computed apart with diffusers' own calls; its file in diffusers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from erasure.concepts import neighbors
from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods.gem import GEM, distance, margin
from erasure.model.base import Base
from erasure.pipelines import ErasedFluxPipeline, ErasedStableDiffusion3Pipeline
from erasure.training.run import Run
from tests.tiny import SIDE, tiny_pipeline
from tests.tiny_transformers import KINDS, asked, tiny_transformer

SMALL = {
    "iterations": 2,
    "early_steps": 2,
    "sample_steps": 3,
    "learning_rate": 1e-2,
    "rank": 2,
    "retain_trajectories": 2,
    "retain_batch_size": 3,
}
CAT = Concept("cat", anchor="dog", keep=("car",))
FLOW = ("sd3", "flux")
ERASED = {"sd3": ErasedStableDiffusion3Pipeline, "flux": ErasedFluxPipeline}


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car", "red cat"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)


def moved_off(state, scale=0.3):
    """Move the low-rank term off the base, so that student and teacher differ."""
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(scale * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))


def started(kind, concept=CAT, seed=3, **settings):
    pipe = tiny_transformer(kind)
    method = dataclasses.replace(GEM(), **{**SMALL, **settings})
    return pipe, method, method.prepare(Base("tiny", pipe), [concept], Run(seed=seed, progress=False))


def grid(pipe, kind, steps):
    """The pipeline's own sigmas for this size, set as its call sets them."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if kind == "sd3":
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=calculate_shift((SIDE // 2) ** 2))
    return scheduler.sigmas


@pytest.mark.parametrize("kind", FLOW)
def test_states_are_the_first_of_the_networks_own_guided_trajectory(kind):
    """x' = x + (sigma' - sigma) v, with v guided from the empty prompt, of the network that trains."""
    pipe, method, state = started(kind)
    moved_off(state)
    batch = method.reached(state, 1)
    seed = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(3 * 1_000_003 + 1)))
    x = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    assert len(batch) == 2 and torch.equal(batch.x[:1], x)
    sigmas, plain = grid(pipe, kind, 3), np.linspace(1, 1 / 3, 3)
    assert torch.allclose(batch.t, 1000 * sigmas[:2])

    def step(sign=1.0, guidance=3.0, own=True, ends=(sigmas[0], sigmas[1])):
        with torch.no_grad():
            with state.adapter.on() if own else state.adapter.off():
                v_c, v_0 = (asked(pipe, kind, x, torch.full((1,), 1000.0), text) for text in ("cat", ""))
            return x + sign * (ends[1] - ends[0]) * (v_0 + guidance * (v_c - v_0))

    assert (batch.x[1:] - step()).abs().max() < 1e-5
    twins = {
        "sign of the velocity": step(sign=-1.0),
        "no guidance": step(guidance=1.0),
        "the base's trajectory": step(own=False),
        "a grid without the shift": step(ends=(plain[0], plain[1])),
    }
    for name, twin in twins.items():
        assert (batch.x[1:] - twin).abs().max() > 1e-3, name
    state.adapter.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_both_terms_are_their_formulas(kind):
    pipe, method, state = started(kind, eta=0.7, gamma=10.0, retain_weight=2.0)
    moved_off(state)
    batch, kept = method.reached(state, 1), state.retain.batch(3, 1, 3)
    assert state.pairs == [("cat", "dog")] and state.kept[0] == "car" and state.kept[-1] == ""
    texts = [state.kept[int(i)] for i in kept.pair]

    def each(one, names):
        return torch.cat([asked(pipe, kind, one.x[i : i + 1], one.t[i : i + 1], name) for i, name in enumerate(names)])

    with torch.no_grad():
        v, after = each(batch, ["cat"] * 2), each(kept, texts)
        with state.adapter.off():
            v_c, v_a, before = each(batch, ["cat"] * 2), each(batch, ["dog"] * 2), each(kept, texts)
    terms = method.loss(state, 1)
    to_a, to_c, gap = ((one - other).flatten(1).norm(dim=1) for one, other in ((v, v_a), (v, v_c), (v_c, v_a)))
    erased = 10 * (to_a - 0.7 * to_c).clamp_min(0).mean()
    moved = ((after - before) ** 2).sum((1, 2, 3)).mean()
    assert erased > 0 and moved > 0
    assert torch.allclose(terms["erase"], erased, rtol=1e-3)
    assert torch.allclose(terms["retain"], 10 * 2 * moved / gap.mean(), rtol=1e-3)
    twins = (10 * (to_c - 0.7 * to_a).clamp_min(0).mean(), 10 * to_a.mean(), 10 * (to_a - to_c).clamp_min(0).mean())
    assert not any(torch.allclose(terms["erase"], twin, rtol=1e-2) for twin in twins)
    sum(terms.values()).backward()
    trained = state.adapter.parameters()
    idle = [name for name, param in trained.items() if param.grad is None or not param.grad.any()]
    assert all("add_q_proj" in name for name in idle), idle  # SD3's last block does not use its text queries' outputs
    state.adapter.remove()


def test_the_first_term_begins_with_the_gap_and_ends_inside_the_ball():
    pipe, method, state = started("sd3", retain_weight=0.0)
    assert state.retain is None
    batch, terms = method.reached(state, 0), method.loss(state, 0)
    assert list(terms) == ["erase"]
    assert torch.allclose(terms["erase"], 100 * distance(batch.concept, batch.neutral).mean(), rtol=1e-4)
    state.adapter.remove()
    draw = torch.Generator().manual_seed(0)
    a, c, u = (torch.randn(4, 2, 3, 3, generator=draw) for _ in range(3))
    u = u / u.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    eta, gap = 0.6, distance(c, a).view(-1, 1, 1, 1)
    centre, radius = a + (a - c) * eta**2 / (1 - eta**2), eta * gap / (1 - eta**2)
    assert margin(centre + 1.001 * radius * u, a, c, eta).gt(0).all()
    assert margin(centre + 0.999 * radius * u, a, c, eta).eq(0).all()
    assert margin(a, a, c, 0.0).eq(0).all() and margin((a + c) / 2, a, c, 1.0).abs().max() < 1e-5


def test_queries_and_keys_of_both_streams_train(tmp_path):
    for kind, names in (("sd3", 4), ("flux", 4), ("pixart", 2)):
        base = Base("tiny", tiny_transformer(kind))
        paths = set(base.targets("qk"))
        assert len(paths) == 2 * names and all(path.startswith("transformer_blocks.") for path in paths)
        kinds = {path.rpartition(".")[2] for path in paths}
        assert kinds == {"to_q", "to_k"} | ({"add_q_proj", "add_k_proj"} if kind in FLOW else set())
        assert kind in FLOW or all(".attn2." in path for path in paths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_the_base_as_it_was_and_costs_what_was_planned(kind, tmp_path):
    base = Base("tiny", tiny_transformer(kind))
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    forecast = plan(base, CAT, "gem", **SMALL)
    patch = erase(base, CAT, "gem", out=tmp_path / "p.safetensors", progress=False, **SMALL)
    assert patch.components == ["transformer"] and patch.payload.kind == "low-rank"
    assert all(torch.equal(before[name], value) for name, value in base.network.state_dict().items())
    # Per update 2 of the trajectory's first step, 4 of the base's, 2 + 3 of the network's own; the pool has two
    # for each state of its three prompts.
    assert (forecast.F, forecast.B) == (patch.costs["F"], patch.costs["B"])
    assert patch.costs["B"] == 2 * (2 + 3) and patch.costs["F"] == 2 * (2 + 4 + 5) + 3 * 3 * 2
    name = patch.payload.names("transformer")[0]
    assert patch.payload.change("transformer", name).any()


@pytest.mark.parametrize("kind", FLOW)
def test_its_file_loads_in_plain_diffusers(kind, tmp_path):
    pipe, target = tiny_transformer(kind, ERASED[kind]), tmp_path / "cat.safetensors"
    erase(Base("tiny", pipe), CAT, "gem", out=target, progress=False, **SMALL)
    x, t = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(5)), torch.full((1,), 700.0)
    with torch.no_grad():
        plain = asked(pipe, kind, x, t, "cat")
        pipe.load_patch(target)
        pipe.fuse_patches()
        ours = asked(pipe, kind, x, t, "cat")
        pipe.unload_patches()
        assert torch.equal(asked(pipe, kind, x, t, "cat"), plain)
        theirs = tiny_transformer(kind)
        theirs.load_lora_weights(str(target))
        assert torch.allclose(asked(theirs, kind, x, t, "cat"), ours, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-4)


def test_the_retain_term_keeps_what_it_is_told_to_keep():
    """The same run without it moves the prompt to keep further."""
    settings = {**SMALL, "iterations": 8, "retain_batch_size": 8, "early_steps": 3}
    moved = []
    for weight in (20.0, 0.0):
        pipe = tiny_transformer("sd3", ErasedStableDiffusion3Pipeline)
        x, t = torch.randn(4, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(5)), torch.full((4,), 900.0)
        patch = erase(Base("tiny", pipe), CAT, "gem", progress=False, **settings, retain_weight=weight)
        with torch.no_grad():
            before = asked(pipe, "sd3", x, t, "car")
            pipe.load_patch(patch)
            pipe.fuse_patches()
            moved.append(float((asked(pipe, "sd3", x, t, "car") - before).norm()))
    assert 0 < moved[0] < 0.7 * moved[1]


def test_it_erases_from_a_unet():
    base = Base("tiny", tiny_pipeline())
    patch = erase(base, CAT, "gem", progress=False, **SMALL)
    assert patch.components == ["unet"]
    assert {name.rpartition(".")[0] for name in patch.payload.names("unet")} == set(base.targets("x"))


def test_the_anchor_is_the_nearest_word_or_nothing():
    assert started("flux", Concept("cat"), guide="empty", retain_weight=0.0)[2].pairs == [("cat", "")]
    (pair,) = started("sd3", Concept("cat"), retain_weight=0.0)[2].pairs
    assert pair[0] == "cat" and pair[1] not in ("", "cat")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sd3", {"eta": -1.0}, "eta"),
        ("sd3", {"guide": "mean"}, "nearest"),
        ("sd3", {"variant": "xx"}, "unknown variant 'xx'"),
        ("distilled", {}, "guidance 3 for a guidance-distilled model"),
    ],
)
def test_what_cannot_be_is_refused(kind, settings, message):
    pipe = tiny_transformer("flux", guidance_embeds=True) if kind == "distilled" else tiny_transformer(kind)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with pytest.raises(ErasureError, match=message):
        erase(Base("tiny", pipe), CAT, "gem", progress=False, **{**SMALL, **settings})
    assert all(torch.equal(before[name], value) for name, value in pipe.transformer.state_dict().items())


def test_a_distilled_model_is_erased_at_guidance_1():
    base = Base("tiny", tiny_transformer("flux", guidance_embeds=True))
    assert erase(base, CAT, "gem", progress=False, **SMALL, trajectory_guidance=1.0).components == ["transformer"]
