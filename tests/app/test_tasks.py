"""The work behind the page, without a page: forecast, erase, compare, stop, upload, download, measure, attack."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch

from erasure.app import tasks
from erasure.app.jobs import Job, Stopped
from erasure.app.models import Models, suited
from erasure.app.tasks import Pictures, Wish
from erasure.errors import ErasureError
from erasure.formats import import_patch
from erasure.patch import Patch

CAT = Wish("cat", "uce")


def weights(models: Models) -> list[torch.Tensor]:
    pipe = models.open("glyph")
    return [value.clone() for part in (pipe.unet, pipe.text_encoder) for value in part.state_dict().values()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def erased(models, visit, wish=CAT) -> str:
    outlook = tasks.outlook(models, visit, Job(), wish)
    return tasks.erase_concept(models, visit, Job(), wish, outlook.forecast)


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image in images]


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


def test_erase_and_compare(models, visit, hurried):
    before_weights, pictures = weights(models), Pictures()
    plain = tasks.compare(models, visit, Job(), "a cat", pictures)
    assert len(plain.before) == 2 and plain.after == [] and plain.readings == []
    name = erased(models, visit)
    assert name == "cat (uce)" and list(visit.patches()) == [name]
    full = tasks.compare(models, visit, Job(), " a cat ", pictures)
    assert pixels(full.before) == pixels(plain.before) and pixels(full.after) != pixels(full.before)
    (reading,) = full.readings
    assert (reading.name, reading.gate, reading.strength, reading.acted) == (name, "always", 1.0, 1.0)
    visit.held[name].strength = 0.5
    half = tasks.compare(models, visit, Job(), "a cat", pictures)
    assert pixels(half.after) not in (pixels(full.after), pixels(half.before)) and half.readings[0].acted == 0.5
    visit.held[name].strength = 0.0
    assert pixels(tasks.compare(models, visit, Job(), "a cat", pictures).after) == pixels(plain.before)
    assert same(weights(models), before_weights)


def test_patches_stack_and_visitors_do_not_see_each_others(models, visits, hurried):
    visit, other = visits.of("a"), visits.of("b")
    pictures = Pictures()
    erased(models, visit)
    one = tasks.compare(models, visit, Job(), "a dog", pictures)
    second = erased(models, visit, Wish("dog", "uce"))
    both = tasks.compare(models, visit, Job(), "a dog", pictures)
    assert [reading.name for reading in both.readings] == ["cat (uce)", "dog (uce)"]
    assert pixels(both.after) != pixels(one.after)
    alone = tasks.compare(models, other, Job(), "a dog", pictures)
    assert alone.after == [] and pixels(alone.before) == pixels(both.before)
    # The second patch is the same as without the first.
    erased(models, other, Wish("dog", "uce"))
    payloads = [visit.held[second].patch.payload, other.held["dog (uce)"].patch.payload]
    assert payloads[0].digest == payloads[1].digest


def test_prompts_that_are_empty_or_too_long_are_refused(models, visit):
    for prompt in ("", "   ", "x" * 501):
        with pytest.raises(ErasureError, match="1 to 500 characters"):
            tasks.compare(models, visit, Job(), prompt, Pictures())


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
    (state,) = visit.folder.glob("*.run")  # where the same wish goes on
    assert state.name.startswith("cat-esd-")


def test_a_stopped_drawing_takes_the_patches_off_again(models, visit):
    before = weights(models)
    erased(models, visit)
    job = Job()
    job.stop()
    with pytest.raises(Stopped):
        tasks.compare(models, visit, job, "a cat", Pictures())
    assert same(weights(models), before) and not models.open("glyph").get_list_patches()


def test_images_before_are_shared_and_the_oldest_forgotten():
    pictures = Pictures(most=3)
    pictures.put("m", "p", (0, 1), ["x", "y"])
    assert pictures.get("m", "p", (0, 1)) == ["x", "y"] and pictures.get("m", "p", (0, 2)) is None
    assert pictures.get("other", "p", (0,)) is None and pictures.get("m", "q", (0,)) is None
    pictures.put("m", "q", (0, 1), ["z", "w"])
    assert pictures.get("m", "p", (0,)) is None and pictures.get("m", "p", (1,)) == ["y"]


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


class Judge:
    """Sees a cat where the first pixel is white."""

    heads = {"object": ["cat", "dog"]}

    def find(self, name):
        return "object", [name]

    def judge(self, images):
        return [{"object": {"cat": float(image.getpixel((0, 0))[0]), "dog": 1.0}} for image in images]

    def versions(self):
        return {"a": "b"}


def test_the_judge_shows_what_it_looks_at():
    from PIL import Image

    job, pipe = Job(), SimpleNamespace(gate_log=[{"p": 1.0}])
    judge = tasks.WatchedJudge(Judge(), job, pipe, "cat")
    images = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    assert judge.judge(images) == Judge().judge(images) and judge.versions() == {"a": "b"}
    assert [(one.caption, one.marked) for one in job.pictures] == [("seen: cat", True), ("seen: dog", False)]
    pipe.gate_log = [{"p": 0.0}]  # the model as it is, whose cats have not come back
    judge.judge(images[:1])
    assert [(one.caption, one.marked) for one in job.pictures] == [("before: cat", False)]


def test_without_a_patch_there_is_nothing_to_measure(models, visit):
    for work in (
        lambda: tasks.measure(models, visit, Job(), "cat (uce)", 12),
        lambda: tasks.attack_patch(models, visit, Job(), "cat (uce)", "rece", 2),
        lambda: tasks.downloads(visit, "cat (uce)"),
    ):
        with pytest.raises(ErasureError, match="Erase something first"):
            work()
