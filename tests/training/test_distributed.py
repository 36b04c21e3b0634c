"""Two processes of a launch make the patch that one makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from erasure.erasing import erase
from erasure.patch import Patch
from tests.conformance.quick import changes, same
from tests.tiny import tiny_pipeline
from tests.training.steps import BATCH, ODD, OPTIONS, TRAINED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder in which two processes on the CPU have done everything of tests/training/steps.py."""
    place = tmp_path_factory.mktemp("launch")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, "-m", "tests.training.steps", str(place)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


@pytest.fixture(scope="module")
def records(folder) -> list[dict]:
    return [json.loads((folder / f"record-{rank}.json").read_text()) for rank in (0, 1)]


def near(one: Patch, other: Patch) -> bool:
    """Whether two patches differ by rounding, which Adam carries on, and no more."""
    first, second = changes(one), changes(other)
    far = sum(float((first[key] - second[key]).square().sum()) for key in first)
    return first.keys() == second.keys() and far < 1e-4 * sum(float(value.square().sum()) for value in first.values())


@pytest.mark.parametrize("method", TRAINED)
def test_two_processes_learn_what_one_learns(method, folder, records):
    alone = erase(tiny_pipeline(), "cat", method, progress=False, **ODD[method])
    together = Patch.load(folder / f"{method}.safetensors")
    assert near(alone, together) and alone.gate == together.gate
    other = erase(tiny_pipeline(), "cat", method, progress=False, **{**ODD[method], BATCH[method]: 2})
    assert not near(other, together)  # the comparison can fail: a process's share alone is another patch
    for record in records:  # every process knows the cost of all of them
        assert {key: record["costs"][method][key] for key in "FB"} == {key: alone.costs[key] for key in "FB"}


def test_weights_and_surgery_are_those_of_the_whole_batch(folder):
    together = Patch.load(folder / "options.safetensors")
    alone = erase(tiny_pipeline(), "cat", "spm", progress=False, **ODD["spm"], **OPTIONS)
    assert near(alone, together) and not near(Patch.load(folder / "spm.safetensors"), together)
    assert {key: together.costs[key] for key in "FB"} == {key: alone.costs[key] for key in "FB"}


def test_an_interrupted_launch_goes_on_together_or_alone(folder, records):
    straight = Patch.load(folder / "esd.safetensors")
    assert records[0]["left"] == ["pool.safetensors", "prepared.json", "run.json", "state.safetensors"]
    assert same(changes(straight), changes(Patch.load(folder / "resumed.safetensors")))
    assert (folder / "alone.safetensors.run").is_dir() and not (folder / "resumed.safetensors.run").exists()
    alone = erase(tiny_pipeline(), "cat", "esd", out=folder / "alone.safetensors", progress=False, **ODD["esd"])
    assert near(alone, straight)
    assert alone.costs["F"] == straight.costs["F"]


def test_the_main_process_draws_the_previews(folder):
    drawn = sorted(path.name for path in (folder / "watched.safetensors.previews").iterdir())
    assert drawn == ["step-000000.png", "step-000002.png", "step-000004.png"]
    watched, plain = (Patch.load(folder / f"{name}.safetensors") for name in ("watched", "esd"))
    assert same(changes(watched), changes(plain)) and watched.costs["F"] == plain.costs["F"]


def test_nan_in_one_process_stops_both_with_one_error(folder, records):
    assert "not a number at step 1" in records[0]["nan"]
    assert records[0]["nan"] == records[1]["nan"]
    assert not (folder / "broken.safetensors").exists()


def test_processes_with_different_runs_are_refused(folder, records):
    assert all("different runs" in record["apart"] for record in records)
    assert not list(folder.glob("apart*"))
