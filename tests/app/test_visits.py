"""Each tab has patches and files of its own, on each model; closed tabs stop their work and leave no files."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from erasure.app import visits as module
from erasure.app.jobs import Job
from erasure.app.visits import MOST_PATCHES, Visits
from erasure.errors import ErasureError


@pytest.fixture
def patch():
    return SimpleNamespace(names=["cat"], method="uce")


def test_two_tabs_share_nothing(visits, patch, tmp_path):
    first, second = visits.of("a"), visits.of("b")
    first.add(patch, tmp_path / "p")
    assert visits.of("a") is first and len(first.patches()) == 1
    assert second.patches() == {} and first.folder != second.folder


def test_patches_belong_to_the_model_they_were_made_on(visit, patch, tmp_path):
    name = visit.add(patch, tmp_path / "p")
    visit.model = "glyph-mmdit"
    assert visit.patches() == {} and visit.stack() == {}
    visit.model = "glyph"
    visit.held[name].strength = 0.5
    assert visit.stack() == {name: (patch, 0.5)}


def test_names_are_told_apart_and_their_number_is_limited(visit, patch, tmp_path):
    names = [visit.add(patch, tmp_path / "p") for _ in range(MOST_PATCHES)]
    assert len(set(names)) == MOST_PATCHES
    with pytest.raises(ErasureError, match="Remove one"):
        visit.add(patch, tmp_path / "p")
    visit.model = "glyph-mmdit"
    visit.add(patch, tmp_path / "p")


@pytest.mark.parametrize("text", ["../../etc/passwd", "a/b", "", "Ünï cödé", "x" * 500, "..", "cat\n"])
def test_files_stay_in_the_folder_whatever_they_are_called(visit, text):
    path = visit.new_file(text, ".txt")
    assert path.resolve().parent == visit.folder.resolve() and len(path.name) < 100
    path.write_text("")
    assert not visit.new_file(text, ".txt").exists()


def test_a_closed_tab_stops_its_work_and_keeps_its_patches_for_a_while(visits, patch, tmp_path):
    visit, other = visits.of("a"), visits.of("b")
    visit.jobs, other.jobs = [Job(), Job()], [Job()]
    visit.add(patch, tmp_path / "p")
    visits.left("a")
    visits.left("nobody")
    assert all(job.stopped for job in visit.jobs) and not other.jobs[0].stopped
    assert visits.of("a").patches()


def test_forgotten_tabs_leave_no_files(visits, monkeypatch):
    old, busy = visits.of("a"), visits.of("b")
    busy.jobs = [Job()]
    monkeypatch.setattr(module, "IDLE", 0.0)
    time.sleep(0.01)
    visits.of("c")
    assert not old.folder.exists() and busy.folder.exists()
    assert visits.of("a") is not old


def test_all_files_are_deleted_at_the_end():
    visits = Visits()
    folder = visits.of("a").folder
    (folder / "file").write_text("x")
    visits.close()
    assert not folder.exists() and not visits.folder.exists()
