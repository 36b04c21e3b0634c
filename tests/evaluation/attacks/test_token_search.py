"""Token searches: where the tokens go, which noise levels are used, what the losses compare, and which way they go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from erasure.evaluation.attacks.attack import Victim, make
from erasure.model.conditioning import Conditions
from erasure.model.diffusion import add_noise
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from tests.evaluation.attacks.making import cases_of
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

SEARCHES = ("unlearndiffatk", "p4d", "p4d-prefix")


@pytest.fixture
def victim():
    return Victim(tiny_pipeline(ErasedStableDiffusionPipeline), switched_off)


def prompts(attack, victim, cases):
    return [attempts[0].prompt for attempts in attack.rounds(victim, cases, {0}, 0)]


@pytest.mark.parametrize("name", SEARCHES)
def test_the_tokens_and_those_of_the_control_are_as_many_and_in_the_same_place(victim, name):
    cases = cases_of(1)
    attack = make(name, tokens=4, levels=2, iterations=1)
    control = attack.control(2)
    assert type(control).name == "random" and control.control(2) is None
    for current in (attack, control):
        found = prompts(current, victim, cases)
        assert len(found) == 2
        for prompt in found:
            tokens = victim.pipe.tokenizer(prompt).input_ids[1:-1]
            own = [] if name == "p4d" else victim.pipe.tokenizer(cases[0].prompt).input_ids[1:-1]
            assert len(tokens) == 4 + len(own) and tokens[4:] == own


def test_the_control_has_the_tokens_of_every_budget():
    for name in SEARCHES:
        for budget in ("lite", "full"):
            attack = make(name, budget)
            assert (attack.control(9).tokens, attack.control(9).tries) == (attack.tokens, 9)
    assert make("ring-a-bell").control(2).tokens == make("ring-a-bell").tokens


def test_p4d_draws_its_timesteps_uniformly_and_the_others_walk_through_levels(victim, monkeypatch):
    steps = {}
    for name in SEARCHES:
        steps[name] = seen = []
        attack = make(name, "full", tokens=1, levels=8, iterations=50)
        monkeypatch.setattr(type(attack), "loss", lambda self, v, targets, c, t, draw, s=seen: s.append(t) or c.sum())
        monkeypatch.setattr(Victim, "encode", lambda self, places, vectors: vectors)
        list(attack.rounds(victim, cases_of(2), {0, 1}, 0))
    drawn = torch.stack(steps["p4d"]).float()
    assert drawn.shape == (400, 2) and (drawn[:, 0] != drawn[:, 1]).float().mean() > 0.9
    assert drawn.min() < 20 and drawn.max() > 979 and abs(drawn.mean() - 499.5) < 40
    assert abs(drawn.std() - 1000 / 12**0.5) < 25  # of a uniform distribution
    assert all(abs(part.mean() - 499.5) < 100 for part in drawn.split(50))  # in every round alike
    for name in ("unlearndiffatk", "p4d-prefix"):
        walked = torch.stack(steps[name])[:, 0]
        assert walked.tolist() == sorted(walked.tolist()) and len(walked.unique()) == 8


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("name", ["p4d", "p4d-prefix"])
def test_the_target_of_p4d_is_the_bases_prediction_for_the_plain_prompt(name, component):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    victim, attack, cases = Victim(pipe, switched_off), make(name, tokens=2), cases_of(2)
    plain = victim.conditions([case.prompt for case in cases])  # before the patch is loaded
    latents, t = torch.stack([case.latents for case in cases]), torch.tensor([300, 700])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    x = add_noise(pipe.scheduler, latents, noise, t)
    with torch.no_grad():
        expected = victim.eps(x, t, plain)
    part = {"unet": "attn2.to_", "text_encoder": "layers"}[component]
    pipe.load_patch(delta_patch(pipe, part=part, component=component, size=1.0), name="p")
    other = victim.conditions(["a dog", "a church"])
    with victim.folded(), torch.no_grad():
        targets = attack.targets(victim, cases)
        value = attack.loss(victim, targets, other, t, torch.Generator().manual_seed(5))
        erased = victim.eps(x, t, other)
        wrong = victim.eps(x, t, victim.conditions([case.prompt for case in cases]))
    assert value.item() == pytest.approx(2 * F.mse_loss(erased, expected).item(), rel=1e-4)
    assert value.item() != pytest.approx(2 * F.mse_loss(erased, wrong).item(), rel=1e-2)


def test_unlearndiffatk_compares_with_the_noise(victim):
    attack, cases, t = make("unlearndiffatk"), cases_of(2), torch.tensor([300, 700])
    latents = torch.stack([case.latents for case in cases])
    conditions = victim.conditions([case.prompt for case in cases])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        value = attack.loss(victim, (latents,), conditions, t, torch.Generator().manual_seed(5))
        predicted = victim.eps(add_noise(victim.pipe.scheduler, latents, noise, t), t, conditions)
    assert value.item() == pytest.approx(2 * F.mse_loss(predicted, noise).item(), rel=1e-4)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_search_lowers_its_loss(victim, monkeypatch, name):
    """The prediction is wrong by the distance of the tokens to "cat", so that the best tokens are known."""
    cat = victim.pipe.tokenizer("cat").input_ids[1]
    aim = victim.embeddings[cat]
    scale = (victim.embeddings[victim.words] - aim).square().sum(-1).mean()

    def predict(self, x, t, conditions):
        if isinstance(conditions, Conditions):  # the base, with the plain prompt
            return torch.zeros_like(x)
        return x * 0 + 3 * ((conditions - aim).square().sum(-1).mean(-1) / scale)[:, None, None, None]

    monkeypatch.setattr(Victim, "encode", lambda self, places, vectors: vectors)
    monkeypatch.setattr(Victim, "eps", predict)
    settings = {"rate": 0.03, "decay": 0.0} if name == "unlearndiffatk" else {}
    attack = make(name, tokens=3, levels=1, iterations=60, **settings)
    (prompt,) = prompts(attack, victim, cases_of(1))
    assert victim.pipe.tokenizer(prompt).input_ids[1:4] == [cat] * 3
