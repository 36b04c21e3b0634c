"""Measuring and attacking show what the judge looks at, and need a patch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from erasure.app import measuring, tasks
from erasure.app.jobs import Job
from erasure.errors import ErasureError


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
    judge = measuring.WatchedJudge(Judge(), job, pipe, "cat")
    images = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    assert judge.judge(images) == Judge().judge(images) and judge.versions() == {"a": "b"}
    assert [(one.caption, one.marked) for one in job.pictures] == [("seen: cat", True), ("seen: dog", False)]
    pipe.gate_log = [{"p": 0.0}]  # the model as it is, whose cats have not come back
    judge.judge(images[:1])
    assert [(one.caption, one.marked) for one in job.pictures[2:]] == [("before: cat", False)]
    judge.judge(images * 4)
    assert len(job.pictures) == measuring.SHOWN == 8


def test_without_a_patch_there_is_nothing_to_measure(models, visit):
    for work in (
        lambda: measuring.measure(models, visit, Job(), "cat (uce)", 12),
        lambda: measuring.attack_patch(models, visit, Job(), "cat (uce)", "rece", 2),
        lambda: tasks.downloads(visit, "cat (uce)"),
    ):
        with pytest.raises(ErasureError, match="Erase something first"):
            work()
