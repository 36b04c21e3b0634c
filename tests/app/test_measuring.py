"""Measuring and attacking: on any model with prompts and a judge, refused before anything runs where they cannot."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from erasure.app import measuring, tasks
from erasure.app.given import Given
from erasure.app.jobs import Job
from erasure.app.models import Models
from erasure.app.tasks import Wish
from erasure.app.visits import Visits
from erasure.errors import ErasureError
from erasure.evaluation import defaults
from erasure.evaluation.judges import registry
from tests.app.doing import erased
from tests.evaluation.judging import write_clip
from tests.tiny import write_tiny


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
    judge = measuring.WatchedJudge(Judge(), job, pipe, "cat", marks=True)
    images = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    assert judge.judge(images) == Judge().judge(images) and judge.versions() == {"a": "b"}
    assert [(one.caption, one.marked) for one in job.pictures] == [("seen: cat", True), ("seen: dog", False)]
    pipe.gate_log = [{"p": 0.0}]  # the model as it is, whose cats have not come back
    judge.judge(images[:1])
    assert [(one.caption, one.marked) for one in job.pictures[2:]] == [("before: cat", False)]
    judge.judge(images * 4)
    assert len(job.pictures) == measuring.SHOWN == 8
    pipe.gate_log = [{"p": 1.0}]
    measuring.WatchedJudge(Judge(), job, pipe, "cat").judge(images[:1])  # a measurement
    assert (job.pictures[-1].caption, job.pictures[-1].marked) == ("seen: cat", False)


def test_without_a_patch_there_is_nothing_to_measure(models, visit):
    for work in (
        lambda: measuring.measure(models, visit, Job(), "cat (uce)", 12),
        lambda: measuring.attack_patch(models, visit, Job(), "cat (uce)", "rece", 2),
        lambda: tasks.downloads(visit, "cat (uce)"),
    ):
        with pytest.raises(ErasureError, match="Erase something first"):
            work()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model that is not glyph, with a patch against cats, and a CLIP: both tiny, with random weights."""
    folder, clip = str(write_tiny(tmp_path_factory.mktemp("own"))), write_clip(tmp_path_factory.mktemp("clip"))
    models, visits = Models(device="cpu"), Visits(folder)
    erased(models, visits.of("a"), Wish("cat", "uce"))
    (held,) = visits.of("a").held.values()
    visits.close()
    return SimpleNamespace(folder=folder, models=models, held=held, clip=clip)


@pytest.fixture
def own(other, visit, monkeypatch):
    """A visit to that model, and images of two steps; CLIP is not in the cache."""
    visit.model = other.folder
    name = visit.add(other.held.patch, other.held.path)
    for module in ("erasure.app.measuring", "erasure.evaluation.evaluate", "erasure.evaluation.attacks.runner"):
        sampling = sys.modules[module].sampling_of
        two = lambda *given, own=sampling: replace(own(*given), steps=2)  # noqa: E731
        monkeypatch.setattr(sys.modules[module], "sampling_of", two)
    monkeypatch.setattr(defaults, "local_clip", lambda: None)
    return SimpleNamespace(models=other.models, visit=visit, name=name, clip=other.clip)


@pytest.fixture
def drawn(own, monkeypatch):
    """The prompts that are drawn from now on."""
    texts, call = [], type(own.models.open(own.visit.model)).__call__

    def noted(pipe, prompt=None, *rest, **options):
        texts.extend(prompt or [])
        return call(pipe, prompt, *rest, **options)

    monkeypatch.setattr(type(own.models.open(own.visit.model)), "__call__", noted)
    return texts


@pytest.fixture
def mine(tmp_path):
    """A file of prompts about cats and dogs."""
    lines = [f"a {name} by {number} trees,{name}" for name in ("cat", "dog") for number in range(6)]
    (tmp_path / "mine.csv").write_text("\n".join(["prompt,object", *lines]))
    return str(tmp_path / "mine.csv")


