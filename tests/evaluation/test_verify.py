"""Verification: results in a copy of the patch, the model card, and the comparison with earlier results."""

from __future__ import annotations

import dataclasses
import re

import pytest

from erasure.errors import ErasureError
from erasure.evaluation.verify import CAVEAT, verify
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.attacks.test_run import Likeness
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

ROWS = PromptSet(
    "tiny", [Prompt(f"r{i}", f"a {o} in red", i, None, {"object": o}) for i, o in enumerate(["cat"] * 4 + ["dog"] * 4)]
)
QUICK = {"prompts": ROWS, "steps": 2, "cases": 2, "progress": False}


class Judge(Likeness):
    heads = {"object": ["cat", "dog", "none"]}

    def clip_scores(self, images, texts):
        return [float(len(text)) for text in texts]

    def features(self, images):
        return [None] * len(images)


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.fixture
def source(pipe, tmp_path):
    patch = delta_patch(pipe, part="resnets", size=0.5, concepts=[{"name": "cat"}], base="some/tiny")
    return patch.save(tmp_path / "cat.safetensors", dtype="bf16")


def test_the_copy_contains_the_results_and_the_source_is_unchanged(pipe, source, tmp_path):
    before = source.read_bytes()
    verification = verify(pipe, source, folder=tmp_path / "out", attacks=["encoder"], judge=Judge(), **QUICK)
    assert source.read_bytes() == before and not pipe.get_list_patches()
    copy = Patch.load(verification.patch)
    assert copy.results == verification.results and copy.stored["dtype"] == "bf16"
    assert copy.payload.digest == Patch.load(source).payload.digest
    assert verification.results["metrics"]["UA"]["n"] == 4 and verification.results["attacks"]["encoder"]["n"] == 2
    assert {"value", "low", "high", "before", "control", "tries"} <= verification.results["attacks"]["encoder"].keys()
    card = verification.card.read_text()
    assert str(tmp_path / "out" / "report.html") in verification.text()
    page = (tmp_path / "out" / "report.html").read_text()
    for part in ("evaluation", "attacks"):
        assert f'href="{part}/report.html"' in page and (tmp_path / "out" / part / "report.html").is_file()
    rows = verification.results["metrics"]["UA"], verification.results["attacks"]["encoder"]
    assert [f"{cell['value']:.0%}" for cell in rows] == re.findall(r"<strong>(.*?)</strong>", page)[::3]
    assert page.count("<img") == 2 * 8 + round(rows[1]["value"] * 2) - round(rows[1]["before"] * 2)
    assert "adapted budget" not in card  # `encoder` has one budget only
    parts = ["# cat, erased from", "**gone**", "](grid.png)", "A patch made by", "## Results"]
    assert [card.index(part) for part in parts] == sorted(card.index(part) for part in parts)
    assert card.startswith("---\nbase_model: some/tiny\n") and CAVEAT in card and "| UA ↑ |" in card
    assert "UA: target images without the target; IRA: images of other objects recognised as such" in card
    again = "erasure verify cat.safetensors --model some/tiny --judge likeness --prompts tiny --steps 2 --guidance 7.5"
    assert f"{again} --attack encoder --cases 2 --budget lite\n" in card
    assert (tmp_path / "out" / "grid.png").is_file() and "](grid.png)" in card
    # Never "safe": what was tried, with intervals.
    pages = [path.read_text() for path in (tmp_path / "out").rglob("*.html")]
    assert (
        len(pages) == 3 and "others may recover the concept" in verification.text() and "| encoder | weights |" in card
    )
    for text in (card, verification.text(), *pages):
        assert "safe" not in text.lower().replace("safetensors", "")


def test_a_second_opinion(pipe, source, tmp_path):
    first = verify(pipe, source, folder=tmp_path / "a", attacks=[], judge=Judge(), **QUICK)
    again = verify(pipe, first.patch, folder=tmp_path / "b", attacks=[], judge=Judge(), **QUICK)
    assert again.earlier == first.results and again.changed() == [] and "are within" in again.text()
    assert again.unchecked() == [] and "not measured again" not in again.text()
    more = {**first.results, "attacks": {"rece": {"value": 1.0}}}
    path = dataclasses.replace(Patch.load(source), results=more, stored={}).save(tmp_path / "more.safetensors")
    less = verify(pipe, path, folder=tmp_path / "d", attacks=[], judge=Judge(), **QUICK)
    assert less.to_json()["unchecked"] == ["rece"] and "not in the copy: rece" in less.text()
    lied = {**first.results, "metrics": {"UA": {"value": 5.0}}}
    path = dataclasses.replace(Patch.load(source), results=lied, stored={}).save(tmp_path / "lied.safetensors")
    caught = verify(pipe, path, folder=tmp_path / "c", attacks=[], judge=Judge(), **QUICK)
    assert len(caught.changed()) == 1 and "UA" in caught.text().split("different from")[1]


def test_bad_input(pipe, source, tmp_path):
    with pytest.raises(ErasureError, match="another folder"):
        verify(pipe, source, folder=tmp_path, judge=Judge(), **QUICK)
    with pytest.raises(ErasureError, match="unlearndiffatk"):
        verify(pipe, source, folder=tmp_path / "x", attacks=["unlearn"], judge=Judge(), **QUICK)
    with pytest.raises(ErasureError, match="cases=1.*at least 2 cases"):
        verify(pipe, source, folder=tmp_path / "x", attacks=["rece"], judge=Judge(), **{**QUICK, "cases": 1})
    assert not pipe.get_list_patches() and not (tmp_path / "x").exists()
    pipe.load_patch(source, name="p")
    with pytest.raises(ErasureError, match="without patches"):
        verify(pipe, source, folder=tmp_path / "x", judge=Judge(), **QUICK)
    source.write_bytes(source.read_bytes()[:100])
    with pytest.raises(ErasureError, match="cat.safetensors"):
        verify(pipe, source, folder=tmp_path / "x", judge=Judge(), **QUICK)


def test_the_card_says_what_an_adapted_budget_changes(pipe, source, tmp_path):
    options = {"attacks": ["noise-scale"], "judge": Judge(), **QUICK}
    verification = verify(pipe, source, folder=tmp_path / "out", **options)
    assert verification.results["attacks"]["noise-scale"]["adapted"].keys() == {"etas", "scales"}
    text = "noise-scale ran an adapted budget: etas (1, 1.34, 1.68) (full: (1, 1.17, 1.34, 1.51, 1.68, 1.85)), "
    assert text in verification.card.read_text()
