"""The table: what is averaged, what is printed, which prompts are asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from erasure.benchmark.row import Cell, Row, members
from erasure.benchmark.run import bench, concept_lists, training_seed, write
from erasure.benchmark.table import Table
from erasure.errors import ErasureError
from erasure.evaluation.metrics.gate_activity import GateActivity
from erasure.evaluation.metrics.statistics import wilson
from erasure.glyph import vocabulary
from erasure.prompts.concept_prompts import concept_prompts


def row(concept: str, value: float, tuned: bool = False, method: str = "esd") -> Row:
    cells = {name: Cell(value, value - 0.1, value + 0.1, 20, 0.5) for name in ("UA", "IRA")}
    return Row(method, concept, "object", tuned, cells, {"F": 10, "B": 4, "seconds": 1.5}, 2000)


def test_means_leave_tuned_concepts_out_and_groups_apart():
    table = Table([row("cat", 0.0, tuned=True), row("dog", 0.8), row("owl", 1.0), row("dog+owl", 0.4)], {})
    means = {(entry["group"], entry["method"]): entry for entry in table.means()}
    assert set(means) == {("objects", "esd"), ("2 together", "esd")}
    both = means["objects", "esd"]["UA"]
    assert both["value"] == pytest.approx(0.9) and both["base"] == 0.5
    # Two concepts say less of others than their 40 images: the interval is no narrower than theirs.
    assert both["low"] == pytest.approx(wilson(36, 40)[0]) and both["high"] == 1.0
    alone = means["2 together", "esd"]["UA"]
    assert (alone["low"], alone["high"]) == (pytest.approx(0.3), pytest.approx(0.5))


def test_the_markdown_has_the_base_before_the_methods_and_every_concept():
    text = Table([row("dog", 0.8), row("dog", 0.6, method="other"), row("cat", 0.7, tuned=True)], {}).markdown()
    lines = text.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["*base*", "esd", "other"]
    assert "80% [70, 90]" in text and "| cat * |" in text
    several = "+".join(str(number) for number in range(16))
    text = Table([row(name, 0.5) for name in (several, "a+b+c+d", "a&b&c&d", "dog")], {}).summary()
    assert [line.split(" (")[0] for line in text.splitlines()[3::2]] == [
        "| objects",
        "| 4 stacked",
        "| 4 together",
        "| 16 together",
    ]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_prompts_about_an_object_ask_for_it_its_synonyms_its_neighbours_and_others():
    rows = concept_prompts(["dog"]).rows
    roles = {role: [r for r in rows if r.labels.get("role", "") == role] for role in ("", "synonym", "neighbour")}
    assert {r.labels["object"] for r in roles["synonym"]} == {"dog"} and not any(
        "dog" in r.prompt for r in roles["synonym"]
    )
    families = {vocabulary()["objects"][r.labels["object"]]["family"] for r in roles["neighbour"]}
    assert families == {"animal"} and "dog" not in {r.labels["object"] for r in roles["neighbour"]}
    assert len({r.id for r in rows}) == len(rows) == 132
    assert {role: len(found) for role, found in roles.items()} == {"": 96, "synonym": 12, "neighbour": 24}
    target = [r for r in roles[""] if r.labels["object"] == "dog"]
    assert len(target) == 48 and len({(r.prompt, r.seed) for r in target}) == 48
    assert {sum(r.prompt == prompt for r in target) for prompt in {r.prompt for r in target}} == {2}
    assert len({r.labels["object"] for r in roles[""]}) == 40  # the others are spread over all objects
    # Wordings of the training captions, with backgrounds and without, and others.
    assert {r.id.partition("-")[0] for r in target} == {"objects", "backgrounds", "varied"}


def test_a_limit_shrinks_every_part_and_keeps_prompts_distinct_first():
    rows = concept_prompts(["dog"], 33).rows
    target = [r for r in rows if r.labels["object"] == "dog" and not r.labels.get("role")]
    assert len(rows) == 33 and len(target) == len({r.prompt for r in target}) == 12


def test_prompts_about_a_style_ask_with_other_words_for_it():
    rows = concept_prompts(["ink"]).rows
    synonyms = [r for r in rows if r.labels.get("role") == "synonym"]
    assert len(synonyms) == 12 and all("silhouette" in r.prompt and r.labels["style"] == "ink" for r in synonyms)
    plain = [r for r in rows if not r.labels.get("role")]
    assert not any("silhouette" in r.prompt for r in plain) and all(r.labels.get("style") for r in plain)


def test_every_concept_has_a_training_seed_of_its_own():
    _, report = concept_lists()
    assert len({training_seed(name) for name in report}) == len(report)
    assert training_seed("dog") == training_seed("dog") == 52579


def test_rows_are_the_same_whatever_they_are_about():
    of_dog, of_owl = ({r.id: (r.prompt, r.seed) for r in concept_prompts([name]).rows} for name in ("dog", "owl"))
    shared = of_dog.keys() & of_owl.keys()
    assert len(shared) > 10 and all(of_dog[key] == of_owl[key] for key in shared)


def test_a_content_concept_is_asked_for_broadly_and_by_name():
    rows = concept_prompts(["weapon"]).rows
    members = {r.labels["object"] for r in rows if not r.labels.get("role") and "weapon" not in r.prompt}
    assert {"bomb", "dagger"} <= members
    assert any("weapon" in r.prompt for r in rows if r.labels.get("role") == "synonym")


def test_the_concept_lists_are_apart():
    tuned, report = concept_lists()
    assert not set(tuned) & {member for name in report for member in members(name)}
    assert sorted(len(members(name)) for name in report if "+" in name) == [4, 16]
    assert [len(members(name)) for name in report if "&" in name] == [4]


def test_bad_input_is_told_before_any_work(tmp_path):
    with pytest.raises(ErasureError, match="unknown concept 'dgo': did you mean 'dog'. Allowed: dog, ") as error:
        bench(["esd"], ["cat&dgo"], tmp_path)
    assert str(error.value).count(" dog,") == 1
    with pytest.raises(ErasureError, match="unknown method"):
        bench(["sed"], ["dog"], tmp_path)
    with pytest.raises(ErasureError, match="at least"):
        bench(["esd"], ["dog"], tmp_path, limit=3, progress=False)
    assert not list(tmp_path.iterdir())


def test_rows_of_an_earlier_table_are_not_measured_again(tmp_path):
    earlier, folder = tmp_path / "earlier.json", tmp_path / "bench"
    first = replace(row("dog", 0.8), outcomes={"UA": {"a": True, "b": False}}, base={"UA": {"a": False, "b": False}})
    earlier.write_text(json.dumps(Table([first], {"limit": 12, "overrides": {}}, {"a": "a dog"}).to_json()))
    options = {"limit": 12, "progress": False, "rows_from": earlier}
    table = bench(["esd"], ["dog"], folder, **options)
    assert table.rows == [first]
    assert Table.from_json(json.loads((folder / "bench.json").read_text())).rows == [first]
    assert "| dog |" in (folder / "bench.md").read_text()
    assert not (folder / "bench.html").exists() and not (folder / "esd").exists()  # they have no images
    with pytest.raises(ErasureError, match="not .*'limit': 20.* not be comparable"):
        bench(["esd"], ["dog"], folder, **{**options, "limit": 20})
    earlier.write_text("{")
    with pytest.raises(ErasureError, match="not a table of `erasure bench`"):
        bench(["esd"], ["dog"], folder, **options)


@pytest.mark.slow
def test_together_is_one_patch_and_stacked_a_patch_each(tmp_path):
    settings = {"iterations": 2, "trajectories": 1, "sample_steps": 4}
    options = {"limit": 12, "progress": False, "overrides": settings}
    joint, stacked, alone = bench(["esd"], ["dog+owl", "dog&owl", "dog"], tmp_path, **options).rows
    folders = {place.parent.name for place in (tmp_path / "esd").glob("*/patch.safetensors")}
    assert folders == {"dog+owl", "dog", "owl"}
    assert (joint.group, stacked.group) == ("2 together", "2 stacked")
    assert stacked.costs["F"] == 2 * alone.costs["F"]
    assert stacked.bytes == pytest.approx(2 * alone.bytes, abs=64)  # headers hold the seconds, in more digits or fewer
    records = (tmp_path / "esd" / "dog&owl" / "patched" / "records.jsonl").read_text().splitlines()
    assert set(json.loads(records[0])["gates"]) == {"dog", "owl"}


def test_kept_is_the_mean_of_what_there_is():
    both = row("dog", 0.8)
    both.cells["CRA"] = Cell(0.6, 0.4, 0.7, 10, 1.0)
    kept = both.cell("kept")
    assert (kept.value, kept.base, kept.n) == (pytest.approx(0.7), 0.75, 10)
    assert (kept.low, kept.high) == (pytest.approx(0.55), pytest.approx(0.8))
    assert row("dog", 0.8).cell("kept").value == 0.8 and both.cell("CRA").value == 0.6
    both.cells.clear()
    assert both.cell("kept") is None
    assert Table([row("dog", 0.8)], {}).means()[0]["kept"]["value"] == 0.8


def folder_of(rows: list[Row], folder: Path) -> Table:
    """A bench's folder, as far as its page reads it."""
    for entry in rows:
        labels = {label: [3, 4] for label in (*entry.concept.split("+"), "cow")}
        report = {
            "concept": entry.concept.split("+"),
            "domain": "object",
            "accuracies": {"base": {"object": labels}, "patched": {"object": {key: [1, 4] for key in labels}}},
            "provenance": {"steps": 25, "judge": {"name": "glyph"}, "versions": {"torch": "2"}},
            "gates": [GateActivity("p", "text", "target", 3, 4, 0.75, 0, 1).to_json()]
            if entry.concept == "dog"
            else [],
        }
        place = folder / entry.method / entry.concept
        place.mkdir(parents=True)
        (place / "report.json").write_text(json.dumps(report))
    return Table(rows, {"limit": None})


