"""Measure a patch and attack it, and show what the judge looks at meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from erasure.app.given import Given, in_page_words
from erasure.app.jobs import Job, Picture
from erasure.app.models import Models, watched
from erasure.app.tasks import held
from erasure.app.visits import Visit
from erasure.errors import ErasureError
from erasure.evaluation.defaults import CLIPS
from erasure.model.loading import sampling_of
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.subjects import load_subjects

NOTHING = Given()  # prompts and judge are left to what suits the model
SHOWN = 8  # pictures: the latest that the judge has looked at


def measure(models: Models, visit: Visit, job: Job, name: str, images: int, given: Given = NOTHING) -> tuple[Any, Path]:
    """Measure what the patches on a model have erased and kept; return the report and the path of its page.

    Args:
        models: the models.
        visit: the visit.
        job: the job.
        name: the patch whose concepts should be gone; all patches on the model act.
        images: prompts to draw, each before and after.
        given: prompts and judge; what is not given is what `evaluate` takes by itself.

    Raises:
        ErasureError: there is no such patch, or as `evaluate` raises it.
    """
    from erasure.evaluation import evaluate

    concepts = held(visit, name).patch.names
    folder = visit.new_file("report", "")
    with _patched(models, visit, job, given) as pipe:
        rows, judge = _settled(models, pipe, job, concepts, given, about=False)
        own = sampling_of(pipe)
        job.enter(f"Measuring {', '.join(concepts)}: {images} prompts, before and after", 4 * images * own.steps)
        report = evaluate(pipe, concepts, folder=folder, limit=images, progress=False, prompts=rows, judge=judge)
    return report, folder / "report.html"


def attack_patch(
    models: Models, visit: Visit, job: Job, name: str, attack_name: str, cases: int, given: Given = NOTHING
) -> tuple[Any, Path]:
    """Try to bring a concept back, and return the report of the attack and the path of its page.

    While it runs, the job's pictures are those that the judge has looked at last.

    Args:
        models: the models.
        visit: the visit.
        job: the job.
        name: the patch whose concepts are attacked; all patches on the model act.
        attack_name: the name of the attack.
        cases: prompts to attack.
        given: prompts and judge; what is not given is what `attack` takes by itself.

    Raises:
        ErasureError: there is no such patch, or as `attack` raises it.
    """
    from erasure.evaluation.attacks.attack import check_unet
    from erasure.evaluation.attacks.run import attack

    concepts = held(visit, name).patch.names
    folder = visit.new_file("attack", "")
    job.enter("Loading the model")
    check_unet(models.open(visit.model))
    with _patched(models, visit, job, given) as pipe:
        rows, judge = _settled(models, pipe, job, concepts, given, about=True)
        job.enter(f"{attack_name}: trying to bring {', '.join(concepts)} back")
        report = attack(
            pipe, concepts, attack_name, folder=folder, cases=cases, progress=False, prompts=rows, judge=judge
        )
    return report, folder / "report.html"


@contextmanager
def _patched(models: Models, visit: Visit, job: Job, given: Given) -> Iterator[Any]:
    """Give the visitor's model with the patches on it; the job may stop, and refusals are in the words of the page."""
    job.enter("Loading the model and the judge")
    with (
        in_page_words(given.file, visit.model),
        models.patched(visit.model, visit.stack()) as pipe,
        job.watching(*watched(pipe)),
    ):
        yield pipe


def _settled(
    models: Models, pipe: Any, job: Job, concepts: list[str], given: Given, *, about: bool
) -> tuple[PromptSet, WatchedJudge]:
    """Return the prompts and the judge: those given, else those that the library takes for the model."""
    from erasure.evaluation.defaults import prompts_and_judge

    rows, judge = prompts_and_judge(pipe, concepts, given.rows(), given.find_judge(models), about=about)
    return rows, WatchedJudge(judge, job, pipe, concepts[0], marks=about)


@dataclass(frozen=True)
class Readiness:
    """What can be measured on a model without prompts and a judge of one's own.

    Args:
        text: says so, for people.
        complete: whether both are there, whatever the concept.
        attacks: why no attack can run; empty where they can.
    """

    text: str
    complete: bool
    attacks: str = ""


def readiness(pipe: Any) -> Readiness:
    """Say which prompts and judge are taken on a model where none are given, and whether it can be attacked."""
    from erasure.evaluation.attacks.attack import check_unet
    from erasure.evaluation.defaults import is_glyph, local_clip

    refused = ""
    try:
        check_unet(pipe)
    except ErasureError as fault:
        refused = f"{str(fault)[0].upper()}{str(fault)[1:]}. Measuring works."
    if is_glyph(pipe):
        return Readiness("Where nothing is given, glyph's own prompts and judge are taken.", True, refused)
    sets = ", ".join(load_subjects()["sets"])
    clip = local_clip()
    judge = (
        f"the judge is CLIP zero-shot ({clip[0]})"
        if clip
        else f"a judge has to be given, because {CLIPS[0]} is not on this machine"
    )
    text = (
        f"Where nothing is given, the prompts are those of the bundled sets {sets}, if one of them asks for the "
        f"concept, and {judge}."
    )
    return Readiness(text, False, refused)


class WatchedJudge:
    """A judge that shows on the page what it looks at.

    Args:
        judge: the judge whose answers these are.
        job: the job that shows the pictures.
        pipe: the pipeline that draws them.
        concept: a name whose head of the judge is shown.
        marks: whether pictures are marked in which it is seen with a patch.

    Raises:
        ErasureError: the judge does not know the concept.
    """

    def __init__(self, judge: Any, job: Job, pipe: Any, concept: str, marks: bool = False) -> None:
        self._judge, self._job, self._pipe, self._marks = judge, job, pipe, marks
        self._head, self._labels = judge.find(concept)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)

    def judge(self, images: list[Image.Image]) -> list[Any]:
        """Return the verdicts of the judge, and show the images with what was seen in them."""
        verdicts = self._judge.judge(images)
        head, acting, shown = self._head, any(any(row.values()) for row in self._pipe.gate_log), []
        for image, verdict in zip(images, verdicts, strict=True):
            seen = max(verdict[head], key=verdict[head].get)
            marked = self._marks and acting and seen in self._labels
            shown.append(Picture(image, f"{'seen' if acting else 'before'}: {seen}", marked))
        self._job.pictures = [*self._job.pictures, *shown][-SHOWN:]
        return list(verdicts)
