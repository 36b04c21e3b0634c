"""Runs on glyph that kill themselves at a chosen moment, each in a process of its own.

A moment is either a call of a layer or a change of a file (opened to be written, renamed, removed). Both are counted
from the start of the run, so that the same number means the same moment on every machine, whatever its speed.

The parent never computes: `multiprocessing` keeps one server that has imported everything, and forks each run from it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from erasure.erasing import erase
from erasure.evaluation.attacks.run import attack
from erasure.evaluation.evaluate import evaluate
from erasure.evaluation.generate import generate
from erasure.patch import Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from erasure.prompts.prompt_set import PromptSet
from erasure.training import loop
from tests.conformance.quick import QUICK

PATCH = "erased.safetensors"
MOMENTS = "moments.json"
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir")  # audit events of files
TIMES = ("seconds", "timestamp", "run_id")  # keys of reports that differ from run to run
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ROWS = PromptSet("nine", [row for row in PromptSet.read("glyph-objects").rows if row.labels["style"] == "ink"][:9])
CATS = PromptSet("cats", [row for row in PromptSet.read("glyph-objects").rows if row.labels["object"] == "cat"])
# Two attacks, so that a run can be killed with one of them done; the first one also calls the UNet in its search.
ATTACKS = {"uma": {"bounds": (0.5, 1.0), "iterations": 2}, "random": {"tokens": 2, "tries": 2}}


def glyph(*patches: Path) -> Any:
    """Return glyph's pipeline with patches."""
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    for path in patches:
        pipe.load_patch(path)
    return pipe


def train(method: str, folder: Path) -> None:
    """Train a small patch with a checkpoint after every second step."""
    loop.CHECKPOINT_EVERY = 2
    erase(glyph(), "cat", method, out=folder / "out" / f"{method}.safetensors", progress=False, **QUICK[method])


def make_patch(folder: Path) -> None:
    """Train the patch that the other runs load, hard enough to break every image."""
    options = {**QUICK["esd"], "learning_rate": 1e-2}
    erase(glyph(), "cat", "esd", out=folder / PATCH, progress=False, **options)


def draw(folder: Path) -> None:
    """Draw nine images."""
    generate(glyph(folder / PATCH), ROWS, folder / "out", steps=2, progress=False)


def draw_pairs(folder: Path) -> None:
    """Draw the images that `judge` judges, with and without the patch."""
    pipe = glyph(folder / PATCH)
    generate(pipe, ROWS, folder / "out" / "patched", steps=2, progress=False)
    with switched_off(pipe):
        generate(pipe, ROWS, folder / "out" / "base", steps=2, progress=False)


def judge(folder: Path) -> None:
    """Judge the nine pairs of images, and write the report."""
    options = {"prompts": ROWS, "whole": True, "steps": 2, "progress": False}
    evaluate(glyph(folder / PATCH), ROWS.rows[0].labels["object"], folder=folder / "out", **options)


def attack_twice(folder: Path) -> None:
    """Run two attacks on two prompts."""
    pipe = glyph(folder / PATCH)
    for name, settings in ATTACKS.items():
        options = {"prompts": CATS, "cases": 2, "steps": 4, "progress": False, "settings": settings}
        attack(pipe, "cat", name, folder=folder / "out", **options)


TASKS: dict[str, Callable[[Path], None]] = {
    "patch": make_patch,
    "draw": draw,
    "pairs": draw_pairs,
    "judge": judge,
    "attack": attack_twice,
}


def run(task: str, folder: Path, kind: str = "", moment: int = -1) -> tuple[int, dict[str, int]]:
    """Run a task in a process of its own.

    Args:
        task: a name of TASKS, or of a method that trains.
        folder: the folder of the run, which holds the patch.
        kind: "calls" or "files", for a run that kills itself.
        moment: number of the call or change before which it does, from 0.

    Returns:
        The exit code, negative for a signal, and the number of moments of each kind, if the run came to its end.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_child, args=(task, folder, kind, moment))
    process.start()
    process.join()
    found = folder / MOMENTS
    moments = json.loads(found.read_text()) if found.is_file() else {}
    found.unlink(missing_ok=True)
    return process.exitcode or 0, moments


def _child(task: str, folder: Path, kind: str, moment: int) -> None:
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    seen = {"calls": 0, "files": 0}

    def count(what: str) -> None:
        if what == kind and seen[what] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[what] += 1

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not arguments[2] & WRITING):
            return
        # The removal of a folder names its files without the folder.
        name = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if name.startswith(os.fspath(folder)) or (name and not os.path.isabs(name) and event != "open"):
            count("files")

    sys.addaudithook(audit)
    register_module_forward_pre_hook(lambda module, inputs: count("calls"))
    TASKS.get(task, lambda place: train(task, place))(folder)
    done = dict(seen)
    (folder / MOMENTS).write_text(json.dumps(done))


def result(folder: Path) -> dict[str, Any]:
    """Return what a run left in `folder`/out: its images, patches, records and reports, without their times.

    Files under temporary names do not count, and the order of the records is free.
    """
    found: dict[str, Any] = {}
    for path in sorted((folder / "out").rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            patch = Patch.load(path)
            found[name] = patch.payload.digest, patch.gate, patch.costs["F"], patch.costs["B"]
        elif path.suffix == ".json":
            found[name] = _without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = sorted(path.read_text().splitlines())
        elif path.suffix == ".png":
            found[name] = path.read_bytes()
        elif path.suffix == ".html":
            found[name] = "written"
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value
