"""STEREO: each part against an independent derivation on the tiny checkpoint, the order of the parts, and twins."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.concepts import neighbors
from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods.stereo import Stereo
from erasure.model.base import Base
from erasure.training.loop import train
from erasure.training.run import Run
from tests.conformance.quick import changes, left_at_a_checkpoint, same
from tests.tiny import tiny_pipeline

SMALL = {
    "rounds": 2,
    "search_iterations": 2,
    "inversion_iterations": 2,
    "iterations": 11,
    "batch_size": 3,
    "inversion_batch_size": 4,
    "learning_rate": 1e-3,
    "search_rate": 2e-3,
    "inversion_rate": 0.5,
    "images": 3,
    "trajectories": 2,
    "sample_steps": 3,
    "anchors": 2,
}
CAT = Concept("cat", keep=("dog", "tree"))


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car", "tree"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)


def started(concepts=(CAT,), **settings):
    base = Base("tiny", tiny_pipeline())
    method = dataclasses.replace(Stereo(), **{**SMALL, **settings})
    return base, method, method.prepare(base, list(concepts), Run(seed=3, progress=False))


def moved(state, scale=0.05, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in state.adapter.parameters().items():
            if name != "words":
                param.add_(scale * torch.randn(param.shape, generator=draw))


def vector(seed, concepts=1):
    return 0.05 * torch.randn(concepts, 1, 32, generator=torch.Generator().manual_seed(seed))


def with_word(base, text, word):
    """The states of a text with a vector in the place of "car": as a token of one's own, in the table itself."""
    table = base.pipe.text_encoder.get_input_embeddings().weight
    number = base.pipe.tokenizer("car").input_ids[1]
    with torch.no_grad():
        own = table[number].clone()
        table[number] = word
        ids = base.pipe.tokenizer([text], padding="max_length", return_tensors="pt").input_ids
        states = base.pipe.text_encoder(ids)[0]
        table[number] = own
    return states


def answer(base, x, t, states):
    return base.unet(x, t, states.expand(len(x), -1, -1)).sample


def close(one, other):
    return torch.allclose(one, other, rtol=1e-3, atol=1e-7)


def test_the_parts_follow_each_other_each_with_its_rate():
    method = dataclasses.replace(Stereo(), **SMALL)
    parts = [method.part(step) for step in range(11)]
    search, invert = [("search", 0, 0), ("search", 0, 1)], [("invert", 0, 0), ("invert", 0, 1)]
    later = [(part, 1, index) for part, _, index in search + invert]
    assert parts == [*search, *invert, *later, *(("erase", 2, index) for index in range(3))]
    assert [method.restarts(step) for step in range(11)] == [part[2] == 0 for part in parts]
    rates = {"search": 2e-3, "invert": 0.5, "erase": 1e-3}
    for step, (part, _, _) in enumerate(parts):
        assert method.learning_rate * method.rate(step) == pytest.approx(rates[part])
    assert [dataclasses.replace(method, rounds=0).part(step)[0] for step in (0, 10)] == ["erase"] * 2


def test_the_first_search_is_esd():
    base, method, state = started(negative_guidance=0.7)
    batch = state.pool.batch(3, 1, 3)
    with torch.no_grad():
        cat, empty = (answer(base, batch.x, batch.t, base.encode([text])) for text in ("cat", ""))
    moved(state)
    loss = method.loss(state, 1)["erase"]
    output = answer(base, batch.x, batch.t, base.encode(["cat"]))
    assert close(loss, (output - (empty - 0.7 * (cat - empty))).square().mean())
    assert not close(loss, (output - (empty + 0.7 * (cat - empty))).square().mean())
    state.adapter.remove()


def test_a_later_search_erases_the_word_from_where_the_round_began():
    base, method, state = started(negative_guidance=0.7)
    moved(state)
    state.adapter.words.data.copy_(vector(5) / state.unit)
    step = 4  # the first of the second round
    batch = state.pool.batch(3, step, 3)
    word = with_word(base, "car", vector(5)[0, 0])
    with torch.no_grad():
        named, empty = (answer(base, batch.x, batch.t, states) for states in (word, base.encode([""])))
    method.loss(state, step)
    assert len(state.found) == 1 and torch.allclose(state.found[0], vector(5), atol=1e-6)
    moved(state, seed=2)  # the round goes on: the teacher stays
    batch = state.pool.batch(3, step + 1, 3)
    with torch.no_grad(), state.adapter.earlier():
        named, empty = (answer(base, batch.x, batch.t, states) for states in (word, base.encode([""])))
    output = answer(base, batch.x, batch.t, word)
    loss = method.loss(state, step + 1)["erase"]
    assert close(loss, (output - (empty - 0.7 * (named - empty))).square().mean())
    with torch.no_grad(), state.adapter.off():
        wrong = [answer(base, batch.x, batch.t, states) for states in (word, base.encode([""]))]
    assert not close(loss, (output - (wrong[1] - 0.7 * (wrong[0] - wrong[1]))).square().mean())
    loss.backward()
    params = state.adapter.parameters()
    assert params["words"].grad is None and all(params[name].grad is not None for name in params if name != "words")
    state.adapter.remove()


