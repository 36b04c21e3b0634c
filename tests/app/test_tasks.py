"""The work behind the page, without a page: forecast, erase, compare, stop, upload, download, measure, attack."""

from __future__ import annotations

import pickle

import pytest
import torch

from erasure.app import tasks
from erasure.app.jobs import Job, Stopped
from erasure.app.models import Models, suited
from erasure.app.tasks import Wish
from erasure.errors import ErasureError
from erasure.formats import import_patch
from erasure.patch import Patch
from tests.app.doing import CAT, erased, same, weights


def test_the_outlook_tells_the_cost_and_what_to_look_at(models, visit):
    found = tasks.outlook(models, visit, Job(), CAT)
    assert found.forecast.F == 0 and found.forecast.seconds > 0 and not found.trains and found.unknown == []
    assert found.prompts[0] == "a cat" and len(found.prompts) == 3 and "a cat" not in found.prompts[1:]
    ink = tasks.outlook(models, visit, Job(), Wish("ink", "uce"))
    assert ink.prompts[0] == "a dog in ink style"
    assert tasks.outlook(models, visit, Job(), Wish("zebra", "uce")).unknown == ["zebra"]


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish("", "uce"), "Say what the model should forget"),
        (Wish(" , ", "uce"), "Say what the model should forget"),
        (Wish(",".join("abcdefghijk"), "uce"), "11 names"),
        (Wish("cat, dog", "uce", anchor="frog"), "one name only"),
        (Wish("cat", "nothing"), "unknown method"),
        (Wish("x" * 300, "uce"), "at most 200"),
    ],
)
def test_wishes_that_cannot_be_met_say_why(models, visit, wish, words):
    with pytest.raises(ErasureError, match=words):
        tasks.outlook(models, visit, Job(), wish)


def test_a_stopped_run_leaves_the_model_as_it_was_and_goes_on_later(models, visit):
    wish, before = Wish("cat", "esd"), weights(models)
    outlook = tasks.outlook(models, visit, Job(), wish)
    assert outlook.trains and outlook.forecast.F > 100
    job = Job()
    tick = job.check

    def stop_soon() -> None:
        if job.done > 20:
            job.stop()
        tick()

    job.check = stop_soon
    with pytest.raises(Stopped):
        tasks.erase_concept(models, visit, job, wish, outlook.forecast)
    assert 0 < job.share < 1 and visit.patches() == {}
    assert same(weights(models), before)
    assert not models.open("glyph").unet._forward_pre_hooks
    (state,) = visit.runs.folder.glob("*/*.run")  # where the same wish goes on
    assert state.is_dir() and not list(visit.folder.iterdir())


def test_what_is_downloaded_is_the_patch_its_card_and_a_lora(models, visit):
    name = erased(models, visit)
    patch, card, lora, text = tasks.downloads(visit, name)
    assert Patch.load(patch).names == ["cat"]
    assert "# cat, erased from glyph" in card.read_text() and str(visit.folder) not in card.read_text()
    back = import_patch(lora, model="glyph", concepts=["cat"])
    ours, theirs = visit.held[name].patch.deltas("unet"), back.deltas("unet")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)
    assert str(visit.folder) not in text
    assert tasks.downloads(visit, name)[2] == lora  # a second time


def test_a_patch_file_can_be_added(models, visits, hurried):
    visit, other = visits.of("a"), visits.of("b")
    name = erased(models, visit)
    added = tasks.add_file(other, visit.held[name].path)
    assert other.held[added].patch.payload.digest == visit.held[name].patch.payload.digest


class Bomb:
    def __reduce__(self):
        return open, ("bomb-went-off", "w")


@pytest.mark.parametrize("name", ["patch.pt", "patch.safetensors", "patch.SAFETENSORS"])
def test_uploads_are_never_unpickled(visit, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ErasureError) as refused:
        tasks.add_file(visit, path)
    assert str(tmp_path) not in str(refused.value) and name in str(refused.value)
    assert not (tmp_path / "bomb-went-off").exists() and visit.patches() == {}


def test_visitors_may_open_files_of_this_machine_only_where_that_is_allowed(tmp_path):
    open_ones, closed = Models(any_path=True), Models(any_path=False)
    assert open_ones.check("glyph") == closed.check("glyph") == "glyph"
    with pytest.raises(ErasureError, match="visitors cannot open files"):
        closed.check(str(tmp_path))
    with pytest.raises(ErasureError, match="no model_index.json"):
        open_ones.check(str(tmp_path))
    with pytest.raises(ErasureError, match="unknown model 'owner/name'"):
        open_ones.check("owner/name")  # nothing is downloaded because a visitor says so
    assert [name for _, name in Models().choices()][0] == "glyph"


def test_the_quickest_method_is_chosen_at_first(models):
    assert suited(models.open("glyph"))[0] == "uce"
