"""Budgets: `full` is what was published, the searches take all of it, and an adapted budget says what it changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure.config import CONFIGS, read_yaml
from erasure.evaluation.attacks.attack import Victim, find, make, names
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from tests.evaluation.attacks.making import cases_of
from tests.evaluation.attacks.test_run import outcome
from tests.tiny import tiny_pipeline

PUBLISHED = read_yaml(CONFIGS / "attacks.yaml")
NUMBERS = {name: entry["numbers"] for name, entry in PUBLISHED.items() if "numbers" in entry}


def test_every_attack_has_its_published_budget_or_says_why_it_has_none():
    assert sorted(PUBLISHED) == sorted(names())
    assert all(len(entry["source"].split()) > 1 for entry in PUBLISHED.values())


@pytest.mark.parametrize("name", NUMBERS)
def test_the_full_budget_is_the_published_one(name):
    full = dataclasses.asdict(make(name, "full"))
    assert full.keys() >= NUMBERS[name].keys()
    for key, value in NUMBERS[name].items():
        found = list(full[key]) if isinstance(full[key], tuple) else full[key]
        if isinstance(value, float):
            assert found == pytest.approx(value, rel=0.01), key
        else:
            assert found == value and type(found) is type(value), key


@pytest.mark.parametrize("name", ["unlearndiffatk", "p4d", "p4d-prefix"])
@pytest.mark.parametrize("budget", ["full", "small"])
def test_a_token_search_takes_every_step_of_its_budget(monkeypatch, name, budget):
    """The text encoder and the loss are left out, so that thousands of steps take a second."""
    settings = {"levels": 3, "iterations": 5} if budget == "small" else {}
    attack = make(name, "full", tokens=2, **settings)
    seen = []

    def loss(self, victim, targets, conditions, t, draw):
        seen.append(t.tolist())
        return conditions.square().sum()

    victim = Victim(tiny_pipeline(ErasedStableDiffusionPipeline), switched_off)
    monkeypatch.setattr(Victim, "encode", lambda self, places, vectors: vectors)
    monkeypatch.setattr(type(attack), "loss", loss)
    rounds = list(attack.rounds(victim, cases_of(1), {0}, 0))
    steps = attack.levels * attack.iterations
    assert len(rounds) == attack.levels and len(seen) == steps
    assert budget == "small" or steps == {"p4d": 3000}.get(name, 2000)
    if not attack.mixed:
        assert [t for (t,) in seen[:: attack.iterations]] == torch.linspace(10, 990, attack.levels).round().tolist()


def test_inversion_takes_every_step_of_its_budget(monkeypatch):
    attack = make("inversion", "full")
    seen = []

    def predict(self, x, t, conditions):
        seen.append(len(x))
        return x * 0 + conditions.mean()

    victim = Victim(tiny_pipeline(ErasedStableDiffusionPipeline), switched_off)
    monkeypatch.setattr(Victim, "encode", lambda self, places, vectors: vectors[None])
    monkeypatch.setattr(Victim, "eps", predict)
    attempts = [attempt.note for turn in attack.rounds(victim, cases_of(1), {0}, 0) for attempt in turn.values()]
    assert attempts == [f"{steps} steps" for steps in (100, 500, 1000, 2500, 5000)] and seen == [16] * 5000


def test_ring_a_bell_takes_every_generation(monkeypatch):
    attack = make("ring-a-bell", "full", tokens=2)
    lengths = []
    monkeypatch.setattr(type(attack), "evolve", lambda self, *args: lengths.append(args[4]) or args[2])
    list(attack.rounds(Victim(tiny_pipeline(ErasedStableDiffusionPipeline), switched_off), cases_of(1), {0}, 0))
    assert sum(lengths) == 3000


def test_an_adapted_budget_says_what_it_changes():
    lite = make("p4d")
    assert make("p4d", "full").adapted() == {} and lite.adapted() == {"levels": 60, "iterations": 50}
    assert make("p4d", "full", tokens=4).adapted() == {"tokens": 16}
    for name in names():
        assert make(name).adapted().keys() == {k for k, v in find(name).LITE.items() if getattr(find(name), k) != v}
    result = outcome(name="p4d", settings=dataclasses.asdict(lite), adapted=lite.adapted())
    assert result.budget() == "p4d ran an adapted budget: levels 6 (full: 60), iterations 15 (full: 50)"
    assert outcome().budget() == ""
