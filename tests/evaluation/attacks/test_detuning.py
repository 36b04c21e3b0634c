"""Spectral DeTuning: the base comes back out of merged exports, and only where their changes have a low rank."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

from erasure.cli.main import main
from erasure.errors import ErasureError
from erasure.evaluation.attacks.detuning import Detuning, detune, detuning, estimate_rank, read_export, recover
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.evaluation.attacks.test_run import QUICK, SCHEMA, Likeness
from tests.patch.making import delta_patch, low_rank_patch, same, weights
from tests.tiny import tiny_pipeline


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.fixture
def files(pipe, tmp_path):
    patches = [low_rank_patch(pipe, seed=i, rank=1, part="attn2.to_k", size=0.5) for i in range(6)]
    return [patch.save(tmp_path / f"{i}.safetensors") for i, patch in enumerate(patches)]


def test_detuning_finds_the_weights_behind_several_low_rank_changes():
    torch.manual_seed(0)
    base = torch.randn(24, 20, dtype=torch.double)
    published = []
    for _ in range(6):
        low = torch.randn(24, 2, dtype=torch.double) @ torch.randn(2, 20, dtype=torch.double)
        published.append(base + 0.3 * low)
    mean = torch.stack(published).mean(0)
    assert (detune(published, 2) - base).norm() < 1e-3 * (mean - base).norm()
    assert estimate_rank(torch.stack(published)) == 2
    for bad, rank, message in ((published[:1], 2, "two or more"), (published, 0, "rank=0")):
        with pytest.raises(ErasureError, match=message):
            detune(bad, rank)


def test_patches_and_the_folders_they_were_merged_into_are_the_same_exports(pipe, files, tmp_path):
    before, folders = weights(pipe), []
    for i, file in enumerate(files[:2]):
        pipe.load_patch(file, name="p")
        pipe.save_pretrained(tmp_path / f"merged{i}")
        folders.append(tmp_path / f"merged{i}")
        pipe.delete_patches("p")
    for file, folder in zip(files, folders, strict=False):
        of_file, of_folder = read_export(pipe, file), read_export(pipe, folder)
        assert of_file.keys() == of_folder.keys() and of_file and all("attn2.to_k" in name for _, name in of_file)
        assert all(torch.equal(of_file[key], of_folder[key]) for key in of_file)
    assert same(before, weights(pipe))


def test_the_base_comes_back_and_draws_the_concept_again(pipe, files, tmp_path):
    before = weights(pipe)
    out = tmp_path / "out"
    options = {key: value for key, value in QUICK.items() if key != "progress"}
    report = detuning(pipe, "cat", files, folder=out, judge=Likeness(near=0.2), **options)
    assert same(before, weights(pipe)) and not pipe.get_list_patches()
    result = report.outcome("detune")
    assert result.plain == 0 and len(result.won) == result.n == 3, report.text()
    assert result.settings["error"] < 0.05 < result.settings["error_of_mean"] and result.settings["rank_used"] == "1"
    data = json.loads((out / "report.json").read_text())
    jsonschema.validate(data, SCHEMA)
    assert "6 exports" in data["notes"][0] and "6 exports" in (out / "report.html").read_text()
    assert len(list((out / "detune").glob("*.png"))) == 3


@pytest.mark.slow
def test_esds_low_rank_exports_of_glyph_give_the_cat_back(tmp_path):
    """The easy victim: a brief ESD of rank 4, merged, and four other exports of the same base."""
    from erasure.erasing import erase

    glyph = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    glyph.set_progress_bar_config(disable=True)
    brief = {"iterations": 40, "rank": 4, "trajectories": 4, "learning_rate": 5e-3, "progress": False}
    patches = [erase(glyph, "cat", "esd", **brief)]
    patches += [low_rank_patch(glyph, seed=i, rank=4, part="attn2.to_", size=0.05, alpha=4.0) for i in range(4)]
    exports = [patch.save(tmp_path / f"{i}.safetensors") for i, patch in enumerate(patches)]
    report = detuning(glyph, "cat", exports, folder=tmp_path / "out", cases=4, steps=12, settings={"iterations": 24})
    result = report.outcome("detune")
    assert result.plain < result.n / 2 and result.plain + len(result.won) == result.n, report.text()
    assert result.settings["error"] < 0.5 * result.settings["error_of_mean"]


def test_full_rank_changes_stay(pipe):
    published = []
    for seed in range(6):
        name = pipe.load_patch(delta_patch(pipe, seed=seed, size=0.5), name="p")
        now = weights(pipe)
        pipe.delete_patches(name)
        published.append({tuple(k.split(".", 1)): v for k, v in now.items() if "attn2.to_k" in k})
    *_, figures = recover(pipe, published, Detuning(iterations=40))
    assert figures["error"] > 0.2


def test_bad_input(pipe, files, tmp_path):
    options = {"folder": tmp_path / "out", "judge": Likeness(), "prompts": QUICK["prompts"], "cases": 3, "steps": 2}
    for exports, message in (
        (files[:1], "two or more"),
        ([files[0], files[0]], "same weights"),
        ([files[0], tmp_path], "diffusers folder"),
    ):
        with pytest.raises(ErasureError, match=message):
            detuning(pipe, "cat", exports, **options)
    pipe.load_patch(files[0])
    with pytest.raises(ErasureError, match="without patches"):
        detuning(pipe, "cat", files, **options)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_exports_with_detune_alone(capsys):
    for line in (["--attack", "p4d", "--export", "a"], ["--attack", "detune", "--patch", "a", "--export", "b"]):
        assert main(["attack", "cat", *line]) == 2
        assert "--export belongs to" in capsys.readouterr().err
    assert main(["attack", "--list"]) == 0 and "detune" in capsys.readouterr().out
