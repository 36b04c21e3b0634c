"""The commands that make patches from patches, and those that share them: exit codes, files, JSON."""

from __future__ import annotations

import json

import pytest

from erasure.patch import Patch
from erasure.pipelines import load_patch
from tests.cli.test_cli import run
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import tiny_pipeline, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Patches one, other, gated and dense, and two checkpoints."""
    root, pipe = tmp_path_factory.mktemp("patches"), tiny_pipeline()
    gate = {"kind": "text", "texts": ["x"]}
    patches = {"one": low_rank_patch(pipe, 1), "other": low_rank_patch(pipe, 2), "dense": delta_patch(pipe, 3)}
    patches["gated"] = low_rank_patch(pipe, 4, gate=gate)
    for name, patch in patches.items():
        patch.save(root / f"{name}.safetensors")
    write_tiny(root / "base")
    load_patch(pipe, patches["one"])
    pipe.save_pretrained(root / "tuned")
    return root


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    """Paths that begin with @ lie in the folder of patches; what is written goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: [word.replace("@", f"{folder}/") for word in words]


ONE, OTHER, DENSE, GATED = (f"@{name}.safetensors" for name in ("one", "other", "dense", "gated"))


@pytest.mark.parametrize(
    ("words", "kind", "parents"),
    [
        (["scale", ONE, "0.5"], "low-rank", [0.5]),
        (["scale", ONE, "-1", "--dtype", "bf16"], "low-rank", [-1]),
        (["negate", DENSE], "delta", [-1]),
        (["merge", ONE, f"{OTHER}:0.25"], "low-rank", [1, 0.25]),
        (["merge", ONE, DENSE, "--model", "@base"], "delta", [1, 1]),
        (["merge", ONE, GATED, "--drop-gate"], "low-rank", [1, 1]),
        (["subtract", ONE, OTHER], "low-rank", [1, -1]),
        (["resize", ONE, "--rank", "1"], "low-rank", [1]),
        (["resize", DENSE, "--energy", "0.9"], "low-rank", [1]),
    ],
)
def test_patches_from_patches(capsys, here, words, kind, parents):
    code, out, err = run(capsys, "patch", *here(*words), "-o", "made.safetensors", "--json")
    assert code == 0 and not err
    info, made = json.loads(out), Patch.load("made.safetensors")
    assert info["patch"] == "made.safetensors" and info["kind"] == kind
    assert info["dtype"] == ("bf16" if "bf16" in words else "fp32")
    assert [entry["weight"] for entry in made.config["parents"]] == parents
    if words[0] == "resize":
        assert info["error"] == made.config["error"] > 0
    code, out, _ = run(capsys, "patch", *here(*words), "-o", "made.safetensors")
    assert code == 0 and out.startswith("made.safetensors: ")


def test_the_difference_of_checkpoints(capsys, here, folder):
    words = here("diff", "@base", "@tuned", "--concept", "van gogh", "-o", "made.safetensors", "--json")
    code, out, _ = run(capsys, "patch", *words)
    assert code == 0 and json.loads(out)["concepts"] == ["van gogh"]
    wanted = Patch.load(folder / "one.safetensors").deltas("unet")
    got = Patch.load("made.safetensors").deltas("unet")
    assert all(float((got[name] - wanted[name]).abs().max()) < 1e-6 for name in wanted)


def test_figures(capsys, here, tmp_path):
    code, out, _ = run(capsys, "patch", *here("conflicts", ONE, OTHER, DENSE), "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 3 and {"cosine", "share_a", "layers"} <= rows[0].keys()
    assert "cosine" in run(capsys, "patch", *here("conflicts", ONE, OTHER))[1]
    code, out, _ = run(capsys, "patch", *here("resize", ONE, "--report"), "-o", "sizes.png", "--json")
    assert code == 0 and [row["rank"] for row in json.loads(out)["rows"]] == [1, 2]
    assert (tmp_path / "sizes.png").is_file()
    assert "worst layer" in run(capsys, "patch", *here("resize", ONE, "--report"))[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["scale", ONE, "nan", "-o", "x.safetensors"], "scaled by a finite number"),
        (["merge", ONE, GATED, "-o", "x.safetensors"], "--drop-gate"),
        (["merge", ONE, "@nowhere.safetensors", "-o", "x.safetensors"], "nowhere.safetensors"),
        (["resize", ONE, "--rank", "0", "-o", "x.safetensors"], "from 1 to 2"),
        (["resize", ONE, "--rank", "3", "-o", "x.safetensors"], "from 1 to 2"),
        (["resize", ONE, "--rank", "0", "--report"], "from 1 to 2"),
        (["resize", ONE, "--rank", "1"], "-o FILE"),
        (["resize", ONE, "-o", "x.safetensors"], "either rank or energy"),
        (["scale", ONE, "2", "--dtype", "fp8", "-o", "x.safetensors"], "unknown dtype"),
        (["conflicts", ONE], "at least two"),
        (["diff", "@base", "@base", "--concept", "x", "-o", "x.safetensors"], "have the same weights in unet"),
        (["diff", "@base", "@nowhere", "--concept", "x", "-o", "x.safetensors"], "unknown model"),
    ],
)
def test_wrong_use(capsys, here, tmp_path, words, says):
    code, out, err = run(capsys, "patch", *here(*words))
    assert code == 2 and says in err and not out and not list(tmp_path.iterdir())


def test_sharing(capsys, here, folder, tmp_path):
    code, out, _ = run(capsys, "push", *here(ONE), "me/one", "--folder", "repo", "--json")
    assert code == 0 and json.loads(out)["files"] == ["README.md", "erasure.json", "one.safetensors"]
    code, out, _ = run(capsys, "pull", "repo", "--json")
    assert code == 0 and json.loads(out)["patch"] == "one.safetensors"
    assert (tmp_path / "one.safetensors").read_bytes() == (folder / "one.safetensors").read_bytes()
    assert "erased from tiny" in run(capsys, "pull", "repo")[1]
    code, _, err = run(capsys, "push", *here(ONE), "one")
    assert code == 2 and "owner/name" in err
    code, _, err = run(capsys, "pull", "no where")
    assert code == 2 and "owner/name" in err
