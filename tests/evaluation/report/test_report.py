"""Files of a report: their schema, the form of eval-unlearn, and the sections of the page."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest

import erasure
from erasure.evaluation import evaluate
from erasure.evaluation.generate import Record
from erasure.evaluation.metrics.gate_activity import gate_activity, gate_kinds
from erasure.evaluation.metrics.target import Target
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from tests.evaluation.standin import BrightnessJudge
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline

SCHEMA = json.loads((Path(erasure.__file__).parent / "evaluation" / "report" / "report.schema.json").read_text())
ROWS = PromptSet(
    "tiny",
    [Prompt(f"r{i}", f"a {o}", i, None, {"object": o, "style": "flat"}) for i, o in enumerate(["cat", "dog"] * 4)],
)
GATE = {"kind": "text", "texts": ["cat"], "threshold": 0.99}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return the folder of a report on a gated patch, a patch without a gate, and an inactive patch."""
    folder = tmp_path_factory.mktemp("report")
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    patches = {
        "gated": low_rank_patch(pipe, gate=GATE, method="<narrow>"),
        "plain": Patch.load(
            delta_patch(pipe, costs={"F": 12345, "B": 67, "seconds": 8.9}).save(folder / "x.safetensors")
        ),
        "off": delta_patch(pipe, seed=2, method="idle"),
    }
    for (name, patch), strength in zip(patches.items(), (1.5, 1.0, 0.0), strict=True):
        pipe.load_patch(patch, name=name, strength=strength)
    evaluate(pipe, "cat", folder=folder, prompts=ROWS, judge=BrightnessJudge(), whole=True, steps=2, progress=False)
    return folder


