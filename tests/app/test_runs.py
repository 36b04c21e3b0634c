"""A stopped or killed run goes on when the same is asked for again, in another tab or on a page started later."""

from __future__ import annotations

import os
import time
from functools import partial
from types import SimpleNamespace

import pytest

from erasure.app import runs as module
from erasure.app import tasks
from erasure.app.jobs import Job, Stopped
from erasure.app.runs import MOST_RUNS, Runs
from erasure.app.tasks import Wish
from erasure.app.visits import Visits
from erasure.config import CACHE_VARIABLE
from erasure.training import loop
from tests.conformance.quick import QUICK

CAT = Wish("cat", "esd")
SMALL = {**QUICK["esd"], "iterations": 6}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Runs of six steps with a checkpoint after every second one, and a cache of its own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)
    settled = tasks.settle
    monkeypatch.setattr(tasks, "settle", lambda base, concepts, method, _: settled(base, concepts, method, {"": SMALL}))
    monkeypatch.setattr(tasks, "erase", partial(tasks.erase, **SMALL))


@pytest.fixture
def later():
    """A page that is started, and ended with the test: call it for one more."""
    started = []

    def start() -> Visits:
        started.append(Visits(lasting=True))
        return started[-1]

    yield start
    for visits in started:
        visits.close()


def erase(models, visit, wish=CAT, until: int | None = None) -> Job:
    """Erase; return the job, which was stopped after a checkpoint if `until` names its step."""
    job, forecast = Job(), SimpleNamespace(F=100, settings={})
    job.began = []
    enter, tick, old = job.enter, job.check, set(visit.runs.folder.glob("*/*.run"))

    def entered(stage, total=None):
        enter(stage, total)
        job.began.append(stage)

    def stop_soon():
        states = set(visit.runs.folder.glob("*/*.run")) - old
        if until is not None and any(loop.reached(state)[0] >= until for state in states):
            job.stop()
        tick()

    job.enter, job.check = entered, stop_soon
    if until is None:
        tasks.erase_concept(models, visit, job, wish, forecast)
    else:
        with pytest.raises(Stopped):
            tasks.erase_concept(models, visit, job, wish, forecast)
    return job


def digest(visit) -> str:
    (held,) = visit.held.values()
    return held.patch.payload.digest


def test_a_stopped_run_goes_on_in_another_tab_and_gives_the_same_patch(models, small, later):
    page = later()
    straight = Visits()
    whole = erase(models, straight.of("a"))
    assert whole.began[-1] == "Erasing cat with esd"
    stopped = erase(models, page.of("a"), until=2)
    assert page.of("a").held == {} and stopped.began[-1] == "Erasing cat with esd"
    page.left("a")
    other = erase(models, page.of("b"), Wish("cat", "esd", anchor="dog"), until=2)
    assert other.began[-1] == "Erasing cat with esd"  # another run, whose state is its own
    model = page.of("c")
    again = erase(models, model)
    assert again.began[-1] == "Erasing cat with esd, from step 2 on"
    assert digest(model) == digest(straight.of("a"))
    costs = [one.held["cat (esd)"].patch.costs for one in (model, straight.of("a"))]
    assert costs[0]["F"] == costs[1]["F"] == whole.done == again.done
    assert len(list(page.runs.folder.iterdir())) == 1  # the other one's
    straight.close()


def test_a_killed_run_goes_on_on_a_page_that_is_started_later(models, small, later):
    first = later()
    erase(models, first.of("a"), until=4)
    second = later()
    assert second.runs.folder != first.runs.folder  # two pages would write into one state
    assert erase(models, second.of("a")).began[-1] == "Erasing cat with esd"
    first.close()  # as the end of its process does, however it ends
    third = later()
    assert third.runs.folder == first.runs.folder
    assert erase(models, third.of("a")).began[-1] == "Erasing cat with esd, from step 4 on"
    assert digest(third.of("a")) == digest(second.of("a"))
    assert not first.folder.exists() and list(third.runs.folder.iterdir()) == []


def test_old_runs_and_too_many_are_deleted(tmp_path, monkeypatch):
    runs = Runs(tmp_path)
    for number in range(MOST_RUNS):
        folder = runs.open(str(number))
        (folder / "state").write_text("x")
        os.utime(folder, (time.time() - 1000 + number,) * 2)
    assert len(list(tmp_path.iterdir())) == MOST_RUNS and (runs.open("0") / "state").is_file()
    runs.open("new")
    assert len(list(tmp_path.iterdir())) == MOST_RUNS and not (tmp_path / "1").exists()
    os.utime(tmp_path / "2", (time.time() - module.KEPT - 1,) * 2)
    runs.open("3")
    assert not (tmp_path / "2").exists() and (tmp_path / "4").exists()
    runs.finished(tmp_path / "3")
    assert not (tmp_path / "3").exists()


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    visits = Visits(lasting=True)
    assert visits.runs.open("a").is_relative_to(visits.folder)
    visits.close()
    assert not visits.folder.exists()
