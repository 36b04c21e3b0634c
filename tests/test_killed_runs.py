"""A run that is killed and then repeated comes to the same result as one that is not, wherever the kill falls."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests import killing

# Five runs of each kind, and what each is killed before: the call of a layer, or the change of a file.
TASKS = {
    "training": ["advunlearn", "esd", "salun", "spm", "unguide"],
    "drawing": ["draw"] * 5,
    "judging": ["judge"] * 5,
    "attacking": ["attack"] * 5,
}
BEFORE = ("calls", "files", "calls", "files", "calls")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a folder that holds a patch, and one that also holds images to judge."""
    folder, pairs = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("pairs")
    assert killing.run("patch", folder)[0] == 0
    shutil.copy(folder / killing.PATCH, pairs)
    assert killing.run("pairs", pairs)[0] == 0
    return {"judging": pairs}.get, folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(TASKS))
def test_a_run_killed_at_a_random_moment_is_resumed_to_the_same_result(kind, start, tmp_path):
    own, common = start
    draw = random.Random(f"moments of {kind}")
    straight: dict[str, tuple[dict, dict]] = {}
    for number, (task, before) in enumerate(zip(TASKS[kind], BEFORE, strict=True)):
        if task not in straight:
            folder = copied(own(kind, common), tmp_path / f"straight-{task}")
            code, moments = killing.run(task, folder)
            assert code == 0
            straight[task] = killing.result(folder), moments
        expected, moments = straight[task]
        folder = copied(own(kind, common), tmp_path / f"killed-{number}")
        moment = draw.randrange(moments[before])
        place = f"{task}, killed before number {moment} of {moments[before]} {before}"
        assert killing.run(task, folder, before, moment)[0] == -signal.SIGKILL, place
        assert killing.run(task, folder)[0] == 0, place
        assert killing.result(folder) == expected, place


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target
