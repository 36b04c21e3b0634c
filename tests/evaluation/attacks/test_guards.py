"""Attacks against guards: the search goes through them, and what has no meaning against them is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Victim, make
from erasure.evaluation.attacks.run import attack
from erasure.patch import Guard, Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.guards.tokens import Tokens
from erasure.pipelines.strengths import switched_off
from tests.evaluation.attacks.making import cases_of
from tests.evaluation.attacks.test_run import QUICK, SMALL, Likeness
from tests.patch.making import delta_patch
from tests.tiny import latents, tiny_pipeline

SLD = {"safety_scale": 3.0, "threshold": 1.0, "warm_up": 0.3, "momentum": 0.5, "momentum_decay": 0.7}
FILTER = {
    **{"margin": 0.0, "steps": 0.7, "midpoint": 0.0, "slope": 1e4, "padding": True, "negative": False},
    **{"reattention": False, "wide_scale": 0.9, "narrow_scale": 0.2, "published": False},
}
GUARDS = {
    "guidance": Guard("guidance", ("cat",), SLD),
    "values": Guard("values", ("cat",), {"peak": 2.0, "slope": 0.0, "centre": 0.0}),
    "tokens": Guard("tokens", ("cat",), FILTER),
}
PROMPTS = ["a red cat", "van gogh night"]


def load(pipe, form, **gate):
    pipe.load_patch(Patch(payload=GUARDS[form], method="test", concepts=[{"name": "cat"}], **gate), name="p")


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.mark.parametrize("form", GUARDS)
def test_a_search_sees_the_predictions_that_the_pipeline_draws_with(pipe, form):
    load(pipe, form, gate={"kind": "text", "texts": ["blue church"], "threshold": 0.99})
    victim = Victim(pipe, switched_off)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(row)) for row in (0, 1)])
    seen = {}
    for name, inside in (("search", victim.folded()), ("apart", nullcontext()), ("base", victim.unpatched())):
        with inside, torch.no_grad(), victim.reading(PROMPTS):
            seen[name] = victim.eps(noise, torch.tensor([601, 601]), victim.conditions(PROMPTS))
    assert torch.equal(seen["apart"], seen["base"])
    pipe.fuse_patches()  # without the gate
    pipe.scheduler.set_timesteps(1)
    pipe.scheduler.timesteps = torch.tensor([601])
    pipe.scheduler.set_timesteps = lambda *_, **__: None
    drawn = latents(pipe, PROMPTS, steps=1, guidance=1.0)
    wanted = pipe.scheduler.step(seen["search"], 601, noise).prev_sample
    assert torch.allclose(drawn, wanted, atol=1e-4)
    assert not torch.allclose(drawn, pipe.scheduler.step(seen["base"], 601, noise).prev_sample, atol=1e-3)


@pytest.mark.parametrize("form", GUARDS)
def test_samples_of_different_noise_are_guarded_each_by_its_own(pipe, form):
    load(pipe, form)
    victim, conditions = Victim(pipe, switched_off), Victim(pipe, switched_off).conditions(PROMPTS)
    noise, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([901, 101])
    with torch.no_grad():
        with victim.folded(), victim.reading(PROMPTS):
            both = victim.eps(noise, times, conditions)
        for row in (0, 1):
            at = slice(row, row + 1)
            with victim.folded(), victim.reading(PROMPTS[at]):
                alone = victim.eps(noise[at], times[at], conditions[[row]])
            base = victim.eps(noise[at], times[at], conditions[[row]])
            assert torch.allclose(both[at], alone, atol=1e-5)
            # In the warm-up guidance is left as it is, and behind its steps the filter is.
            idle = (form, row) in (("guidance", 0), ("tokens", 1))
            assert torch.equal(alone, base) == idle


@pytest.mark.parametrize("form", GUARDS)
def test_gradients_go_through_the_guard(pipe, form):
    load(pipe, form)
    victim = Victim(pipe, switched_off)
    draw = torch.Generator().manual_seed(3)
    noise, weights = (torch.randn(2, 4, 8, 8, generator=draw, dtype=torch.double) for _ in range(2))
    pipe.unet.double()
    states, time = victim.conditions(PROMPTS).states.double(), torch.tensor([601, 401])
    along = torch.randn(states.shape, generator=draw, dtype=torch.double)

    def value(moved, guarded):
        with victim.folded(guards=guarded), victim.reading(PROMPTS):
            conditions = victim.conditions(PROMPTS)
            return 1e3 * (weights * victim.eps(noise, time, type(conditions)(moved))).sum()

    found = {}
    for guarded in (True, False):
        leaf = states.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(leaf, guarded), leaf)
        with torch.no_grad():
            step = 1e-3
            measured = (value(states + step * along, guarded) - value(states - step * along, guarded)) / (2 * step)
        found[guarded] = float((gradient * along).sum())
        assert found[guarded] == pytest.approx(float(measured), rel=0.02)
    assert abs(found[True] - found[False]) > 0.02 * abs(found[False])


@pytest.mark.parametrize("name", ["unlearndiffatk", "p4d", "p4d-prefix"])
def test_a_search_for_tokens_tells_the_guard_the_words_that_it_tries(pipe, monkeypatch, name):
    load(pipe, "tokens")
    seen, real = [], Tokens.filters

    def filters(self, pipe, texts, prompt):
        seen.append(prompt[0])
        return real(self, pipe, texts, prompt)

    monkeypatch.setattr(Tokens, "filters", filters)
    cases = cases_of(2)
    search = make(name, tokens=2, levels=1, iterations=3)
    attempts = next(search.rounds(Victim(pipe, switched_off), cases, {0, 1}, 0))
    assert len(seen) == 3 * 2 and len(set(seen)) > 2
    if name != "p4d":
        assert all(text.endswith(cases[number % 2].prompt) for number, text in enumerate(seen))
    assert set(attempts) == {0, 1}


@pytest.mark.parametrize("form", GUARDS)
def test_every_guard_can_be_attacked_by_text(pipe, tmp_path, form):
    load(pipe, form)
    names = ["unlearndiffatk", "random"]
    report = attack(pipe, "cat", names[0], folder=tmp_path, settings=SMALL[names[0]], judge=Likeness(), **QUICK)
    assert report.outcome(names[0]).n == 3 and "p is a guard: searches face it" in report.text()


@pytest.mark.parametrize("name", ["relearning", "rece", "encoder"])
def test_an_attack_on_weights_is_refused_where_none_is_changed(pipe, tmp_path, name):
    load(pipe, "guidance")
    match = f"{name} undoes a change of weights, and p changes none. Nothing was attacked"
    with pytest.raises(ErasureError, match=match):
        attack(pipe, "cat", name, folder=tmp_path, settings=SMALL[name], judge=Likeness(), **QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["inversion", "uma", "ring-a-bell-direct"])
def test_embeddings_are_refused_where_a_guard_reads_words(pipe, tmp_path, name):
    load(pipe, "tokens")
    with pytest.raises(ErasureError, match=f"{name} passes embeddings, and p reads the words.*Nothing was attacked"):
        attack(pipe, "cat", name, folder=tmp_path, settings=SMALL[name], judge=Likeness(), **QUICK)
    pipe.set_patches({"p": 0.0})
    report = attack(pipe, "cat", name, folder=tmp_path, settings=SMALL[name], judge=Likeness(), **QUICK)
    assert "No patch is active" in report.text()


def test_next_to_changed_weights_they_run_and_the_rest_is_left_out_with_a_note(pipe, tmp_path):
    load(pipe, "tokens")
    pipe.load_patch(delta_patch(pipe, part="resnets", size=0.5), name="weights")
    options = {"judge": Likeness(), **QUICK}
    report = attack(pipe, "cat", "relearning", folder=tmp_path / "a", settings=SMALL["relearning"], **options)
    assert report.outcome("relearning").n == 3
    options["judge"] = Likeness()
    report = attack(pipe, "cat", ["rece", "img2img"], folder=tmp_path / "b", leave_out=True, **options)
    assert [outcome.name for outcome in report.outcomes] == ["img2img"]
    assert "left out: rece passes embeddings" in report.text()
    with pytest.raises(ErasureError, match="rece passes embeddings"):
        attack(pipe, "cat", ["rece"], folder=tmp_path / "c", leave_out=True, **options)
