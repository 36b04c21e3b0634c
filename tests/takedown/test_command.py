"""The commands on a list, for a checkpoint of the true architecture in one file, at a tenth of its width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erasure.cli.main import main
from erasure.formats.single_file import save_single_file
from erasure.patch import Patch
from tests.tiny import shrunk_pipeline

LIST = """
erase:
  - {name: Van Gogh, kind: style, aliases: [Vincent van Gogh]}
  - {name: Mickey Mouse, kind: identity}
  - dog
keep: [Rembrandt, cat, {file: more.txt}]
defaults: []
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("lists")
    save_single_file(shrunk_pipeline("sd2"), place / "model.safetensors")
    (place / "list.yaml").write_text(LIST)
    (place / "more.txt").write_text("tree\nhouse\n")
    return place


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_list_is_planned_and_erased_from_one_file(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    what = ("--list", "list.yaml", "--model", "model.safetensors")
    code, out, err = run(capsys, "plan", *what)
    assert code == 0, err
    for text in ("Van Gogh", "Mickey Mouse", "nearest kept", "kept words       4"):
        assert text in out, text
    forecast = json.loads(run(capsys, "plan", *what, "--json")[1])
    assert {row["name"] for row in forecast["rows"]} == {"Van Gogh", "Vincent van Gogh", "Mickey Mouse", "dog"}
    assert forecast["kept"] == 4 and forecast["width"] == 160
    code, out, err = run(capsys, "erase", *what, "-o", "patch.safetensors")
    out = " ".join(out.split())  # lines are as wide as the terminal
    assert code == 0 and "erases 3 names by speed" in out and "relative error of fp16 0.0" in out, err
    patch = Patch.load("patch.safetensors")
    assert patch.config["method"] == "speed" and patch.concepts[0]["aliases"] == ["Vincent van Gogh"]
    assert [entry["name"] for entry in patch.kept["keep"]] == ["Rembrandt", "cat", "tree", "house"]
    data = json.loads(run(capsys, "erase", *what, "-o", "again.safetensors", "--method", "uce", "--json")[1])
    assert data["method"] == "uce" and data["bytes"] == Path("again.safetensors").stat().st_size
    assert 0 < data["dtype_error"] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["erase", "cat", "--list", "list.yaml"], "CONCEPT cannot be used with --list"),
        (
            ["erase", "--list", "list.yaml", "--keep", "x", "--anchor", "y"],
            "--anchor, --keep cannot be used with --list",
        ),
        (["erase", "--list", "list.yaml", "--preview-every", "1"], "--preview-every cannot be used with --list"),
        (["erase"], "which concept should be erased? Give CONCEPT, or a list of names with --list"),
        (["plan", "--list", "none.yaml"], "none.yaml: cannot be read"),
        (["erase", "--list", "list.yaml", "--method", "esd"], "esd does not solve for a whole list"),
        (["erase", "--list", "list.yaml", "--set", "ridgee=1"], "ridgee"),
        (["erase", "--list", "list.yaml", "--precision", "bf16"], "makes no UNet calls, so precision would have no"),
        (["plan", "--list", "odd.yaml", "--model", "model.safetensors"], "no list knows 1 name ('Qwx Zyv'): say what"),
        (["erase", "--list", "both.yaml"], "both.yaml: 'puppy' (an alias of 'dog'): both to be erased and to be kept"),
    ],
)
def test_wrong_use(folder, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    Path("odd.yaml").write_text("erase: [Qwx Zyv]\n")
    Path("both.yaml").write_text("erase:\n  - {name: dog, aliases: [puppy]}\nkeep: [puppy]\n")
    code, _, err = run(capsys, *arguments, *(["-o", "wrong.safetensors"] if arguments[0] == "erase" else []))
    assert code == 2 and says in err, err
    assert not Path("wrong.safetensors").exists()


def test_the_kind_may_be_given_for_all(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    Path("odd.yaml").write_text("erase: [Qwx Zyv]\nkeep: [cat]\ndefaults: []\n")
    arguments = (
        "erase",
        "--list",
        "odd.yaml",
        "--model",
        "model.safetensors",
        "--kind",
        "identity",
        "-o",
        "k.safetensors",
    )
    code, _, err = run(capsys, *arguments, "--set", "guide=empty")
    assert code == 0 and Patch.load("k.safetensors").concepts[0]["kind"] == "identity", err