def test_the_report_matches_its_schema(place):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    data = json.loads((place / "report.json").read_text())
    jsonschema.validate(data, SCHEMA)
    assert data["erasure"] == erasure.__version__
    assert data["provenance"]["loaded"]["gated"]["gate"] == "text"
    assert set(data["paired"]) == {"object", "style", "target"}
    page = (place / "report.html").read_text()
    assert "<td>cat gone<td>" in page and "<td>object kept<td>" in page and "<td>style kept<td>" in page
    assert set(data["paired_labels"]["object"]) == {"cat", "dog"} and set(data["paired_labels"]["style"]) == {"flat"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.update(schema=2),
        lambda data: data.pop("faults"),
        lambda data: data["rows"]["patched"][0].pop("low"),
        lambda data: data["rows"]["patched"][0].update(value="1"),
        lambda data: data["accuracies"]["base"]["object"].update(cat=[1]),
        lambda data: data["provenance"].pop("versions"),
        lambda data: data.update(more=1),
    ],
)
def test_the_schema_rejects_incomplete_reports(place, spoil):
    data = copy.deepcopy(json.loads((place / "report.json").read_text()))
    spoil(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


def test_the_form_of_eval_unlearn(place):
    data = json.loads((place / "report-eval-unlearn.json").read_text())
    ours = json.loads((place / "report.json").read_text())
    assert set(data) == {
        "run_id",
        "timestamp",
        "technique_name",
        "erase_concept",
        "metric_names",
        "metric_results",
    }
    assert re.fullmatch("[0-9a-f]{8}", data["run_id"]) and isinstance(data["timestamp"], float)
    assert data["technique_name"] == "<narrow>+random" and data["erase_concept"] == "cat"
    assert data["metric_names"] == [metric["name"] for metric in ours["rows"]["patched"]]
    for metric, base in zip(ours["rows"]["patched"], ours["rows"]["base"], strict=True):
        result = data["metric_results"][metric["name"]]
        assert set(result) == {"name", "value", "details"} and result["value"] == metric["value"]
        assert result["details"]["n"] == metric["n"] and result["details"]["base"] == base["value"]


def test_the_gate_log_contains_gated_patches_only(place):
    page = (place / "report.html").read_text()
    log = page[page.index("<summary>Gate log") : page.index("<h2>Cost of the erasure")]
    # cat opens the gate on all four target prompts, dog on none; strength 1.5 where it is open.
    assert "4 of 4<td>1.50" in log and "0 of 4<td>0.00" in log
    assert ">gated<" in log and "text gate" in log and "plain" not in log and ">off<" not in log
    assert page.count("gate: 1.50") == 4 and page.count("gate: 0.00") == 4
    assert "<narrow>" not in page
    data = json.loads((place / "report.json").read_text())
    assert {
        (activity["patch"], activity["gate"], activity["prompts"], activity["acts"], activity["n"], activity["mean"])
        for activity in data["gates"]
    } == {
        ("gated", "text", "target", 4, 4, 1.5),
        ("gated", "text", "kept", 0, 4, 0.0),
    }


def test_the_gate_log_covers_all_prompts():
    labels = ["cat"] * 3 + ["dog"] * 2
    records = [
        Record(str(i), "a", 0, 1, 1.0, "", {"object": label}, {"p": value})
        for i, (label, value) in enumerate(zip(labels, (1.0, 0.5, 0.0, 0.0, 0.25), strict=True))
    ]
    activities = gate_activity(records, Target("object", ("cat",), None), {"p": "text", "q": "latent"})
    assert [
        (activity.prompts, activity.acts, activity.n, activity.mean, activity.least, activity.most)
        for activity in activities
    ] == [
        ("target", 2, 3, 0.5, 0.0, 1.0),
        ("kept", 1, 2, 0.125, 0.0, 0.25),
    ]
    assert gate_kinds({"a": {"gate": "always"}, "b": {"gate": "text"}, "c": {}}) == {"b": "text"}


def test_the_page_shows_the_costs_of_active_patches(place):
    loaded = json.loads((place / "report.json").read_text())["provenance"]["loaded"]
    size = (place / "x.safetensors").stat().st_size
    assert loaded["plain"]["costs"] == {"F": 12345, "B": 67, "seconds": 8.9} and loaded["plain"]["bytes"] == size
    assert loaded["gated"]["costs"] == {} and loaded["gated"]["bytes"] is None
    page = (place / "report.html").read_text()
    rows = re.findall(r"<tr>(<td>.*?)</tr>", page[page.index("Cost of the erasure") : page.index("Settings and")])
    assert rows == [f"<td>plain<td>12,345<td>67<td>9<td>{size / 1000:,.0f}"]


def test_the_page_has_the_tradeoff_plot_and_the_accuracy_for_each_label(place):
    page, data = (place / "report.html").read_text(), json.loads((place / "report.json").read_text())
    names = re.findall(r"<title>([^<]*): kept \(IRA\) (\d+)%[^<]*erased \(UA\) (\d+)%", page)
    rows = {row: {m["name"]: round(100 * m["value"]) for m in data["rows"][row]} for row in ("base", "patched")}
    assert {name: (int(kept), int(erased)) for name, kept, erased in names} == {
        "&lt;narrow&gt; + random": (rows["patched"]["IRA"], rows["patched"]["UA"]),
        "base": (rows["base"]["IRA"], rows["base"]["UA"]),
    }
    shown = page[page.index("<h2>Interference") :]
    rows = re.findall(r'<div class="row( target)?"><span>(\w+)<.*?>(\d+)/(\d+) → (\d+)/(\d+)<', shown)
    accuracies = data["accuracies"]
    expected = [
        (label, *accuracies["base"][h][label], *accuracies["patched"][h][label])
        for h in ("object", "style")
        for label in accuracies["base"][h]
    ]
    assert [(label, *map(int, numbers)) for _, label, *numbers in rows] == expected
    assert [label for target, label, *_ in rows if target] == ["cat"]


def test_without_gates_there_is_no_gate_log_and_without_patches_no_technique(tmp_path):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    options = {"prompts": ROWS, "judge": BrightnessJudge(), "whole": True, "steps": 2, "progress": False}
    evaluate(pipe, "cat", folder=tmp_path, **options)
    page = (tmp_path / "report.html").read_text()
    assert "Gate log" not in page and "gate:" not in page
    data = json.loads((tmp_path / "report-eval-unlearn.json").read_text())
    assert data["technique_name"] == "none"