def test_another_model_is_measured_with_prompts_and_judge_of_the_visitor(own, drawn, mine):
    job = Job()
    report, page = measuring.measure(
        own.models, own.visit, job, own.name, 12, Given(file=mine, judge=f"clip:{own.clip}?labels=cat,dog")
    )
    assert page.is_file() and report.metric("UA") is not None and report.provenance["judge"]["name"] == "clip"
    assert report.provenance["prompts"]["name"] == "mine" and report.provenance["prompts"]["used"] == 10
    assert drawn and all("trees" in text for text in drawn)
    assert {one.caption.split()[-1] for one in job.pictures} <= {"cat", "dog"} and len(job.pictures) == 8


def test_another_model_is_attacked_with_prompts_and_judge_of_the_visitor(own, drawn, mine, monkeypatch):
    monkeypatch.setitem(registry.KINDS, "sees-cats", "tests.app.doing:SeesCats")
    job = Job()
    report, page = measuring.attack_patch(
        own.models, own.visit, job, own.name, "random", 2, Given(file=mine, judge="sees-cats")
    )
    assert page.is_file() and report.cases == report.plain == 2 and set(report.prompts.values()) <= set(drawn)
    assert all("a cat by" in text for text in report.prompts.values())
    assert report.provenance["judge"]["name"] == "sees-cats" and any(one.marked for one in job.pictures)


def test_what_is_missing_is_said_before_anything_is_drawn(own, drawn, mine):
    """As `erasure evaluate` and `erasure attack` refuse it, in the words of the page."""
    works = (
        lambda given: measuring.measure(own.models, own.visit, Job(), own.name, 12, given),
        lambda given: measuring.attack_patch(own.models, own.visit, Job(), own.name, "random", 2, given),
    )
    for work in works:
        with pytest.raises(ErasureError) as both:
            work(Given())
        assert "Give “Prompts” with prompts for cat" in str(both.value) and "“Judge” that knows" in str(both.value)
        assert "--" not in str(both.value) and own.visit.model not in str(both.value)
        with pytest.raises(ErasureError, match="Give “Judge” that knows.*clip:FOLDER"):
            work(Given(file=mine))
        with pytest.raises(ErasureError, match="has no prompt for cat; its objects are tench"):
            work(Given(prompts="objects", judge=f"clip:{own.clip}?labels=cat,dog"))
    assert drawn == []


def test_clip_on_this_machine_and_a_bundled_set_are_taken_by_themselves(own, drawn, monkeypatch):
    monkeypatch.setattr(defaults, "local_clip", lambda: ("its name", own.clip))
    patch = own.visit.held[own.name].patch
    church = own.visit.add(replace(patch, concepts=({**patch.concepts[0], "name": "church"},)), own.visit.folder / "p")
    report, _ = measuring.measure(own.models, own.visit, Job(), church, 12)
    assert report.provenance["prompts"]["name"] == "objects" and report.provenance["judge"]["source"] == own.clip
    assert drawn


def test_it_is_told_what_is_taken_by_itself(own, models, monkeypatch):
    glyph, other = (measuring.readiness(one) for one in (models.open("glyph"), own.models.open(own.visit.model)))
    assert glyph.complete and "glyph's own prompts and judge" in glyph.text and glyph.attacks == ""
    assert not other.complete and "a judge has to be given" in other.text and other.attacks == ""
    monkeypatch.setattr(defaults, "local_clip", lambda: ("its name", own.clip))
    assert "CLIP zero-shot (its name)" in measuring.readiness(own.models.open(own.visit.model)).text


def test_a_model_without_a_unet_is_measured_by_glyphs_judge_and_its_attack_refused_at_once(models, visit, monkeypatch):
    visit.model = "glyph-mmdit"
    pipe = models.open(visit.model)
    ready = measuring.readiness(pipe)
    assert ready.complete and "reach into a UNet" in ready.attacks
    visit.add(SimpleNamespace(names=["cat"], method="uce"), visit.folder / "p")
    monkeypatch.setattr(Models, "patched", lambda *given: pytest.fail("something runs"))
    with pytest.raises(ErasureError, match="reach into a UNet"):
        measuring.attack_patch(models, visit, Job(), "cat (uce)", "random", 2)
    rows, judge = measuring._settled(models, pipe, Job(), ["cat"], Given(), about=False)
    assert rows.name == "glyph-objects" and judge.name == "glyph"