def test_the_page_holds_tables_plots_and_matrices(tmp_path):
    rows = [row("dog", 0.8), row("dog", 0.6, method="<other>"), row("cat", 0.7, tuned=True), row("dog+owl", 0.4)]
    for entry, value in zip(rows, (0.4, 0.3, 0.9, 0.2), strict=True):
        entry.cells["H"] = Cell(value, value, value, 20, 0.0)
    write(folder_of(rows, tmp_path), tmp_path)
    page = (tmp_path / "bench.html").read_text()
    assert "<script" not in page and "http:" not in page and "https:" not in page and "<other>" not in page
    assert page.count("<svg") == 2  # objects, and two together
    assert page.count('class="matrix"') == 2 and "−50" in page and "color-mix" not in page and "dog + 1 more" in page
    assert "highest H: 2 together (1) esd (erased 40%, kept 40%), objects (1) esd (erased 80%, kept 80%)." in page
    assert "2 methods, 3 concepts, 4 runs" in page and "cat *" in page and "&quot;torch&quot;" in page
    log = page[page.index("<summary>Gate log") :]
    assert "<td>esd, dog<small>text gate" in log and "3 of 4<td>0.75<small>0.00 to 1.00" in log
    assert log.count("text gate") == 2 and "esd, cat" not in log  # the two methods' dogs
    assert "data:image/png;base64," in page and (tmp_path / "bench.png").is_file()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_without_its_report_is_told(tmp_path):
    table = folder_of([row("dog", 0.8)], tmp_path)
    (tmp_path / "esd" / "dog" / "report.json").unlink()
    with pytest.raises(ErasureError, match=r"report\.json cannot be read.*result\.json"):
        write(table, tmp_path)
    assert not (tmp_path / "bench.html").exists()
