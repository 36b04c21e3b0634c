"""SPM's objective against its formula, its anchors, its gate and its published loop."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.concepts.similarity import cosines
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configure
from erasure.methods.spm import SPM
from erasure.model.base import Base
from erasure.model.diffusion import counting
from erasure.model.trajectories import build_pool
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.gates.text import TextGate
from erasure.training import loop as training
from erasure.training.run import Run
from tests.tiny import tiny_pipeline

SMALL = {"iterations": 3, "batch_size": 2, "trajectories": 2, "sample_steps": 4, "learning_rate": 1e-2}


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def moved(method: SPM, base: Base, *concepts: Concept):
    """A state whose membranes have left zero."""
    state = method.prepare(base, list(concepts) or [Concept("cat")], Run(seed=3, progress=False))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.1 * torch.randn(param.shape, generator=draw))
    return state


def test_the_loss_is_the_formula(base):
    method = dataclasses.replace(SPM(), **SMALL, negative_guidance=1.5, anchor_weight=7.0)
    state = moved(method, base)
    terms = method.loss(state, 1)
    batch = state.pool.batch(2, 1, state.seed)
    draw = torch.Generator().manual_seed(state.seed * 1_000_003 + 1)
    anchors, weights = method.anchors(state, base.conditions(["cat", "cat"]), draw)
    anchors = anchors.states
    cat, empty = base.encode(["cat", "cat"]), base.encode(["", ""])
    with torch.no_grad():
        output, kept = (base.unet(batch.x, batch.t, e).sample for e in (cat, anchors))
        with state.adapter.off():
            e_c, e_n, still = (base.unet(batch.x, batch.t, e).sample for e in (cat, empty, anchors))
    assert torch.equal(weights, torch.ones(2))
    assert torch.allclose(terms["erase"], ((output - (e_n - 1.5 * (e_c - e_n))) ** 2).mean(), rtol=1e-4)
    assert torch.allclose(terms["anchor"], 7.0 * ((kept - still) ** 2).mean(), rtol=1e-4)
    assert not torch.allclose(terms["erase"], ((output - (e_n + 1.5 * (e_c - e_n))) ** 2).mean(), rtol=1e-2)
    state.adapter.remove()


def test_the_published_loss_is_the_formula_with_the_base_as_teacher(base):
    """Walked with the membranes on, judged without; the anchor term is a mean over the anchors by their weights."""
    method = dataclasses.replace(configure("spm", "object", {"parity": True}), anchor_weight=7.0, negative_guidance=1.5)
    state = moved(method, base)
    terms = method.loss(state, 1)
    draw = torch.Generator().manual_seed(state.seed * 1_000_003 + 1)
    batch = method.tuples(state, draw, 1)
    anchors, weights = method.anchors(state, base.conditions(["cat"]), draw)
    cat, empty = base.encode(["cat"]), base.encode([""])
    x, t = batch.x.repeat(3, 1, 1, 1), batch.t.repeat(3)
    with torch.no_grad():
        output, kept = base.unet(batch.x, batch.t, cat).sample, base.unet(x, t, anchors.states).sample
        with state.adapter.off():
            e_c, e_n = (base.unet(batch.x, batch.t, e).sample for e in (cat, empty))
            still = base.unet(x, t, anchors.states).sample
    assert torch.allclose(batch.concept, e_c, atol=1e-5) and torch.allclose(batch.neutral, e_n, atol=1e-5)
    assert not torch.allclose(e_c, output, atol=1e-3)  # the membranes do something here
    assert torch.allclose(terms["erase"], ((output - (e_n - 1.5 * (e_c - e_n))) ** 2).mean(), rtol=1e-4)
    drift = ((kept - still) ** 2).mean((1, 2, 3))
    assert drift.min() > 0 and weights.tolist() == [0.5, 0.25, 0.25]
    assert torch.allclose(terms["anchor"], 7.0 * (0.5 * drift[0] + 0.25 * drift[1] + 0.25 * drift[2]), rtol=1e-4)
    state.adapter.remove()


def test_the_published_trajectory_is_walked_with_the_membranes_on(base):
    method = configure("spm", "object", {"parity": True})
    state = moved(method, base)
    on = method.tuples(state, torch.Generator().manual_seed(2), 0)
    with state.adapter.off():
        off = method.tuples(state, torch.Generator().manual_seed(2), 0)
    assert torch.equal(on.t, off.t) and not torch.allclose(on.x, off.x, atol=1e-3)
    state.adapter.remove()


def test_a_refreshed_pool_is_walked_with_the_membranes_on_and_judged_without(base):
    method = dataclasses.replace(SPM(), **SMALL, refresh=2)
    state = moved(method, base)
    first, draw = state.pool, torch.Generator()
    method.tuples(state, draw, 1)
    assert state.pool is first and method.snapshot(state) == {}
    with counting(base.unet) as counts:
        batch = method.tuples(state, draw, 2)
    assert counts.forward == 4 * 2 * 4  # membranes on: concept and empty; off: concept and neutral
    method.tuples(state, draw, 3)
    walked = build_pool(base, state.pairs, trajectories=2, seed=state.seed + 1_000_003, steps=4, guidance=3.0)
    cat, empty = base.encode(["cat", "cat"]), base.encode(["", ""])
    with torch.no_grad(), state.adapter.off():
        still = build_pool(base, state.pairs, trajectories=2, seed=state.seed + 1_000_003, steps=4, guidance=3.0)
        e_c, e_n = (base.unet(batch.x, batch.t, e).sample for e in (cat, empty))
    assert torch.equal(state.pool.x, walked.x) and torch.equal(state.pool.t, walked.t)
    last = state.pool.t == state.pool.t.min()
    assert not torch.allclose(state.pool.x[last], still.x[last], atol=1e-2)
    assert torch.allclose(batch.concept, e_c, atol=1e-5) and torch.allclose(batch.neutral, e_n, atol=1e-5)
    assert not torch.allclose(walked.concept, state.pool.concept, atol=1e-2)
    state.adapter.remove()


def test_a_pool_that_training_made_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 4)
    # Killed after step 3, which walked anew; steps 4 and 5 need that pool.
    settings = {**SMALL, "iterations": 6, "refresh": 3}
    straight = erase(tiny_pipeline(), "cat", "spm", progress=False, **settings)
    real, out = training._write, tmp_path / "p.safetensors"

    def killed(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        erase(tiny_pipeline(), "cat", "spm", out=out, progress=False, **settings)
    monkeypatch.setattr(training, "_write", real)
    resumed = erase(tiny_pipeline(), "cat", "spm", out=out, progress=False, **settings)
    assert resumed.payload.digest == straight.payload.digest
    assert {**resumed.costs, "seconds": 0} == {**straight.costs, "seconds": 0}


@pytest.mark.parametrize(("refresh", "walks"), [(0, 0), (3, 1), (1, 5)])
def test_the_cost_is_the_one_in_the_docstring(base, refresh, walks):
    settings = {**SMALL, "iterations": 6, "refresh": refresh}
    costs = erase(base, "cat", "spm", progress=False, **settings).costs
    assert costs["F"] == 2 * 2 * 4 + walks * 4 * 2 * 4 + 6 * 3 * 2
    assert costs["B"] == 6 * 2 * 2


def test_parity_leaves_out_the_dead_halves_alone(base):
    method = configure("spm", "object", {"parity": True})
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    for step in range(3):
        drawn = torch.Generator().manual_seed(state.seed * 1_000_003 + step)
        torch.randint(1, (1,), generator=drawn)
        k = int(torch.randint(1, 30, (1,), generator=drawn))
        with counting(base.unet) as counts:
            torch.stack(list(method.loss(state, step).values())).sum().backward()
        # walk, concept and neutral, three anchors off; concept and three anchors on
        assert (counts.forward, counts.backward) == (2 * k + 2 + 3 + 4, 4)
    state.adapter.remove()


def test_a_style_is_erased_from_its_carriers_and_concepts_share_the_membranes(base):
    concepts = [Concept("monet", kind="style"), Concept("cat", aliases=("tree",), anchor="dog")]
    method = dataclasses.replace(SPM(), **SMALL)
    state = method.prepare(base, concepts, Run(progress=False))
    assert ("a dog in monet style", "a dog") in state.pairs and ("cat", "dog") in state.pairs
    assert {int(i) for i in state.pool.pair} == set(range(len(state.pairs)))
    assert not {"cat", "tree", "monet style"} & {*state.near, *state.texts}
    assert method.gate(state)["texts"] == ["monet", "cat", "tree"]
    state.adapter.remove()


def test_every_layer_of_the_transformer_blocks_gets_one_dimension(base):
    patch = erase(base, "cat", "spm", progress=False, **SMALL)
    modules = dict(base.unet.named_modules())
    expected = {
        f"{path}.weight"
        for path, one in modules.items()
        if ".attentions." in path and isinstance(one, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert set(patch.payload.names("unet")) == expected and patch.payload.ranks == [1]
    assert any(modules[name.removesuffix(".weight")].__class__.__name__ == "Conv2d" for name in expected)


def test_anchors_follow_the_papers_law_and_the_neighbours(base):
    method = dataclasses.replace(SPM(), **SMALL)
    state = method.prepare(base, [Concept("cat", keep=("dog",))], Run(progress=False))
    assert state.near == ["dog", ""] and "cat" not in state.texts
    expected = 1 - cosines(base, state.texts, ["cat"]).abs()[:, 0]
    assert torch.allclose(state.odds, expected)
    draw, n = torch.Generator().manual_seed(0), 400
    state.odds = torch.zeros(len(state.texts))
    state.odds[[1, 4]] = torch.tensor([0.75, 0.25])
    drawn, _ = method.anchors(state, base.conditions(["cat"] * n), draw)
    for text, share in ((state.texts[1], 0.375), (state.texts[4], 0.125), ("dog", 0.25), ("", 0.25)):
        found = (drawn.states == base.encode([text])).flatten(1).all(1).float().mean()
        assert abs(float(found) - share) < 0.06, text
    state.adapter.remove()


def test_parity_anchors_are_noise_of_the_concepts_length_and_the_empty_prompt(base):
    method = configure("spm", "object", {"parity": True, "iterations": 4})
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    cat = base.conditions(["cat"])
    conditions, weights = method.anchors(state, cat, torch.Generator().manual_seed(1))
    anchors, cat = conditions.states, cat.states
    assert torch.equal(anchors[0], base.encode([""])[0]) and weights.tolist() == [0.5, 0.25, 0.25]
    ratio = anchors[1:].flatten(1).norm(dim=1) / cat.norm()
    assert ((ratio > 0.8) & (ratio < 1.2)).all()
    state.adapter.remove()


def test_parity_feeds_t_33_to_42_above_the_latents_own(base):
    method = configure("spm", "object", {"parity": True})
    state = method.prepare(base, [Concept("cat")], Run(progress=False))
    schedule = base.sampler("ddim")
    schedule.set_timesteps(30)
    seen = set()
    for step in range(8):
        states = method.tuples(state, torch.Generator().manual_seed(step), step)
        true = [int(t) for t in schedule.timesteps if 30 <= int(states.t[0]) - int(t) <= 43]
        assert len(true) == 1
        seen.add(tuple(states.x.shape[2:]))
        assert max(states.x.shape[2:]) < base.latent_shape()[1]
    assert len(seen) > 1
    state.adapter.remove()


def test_the_published_rate_warms_up_and_restarts():
    method = configure("spm", "object", {"parity": True})
    assert method.rate(0) == 0 and method.rate(250) == 0.5 and method.rate(500) == 1
    third = 500 + 2500 / 3
    assert method.rate(math.floor(third) - 1) < 0.01 and method.rate(math.ceil(third) + 1) > 0.99
    assert SPM().rate(17) == 1.0


def test_the_gate_names_the_concepts_and_lets_neighbours_pass():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    patch = erase(
        pipe, {"name": "van gogh", "aliases": ["starry night"], "kind": "object"}, "spm", progress=False, **SMALL
    )
    assert patch.gate["kind"] == "text" and patch.gate["texts"] == ["van gogh", "starry night"]
    assert patch.gate["power"] == 1.0 and 0.5 <= patch.gate["threshold"] < 1
    parity = configure("spm", "object", {"parity": True})
    assert (parity.gate_power, parity.gate_threshold, parity.anchor_weight) == (2.0, 0.0, 1000.0)


def test_parity_gates_and_trains_each_kind_as_published(base):
    """Doubled gamma on both factors is 4 gamma^2; the fixed multiplier of nudity is a strength of 4 on every prompt."""
    strengths = {}
    for kind in ("object", "style", "content"):
        method = configure("spm", kind, {"parity": True})
        state = method.prepare(base, [Concept("van gogh", kind=kind)], Run(progress=False))
        assert state.pairs == [("van gogh", "")]
        settings = method.gate(state)
        gate = TextGate(tuple(settings["texts"]), settings["power"], settings["threshold"], settings.get("scale", 1.0))
        strengths[kind] = [gate.strength(similarity) for similarity in (1.0, 0.5)]
        state.adapter.remove()
    assert strengths == {"object": [1.0, 0.25], "style": [4.0, 1.0], "content": [4.0, 4.0]}
    nudity = configure("spm", "content", {"parity": True})
    assert (nudity.negative_guidance, nudity.anchor_weight, nudity.iterations) == (3.0, 100.0, 15_000)
    style = configure("spm", "style", {"parity": True})
    assert (style.negative_guidance, style.anchor_weight, style.iterations) == (1.0, 1000.0, 3000)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"anchor_weight": -1}, "anchor_weight=-1.0: must be at least 0"),
        ({"sample_steps": 1}, "at least 2"),
        ({"refresh": -1}, "refresh=-1"),
        ({"gate_threshold": 1.5}, "between 0 and 1"),
        ({"gate_power": -1}, "gate_power"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"variant": "attn"}, "transformer"),
    ],
)
def test_settings_that_make_no_sense(base, setting, message):
    with pytest.raises(ErasureError, match=message):
        erase(base, "cat", "spm", **{**SMALL, **setting})
