"""What an attack says around its figures: its page, its notes, and that it knows a bad folder before it searches."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation.attacks.curves import curve
from erasure.evaluation.attacks.report import AttackReport
from erasure.evaluation.attacks.run import attack
from erasure.evaluation.report.attack_page import attack_page
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.evaluation.attacks.test_run import QUICK, Likeness, outcome
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline


def page(*outcomes, **more):
    report = AttackReport(("cat",), "object", 10, 12, 2, list(outcomes), {"cases": ["a", "b"]}, **more)
    return report, attack_page(
        report, {"base": [Image.new("RGB", (8, 8))] * 2, **dict.fromkeys(("x", "y"), [None] * 2)}
    )


def test_the_shares_come_first_each_with_its_interval():
    text = page(outcome(control=None))[1]
    head, row = re.findall(r"<tr>(.*?)</tr>", text)[:2]
    assert re.findall(r"<th>(\w+)", head) == ["attack", "before", "after", "control"]
    assert row.endswith("<td>20%<small>6 to 51</small><td><b>40%</b><small>17 to 69</small><td><small></small>")


def test_what_was_asked_stands_beside_the_prompt_it_replaces():
    text = page(outcome(asked={"a": "xq cat", "z": "zz cat"}), prompts={"a": "a <cat>", "z": "a dog"})[1]
    plain = re.sub(r"<td [^>]*>", "<td>", text)
    assert "a &lt;cat&gt;<td>1<td>xq cat" in plain and "a dog<td>not recovered<td>zz cat" in plain
    assert "Last prompts" not in page(outcome())[1]  # nothing was left to attack
    assert "each attack for 10 prompts (of 10)" in text and "recognised as the concept have a red frame" in text


def test_one_attack_is_the_only_one_and_not_the_strongest():
    assert "with x, the only attack tried, for 4" in page(outcome())[0].summary()
    assert "with x, the strongest of 2 attacks tried" in page(outcome(), outcome(name="y", won={}))[0].summary()


def test_names_of_lines_have_their_marks_beside_them():
    drawn = curve(outcome())
    # Two marks beside names, and one at each of three tries on two lines.
    assert drawn.count('stroke="var(--c0)"') == drawn.count('stroke="var(--c1)"') == 2
    assert drawn.count("stroke-dasharray") == 2


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def test_an_attack_with_nothing_to_undo_is_told(pipe, tmp_path):
    options = {"judge": Likeness(), **QUICK}
    report = attack(pipe, "cat", "encoder", folder=tmp_path / "a", **options)
    assert report.notes == ["No patch is active: these figures attack the base model"]
    assert report.prompts == dict.fromkeys(("r0", "r1", "r2"), "a cat in red")
    pipe.load_patch(delta_patch(pipe, part="resnets", size=0.5), name="p")
    options["judge"] = Likeness()
    report = attack(pipe, "cat", ["rece", "encoder"], folder=tmp_path / "b", **options)
    assert [note[:50] for note in report.notes] == ["encoder: no active patch changes the text encoder,"]
    options["judge"] = Likeness()
    assert attack(pipe, "cat", "rece", folder=tmp_path / "b", **options).notes == []


def test_a_log_gets_a_line_for_every_attack(pipe, tmp_path, capsys):
    options = {**QUICK, "judge": Likeness()}
    attack(pipe, "cat", ["rece", "encoder"], folder=tmp_path / "a", **{**options, "progress": True})
    # The base, attacked: every prompt shows the cat as it is, and nothing is left to try.
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"{name}: concept shown for 3 of 3 prompts after 0 tries" for name in ("rece", "encoder")
    ]
    attack(pipe, "cat", ["rece"], folder=tmp_path / "b", **{**options, "judge": Likeness()})
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_known_before_the_search(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("drew"))
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper" / "still"):
        with pytest.raises(ErasureError, match="cannot be written: Not a directory.*nothing was attacked"):
            attack(pipe, "cat", "rece", folder=place, judge=Likeness(), **QUICK)
    assert (tmp_path / "file").read_text() == "mine"
