"""The options that every method which trains shares: weights of forget samples, and gradient surgery."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.method import GradientMethod
from erasure.methods import configure
from erasure.model.base import Base
from erasure.training.reweighting import Samples
from erasure.training.run import Run
from tests.conformance.quick import changes, left_at_a_checkpoint, same, small, weights
from tests.conformance.sketches import METHODS, those
from tests.tiny import tiny_pipeline

# The loop is the same for all methods: these stand for weights alone, for both, and for what is outside the UNet.
RUNS = {
    "esd": {"reweight": "dynamic"},
    "spm": {"reweight": "static", "surgery": "first"},
    "advunlearn": {"surgery": "first"},
}
TRAINED = those(GradientMethod)
FORGETTING = [name for name in TRAINED if METHODS[name].FORGET]
RETAINING = [name for name in TRAINED if METHODS[name].RETAIN]


def test_methods_say_which_terms_forget_and_which_retain():
    assert {"esd", "salun", "advunlearn", "spm", "unguide"} <= set(FORGETTING)
    assert {"salun", "advunlearn", "spm"} <= set(RETAINING)


@pytest.mark.parametrize("method", sorted({*FORGETTING, *RETAINING}))
def test_the_terms_are_those_of_the_loss(method):
    """Both weightings call each sample by its own loss; without the option the same term is a number, its mean."""
    base, found = Base("tiny", tiny_pipeline()), {}
    for mode in ("none", "static", "dynamic") if method in FORGETTING else ("none",):
        own = configure(method, "object", {**small(method), "reweight": mode})
        state = own.prepare(base, [Concept("cat", anchor="dog")], Run(seed=3, progress=False))
        with torch.no_grad():
            for param in state.adapter.parameters().values():
                param.mul_(1.2).add_(0.01)
        found[mode] = own.loss(state, 3 if method == "stereo" else 1)  # its second update trains a word
        state.adapter.remove()
    assert set(METHODS[method].RETAIN) <= set(found["none"]) and METHODS[method].FORGET not in METHODS[method].RETAIN
    if method not in FORGETTING:
        return
    term, static, dynamic = (terms[METHODS[method].FORGET] for terms in found.values())
    assert isinstance(static, Samples) and isinstance(dynamic, Samples)
    assert static.losses.shape == static.own.shape == static.t.shape == (len(static.t),)
    for samples in (static, dynamic):
        assert torch.allclose(samples.losses.mean(), term, rtol=1e-4) and not samples.own.requires_grad
    assert static.losses.requires_grad and not torch.allclose(static.own, dynamic.own, rtol=1e-3)


@pytest.mark.parametrize("method", RUNS)
def test_options_change_the_patch_and_survive_an_interruption(method, tmp_path, monkeypatch):
    """The small run's plain patch is another; the forecast counts what the run counts, and the header says it."""
    options = RUNS[method]
    pipe, own = tiny_pipeline(), {**small(method), "batch_size": 3, **options}
    before = weights(pipe)
    straight = erase(pipe, "cat", method, progress=False, **own)
    plain = erase(pipe, "cat", method, progress=False, **{**small(method), "batch_size": 3})
    assert same(before, weights(pipe)) and not same(changes(straight), changes(plain))
    assert options.items() <= straight.config.items()
    out = tmp_path / "p.safetensors"
    left_at_a_checkpoint(monkeypatch, lambda: erase(tiny_pipeline(), "cat", method, out=out, progress=False, **own))
    resumed = erase(tiny_pipeline(), "cat", method, out=out, progress=False, **own)
    assert same(changes(straight), changes(resumed))
    forecast = plan(tiny_pipeline(), "cat", method, **own)
    for costs in (resumed.costs, {"F": forecast.F, "B": forecast.B}):
        assert (costs["F"], costs["B"]) == (straight.costs["F"], straight.costs["B"])
    assert straight.costs["F"] == plain.costs["F"]
    assert (straight.costs["B"] > plain.costs["B"]) == ("surgery" in options)


@pytest.mark.parametrize("method", TRAINED)
def test_an_option_that_a_method_cannot_use_is_refused_before_the_model_is_loaded(method):
    if method not in RETAINING:
        with pytest.raises(ErasureError, match=f"{method}: surgery=first has no meaning here.*no term that retains"):
            erase("no such model", "cat", method, surgery="first")
    if method not in FORGETTING:
        with pytest.raises(ErasureError, match=f"{method}: reweight=static has no meaning here"):
            erase("no such model", "cat", method, reweight="static")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"reweight": "hard"}, "none, static, dynamic"),
        ({"reweight_temperature": 0.0}, "reweight_temperature=0.0: must be above 0"),
        ({"surgery_weight": 0.0}, "surgery_weight=0.0: must be above 0"),
        ({"surgery": "third"}, "none, first, uno, doco"),
    ],
)
def test_bad_values_say_what_is_allowed(setting, says):
    with pytest.raises(ErasureError, match=says):
        configure("spm", "object", setting)


