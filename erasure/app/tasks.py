"""The work behind the page: forecast, erase, add a patch, and make files to download.

Each function takes the models, a visit and a job, runs in the job's thread, and returns plain values.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erasure.app.jobs import Job
from erasure.app.models import Models, base_of, watched
from erasure.app.visits import Visit
from erasure.concepts.concept import KINDS, Concept
from erasure.concepts.neighbors import neighbours
from erasure.erasing import check_network, erase, identity, settle, unlisted
from erasure.errors import ErasureError
from erasure.forecast import Forecast, plan
from erasure.methods import find
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.training.compute import Computing
from erasure.training.loop import reached
from erasure.training.run import run_key

MOST_NAMES = 10  # names that are erased together from the page
PREVIEWS = 4  # previews of a run that trains
KEPT = 2  # prompts of neighbours that are suggested


@dataclass(frozen=True)
class Wish:
    """What a visitor wants to erase, as it stands on the page.

    Args:
        names: one name, or several with commas between them.
        method: the name of a method.
        kind: one of `KINDS`; empty: as our lists say.
        anchor: what should be drawn instead; empty: left to the method.
    """

    names: str
    method: str
    kind: str = ""
    anchor: str = ""

    def concepts(self, base: Base) -> list[Concept]:
        """Return the concepts, each with its kind.

        Raises:
            ErasureError: no name or too many, an anchor for several, or a name of which no list says what it is.
        """
        names = [name.strip() for name in self.names.split(",") if name.strip()]
        if not names:
            raise ErasureError("Say what the model should forget: choose a word or type one, such as cat")
        if len(names) > MOST_NAMES:
            raise ErasureError(
                f"{len(names)} names are more than the {MOST_NAMES} that this page erases together; `erasure erase "
                "--list` takes thousands. Nothing was changed"
            )
        if self.anchor.strip() and len(names) > 1:
            raise ErasureError("What to draw instead can be given for one name only; nothing was changed")
        details = {"kind": self.kind, "anchor": self.anchor.strip()}
        given = [{"name": name, **{key: text for key, text in details.items() if text}} for name in names]
        preset = base.family().preset
        if (preset is None or preset.checkpoint is None) and (missing := unlisted(base, given)):
            raise ErasureError(
                f"No list says what {', '.join(map(repr, missing))} is: choose the kind under “Model, method and more” "
                f"({', '.join(KINDS)}). Nothing was changed"
            )
        return Concept.list_of(given, base.words, find(self.method).MOST)


@dataclass(frozen=True)
class Outlook:
    """What is known before a concept is erased.

    Args:
        forecast: the cost.
        prompts: a prompt that asks for the concept, then prompts that should stay as they are.
        trains: whether the method trains.
        unknown: names that the model was never taught.
    """

    forecast: Forecast
    prompts: list[str]
    trains: bool
    unknown: list[str]


def asking(kind: str, word: str) -> str:
    """Return a prompt that asks for a word of a kind, as people type it: "a cat", "a dog in ink style"."""
    if kind == "style":
        return f"a dog in {word} style"
    if kind != "object":
        return word
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def outlook(models: Models, visit: Visit, job: Job, wish: Wish) -> Outlook:
    """Forecast an erasure, and suggest prompts to look at it with."""
    job.enter("Forecasting")
    pipe = models.open(visit.model)
    base = base_of(visit.model, pipe)
    check_network(wish.method, base)
    with job.watching(*watched(pipe)):
        concepts = wish.concepts(base)
        forecast = plan(base, concepts, wish.method)
        prompts = suggestions(base, concepts)
    names = [name for concept in concepts for name in concept.names]
    unknown = base.vocabulary.unknown(names) if base.vocabulary is not None else []
    return Outlook(forecast, prompts, find(wish.method).CALLS_UNET, unknown)


def suggestions(base: Base, concepts: list[Concept]) -> list[str]:
    """Return a prompt for the first of the concepts, and prompts for its neighbours, which should stay."""
    first = concepts[0]
    near = neighbours(base, first, concepts)[:KEPT]
    return [asking(first.kind, first.name), *(asking(first.kind, word) for word in near)]


def erase_concept(models: Models, visit: Visit, job: Job, wish: Wish, forecast: Forecast) -> str:
    """Erase what a visitor wishes, put the patch on the stack, and return the patch's name there.

    The patch is made from the model as it is, without the patches that are on it already. A run that was stopped or
    killed goes on where it was when the same is wished again, in this tab or another.

    Args:
        models: the models.
        visit: the visit.
        job: the job.
        wish: what is erased.
        forecast: its cost, by which the progress is told.
    """
    visit.check_room()
    job.enter("Loading the model")
    pipe = models.open(visit.model)
    base = base_of(visit.model, pipe)
    check_network(wish.method, base)
    with job.watching(*watched(pipe)):
        concepts = wish.concepts(base)
        folder = visit.runs.open(_key(base, concepts, wish.method))
        written = folder / "patch.safetensors"
        every = _preview_every(wish.method, forecast)
        job.note = str(written.with_name(f"{written.name}.previews")) if every else ""
        step, passes = reached(written.with_name(f"{written.name}.run"))
        where = f", from step {step} on" if step else ""
        names = ", ".join(concept.name for concept in concepts)
        job.enter(f"Erasing {names} with {wish.method}{where}", forecast.F or None)
        job.done = passes
        erase(base, concepts, wish.method, out=written, progress=False, preview_every=every)
    path = visit.new_file(f"{wish.names} {wish.method}", ".safetensors")
    temporary = path.with_suffix(".tmp")
    shutil.copyfile(written, temporary)
    temporary.replace(path)
    visit.runs.finished(folder)
    return visit.add(Patch.load(path), path)


def _key(base: Base, concepts: list[Concept], method: str) -> str:
    """Return a name that only the run with the same result gets, so that a stopped one finds its state."""
    settled = settle(base, concepts, method, {})
    return run_key(identity(settled.chosen.method, base, settled.concepts, Computing()))


def _preview_every(method: str, forecast: Forecast) -> int | None:
    """Return the steps between previews; None for a method without steps, whose result is drawn at once anyway."""
    steps = forecast.settings.get("iterations", {}).get("value")
    return max(1, steps // PREVIEWS) if steps and find(method).PREVIEWS else None


def newest_preview(job: Job) -> Path | None:
    """Return the newest preview of a run that trains, or None if there is none yet."""
    return max(Path(job.note).glob("step-*.png"), default=None) if job.note else None


def add_file(visit: Visit, path: str | Path) -> str:
    """Read a patch that a visitor uploads, put it on the stack, and return its name there.

    Raises:
        ErasureError: it is no safetensors file, is damaged or holds no patch; or there is no room.
    """
    source = Path(path)
    if source.suffix != ".safetensors":
        raise ErasureError(f"{source.name}: only .safetensors files are read here, and nothing was")
    try:
        patch = Patch.load(source)
    except ErasureError as fault:
        raise ErasureError(str(fault).replace(str(source), source.name)) from None
    return visit.add(patch, source)


def held(visit: Visit, name: str) -> Any:
    """Return a visitor's patch by its name."""
    if name not in visit.patches():
        raise ErasureError("Erase something first, or add a patch file: there is nothing to work on yet")
    return visit.patches()[name]


