"""Relearning: LoRA as peft has it, weights that come back, and a control without the concept."""

from __future__ import annotations

import copy

import pytest
import torch

from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Case, Victim, make
from erasure.evaluation.attacks.relearning import WeightUpdate, updated_weights
from erasure.evaluation.attacks.ring_a_bell import FILLER
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from tests.tiny import tiny_pipeline


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def test_moved_weights_learn_and_come_back():
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    layer.requires_grad_(False)
    delta = [torch.ones_like(layer.weight)]
    with updated_weights([layer.weight], lambda: delta) as move:
        assert torch.equal(layer.weight, before + 1) and layer.weight.requires_grad
        delta[0] += 1
        move()
        assert torch.equal(layer.weight, before + 2)
    assert torch.equal(layer.weight, before) and not layer.weight.requires_grad


def test_relearning_is_pefts_lora():
    """One layer, as peft wraps it, from the same start: the same change after some steps of AdamW."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    net, x, want = torch.nn.Sequential(torch.nn.Linear(6, 5)), torch.randn(8, 6), torch.randn(8, 5)
    plain = copy.deepcopy(net)
    learnt = WeightUpdate([plain[0].weight], 3, torch.Generator().manual_seed(0))
    wrapped = inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=["0"]), net)
    down, up = wrapped[0].lora_A["default"].weight, wrapped[0].lora_B["default"].weight
    assert [leaf.shape for leaf in learnt.leaves] == [down.shape, up.shape] and not up.any()
    assert learnt.leaves[0].abs().max() < 6**-0.5 >= down.abs().max()  # the same range
    with torch.no_grad():
        down.copy_(learnt.leaves[0])
    ours = torch.optim.AdamW(learnt.leaves, lr=0.01, weight_decay=0)
    theirs = torch.optim.AdamW([down, up], lr=0.01, weight_decay=0)
    for _ in range(3):
        theirs.zero_grad()
        ((wrapped(x) - want) ** 2).mean().backward()
        theirs.step()
        with updated_weights([plain[0].weight], learnt):
            gradients = torch.autograd.grad(((plain(x) - want) ** 2).mean(), [plain[0].weight])
        ours.zero_grad()
        torch.autograd.backward(learnt(), gradients)
        ours.step()
    assert torch.allclose(learnt()[0], wrapped[0].get_delta_weight("default"), atol=1e-6) and learnt()[0].any()
    with pytest.raises(ErasureError, match="rank=0"):
        WeightUpdate([plain[0].weight], 0, torch.Generator())


def test_relearnings_control_learns_pictures_without_the_concept(pipe, monkeypatch):
    prompts, real = [], Victim.base_latents
    monkeypatch.setattr(
        Victim, "base_latents", lambda self, texts, *others: prompts.extend(texts) or real(self, texts, *others)
    )
    parts = [("a cat in red", "a", "in red"), ("a pet", "", "a pet")]
    cases = [Case(str(i), text, i, "cat", torch.zeros(4, 8, 8), *ends) for i, (text, *ends) in enumerate(parts)]
    control = make("relearning", steps=(1, 2), batch=2).control(1)
    assert len(list(control.rounds(Victim(pipe, switched_off), cases, {0, 1}, 0))) == 1
    assert prompts == [f"a {FILLER} in red", ""]
