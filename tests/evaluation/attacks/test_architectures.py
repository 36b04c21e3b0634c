"""Every attack on Stable Diffusion 2 with v-prediction and on XL: two text encoders, pooled text, sizes.

(Stable Diffusion 1: test_attacks.py.)
"""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Attempt, Case, Victim, make, names
from erasure.evaluation.attacks.detuning import detuning
from erasure.evaluation.attacks.ring_a_bell import shifted
from erasure.evaluation.attacks.run import attack
from erasure.evaluation.attacks.runner import AttackRunner
from erasure.evaluation.metrics.white_box import measure_white_box
from erasure.evaluation.verify import verify
from erasure.patch import Delta
from erasure.pipelines import (
    ErasedStableDiffusionPipeline,
    ErasedStableDiffusionXLImg2ImgPipeline,
    ErasedStableDiffusionXLPipeline,
    sibling,
)
from erasure.pipelines.strengths import switched_off
from tests.evaluation.attacks.test_run import QUICK, SMALL, Likeness, same
from tests.evaluation.test_verify import QUICK as BOTH
from tests.evaluation.test_verify import Judge
from tests.patch.making import delta_patch, patch_of
from tests.tiny import tiny_pipeline, tiny_tokenizer

PIPELINES = {"sd2-v": ErasedStableDiffusionPipeline, "sdxl": ErasedStableDiffusionXLPipeline}


def tiny(kind):
    pipe = tiny_pipeline(PIPELINES[kind], kind=kind)
    if kind == "sd2-v":
        pipe.tokenizer.pad_token = "!"  # as the true one
    return pipe


@pytest.fixture(params=PIPELINES)
def pipe(request):
    return tiny(request.param)


@pytest.fixture
def large():
    return tiny("sdxl")


def state(pipe):
    parts = [getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")]
    return [(p.detach().clone(), p.requires_grad) for part in parts if part is not None for p in part.parameters()]


@pytest.mark.parametrize("name", sorted(SMALL))
def test_runs_and_leaves_the_model_as_it_was(pipe, tmp_path, name):
    pipe.load_patch(delta_patch(pipe, part="attn2.to_", size=2.0), name="p")
    before = state(pipe)
    report = attack(pipe, "cat", name, folder=tmp_path, settings=SMALL[name], judge=Likeness(), **QUICK)
    assert same(before, state(pipe))
    result = report.outcome(name)
    assert result.n == 3 and 1 <= result.rounds <= 2 and len(result.asked) == 3 - result.plain == 3
    assert (result.control is None) == (make(name).control(1) is None)


def test_the_closed_form_answers_for_keys_and_values_on_xl_too(large, tmp_path):
    """Keys and values that are doubled: half the states say the same."""
    readers = {p: m for p, m in large.unet.named_modules() if p.endswith(("attn2.to_k", "attn2.to_v"))}
    change = {f"{path}.weight": module.weight.detach().clone() for path, module in readers.items()}
    large.load_patch(patch_of(large, Delta({"unet": change})), name="p")
    settings = {"ridge": 1e-12}
    report = attack(large, "cat", "rece", folder=tmp_path, settings=settings, judge=Likeness(), **QUICK)
    assert report.plain == 0 and len(report.outcome("rece").won) == 3


def test_words_in_slots_are_the_prompt_itself(pipe):
    victim = Victim(pipe, switched_off)
    cat, dog = (pipe.tokenizer(word).input_ids[1] for word in ("cat", "dog"))
    places = victim.slots([("a", "in red"), ("a photo of", "")], 2)
    joint = victim.encode(places, victim.embeddings[[cat, dog]])
    want = victim.conditions(["a cat dog in red", "a photo of cat dog"])
    assert torch.allclose(joint.states, want.states, atol=1e-5)
    separate = victim.encode(places, victim.embeddings[torch.tensor([[cat, dog], [dog, cat]])])
    assert torch.allclose(separate.states[0], want.states[0], atol=1e-5)
    assert not torch.allclose(separate.states[1], want.states[1], atol=1e-2)
    if want.pooled is not None:
        assert torch.allclose(joint.pooled, want.pooled, atol=1e-5)
        assert not torch.allclose(separate.pooled[1], want.pooled[1], atol=1e-2)


@pytest.mark.parametrize("forced", [True, False])
def test_conditions_draw_what_their_texts_draw(large, forced):
    """The empty prompt of guidance is the pipeline's own too: zeros, or its encoding."""
    large.register_to_config(force_zeros_for_empty_prompt=forced)
    runner = AttackRunner(Victim(large, switched_off), Likeness(), None, 2, 3.0, 4)
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    case = Case("a", "a cat in red", 3, "cat", latents, "a", "in red")
    conditions = runner.victim.conditions(["a cat in red"])
    pictures = [
        runner.draw([case], {0: attempt})[0]
        for attempt in (
            Attempt("a cat in red"),
            Attempt(embeds=conditions),
            Attempt(embeds=shifted(conditions, conditions, 1.0)),
        )
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()


def test_img2img_keeps_what_the_pipeline_is_told(large):
    large.register_to_config(force_zeros_for_empty_prompt=False)
    other = sibling(large, ErasedStableDiffusionXLImg2ImgPipeline)
    assert other.config.force_zeros_for_empty_prompt is False and other.unet is large.unet


@pytest.mark.parametrize("name", sorted(names()))
def test_tokenizers_that_differ_are_refused_before_any_work(large, tmp_path, name):
    large.tokenizer_2 = tiny_tokenizer(pad_token="!")
    large.tokenizer_2.add_tokens(["newword"])
    with pytest.raises(ErasureError, match="differ in vocabulary.*nothing was attacked"):
        attack(large, "cat", name, folder=tmp_path, judge=Likeness(), **QUICK)
    assert not list(tmp_path.iterdir())


def test_detuning_on_xl(large, tmp_path):
    exports = []
    for seed in range(3):
        patch = delta_patch(large, part="attn2.to_k", size=0.5, seed=seed)
        exports.append(patch.save(tmp_path / f"{seed}.safetensors"))
    settings = {"rank": 1, "iterations": 4}
    report = detuning(
        large,
        "cat",
        exports,
        folder=tmp_path / "out",
        judge=Likeness(),
        settings=settings,
        **{k: v for k, v in QUICK.items() if k != "progress"},
    )
    assert report.outcome("detune").n == 3


def test_verify_and_the_figures_from_within_on_xl(large, tmp_path):
    patch = delta_patch(large, part="attn2.to_", size=2.0, concepts=[{"name": "cat"}])
    source = patch.save(tmp_path / "cat.safetensors")
    verified = verify(large, source, folder=tmp_path / "out", attacks=["random", "rece"], judge=Judge(), **BOTH)
    assert set(verified.results["attacks"]) == {"random", "rece"}
    large.load_patch(patch, name="p")
    drift = measure_white_box(large, "cat", kept=["a dog"], words=["tree"], images=2, steps=2).metrics
    assert drift["drift_target"].value > 0 and drift["closed_leak"].value > 0