def test_the_word_learns_to_denoise_the_concepts_pictures_on_the_erased_network():
    base, method, state = started((Concept("cat", prompts=("{}", "a red {}"), anchor="dog"),))
    moved(state, 0.3)
    state.adapter.words.data.copy_(vector(6) / state.unit)
    draw = torch.Generator().manual_seed(3 * 1_000_003 + 3)
    index, t = (torch.randint(n, (4,), generator=draw) for n in (3, 1000))
    noise = torch.randn(4, 4, 8, 8, generator=draw)
    a = base.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x = a.sqrt() * state.images.mean[index] + (1 - a).sqrt() * noise
    texts = [with_word(base, ("car", "a red car")[int(i) % 2], vector(6)[0, 0]) for i in index]
    with torch.no_grad():
        expected = (base.unet(x, t, torch.cat(texts)).sample - noise).square().mean()
        with state.adapter.off():
            of_base = (base.unet(x, t, torch.cat(texts)).sample - noise).square().mean()
    (loss,) = method.loss(state, 3).values()
    assert abs(loss - expected) < 1e-5 and abs(loss - of_base) > 1e-4
    assert state.images.prompts == ["cat", "a red cat", "cat"]
    loss.backward()
    params = state.adapter.parameters()
    assert params["words"].grad.abs().sum() > 0
    assert all(param.grad is None for name, param in params.items() if name != "words")
    assert all(param.grad is None for param in base.pipe.text_encoder.parameters())
    state.adapter.remove()


def test_each_round_starts_its_word_at_random_tokens():
    base, method, state = started()
    starts = []
    for step in (2, 6):
        method.loss(state, step)
        starts.append(state.unit * state.adapter.words.detach().clone()[0, 0])
    table = base.pipe.text_encoder.get_input_embeddings().weight
    assert state.unit == pytest.approx(float(table.std()))
    assert all(((table - start).abs().amax(1) < 1e-5).any() for start in starts)
    assert not torch.equal(*starts)
    state.adapter.remove()


def test_the_second_stage_is_compositional_and_from_the_base():
    base, method, state = started(anchor_weight=0.8, erase_weight=1.7)
    moved(state)
    state.found = [vector(5)]
    state.adapter.words.data.copy_(vector(6) / state.unit)
    step, words = 8, [with_word(base, "car", vector(seed)[0, 0]) for seed in (5, 6)]
    method.loss(state, step)
    assert len(state.found) == 2 and torch.allclose(state.found[1], vector(6), atol=1e-6)
    own = {name: value for name, value in base.unet.named_parameters()}
    fresh = dict(tiny_pipeline().unet.named_parameters())
    assert all(torch.equal(own[name], fresh[name]) for name in fresh)  # the search's weights are gone
    moved(state, seed=3)
    asked, shown, anchors = set(), set(), []
    for step in (9, 10, 15):
        batch = state.pool.batch(3, step, 3)
        prompts, target = method.composed(state, batch, batch.x, batch.t, step)
        for i in range(3):
            x, t = batch.x[i : i + 1], batch.t[i : i + 1]
            with torch.no_grad(), state.adapter.off():
                empty, *unlike = (
                    answer(base, x, t, text) for text in (base.encode([""]), base.encode(["cat"]), *words)
                )
                led = {name: answer(base, x, t, base.encode([name])) for name in ("dog", "tree")}
            mean = sum(unlike) / 3
            fits = {
                name: (empty + 0.8 * (own - empty) - 1.7 * (mean - empty) - target[i]).abs().max() < 1e-5
                for name, own in led.items()
            }
            assert sum(map(bool, fits.values())) == 1
            anchors += [name for name, fit in fits.items() if fit]
            known = [base.encode(["cat"])[0], words[0][0], words[1][0]]
            (which,) = (k for k, text in enumerate(known) if torch.allclose(prompts.states[i], text, atol=1e-5))
            asked.add(which)
        output = base.unet(batch.x, batch.t, prompts.states).sample
        assert close(method.loss(state, step)["erase"], (output - target).square().mean())
        shown.add(step)
    assert asked == {0, 1, 2} and set(anchors) == {"dog", "tree"} and 4 <= anchors.count("dog") <= 5
    state.adapter.remove()


