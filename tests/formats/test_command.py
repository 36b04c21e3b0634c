"""The commands `erasure patch info`, `formats`, `import` and `export`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from erasure.cli.main import main
from erasure.patch import Patch
from tests.formats.making import changed, close
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline, write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny(tmp_path_factory.mktemp("model") / "tiny"))


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["patch", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


def test_exported_and_imported_again(capsys, tmp_path, model):
    patch = delta_patch(tiny_pipeline(), base=model)
    patch.save(tmp_path / "p.safetensors")
    # The base is read from the header of the patch.
    code, out, _ = run(
        capsys, "export", tmp_path / "p.safetensors", "--format", "esd", "-o", tmp_path / "esd.safetensors"
    )
    assert code == 0 and "written as unet" in out
    code, out, _ = run(
        capsys,
        "import",
        tmp_path / "esd.safetensors",
        "--model",
        model,
        "--concept",
        "cat",
        "-o",
        tmp_path / "back.safetensors",
    )
    assert code == 0 and "detected as unet (UNet weights under diffusers' names" in out
    imported = Patch.load(tmp_path / "back.safetensors")
    assert close(patch, imported, 1e-5) and imported.names == ["cat"]


def test_a_rank_and_its_error_are_reported(capsys, tmp_path):
    delta_patch(tiny_pipeline()).save(tmp_path / "p.safetensors")
    command = (
        "export",
        tmp_path / "p.safetensors",
        "--format",
        "kohya",
        "--rank",
        3,
        "-o",
        tmp_path / "lora.safetensors",
    )
    assert "reduced to rank 3: relative error 0." in run(capsys, *command)[1]
    report = json.loads(run(capsys, *command, "--json")[1])
    assert 0 < report["error"] < 1 and report["format"] == "kohya" and report["notes"] == []


def test_pickles_need_the_flag(capsys, tmp_path, model):
    torch.save(changed(tiny_pipeline(), "unet", "attn2.to_k"), tmp_path / "unet.pt")
    command = ("import", tmp_path / "unet.pt", "--model", model, "-o", tmp_path / "p.safetensors")
    code, _, err = run(capsys, *command)
    assert code == 2 and "--allow-pickle" in err and not (tmp_path / "p.safetensors").exists()
    code, out, _ = run(capsys, *command, "--allow-pickle", "--json")
    report = json.loads(out)
    assert code == 0 and report["format"] == "unet" and report["kind"] == "delta" and report["components"] == ["unet"]
    assert (tmp_path / "p.safetensors").exists()


def test_info_reports_loaders_and_exports(capsys, tmp_path):
    low_rank_patch(tiny_pipeline(), gate={"kind": "text"}).save(tmp_path / "p.safetensors")
    report = json.loads(run(capsys, "info", tmp_path / "p.safetensors", "--json")[1])
    assert report["loads"]["erasure"] == "with its gate" and report["loads"]["ComfyUI"] == "without its gate"
    assert report["exports"]["spm"].startswith("no: needs a term on every layer") and report["exports"][
        "peft"
    ].startswith("yes")
    text = run(capsys, "info", tmp_path / "p.safetensors")[1]
    assert "diffusers without its gate" in text and "checkpoint" in text


def test_formats_are_listed(capsys):
    table = json.loads(run(capsys, "formats", "--json")[1])
    assert {"format", "holds", "reads", "writes", "loaders"} <= set(table[0])
    out = run(capsys, "formats")[1]
    assert all(row["format"] in out for row in table) and "advunlearn" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "p.safetensors", "--format", "pfet", "-o", "x"), "did you mean 'peft'"),
        (("export", "p.safetensors", "--format", "kohya", "-o", "x"), "--rank"),
        (("export", "p.safetensors", "--format", "unet", "--model", "nowhere", "-o", "x"), "unknown model 'nowhere'"),
        (("import", "other.safetensors", "-o", "x"), "none of spm, kohya"),
        (("import", "other.safetensors", "--format", "kohia", "-o", "x"), "did you mean 'kohya'"),
        (("import", "p.safetensors", "-o", "x"), "a patch already"),
        (("import", ".", "-o", "x"), "a folder without"),
    ],
)
def test_wrong_use_exits_with_2_before_a_model_loads(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    delta_patch(tiny_pipeline()).save("p.safetensors")
    save_file({"layer1": torch.ones(1)}, "other.safetensors")
    code, out, err = run(capsys, *arguments)
    assert code == 2 and message in err and out == "" and not (tmp_path / "x").exists()


def test_info_is_a_page_for_people(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    results = {
        "metrics": {"UA": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 40, "base": 0.1, "higher_is_better": True}},
        "attacks": {"rece": {"value": 0.5, "low": 0.3, "high": 0.7, "n": 12, "before": 0.25, "control": 0.25}},
    }
    concept = {"name": "cat", "kind": "object", "aliases": ["kitten"], "anchor": "a dog", "keep": ["lion", "dog"]}
    patch = low_rank_patch(
        tiny_pipeline(),
        concepts=[concept],
        gate={"kind": "text", "texts": ["cat"], "states": "A" * 500},
        config={"method": "spm", "rank": 2, "warm_up": None, "early": True},
        costs={"F": 3600, "B": 1600, "seconds": 321.53},
        results=results,
    )
    patch.save(tmp_path / "p.safetensors")
    assert main(["patch", "info", str(tmp_path / "p.safetensors")]) == 0
    text = capsys.readouterr().out
    titles = [line for line in text.splitlines() if line and not line.startswith(" ") and ":" not in line]
    assert [title for title in titles if title[0].isupper()] == [
        "What", "Erased", "Base", "Gate", "Settings", "Costs", "Results", "Where it loads", "Exports"
    ]  # fmt: skip
    flat = " ".join(text.split())
    assert "cat kind object; also called kitten; shows instead a dog; preserves lion, dog" in flat
    assert "warm_up none" in flat and "early yes" in flat and "forwards 3,600 backwards 1,600" in flat
    assert "UA 90% [80, 95]; base 10%" in flat and "rece success rate 50% [30, 70]; without the attack 25%" in flat
    assert not any(sign in text for sign in ("{", "}", '"', "null", "AAAA"))
    assert [line for line in text.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
