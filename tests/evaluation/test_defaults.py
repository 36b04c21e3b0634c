"""What evaluations and attacks take by themselves: glyph's prompts, judge and sampling on glyph alone."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.evaluation import defaults, evaluate, generate
from erasure.evaluation.attacks import relearning
from erasure.evaluation.attacks.attack import Case, Victim
from erasure.evaluation.attacks.run import attack
from erasure.evaluation.attacks.runner import prepare
from erasure.evaluation.defaults import default_judge, default_prompts
from erasure.evaluation.metrics.white_box import measure_white_box
from erasure.evaluation.suite import run_suite
from erasure.evaluation.verify import verify
from erasure.model import presets
from erasure.model.base import Base
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from erasure.training.callbacks import Previews
from tests.evaluation.standin import BrightnessJudge
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

ROWS = PromptSet(
    "rows", [Prompt(f"{name}-{i}", f"a {name}", i, None, {"object": name}) for name in ("cat", "dog") for i in range(3)]
)


CASE = Case("a", "a cat", 0, "cat", torch.zeros(4, 8, 8), "a", "")


class Stop(Exception):
    """Raised in the place of drawing."""


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.fixture
def looks_like(monkeypatch):
    """Let every checkpoint have the architecture of a family."""

    def change(name: str) -> None:
        shape = presets.find(name).architecture
        monkeypatch.setattr(presets, "_architecture", lambda pipe: shape)

    return change


@pytest.fixture
def no_clip(monkeypatch):
    monkeypatch.setattr(defaults, "local_clip", lambda: None)


@pytest.mark.parametrize(("family", "steps", "guidance"), [("sd1", 50, 7.5), ("sdxl", 50, 5.0), ("glyph", 25, 3.0)])
def test_everything_that_draws_samples_as_the_family_does(
    pipe, looks_like, monkeypatch, tmp_path, family, steps, guidance
):
    looks_like(family)
    seen = []

    def draw(self, texts, seeds, batch, *sampling):
        seen.append(sampling)
        raise Stop

    monkeypatch.setattr(Victim, "base_latents", draw)
    with pytest.raises(Stop):  # --inside
        measure_white_box(pipe, "cat", ["a dog"])
    victim = Victim(pipe, lambda pipe: None)
    with pytest.raises(Stop):  # relearning's control
        next(relearning.Relearning(benign=True).rounds(victim, [CASE], {0}, 0))
    runner, _ = prepare(pipe, "cat", ROWS, BrightnessJudge(), None, None, 4)
    seen.append((runner.steps, runner.guidance))

    def settings(pipe, *sampling):
        seen.append(sampling)
        raise Stop

    monkeypatch.setattr(generate, "image_settings", settings)
    with pytest.raises(Stop):
        generate.generate(pipe, ROWS, tmp_path / "a", progress=False)
    with pytest.raises(Stop):
        evaluate(pipe, "cat", folder=tmp_path / "b", prompts=ROWS, judge=BrightnessJudge(), progress=False)
    assert seen == [(steps, guidance)] * 5
    with pytest.raises(Stop):  # what is given is kept
        generate.generate(pipe, ROWS, tmp_path / "c", steps=3, guidance=2.0, progress=False)
    assert seen[-1] == (3, 2.0)


def test_previews_sample_as_the_family_does(pipe, looks_like, tmp_path):
    from erasure.concepts.concept import Concept

    for family, expected in (("sd1", (25, 7.5)), ("sdxl", (25, 5.0)), ("glyph", (20, 5.0))):
        looks_like(family)
        own = Previews(Base("mine", pipe), [Concept("cat")], tmp_path, 1).sampling
        assert (own.steps, own.guidance, own.scheduler) == (*expected, "ddim")


def test_without_judge_and_prompts_another_checkpoint_is_refused(pipe, looks_like, no_clip, tmp_path):
    looks_like("sd1")
    pipe.load_patch(delta_patch(pipe), name="p")
    both = "is not glyph.*--prompts.*objects, styles, identities.*and --judge.*clip:FOLDER.*Nothing was drawn"
    for call in (evaluate, lambda *a, **k: attack(*a, "rece", **k)):
        with pytest.raises(ErasureError, match=both):
            call(pipe, "starry night", folder=tmp_path / "x")
        with pytest.raises(ErasureError, match="Give --judge"):
            call(pipe, "cat", folder=tmp_path / "x", prompts=ROWS)
        with pytest.raises(ErasureError, match="Give --prompts.*Nothing was drawn") as caught:
            call(pipe, "cat", folder=tmp_path / "x", judge=BrightnessJudge())
        assert "--judge" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_verify_and_glyphs_suites_are_refused_too(pipe, looks_like, no_clip, tmp_path):
    looks_like("sd1")
    source = delta_patch(pipe).save(tmp_path / "p.safetensors")
    with pytest.raises(ErasureError, match="is not glyph"):
        verify(pipe, source, folder=tmp_path / "v", attacks=[])
    for name in ("glyph-full", "glyph-quick"):
        with pytest.raises(ErasureError, match="prompts or the judge of glyph.*esd-styles"):
            run_suite(pipe, "cat", name, folder=tmp_path / "s")
        with pytest.raises(ErasureError, match="prompts or the judge of glyph"):
            run_suite(pipe, "cat", name, folder=tmp_path / "s", judge="nudenet")


@pytest.mark.parametrize("name", ["glyph", "glyph-mmdit", "glyph-dit"])
def test_glyph_and_its_siblings_have_its_prompts_and_judge(pipe, looks_like, name):
    looks_like(name)
    assert default_prompts(pipe, "cat", False, None).name == "glyph-objects"
    assert default_prompts(pipe, "cat", False, None, about=True).name == "about-cat"
    assert default_judge(pipe, ROWS).name == "glyph"


def test_a_bundled_set_and_a_clip_on_this_machine_are_taken(pipe, looks_like, monkeypatch, clip, caplog):
    looks_like("sd1")
    monkeypatch.setattr(defaults, "local_clip", lambda: ("openai/clip", clip))
    rows = default_prompts(pipe, "church", False, None)
    judge = default_judge(pipe, rows)
    assert rows.name == "objects" and judge.name == "clip" and judge.find("church") == ("object", ["church"])
    assert judge.source == clip and "CLIP zero-shot (openai/clip)" in caplog.text
    styles = default_prompts(pipe, ["Vincent van Gogh"], False, None)
    assert styles.name == "styles" and "in the style of" in default_judge(pipe, styles).templates[0]
    single = PromptSet("one", [row for row in ROWS.rows if row.labels["object"] == "cat"])
    with pytest.raises(ErasureError, match="Give --judge"):  # one label is no choice
        default_judge(pipe, single)


def test_a_clip_is_found_in_the_cache_alone(monkeypatch):
    import huggingface_hub

    kept = {("openai/clip-vit-base-patch32", file): f"/cache/{file}" for file in ("config.json", "model.safetensors")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: kept.get((name, file)))
    assert defaults.local_clip() == ("openai/clip-vit-base-patch32", "/cache")
    del kept["openai/clip-vit-base-patch32", "model.safetensors"]
    assert defaults.local_clip() is None