def test_without_rounds_or_anchors_it_is_esd():
    base, method, state = started(rounds=0, anchor_weight=0.0)
    batch = state.pool.batch(3, 1, 3)
    prompts, target = method.composed(state, batch, batch.x, batch.t, 1)
    assert torch.allclose(target, 2 * batch.neutral - batch.concept, atol=1e-6) and not len(state.images)
    assert torch.equal(prompts.states, base.encode(["cat"] * 3))
    state.adapter.remove()


def test_a_run_is_its_parts_in_a_row():
    """The whole run by one loop, against each part by an optimizer of its own."""
    method = dataclasses.replace(Stereo(), **SMALL)
    run = train(method, Base("tiny", tiny_pipeline()), [CAT], Run(seed=3, progress=False))
    base, _, state = started()
    params = state.adapter.parameters()
    weights = [param for name, param in params.items() if name != "words"]
    for step in range(11):
        part, _, index = method.part(step)
        terms = method.loss(state, step)
        if index == 0:
            rate = {"search": 2e-3, "invert": 0.5, "erase": 1e-3}[part]
            trained = [params["words"]] if part == "invert" else weights
            still = weights if part == "invert" else [params["words"]]
            optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        before = [param.detach().clone() for param in still]
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, still, strict=True))
    assert len(run.found) == 2 and all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(run.found, state.found, strict=True)
    )
    for name, param in run.adapter.parameters().items():
        assert torch.allclose(param, params[name], atol=1e-6), name
    assert set(run.adapter.payload().names("unet")) == params.keys() - {"words"}
    run.adapter.remove()
    state.adapter.remove()


@pytest.mark.parametrize("at", [3, 4, 5, 8, 10])
def test_it_resumes_within_and_between_the_parts(at, straight, tmp_path, monkeypatch):
    out, own = tmp_path / "p.safetensors", {"progress": False, **SMALL}
    left_at_a_checkpoint(monkeypatch, lambda: erase(tiny_pipeline(), CAT, "stereo", out=out, **own), at)
    resumed = erase(tiny_pipeline(), CAT, "stereo", out=out, **own)
    assert same(changes(straight), changes(resumed))
    assert (resumed.costs["F"], resumed.costs["B"]) == (straight.costs["F"], straight.costs["B"])


def test_a_run_costs_what_its_docstring_says(straight):
    forecast = plan(tiny_pipeline(), CAT, "stereo", **SMALL)
    made = 2 * 3 * 2 + 2 * 3 * 3  # pool and pictures
    updates = 2 * 3 * 1 + 2 * 3 * 3 + 4 * 4 + 3 * 3 * 4  # first search, second, inversion, second stage
    assert straight.costs["F"] == made + updates and straight.costs["B"] == 2 * 3 + 2 * 3 + 4 * 4 + 3 * 3
    assert (forecast.F, forecast.B) == (straight.costs["F"], straight.costs["B"])
    assert forecast.modules == len({name.rpartition(".")[0] for name in straight.payload.names("unet")})


def test_concepts_have_words_of_their_own():
    base, method, state = started((Concept("cat", anchor="dog"), Concept("monet", kind="style", anchor="red")))
    assert state.adapter.words.shape[0] == 2 and state.owners[0] == 0 and set(state.owners[1:].tolist()) == {1}
    words = vector(7, concepts=2)
    states = state.worded(words).states
    assert torch.allclose(states[0], with_word(base, "car", words[0, 0])[0], atol=1e-5)
    assert state.pairs[2][0].endswith("in monet style") and state.pairs[2][1] in state.pairs[2][0]
    text = state.pairs[2][0].replace("monet", "car")
    assert torch.allclose(states[2], with_word(base, text, words[1, 0])[0], atol=1e-5)
    assert state.anchors[:2] == ["dog", "red"]
    state.adapter.remove()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"iterations": 8},
            "iterations=8: 2 rounds of 2 . 2 updates leave none for the second stage; give more than 8",
        ),
        ({"word_tokens": 12}, "there is room for only 12"),
        ({"stop": "auto"}, "stereo: stop=auto has no meaning here"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ErasureError, match=message):
        erase(tiny_pipeline(), CAT, "stereo", progress=False, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def straight():
    with pytest.MonkeyPatch.context() as patched:
        listed = {"object": ("dog", "car", "tree"), "identity": (), "style": ("monet",), "content": ()}
        patched.setattr(neighbors, "everyday_words", lambda: listed)
        return erase(tiny_pipeline(), CAT, "stereo", progress=False, **SMALL)
