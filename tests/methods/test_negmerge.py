"""NegMerge: its loss against the formula, the fine-tunes it makes, and how it chooses its scale."""

from __future__ import annotations

import logging

import pytest
import torch

from erasure.concepts import neighbors
from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods.negmerge import NegMerge, chosen
from erasure.model.base import Base
from erasure.training.loop import train
from erasure.training.run import Run
from tests.conformance.quick import changes, same
from tests.tiny import tiny_pipeline

SMALL = {
    "iterations": 6,
    "fine_tunes": 2,
    "batch_size": 3,
    "image_count": 4,
    "sample_steps": 2,
    "scale_steps": 2,
    "learning_rate": 1e-3,
    "templates": ("{}", "a photo of {}"),
}
CAT = Concept("cat", keep=("car",))


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car", "red cat"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def prepared(base, concepts=(CAT,), **settings):
    method = NegMerge(**{**SMALL, **settings})
    return method, method.prepare(base, list(concepts), Run(seed=3, progress=False))


def test_the_loss_is_that_of_training_on_the_pictures_with_the_fine_tunes_own_caption(base):
    method, state = prepared(base)
    for step, text in ((1, "cat"), (4, "a photo of cat")):
        draw = torch.Generator().manual_seed(3 * 1_000_003 + step)
        index = torch.randint(4, (3,), generator=draw)
        torch.randn(3, *base.latent_shape(), generator=draw)  # of the posterior, which drawn pictures do not have
        t = torch.randint(1000, (3,), generator=draw)
        eps = torch.randn(3, *base.latent_shape(), generator=draw)
        a = base.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        x = a.sqrt() * state.images.mean[index] + (1 - a).sqrt() * eps
        expected = ((base.unet(x, t, base.encode([text] * 3)).sample - eps) ** 2).mean()
        assert torch.allclose(method.loss(state, step)["learn"], expected, rtol=1e-4)
        other = ((base.unet(x, t, base.encode(["dog"] * 3)).sample - eps) ** 2).mean()
        assert not torch.allclose(other, expected, rtol=1e-4)
    state.adapter.remove()


