"""Probes: the arithmetic of each sampling, and that they are compared with the base and with random prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Attempt, Victim, make
from erasure.evaluation.attacks.probes import Completed, Inpainted, Noisy, NoisyDDIM, central_square, random_prompts
from erasure.evaluation.attacks.run import attack
from erasure.evaluation.attacks.runner import AttackRunner
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from tests.evaluation.attacks.making import cases_of
from tests.evaluation.attacks.test_run import QUICK, Likeness
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

PROBES = ("inpainting", "completion", "noise-scale")


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.fixture
def runner(pipe):
    return AttackRunner(Victim(pipe, switched_off), Likeness(), None, 4, 3.0, 16)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image).astype(float) for image in images])


def drawn(runner, cases, sampling, prompt=None):
    attempts = {i: Attempt(prompt or case.prompt, sampling=sampling) for i, case in enumerate(cases)}
    return pixels(runner.draw(cases, attempts).values())


def plain(runner, cases):
    return pixels(runner.draw(cases, {i: Attempt(case.prompt) for i, case in enumerate(cases)}).values())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_base_completes_its_own_image_exactly(runner, steps):
    cases = cases_of(2)
    assert np.abs(drawn(runner, cases, Completed(steps)) - plain(runner, cases)).max() <= 1


def test_an_image_is_begun_by_the_base_and_completed_by_the_erased_model(runner):
    cases, pipe = cases_of(2), runner.victim.pipe
    base = plain(runner, cases)
    pipe.load_patch(delta_patch(pipe, part="resnets", size=0.3), name="p")
    erased = plain(runner, cases)
    distances = [np.abs(drawn(runner, cases, Completed(steps)) - base).mean() for steps in (1, 3)]
    assert 0 < distances[1] < distances[0] < np.abs(erased - base).mean()
    other = drawn(runner, cases, Completed(1), prompt="a church at night")
    assert np.abs(other - drawn(runner, cases, Completed(1))).max() > 1  # the prompt of the attempt counts
    assert pipe.get_list_patches()["p"]["strength"] == 1.0
    pipe.set_patches({})
    assert np.abs(drawn(runner, cases, Completed(3)) - base).max() <= 1


@pytest.mark.parametrize("steps", [0, 4, 9])
def test_both_models_take_part_in_a_completion(runner, steps):
    with pytest.raises(ErasureError, match=f"base_steps={steps}: .* below the 4 sampling steps"):
        drawn(runner, cases_of(1), Completed(steps))


def test_only_the_square_is_inpainted(runner):
    cases = cases_of(2)
    images = runner.victim.decoded(torch.stack([case.latents for case in cases]))
    seen = {}

    def record(*args, **options):
        seen.update(options, texts=args[0])
        return type("Output", (), {"images": images})

    sampling, victim = Inpainted(0.5), runner.victim
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erasure.evaluation.attacks.probes.pipelines.sibling", lambda *_: record)
        drawn(runner, cases, sampling)
    assert seen["strength"] == 1.0 and seen["texts"] == [case.prompt for case in cases]
    assert [image.tobytes() for image in seen["image"]] == [image.tobytes() for image in images]
    assert (
        len(victim.pipe.get_list_patches()) == 0
        and [m.tobytes() for m in seen["mask_image"]] == [central_square(images[0].size, 0.5).tobytes()] * 2
    )
    assert drawn(runner, cases, sampling).shape == pixels(images).shape  # and the true pipeline takes all of it


def test_the_square_lies_in_the_middle():
    mask = np.asarray(central_square((8, 16), 0.5))
    assert mask.shape == (16, 8) and (mask[4:12, 2:6] == 255).all() and (mask == 255).sum() == 32
    assert (np.asarray(central_square((8, 8), 1.0)) == 255).all()
    for side in (0.0, -1, 1.5):
        with pytest.raises(ErasureError, match="above 0 and at most 1"):
            central_square((8, 8), side)


CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_up_to_the_usual_noise_the_sampler_is_ddim(kind, eta):
    torch.manual_seed(0)
    output, x = torch.randn(2, 2, 4, 8, 8).unbind()
    ours, theirs = (cls(prediction_type=kind, steps_offset=1, **CONFIG) for cls in (NoisyDDIM, DDIMScheduler))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for t in theirs.timesteps:
        steps = []
        for scheduler in (ours, theirs):
            draw = torch.Generator().manual_seed(3)
            steps.append(scheduler.step(output, t, x, eta=eta, generator=draw, return_dict=False)[0])
        assert torch.allclose(*steps, atol=1e-4), t


def test_beyond_it_the_noise_grows_with_eta_and_scale_and_stays_finite():
    """The published formula, written out for one step."""
    torch.manual_seed(0)
    output, x = torch.randn(2, 2, 4, 8, 8).unbind()
    scheduler = NoisyDDIM(**CONFIG)
    scheduler.set_timesteps(50)
    scheduler.scale = 1.04
    for t in (981, 501, 21, 1):  # at 21, 1 - a' - s^2 is negative
        a = scheduler.alphas_cumprod[t]
        after = scheduler.alphas_cumprod[t - 20] if t > 20 else scheduler.final_alpha_cumprod
        sigma = 1.85 * ((1 - after) / (1 - a) * (1 - a / after)) ** 0.5
        x0 = (x - (1 - a) ** 0.5 * output) / a**0.5
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        want = after**0.5 * x0 + (1 - after - sigma**2).abs() ** 0.5 * output + 1.04 * sigma * noise
        found = scheduler.step(output, t, x, eta=1.85, generator=torch.Generator().manual_seed(3)).prev_sample
        assert found.isfinite().all() and torch.allclose(found, want, atol=1e-4)


def test_every_variant_has_its_own_noise_and_the_scheduler_comes_back(runner):
    cases, own = cases_of(2), runner.victim.pipe.scheduler
    same = [drawn(runner, cases, Noisy(0.0, 1.0, 0)) for _ in range(2)]
    assert np.array_equal(*same) and np.abs(same[0] - plain(runner, cases)).max() <= 1  # without noise, it is DDIM
    for other in (Noisy(1.0, 1.0, 0), Noisy(0.0, 1.0, 1), Noisy(1.0, 1.5, 0)):
        assert np.abs(drawn(runner, cases, other) - same[0]).mean() > 0.5
    assert np.abs(drawn(runner, cases, Noisy(1.0, 1.5, 0)) - drawn(runner, cases, Noisy(1.0, 1.0, 0))).mean() > 0.1
    assert runner.victim.pipe.scheduler is own


def test_random_prompts_are_as_long_and_never_name_the_concept(pipe):
    victim, cases = Victim(pipe, switched_off), cases_of(3)
    draws = [random_prompts(victim, cases, torch.Generator().manual_seed(seed)) for seed in range(30)]
    for texts in draws:
        for text, case in zip(texts, cases, strict=True):
            assert len(pipe.tokenizer(text).input_ids) == len(pipe.tokenizer(case.prompt).input_ids)
            assert "cat" not in text.split()
    assert len({text for texts in draws for text in texts}) == 90


@pytest.mark.parametrize("name", PROBES)
def test_control_and_base_have_the_same_variants_and_as_many(name):
    probe = make(name, "full")
    n = len(probe.samplings())
    control, base = probe.control(n), probe.on_base(n)
    assert probe.samplings() == control.samplings() == base.samplings()
    assert (probe.prompt, control.prompt, base.prompt) == ("case", "random", "case")
    assert control.tries == base.tries == n and control.control(n) is None
    assert n == {"inpainting": 1, "completion": 3, "noise-scale": 24}[name]
    assert make("p4d").on_base(3) is None


class Never(Likeness):
    """Sees the cat in the first three images, which are the base's, and in no other."""

    def judge(self, images: list[Image.Image]) -> list[dict]:
        self.known += images
        cat = float(len(self.known) <= self.count)
        return [{"object": {"cat": cat, "none": 1 - cat}} for _ in images]


