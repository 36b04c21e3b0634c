"""Attacks by embeddings: UMA stays in its ball and approaches the base, and concept inversion learns the images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from erasure.evaluation.attacks.attack import Victim, make
from erasure.model.diffusion import add_noise
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from tests.evaluation.attacks.making import cases_of
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline


@pytest.fixture
def victim():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(delta_patch(pipe, part="attn2.to_", size=2.0), name="p")
    return Victim(pipe, switched_off)


def erased_states(victim, cases):
    with victim.folded():
        return victim.conditions([case.prompt for case in cases])


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_uma_and_its_control_stay_in_the_ball_and_use_it(victim, rate):
    """The rate is so high that the search reaches the border of every ball."""
    cases, bounds = cases_of(2), (0.05, 0.2)
    attack = make("uma", "full", bounds=bounds, iterations=15, rate=rate)
    erased = erased_states(victim, cases).states
    norm = erased.norm(dim=-1).mean()
    for bound, attempts in zip(bounds, attack.rounds(victim, cases, {0, 1}, 0), strict=True):
        states = torch.cat([attempts[i].embeds.states for i in (0, 1)])
        lengths = (states - erased).norm(dim=-1) / norm
        assert (lengths <= bound * 1.001).all() and (lengths > bound * 0.95).float().mean() > 0.5
    assert attack.control(2).bounds == bounds and attack.control(2).rate == 0


def mismatch(victim, cases, conditions, base):
    """Return how far the erased model's predictions are from the base's, at fixed timesteps and noises."""
    draw, total = torch.Generator().manual_seed(9), 0.0
    latents = torch.stack([case.latents for case in cases])
    for _ in range(8):
        t = torch.randint(1000, (len(cases),), generator=draw)
        x = add_noise(victim.pipe.scheduler, latents, torch.randn(latents.shape, generator=draw), t)
        with torch.no_grad():
            with victim.unpatched():
                target = victim.eps(x, t, base)
            with victim.folded():
                total += F.mse_loss(victim.eps(x, t, conditions), target).item()
    return total


def test_uma_brings_the_erased_model_nearer_to_the_base(victim):
    cases = cases_of(2)
    with victim.unpatched():
        base = victim.conditions([case.prompt for case in cases])
    erased = erased_states(victim, cases)
    attack = make("uma", "full", bounds=(2.0,), iterations=60)
    (attempts,) = attack.rounds(victim, cases, {0, 1}, 0)
    found = type(base).cat([attempts[i].embeds for i in (0, 1)])
    before = mismatch(victim, cases, erased, base)
    assert mismatch(victim, cases, found, base) < 0.7 * before


def test_inversion_lowers_the_loss_on_the_bases_images(victim, monkeypatch):
    """The model predicts no noise, plus an error that is the word's distance to a known vector."""
    aim = torch.linspace(-1, 1, victim.embeddings.shape[1]) * victim.spread

    def predict(self, x, t, conditions):
        return x * 0 + ((conditions - aim).square().mean((1, 2)) / self.spread**2)[:, None, None, None]

    monkeypatch.setattr(Victim, "encode", lambda self, places, vectors: vectors.expand(2, 1, -1))
    monkeypatch.setattr(Victim, "eps", predict)
    attack = make("inversion", steps=(1, 80), batch=4)
    rounds = [attempts[0].embeds for attempts in attack.rounds(victim, cases_of(2), {0, 1}, 0)]
    first, last = [(word - aim).norm().item() for word in rounds]
    assert last < 0.5 * first