def test_own_settings_are_listed_before_those_that_all_methods_share():
    from erasure.config import fields_of

    names = [field.name for field in fields_of(METHODS["esd"])]
    shared = {"reweight", "reweight_temperature", "surgery", "surgery_weight", "sparsity", "sparsity_l1"}
    assert names[0] == "variant" and set(names[-9:]) == shared | {"sparsity_share", "sparsity_turn", "sparsity_rank"}


@pytest.mark.parametrize("surgery", ["first", "uno"])
def test_surgery_works_with_gradient_checkpointing(surgery):
    own = {**small("spm"), "surgery": surgery, "surgery_weight": 10.0, "iterations": 2}
    plain, frugal = (
        changes(erase(tiny_pipeline(), "cat", "spm", progress=False, gradient_checkpointing=on, **own))
        for on in (False, True)
    )
    assert all(torch.allclose(plain[key], frugal[key], rtol=1e-3, atol=1e-6) for key in plain)


def test_unos_term_changes_the_patch_and_costs_what_its_forecast_says(tmp_path, monkeypatch):
    """SPM's one call serves both losses: five passes for one. Its retain gradient is zero before the first update."""
    own = {**small("spm"), "surgery": "uno", "surgery_weight": 10.0, "iterations": 3}
    straight = erase(tiny_pipeline(), "cat", "spm", progress=False, **own)
    plain, faint = (
        erase(tiny_pipeline(), "cat", "spm", progress=False, **{**own, **other})
        for other in ({"surgery": "none"}, {"surgery_weight": 1e-12})
    )
    assert all(torch.isfinite(change).all() for change in changes(straight).values())
    far, near = (
        sum(float((one - changes(plain)[key]).square().sum()) for key, one in changes(other).items())
        for other in (straight, faint)
    )
    assert far > 1e4 * near  # without its weight there is nothing else that differs but rounding
    out = tmp_path / "p.safetensors"
    left_at_a_checkpoint(monkeypatch, lambda: erase(tiny_pipeline(), "cat", "spm", out=out, progress=False, **own))
    assert same(changes(straight), changes(erase(tiny_pipeline(), "cat", "spm", out=out, progress=False, **own)))
    forecast, first, lean = (
        plan(tiny_pipeline(), "cat", "spm", **{**own, "surgery": s}) for s in ("uno", "first", "none")
    )
    assert (forecast.F, forecast.B) == (straight.costs["F"], straight.costs["B"])
    assert forecast.B == 5 * plain.costs["B"] and forecast.F == plain.costs["F"]
    assert forecast.activation_bytes > 1.5 * lean.activation_bytes
    assert forecast.training_bytes == first.training_bytes + 4 * first.weights


def test_what_cannot_be_differentiated_twice_is_refused():
    with pytest.raises(ErasureError, match="gem: surgery=uno has no meaning here.*no second derivative.*surgery=first"):
        configure("gem", "object", {"surgery": "uno"})
    with pytest.raises(ErasureError, match="compiled network has no second derivatives"):
        erase("no such model", "cat", "spm", surgery="uno", compile=True)
    with pytest.raises(ErasureError, match="those of 2 processes are averaged"):
        plan(tiny_pipeline(), "cat", "spm", processes=2, **{**small("spm"), "surgery": "uno"})


def test_static_weights_cost_salun_a_forward_for_each_forget_image_and_esd_nothing():
    counted = {
        (method, mode): plan(tiny_pipeline(), "cat", method, **{**small(method), "reweight": mode}).F
        for method in ("salun", "esd")
        for mode in ("none", "static")
    }
    own = configure("salun", "object", small("salun"))
    assert counted["salun", "static"] - counted["salun", "none"] == own.iterations * own.batch_size
    assert counted["esd", "static"] == counted["esd", "none"]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_loss_that_decides_is_the_samples_own(mode):
    """Of sampled states: the distance from the guided prediction that the sampler followed; of images: from the noise.

    It is small where the model still draws the concept, so it is not the term that forgets, which falls as it goes.
    """
    base = Base("tiny", tiny_pipeline())
    for name in ("esd", "salun"):
        own = configure(name, "object", {**small(name), "reweight": mode})
        state = own.prepare(base, [Concept("cat", anchor="dog")], Run(seed=3, progress=False))
        with torch.no_grad():
            for param in state.adapter.parameters().values():
                param.mul_(1.3)
        samples = own.loss(state, 1)[own.FORGET]
        if name == "esd":
            batch = own.tuples(state, 1)
            x, t, truth = batch.x, batch.t, batch.neutral + own.trajectory_guidance * (batch.concept - batch.neutral)
        else:
            draw = torch.Generator().manual_seed(state.seed * 1_000_003 + 1)
            index, _ = own.chosen(state, 1, draw)
            x, t, truth = own.noised(base, state.forget.sample(index, draw), draw)
        with torch.no_grad(), state.adapter.off() if mode == "static" else nullcontext():
            output = base.unet(x, t, base.encode(["cat"] * len(x))).sample
        assert torch.allclose(samples.own, ((output - truth) ** 2).mean((1, 2, 3)), rtol=1e-3)
        assert not torch.allclose(samples.own, samples.losses, rtol=0.1)
        state.adapter.remove()
