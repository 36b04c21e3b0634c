"""`erasure list presets`, the page of the docs, and what `plan` and `erase` tell about settings and kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import erasure
from erasure.cli import choices, preset_tables
from erasure.cli.main import main
from erasure.model import presets
from tests.tiny import write_tiny

PAGE = Path(erasure.__file__).resolve().parents[1] / "docs" / "presets.md"
BRIEF = ["iterations=2", "learning_rate=1e-3", "trajectories=1", "sample_steps=2"]
GIVEN = ["--method", "esd", *(word for setting in BRIEF for word in ("--set", setting))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_tiny(tmp_path_factory.mktemp("tiny")))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_page_of_the_docs_is_the_generated_one():
    assert PAGE.read_text(encoding="utf-8") == preset_tables.page(), (
        "python -m erasure.cli.preset_tables > docs/presets.md"
    )


def test_the_table_has_every_method_and_kind_with_a_source():
    for preset in map(presets.find, presets.names()):
        rows = preset_tables.preset_rows(preset)
        assert all(len(row) == 4 and all(row) for row in rows)
        for method in ("advunlearn", "esd", "salun", "spm", "unguide"):
            kinds = {kind for name, kind, *_ in rows if name == method}
            assert "all" in kinds or set(choices.KINDS) <= set(", ".join(kinds).split(", "))
    rows = preset_tables.preset_rows(presets.find("sd1"))
    assert next(kind for method, kind, text, _ in rows if method == "esd" and "variant=u" in text) == "object, content"


def test_presets_are_listed(capsys):
    assert json.loads(run(capsys, "list", "presets", "--json")[1]).keys() == set(presets.names())
    text = " ".join(run(capsys, "list", "presets", "sd1")[1].split())
    assert "50 steps, guidance 7.5" in text and "train-esd.py" in text
    assert json.loads(run(capsys, "list", "presets", "sd1", "--json")[1])[0]["source"]
    assert run(capsys, "list", "presets", "sd9")[0] == 2
    assert choices.presets() == tuple(presets.names())


def test_a_plan_tells_where_each_setting_came_from(capsys, tiny):
    three = ["--method", "esd", "--set", "iterations=3"]
    code, out, _ = run(capsys, "plan", "Monet", *three, "--preset", "glyph", "--json", "--model", tiny)
    costs = json.loads(out)
    assert code == 0 and costs["settings"]["iterations"] == {"value": 3, "source": "given"}
    assert costs["settings"]["trajectories"]["value"] == 12 and all(own["source"] for own in costs["settings"].values())
    assert "preset glyph (as asked for)" in costs["sources"][0] and "erased as a style" in costs["sources"][1]
    text = " ".join(run(capsys, "plan", "cat", *three)[1].split())
    assert "iterations=3: given" in text and "tuned on glyph" in text and "Settings, and where they come from" in text


def test_the_run_tells_it_too(capsys, tiny, tmp_path):
    out = str(tmp_path / "p.safetensors")
    code, _, err = run(capsys, "erase", "cat", "--model", tiny, *GIVEN, "-o", out)
    flat = " ".join(err.split())
    assert code == 0 and "learning_rate=0.001" in flat and ": given" in flat and "no preset (no family is known" in flat
    told = json.loads(run(capsys, "erase", "cat", "--model", tiny, *GIVEN, "-o", out, "--json")[1])
    assert any(line.endswith(": given") for line in told["sources"])


def test_a_file_of_settings_is_named_as_their_source(capsys, tiny, tmp_path):
    (tmp_path / "own.yaml").write_text("batch_size: 2\niterations: 5\n")
    arguments = ["plan", "cat", "--model", tiny, "--config", str(tmp_path / "own.yaml"), *GIVEN, "--json"]
    settings = json.loads(run(capsys, *arguments)[1])["settings"]
    assert settings["batch_size"] == {"value": 2, "source": "the file of --config"}
    assert settings["iterations"] == {"value": 2, "source": "given"}


def test_a_name_that_no_list_knows_needs_its_kind_on_a_real_checkpoint(capsys, tiny):
    code, _, err = run(capsys, "plan", "zzyzx", "cat", "--model", tiny, *GIVEN)
    assert code == 2 and "no list knows 'zzyzx'" in err and "object, style, identity, content" in err
    assert "cat" not in err.split("no list knows")[1].split(":")[0]
    assert run(capsys, "plan", "zzyzx", "--kind", "identity", "--model", tiny, *GIVEN)[0] == 0
    code, _, err = run(capsys, "plan", "zzyzx", *GIVEN)  # on glyph
    assert code == 0


def test_an_unknown_name_on_glyph_is_told(capsys, tmp_path):
    code, _, err = run(capsys, "erase", "zzyzx", *GIVEN, "--set", "batch_size=1", "-o", str(tmp_path / "p.safetensors"))
    assert code == 0 and "'zzyzx' is erased as an object" in " ".join(err.split())
