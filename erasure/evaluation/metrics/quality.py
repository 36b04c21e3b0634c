"""Picture quality: are the pictures of target prompts still good ones, and what do they show instead of the target?

Without this, a model that draws noise for the target's prompts would count as a perfect erasure: nothing is seen in
noise. `quality` is the share of pictures that the judge takes for a well-formed picture of something, whatever it is;
`CRA_target` (accuracy.py) says whether they follow the rest of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from erasure.evaluation.metrics.metric import Metric, share_metric
from erasure.evaluation.metrics.target import TARGET_ROLES, JudgedImage, Target

GOOD = 0.5  # probability from which a picture counts as well formed
NOT_JUDGED = "not judged"


def quality_metrics(images: list[JudgedImage], target: Target) -> Iterator[Metric | None]:
    """Yield `quality` of the target's pictures and `quality_kept` of the others, where the judge measures it.

    A picture that could not be judged counts as broken.
    """
    erased = [image for image in images if image.role not in TARGET_ROLES and target.matches(image.record)]
    kept = [image for image in images if target.is_kept(image)]
    if all(image.quality is None for image in images):
        return
    for name, part, whose in (("quality", erased, "target"), ("quality_kept", kept, "kept")):
        marks = [image.quality is not None and image.quality > GOOD for image in part]
        yield share_metric(name, marks, True, f"{whose} images that are well-formed pictures of something")


def drawn_instead(runs: dict[str, list[JudgedImage]], target: Target) -> dict[str, dict[str, int]]:
    """Count what the judge sees in the pictures of target prompts.

    Args:
        runs: "base" and "patched" -> judged images of the same prompts.
        target: what should be erased.

    Returns:
        "base" and "patched" -> label -> pictures; the commonest label of the patched run comes first. The label `none`
        means that the judge sees none of its labels, `not judged` that it could not judge.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, images in runs.items():
        counts[name] = {}
        for image in images:
            if image.role not in TARGET_ROLES and target.matches(image.record):
                label = NOT_JUDGED if image.verdict is None else image.top_label(target.domain)
                counts[name][label] = counts[name].get(label, 0) + 1
    order = sorted({label for run in counts.values() for label in run}, key=lambda x: (-counts["patched"].get(x, 0), x))
    return {name: {label: run[label] for label in order if label in run} for name, run in counts.items()}
