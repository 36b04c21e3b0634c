"""`erasure demo`: the whole way once, on the embedded checkpoint: erase, load, measure, show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 100  # prompts: enough to see it, few enough to wait for


@dataclass(frozen=True)
class Demo:
    """What the demo made."""

    patch: Path
    report: Path
    seconds: float
    summary: str
    metrics: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "patch": str(self.patch),
            "report": str(self.report),
            "seconds": round(self.seconds, 1),
            "summary": self.summary,
            "metrics": self.metrics,
        }


def demo(concept: str, folder: Path, *, progress: bool = True, say: Callable[[str], None] = lambda _: None) -> Demo:
    """Erase `concept` from glyph, load the patch and measure it against the base.

    Args:
        concept: an object or a style that glyph knows.
        folder: for the patch, the images and the report; a second call goes on from what is there.
        progress: show bars.
        say: is told what happens, a line a step.

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
    begun = time.perf_counter()
    slug = concept.replace(" ", "-")
    target = folder / f"{slug}.safetensors"
    pipe = ErasedStableDiffusionPipeline.from_pretrained("glyph")
    pipe.set_progress_bar_config(disable=True)
    say(
        f"1. erase {concept!r} from glyph, a {sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.0f}M UNet, with ESD"
    )
    if target.is_file():
        patch = Patch.load(target)
        say(f"   {target} is there already")
    else:
        patch = erase(pipe, concept, "esd", out=target, progress=progress)
    costs = patch.costs
    size = target.stat().st_size / 1e6
    say(f"   {target}: {size:.1f} MB, {costs['F']} forwards, {costs['B']} backwards, {costs['seconds']} s")
    say("2. load the patch and draw the same prompts from the same seeds, with it and without")
    pipe.load_patch(target)
    report = evaluate(pipe, concept, folder=folder / f"report-{slug}", limit=LIMIT, progress=progress)
    say("3. what the judge found")
    page = folder / f"report-{slug}" / "report.html"
    return Demo(target, page, time.perf_counter() - begun, report.text(), report.metrics())