def test_each_fine_tune_is_a_run_of_its_own_from_the_base(base):
    """Adam written out once for each: a start from the base, without moments, at its own rate."""
    method, state = prepared(base, rate_spread=4.0)
    params = state.adapter.parameters()
    start = {key: param.detach().clone() for key, param in params.items()}
    assert [method.fine_tune(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]
    taus = []
    for steps, rate in (((0, 1, 2), 1e-3 / 4), ((3, 4, 5), 1e-3 * 4)):
        with torch.no_grad():
            for key, param in params.items():
                param.copy_(start[key])
        optimizer = torch.optim.AdamW(params.values(), lr=rate, weight_decay=0.0)
        for step in steps:
            optimizer.zero_grad()
            NegMerge.loss.__get__(_Still(method))(state, step)["learn"].backward()
            optimizer.step()
        taus.append({key: (param - start[key]).detach() for key, param in params.items()})
    state.adapter.remove()
    trained = train(method, base, [CAT], Run(seed=3, progress=False))
    trained.adapter.bank()
    tau = trained.adapter.merged()
    for key, found in tau.items():
        agreed = taus[0][key].sign() * taus[1][key].sign() > 0
        expected = torch.where(agreed, (taus[0][key] + taus[1][key]) / 2, 0.0)
        assert torch.allclose(found, expected, rtol=1e-2, atol=2e-6)
    assert 0.1 < trained.adapter.agreement() < 0.99
    trained.adapter.remove()


class _Still:
    """A method whose fine-tunes never end, so that a test begins them itself."""

    def __init__(self, method):
        self._method = method

    def restarts(self, step):
        return False

    def __getattr__(self, name):
        return getattr(self._method, name)


def test_the_patch_leads_away_from_what_was_learnt(base):
    """The fine-tune fits its pictures better than the base, and the patch, which is its negation, worse."""
    settings = {**SMALL, "fine_tunes": 1, "iterations": 30, "scale": 1.0}
    method = NegMerge(**settings)
    state = train(method, base, [CAT], Run(seed=3, progress=False))

    def loss():
        with torch.no_grad():
            return sum(float(method.loss(state, step)["learn"]) for step in range(1, 9))

    learnt = loss()
    with state.adapter.off():
        before = loss()
    method.conclude(state, Run())
    assert learnt < before < loss()
    params = state.adapter.parameters()
    payload = state.adapter.payload()
    with state.adapter.off():
        start = {key: param.detach().clone() for key, param in params.items()}
    assert all(torch.allclose(params[key], start[key] + payload.change("unet", key), atol=1e-6) for key in params)
    state.adapter.remove()


def test_the_scale_erases_most_of_those_that_keep_the_drift_small():
    erased = [[0.1, 0.2], [0.4, 0.3], [0.6, 0.2], [0.9, 0.8]]
    drift = [[0.1, 0.2], [0.2, 0.4], [0.5, 0.4], [0.6, 0.9]]
    assert chosen(erased, drift, 0.5) == 1  # of the least erased level, not of the mean or the first
    assert chosen(erased, drift, 1.0) == 3
    assert chosen(erased, drift, 0.4) == 1  # the bound itself is allowed
    assert chosen(erased, drift, 0.05) == 0  # nothing is allowed: the least drift
    assert chosen(erased[::-1], drift[::-1], 0.05) == 3


def test_the_search_is_recorded_and_a_given_scale_needs_none(base):
    found = erase(base, CAT, "negmerge", progress=False, **SMALL, most_scale=2.0, most_drift=100.0)
    search = found.curves
    assert search["scales"] == [1.0, 2.0] and search["scale"] in (1.0, 2.0) and 0 < search["agreement"] < 1
    assert len(search["erased"]) == len(search["drift"]) == 2 and "steps" not in search
    best = max((0, 1), key=lambda place: min(search["erased"][place]))
    assert search["scale"] == search["scales"][best]
    given = erase(base, CAT, "negmerge", progress=False, **SMALL, scale=search["scale"])
    assert same(changes(found), changes(given)) and given.curves is None
    assert found.costs["F"] > given.costs["F"] and found.costs["B"] == given.costs["B"] == 6 * 3
    zeros = torch.cat([change.flatten() for change in changes(found).values()]) == 0
    assert abs(float(zeros.float().mean()) - (1 - search["agreement"])) < 1e-3


def test_the_search_measures_the_base_minus_the_scaled_task_vector(base, monkeypatch):
    from erasure.training.curves import Curves

    seen, real = [], Curves.measure

    def measure(self, step):
        real(self, step)
        with torch.no_grad():
            seen.append({key: param.clone() for key, param in self.adapter.parameters().items()})

    monkeypatch.setattr(Curves, "measure", measure)
    start = {name: param.clone() for name, param in base.unet.named_parameters()}
    patch = erase(base, CAT, "negmerge", progress=False, **SMALL, most_scale=2.0, most_drift=100.0)
    tau = {key.removeprefix("unet."): -change / patch.curves["scale"] for key, change in changes(patch).items()}
    for place, scale in enumerate((1.0, 2.0)):
        assert all(torch.allclose(seen[place][key], start[key] - scale * tau[key], atol=1e-5) for key in tau)


def test_a_drift_that_no_scale_keeps_small_is_said(base, caplog):
    with caplog.at_level(logging.WARNING, "erasure"):
        patch = erase(base, CAT, "negmerge", progress=False, **SMALL, most_drift=1e-6)
    assert "above most_drift=1e-06 as at every scale that was tried" in caplog.text
    assert patch.curves["scale"] == patch.curves["scales"][0]


def test_the_forecast_counts_the_search_and_what_is_kept_of_the_fine_tunes(base):
    counted, costs = plan(base, CAT, "negmerge", **SMALL), erase(base, CAT, "negmerge", progress=False, **SMALL).costs
    assert (counted.F, counted.B) == (costs["F"], costs["B"])
    assert counted.training_bytes == (16 + 5) * counted.weights


def test_styles_are_learnt_on_their_subjects(base):
    _, state = prepared(base, [Concept("monet", kind="style", keep=("red",))], image_count=2)
    assert {"monet style", "a dog in monet style"} & set(state.images.prompts)
    assert len(state.images) == len(state.pairs) > 2
    state.adapter.remove()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"fine_tunes": 7}, "iterations=6: must be at least fine_tunes=7"),
        ({"fine_tunes": 101, "iterations": 200}, "fine_tunes=101: must be between 1 and 100"),
        ({"templates": ("a photo",)}, "'a photo' lacks {}"),
        ({"templates": ()}, "templates is empty"),
        ({"consensus": "most"}, "sign, none"),
        ({"scale": 0.0}, "scale=0.0: must be above 0"),
        ({"stop": "auto"}, "negmerge: stop=auto has no meaning here: a fine-tune learns"),
        ({"variant": "nothing"}, "x-strict"),
    ],
)
def test_bad_settings_say_what_is_allowed(base, setting, says):
    with pytest.raises(ErasureError, match=says):
        erase(base, CAT, "negmerge", progress=False, **{**SMALL, **setting})
