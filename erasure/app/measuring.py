"""Measure a patch and attack it, and show what the judge looks at meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from erasure.app.jobs import Job, Picture
from erasure.app.models import Models, watched
from erasure.app.tasks import held
from erasure.app.visits import Visit
from erasure.model.loading import sampling_of

SHOWN = 8  # pictures: the latest that the judge has looked at


def measure(models: Models, visit: Visit, job: Job, name: str, images: int) -> tuple[Any, Path]:
    """Measure what the patches on a model have erased and kept; return the report and the path of its page.

    Args:
        models: the models.
        visit: the visit.
        job: the job.
        name: the patch whose concepts should be gone; all patches on the model act.
        images: prompts to draw, each before and after.
    """
    from erasure.evaluation import evaluate

    concepts = held(visit, name).patch.names
    folder = visit.new_file("report", "")
    with models.patched(visit.model, visit.stack()) as pipe, job.watching(*watched(pipe)):
        own = sampling_of(pipe)
        job.enter(f"Measuring {', '.join(concepts)}: {images} prompts, before and after", 4 * images * own.steps)
        report = evaluate(pipe, concepts, folder=folder, limit=images, progress=False, judge=_judge(pipe, job, ""))
    return report, folder / "report.html"


def attack_patch(models: Models, visit: Visit, job: Job, name: str, attack_name: str, cases: int) -> tuple[Any, Path]:
    """Try to bring a concept back, and return the report of the attack and the path of its page.

    While it runs, the job's pictures are those that the judge has looked at last.

    Args:
        models: the models.
        visit: the visit.
        job: the job.
        name: the patch whose concepts are attacked; all patches on the model act.
        attack_name: the name of the attack.
        cases: prompts to attack.
    """
    from erasure.evaluation.attacks.run import attack

    concepts = held(visit, name).patch.names
    folder = visit.new_file("attack", "")
    with models.patched(visit.model, visit.stack()) as pipe, job.watching(*watched(pipe)):
        job.enter(f"{attack_name}: trying to bring {', '.join(concepts)} back")
        judge = _judge(pipe, job, concepts[0])
        report = attack(pipe, concepts, attack_name, folder=folder, cases=cases, progress=False, judge=judge)
    return report, folder / "report.html"


def _judge(pipe: Any, job: Job, concept: str) -> Any:
    """Return the judge that suits a model, made to show what it looks at; None where the library has to choose."""
    from erasure.evaluation.defaults import GLYPH, is_glyph
    from erasure.evaluation.judges.registry import find_judge

    return WatchedJudge(find_judge(GLYPH), job, pipe, concept) if is_glyph(pipe) else None


class WatchedJudge:
    """A judge that shows on the page what it looks at.

    Args:
        judge: the judge whose answers these are.
        job: the job that shows the pictures.
        pipe: the pipeline that draws them.
        concept: what is marked where it is seen with a patch; empty: nothing.
    """

    def __init__(self, judge: Any, job: Job, pipe: Any, concept: str) -> None:
        self._judge, self._job, self._pipe = judge, job, pipe
        self._head, self._labels = judge.find(concept) if concept else ("", [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)

    def judge(self, images: list[Image.Image]) -> list[Any]:
        """Return the verdicts of the judge, and show the images with what was seen in them."""
        verdicts = self._judge.judge(images)
        head = self._head or next(iter(self._judge.heads))
        acting, shown = any(any(row.values()) for row in self._pipe.gate_log), []
        for image, verdict in zip(images, verdicts, strict=True):
            seen = max(verdict[head], key=verdict[head].get)
            shown.append(Picture(image, f"{'seen' if acting else 'before'}: {seen}", acting and seen in self._labels))
        self._job.pictures = [*self._job.pictures, *shown][-SHOWN:]
        return list(verdicts)
