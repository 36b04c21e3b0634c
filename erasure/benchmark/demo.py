"""`erasure demo`: erase a concept from the embedded checkpoint, load the patch, measure it and write a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 100  # prompts: enough for a clear result, few enough for about two minutes


@dataclass(frozen=True)
class Demo:
    """The files and figures that a demonstration produced.

    Args:
        patch: path of the patch.
        report: path of the report's HTML page.
        seconds: time that the demonstration took.
        summary: the report as text.
        metrics: every metric of the report as plain data.
    """

    patch: Path
    report: Path
    seconds: float
    summary: str
    metrics: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data, with paths as strings."""
        return {
            "patch": str(self.patch),
            "report": str(self.report),
            "seconds": round(self.seconds, 1),
            "summary": self.summary,
            "metrics": self.metrics,
        }


def demo(concept: str, folder: Path, *, progress: bool = True, say: Callable[[str], None] = lambda _: None) -> Demo:
    """Erase `concept` from glyph by the default method, load the patch and measure it against the base model.

    Args:
        concept: an object or a style that glyph knows.
        folder: folder for the patch, the images and the report; a second call resumes from its contents.
        progress: show progress bars.
        say: called with one line of text at each step.

    Returns:
        The paths and figures of the demonstration.

    Raises:
        ErasureError: glyph does not know the concept, or the folder cannot be written.
    """
    from erasure.erasing import erase
    from erasure.errors import unknown
    from erasure.evaluation import evaluate
    from erasure.patch import Patch
    from erasure.pipelines import ErasedStableDiffusionPipeline
    from erasure.prompts.concept_prompts import glyph_words

    words = glyph_words()
    if concept not in (known := [*words.objects, *words.styles]):
        raise unknown("concept of glyph", concept, known)
    started = time.perf_counter()
    slug = concept.replace(" ", "-")
    target = folder / f"{slug}.safetensors"
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    millions = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    say(f"1. Erase {concept!r} from glyph, whose UNet has {millions:.0f} million parameters.")
    if target.is_file():
        patch = Patch.load(target)
        say(f"   {target} exists and is used again.")
    else:
        patch = erase(pipe, concept, out=target, progress=progress)
    costs = patch.costs
    size = target.stat().st_size / 1e6
    say(
        f"   {target}: {size:.1f} MB, made by {patch.method} with {costs['F']} forward and {costs['B']} backward "
        f"passes in {costs['seconds']} s."
    )
    say("2. Load the patch and generate the same prompts from the same seeds with and without it.")
    pipe.load_patch(target)
    report = evaluate(pipe, concept, folder=folder / f"report-{slug}", limit=LIMIT, progress=progress)
    say("3. Judge the images.")
    page = folder / f"report-{slug}" / "report.html"
    return Demo(target, page, time.perf_counter() - started, report.text(), report.metrics())
