"""Runs that stop before any one of their renames and are then repeated come to the same result each time.

`tests/test_killed_runs.py` does the same with processes that are killed, at moments between the renames too.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from erasure.erasing import erase
from erasure.evaluation.attacks.run import attack
from erasure.evaluation.evaluate import evaluate
from erasure.evaluation.generate import generate
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from erasure.training import loop
from tests import killing
from tests.conformance.quick import QUICK
from tests.evaluation.attacks.test_run import Likeness
from tests.evaluation.standin import BrightnessJudge
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

ROWS = PromptSet(
    "six", [Prompt(f"r{i}", f"a {thing}", i, None, {"object": thing}) for i, thing in enumerate(["cat", "dog"] * 3)]
)
OPTIONS = {"prompts": ROWS, "steps": 1, "progress": False}


class Stopped(BaseException):
    """The run stops here."""


def pipe():
    """Return a pipeline with a patch that changes what it draws."""
    erased = tiny_pipeline(ErasedStableDiffusionPipeline)
    erased.load_patch(delta_patch(erased, part="resnets", size=0.5), name="p")
    return erased


def train(method, out, seed=0, **changed):
    options = {**QUICK[method], "progress": False, **changed}
    return erase(tiny_pipeline(), "cat", method, out=out / "p.safetensors", seed=seed, **options)


def attack_twice(out):
    for name in ("img2img", "random"):
        settings = {"img2img": {"strengths": (0.5,)}, "random": {"tokens": 2, "tries": 1}}[name]
        options = {**OPTIONS, "cases": 2, "settings": settings}
        attack(pipe(), "cat", name, folder=out, judge=Likeness(2), **options)


RUNS = {
    "esd": lambda out: train("esd", out),
    "salun": lambda out: train("salun", out, iterations=1),
    "drawing": lambda out: generate(pipe(), ROWS, out, steps=1, progress=False),
    "judging": lambda out: evaluate(pipe(), "cat", folder=out, judge=BrightnessJudge(), whole=True, **OPTIONS),
    "attacking": attack_twice,
}


@pytest.fixture
def stop(monkeypatch):
    """Return a function that makes the n-th rename from now on stop the run, and the list of the renames."""
    real, left, done = os.replace, [-1], []

    def rename(source, target):
        if left[0] == len(done):
            raise Stopped
        done.append(target)
        real(source, target)

    def at(number):
        left[0] = number
        done.clear()

    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)
    return at, done


@pytest.mark.parametrize("run", sorted(RUNS))
def test_a_run_stopped_before_any_rename_is_repeated_to_the_same_result(run, stop, tmp_path):
    at, done = stop
    RUNS[run](tmp_path / "straight" / "out")
    expected, renames = killing.result(tmp_path / "straight"), len(done)
    assert renames >= 6 and len(expected) >= 1
    # SalUn keeps two sets of images and a mask; what follows them is as in ESD.
    for number in range(2, 5) if run == "salun" else range(renames):
        folder = tmp_path / str(number)
        at(number)
        with pytest.raises(Stopped):
            RUNS[run](folder / "out")
        at(-1)
        RUNS[run](folder / "out")
        assert killing.result(folder) == expected, f"stopped before rename {number} of {renames}"


def test_a_state_that_is_deleted_in_part_is_not_taken_for_another_run(tmp_path, monkeypatch):
    """The note of what the run was may be gone, and its checkpoint still there."""
    expected = train("esd", tmp_path / "straight", seed=1).payload.digest
    real = shutil.rmtree

    def partly(folder: Path, **options):
        if (Path(folder) / "run.json").is_file():
            (Path(folder) / "run.json").unlink()
            raise Stopped

    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(shutil, "rmtree", partly)
    with pytest.raises(Stopped):
        train("esd", tmp_path, seed=0)
    monkeypatch.setattr(shutil, "rmtree", real)
    assert Patch.load(tmp_path / "p.safetensors").seed == 0
    assert train("esd", tmp_path, seed=1).payload.digest == expected
    assert [path.name for path in tmp_path.iterdir() if "run" in path.name] == []
