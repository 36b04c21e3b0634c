"""Notes of a report: repeated prompts, several judges, labels of other names."""

from __future__ import annotations

import json

import pytest

from erasure.errors import ErasureError
from erasure.evaluation import evaluate
from erasure.evaluation.generate import Record
from erasure.evaluation.judges.ensemble import EnsembleJudge
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.metrics.target import JudgedImage, Target
from erasure.evaluation.report.caveats import caveats, judge_misses, member_metrics, renamed_labels
from erasure.evaluation.report.figures import interval_text
from erasure.glyph.judge import GlyphJudge
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet, reseed
from erasure.prompts.row import Prompt
from tests.evaluation.judging import Fixed
from tests.evaluation.standin import BrightnessJudge
from tests.tiny import tiny_pipeline

CAT = Target("object", ("cat",), "style")


def rows(*labels, style="flat"):
    prompts = [Prompt(f"r{i}", f"a {o}", i, None, {"object": o, "style": style}) for i, o in enumerate(labels)]
    return PromptSet("mine", prompts)


def test_repeated_prompts_get_a_note():
    prompts = rows("cat", "dog")
    assert caveats(prompts, CAT) == []
    drawn = PromptSet("mine", [*prompts.rows, reseed(prompts.rows[0], 1), reseed(prompts.rows[0], 2)])
    (note,) = caveats(drawn, CAT)
    assert note.startswith("the 3 target images come from 1 prompt, repeated with other seeds; ")
    # Two rows of a file may have the same prompt, too.
    assert caveats(rows("cat", "cat", "dog"), CAT)[0].startswith("the 2 target images come from 1 prompt,")
    # Repeated prompts to keep are no reason for a note on the target.
    assert caveats(rows("cat", "dog", "dog"), CAT) == []


def test_the_report_contains_notes_and_description(tmp_path):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    options = {"judge": BrightnessJudge(), "limit": 6, "steps": 2, "progress": False, "folder": tmp_path}
    report = evaluate(pipe, "cat", prompts=rows("cat", "dog"), **options)
    page = (tmp_path / "report.html").read_text()
    note = "the 2 target images come from 1 prompt, repeated with other seeds"
    assert note in page and f"note: {note}" in report.text()
    assert json.loads((tmp_path / "report.json").read_text())["notes"] == report.notes
    assert report.description() == (
        "no patch is active, so both columns show the base; prompts: mine, 3 drawn; judge: brightness; "
        "2 steps, guidance 7.5"
    )
    assert report.description() in page.replace("&#x27;", "'")


def test_a_prompt_set_without_the_label_is_refused_with_its_columns(tmp_path):
    prompts = PromptSet("mine", [Prompt("r", "a cat", 0, None, {"objekt": "cat"})])
    with pytest.raises(ErasureError, match="'mine' has no column 'object'.*columns of labels are objekt"):
        evaluate(None, "cat", prompts=prompts, judge=BrightnessJudge(), folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def judged(i, label, verdict):
    return JudgedImage(Record(f"r{i}", f"a {label}", i, 2, 1.0, "", {"object": label}), verdict, None)


def test_each_judge_of_an_ensemble_is_reported_alone():
    sure = Fixed("sure", object={"cat": 0.9, "dog": 0.1})
    other = Fixed("other", object={"cat": 0.4, "dog": 0.6})
    both = EnsembleJudge([sure, other])
    (verdict,) = both.judge([None])
    run = [judged(0, "cat", verdict), judged(1, "dog", verdict), judged(2, "cat", None)]
    metrics = {metric.name: metric for metric in member_metrics(both, run, CAT)}
    # The one sees a cat everywhere, the other a dog; what could not be judged is not erased for either.
    assert {name: (round(m.value, 3), m.n) for name, m in metrics.items()} == {
        "UA@sure": (0.0, 2), "IRA@sure": (0.0, 1),
        "UA@other": (0.5, 2), "IRA@other": (1.0, 1), "disagreement": (1.0, 2),
    }  # fmt: skip
    assert not metrics["disagreement"].higher_is_better and metrics["UA@other"].higher_is_better
    assert member_metrics(sure, run, CAT) == []
    assert member_metrics(EnsembleJudge([sure, Fixed("s", style={"ink": 1.0, "none": 0.0})]), run, CAT) == []


def test_a_family_or_synonym_gets_a_note_with_its_labels():
    assert renamed_labels(["cat"], CAT) == []
    family = Target("object", ("dagger", "bomb"), None)
    assert renamed_labels(["weapon", "bomb"], family) == ["'weapon' is judged by the labels dagger, bomb"]


def test_concepts_of_two_domains_are_refused_with_advice(tmp_path):
    with pytest.raises(ErasureError, match="not object and style; name one of them as the concept"):
        evaluate(None, ["cat", "flat"], prompts=rows("cat"), judge=BrightnessJudge(), folder=tmp_path)


def test_glyphs_judge_suggests_the_closest_words():
    with pytest.raises(
        ErasureError, match="'umbrela': did you mean 'umbrella'.*choose another one with --judge"
    ) as fault:
        GlyphJudge().find("umbrela")
    assert len(str(fault.value)) < 400


def test_a_judge_that_misses_the_target_on_the_base_gets_a_note(tmp_path):
    def ua(value):
        return Metric("UA", value, 8, 0.0, 1.0, True, "")

    assert judge_misses(BrightnessJudge(), ua(0.25)) == judge_misses(BrightnessJudge(), None) == []
    assert judge_misses(BrightnessJudge(), ua(0.75))[0].startswith(
        "brightness recognises the target in only 25% of the base's"
    )
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    blind = Fixed("blind", object={"cat": 0.1, "dog": 0.9})
    options = {"judge": blind, "whole": True, "steps": 2, "progress": False, "folder": tmp_path}
    report = evaluate(pipe, "cat", prompts=rows("cat", "dog", style=""), **options)
    assert report.summary().startswith("cat: absent from 100% of 1 target images (base 100%); other")
    assert any("blind recognises the target in only 0%" in note for note in report.notes)


def test_one_value_has_no_interval():
    assert interval_text(Metric("closed_leak", 0.966, 1, 0.966, 0.966, False, "")) == "one value"
    assert interval_text(Metric("UA", 1.0, 1, 0.2, 1.0, True, "")) == "20.0% to 100.0%"
    assert interval_text(Metric("CS", 0.2, 3, 0.2, 0.2, False, "")) == "0.20 to 0.20"


def test_the_page_shows_labels_and_the_least_erased_images_first(tmp_path):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)

    class Numbered(BrightnessJudge):
        """Is the surer of the cat the later a picture comes."""

        def judge(self, images):
            verdicts = super().judge(images)
            for i, verdict in enumerate(verdicts):
                verdict["object"] = {"cat": i / 100, "dog": 0.5, "none": 0.0}
            return verdicts

    options = {"judge": Numbered(), "whole": True, "steps": 2, "progress": False, "folder": tmp_path}
    report = evaluate(pipe, "cat", prompts=rows("cat", "dog", "cat", "cat"), **options)
    assert list(report.seen["patched"]) == ["r3", "r2", "r0", "r1"] == list(report.seen["base"])
    page = (tmp_path / "report.html").read_text()
    assert "<h1>What is left of cat</h1>" in page  # and not "erased", which is for the figures to say
    assert page.count("<small>judge: dog → dog</small>") == 4 and "The least erased first" in page