@contextmanager
def _renamed(visit: Visit) -> Iterator[None]:
    """Keep paths of this machine out of messages to visitors."""
    try:
        yield
    except ErasureError as fault:
        raise ErasureError(str(fault).replace(f"{visit.folder}/", "")) from None


def downloads(visit: Visit, name: str) -> tuple[Path, Path, Path | None, str]:
    """Make the files of a patch that can be downloaded.

    Returns:
        The patch, its card, a LoRA that ComfyUI loads (None if there can be none), and a sentence on what the LoRA
        leaves out, or why there is none.
    """
    from erasure.evaluation.report.card import card
    from erasure.formats.import_export import export_patch
    from erasure.patch.payload import LowRank

    one = held(visit, name)
    text, folder = visit.folder / f"{one.path.stem}-card.md", visit.folder
    temporary = text.with_suffix(".tmp")
    temporary.write_text(card(one.patch, one.path.name), encoding="utf-8")
    temporary.replace(text)
    lora = folder / f"{one.path.stem}-comfyui.safetensors"
    form = "kohya" if isinstance(one.patch.payload, LowRank) else "diff"
    try:
        with _renamed(visit):
            written = export_patch(replace(one.patch, stored={}), lora, form)
    except ErasureError as fault:
        return one.path, text, None, f"ComfyUI: {fault}"
    return one.path, text, lora, f"ComfyUI: {'; '.join(written.notes)}" if written.notes else ""
