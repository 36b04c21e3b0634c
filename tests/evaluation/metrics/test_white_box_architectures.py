"""White-box metrics on Stable Diffusion 2 (v-prediction) and XL (two text encoders, pooled text)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.evaluation.attacks.attack import Victim
from erasure.evaluation.evaluate import evaluate
from erasure.evaluation.metrics.white_box import closed_form_leak, compare_predictions, measure_white_box
from erasure.model.conditioning import encode_prompt
from erasure.pipelines import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline
from erasure.pipelines.strengths import switched_off
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.standin import BrightnessJudge
from tests.patch.making import delta_patch, low_rank_patch, same, weights
from tests.tiny import tiny_pipeline

KEPT = ["a dog", "a tree in blue", "a car " * 30]  # the last is longer than the encoders read
QUICK = {"images": 4, "steps": 2, "words": ["dog", "tree"]}


@pytest.fixture(params=["sd2-v", "sdxl"])
def pipe(request):
    cls = ErasedStableDiffusionXLPipeline if request.param == "sdxl" else ErasedStableDiffusionPipeline
    return tiny_pipeline(cls, kind=request.param)


def test_without_patches_nothing_differs_from_the_base(pipe):
    metrics = measure_white_box(pipe, "cat", KEPT, **QUICK).metrics
    assert metrics["drift_target"].value == metrics["drift_kept"].value == 0
    assert metrics["margin"].value == metrics["margin_base"].value != 0
    assert (metrics["closed_leak"].value, metrics["closed_leak"].n) == (1, 2)


@pytest.mark.parametrize("gate", [None, {"kind": "text", "texts": ["cat"]}], ids=["always", "gated"])
def test_a_patch_is_measured_and_weights_are_restored(pipe, gate):
    clean = weights(pipe)
    patch = low_rank_patch(pipe, part="", size=0.5, gate=gate) if gate else delta_patch(pipe, size=0.5)
    pipe.load_patch(patch, name="p", strength=0.7)
    before = weights(pipe)
    white_box = measure_white_box(pipe, "cat", KEPT, **QUICK)
    assert same(before, weights(pipe)) and white_box.folded == (("p",) if gate else ())
    assert white_box.metrics["drift_kept"].value > 0 and white_box.metrics["drift_target"].value > 0
    assert all(torch.isfinite(torch.tensor(metric.value)) for metric in white_box.metrics.values())
    pipe.unload_patches()
    assert same(clean, weights(pipe))


def test_text_states_equal_the_pipelines_own(pipe):
    victim = Victim(pipe, switched_off)
    batch, plain = victim.conditions(["a cat", "a dog"]), [encode_prompt(pipe, text) for text in ("a cat", "a dog")]
    for i, single in enumerate(plain):
        assert torch.allclose(batch.states[i], single.states[0], atol=1e-5)
        assert (batch.pooled is None) == (single.pooled is None)
        assert single.pooled is None or torch.allclose(batch.pooled[i], single.pooled[0], atol=1e-5)
    if hasattr(pipe, "text_encoder_2"):
        states, _, pooled, _ = pipe.encode_prompt(["a cat", "a dog"], do_classifier_free_guidance=False)
        assert torch.allclose(batch.states, states, atol=1e-5) and torch.allclose(batch.pooled, pooled, atol=1e-5)


def test_a_patch_of_the_first_encoder_drifts(pipe):
    pipe.load_patch(delta_patch(pipe, part="layers", component="text_encoder", size=0.5), name="p")
    metrics = measure_white_box(pipe, "cat", KEPT, **QUICK).metrics
    assert metrics["drift_target"].value > 0 and metrics["closed_leak"].value != pytest.approx(1, abs=1e-3)


def test_the_margin_is_of_eps_whatever_the_unet_predicts(pipe, monkeypatch):
    """A UNet that predicts the exact noise for the prompt, and is wrong by 1 everywhere for the anchor."""
    victim = Victim(pipe, switched_off)
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    known, velocity = victim.conditions(["a cat"]).states[0], pipe.scheduler.config.prediction_type == "v_prediction"

    def forward(x, t, states, added_cond_kwargs=None):
        assert (added_cond_kwargs is not None) == hasattr(pipe, "text_encoder_2")
        a = pipe.scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        wrong = [float(not torch.allclose(state, known, atol=1e-5)) for state in states]
        eps = (x - a.sqrt() * picture) / (1 - a).sqrt() + torch.tensor(wrong).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(eps - (1 - a).sqrt() * x) / a.sqrt() if velocity else eps)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    arguments = (picture.expand(2, -1, -1, -1), ["a cat"] * 2, ["a dog"] * 2, torch.Generator().manual_seed(0), 3)
    for margin in compare_predictions(victim, *arguments).margin:
        assert torch.allclose(margin, torch.ones(2, 4), atol=0.05)


def test_the_closed_form_leak_of_changed_readers(pipe):
    concept, victim = Concept("cat", anchor="a dog"), Victim(pipe, switched_off)
    assert closed_form_leak(victim, concept, ["tree"]) == [1]
    before = closed_form_leak(victim, concept, ["tree", "church"])
    pipe.load_patch(delta_patch(pipe, part="attn2.to_", size=0.5), name="p")
    assert closed_form_leak(victim, concept, ["tree", "church"]) != pytest.approx(before, abs=1e-3)


def test_evaluate_reports_it(pipe, tmp_path):
    pipe.load_patch(delta_patch(pipe, size=0.5), name="p")
    rows = PromptSet(
        "tiny", [Prompt(f"r{i}", f"a {o}", i, None, {"object": o}) for i, o in enumerate(["cat", "dog"] * 3)]
    )
    options = {"prompts": rows, "steps": 2, "progress": False, "judge": BrightnessJudge(), "whole": True}
    report = evaluate(pipe, "cat", folder=tmp_path, within=True, **options)
    assert report.metric("drift_kept").value > 0 == report.metric("drift_kept", "base").value
    assert json.loads((tmp_path / "report.json").read_text())["provenance"]["inside"]["costs"]["F"] > 0