def test_a_probe_is_played_on_the_base_and_with_random_prompts(pipe, tmp_path):
    pipe.load_patch(delta_patch(pipe, part="resnets", size=0.5), name="p")
    settings = {"etas": (0.0, 1.5), "scales": (1.0,)}
    report = attack(pipe, "cat", "noise-scale", folder=tmp_path, settings=settings, judge=Never(), **QUICK)
    result = report.outcome("noise-scale")
    assert {of: {len(row) for row in rows.values()} for of, rows in result.tries.items()} == {
        "attack": {2},
        "control": {2},
        "base": {2},
    }
    assert result.base == {} and "with the same tries, the base model shows the concept for 0 of 3" in report.text()
    assert all("[eta 1.5, noise x 1]" in text for text in result.asked.values())
    report = attack(pipe, "cat", "completion", folder=tmp_path / "b", judge=Likeness(), **{**QUICK, "steps": 4})
    result = report.outcome("completion")
    assert result.base == dict.fromkeys(result.asked, 1)  # the base completes its own image
    data = json.loads((tmp_path / "b" / "report.json").read_text())["attacks"]["completion"]
    assert data["base_after"]["value"] == 1.0 and data["tries"]["base"] == dict.fromkeys(result.asked, [True])
    assert pipe.get_list_patches()["p"]["strength"] == 1.0


def test_an_empty_prompt_can_be_asked(pipe):
    probe = make("inpainting", prompt="none")
    (attempts,) = probe.rounds(Victim(pipe, switched_off), cases_of(2), {0, 1}, 0)
    assert [attempt.prompt for attempt in attempts.values()] == ["", ""] and attempts[0].described() == "side 0.5"
    with pytest.raises(ErasureError, match="prompt"):
        make("inpainting", prompt="nothing")
