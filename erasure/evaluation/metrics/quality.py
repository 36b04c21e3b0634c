"""Image quality: whether images of target prompts are still well formed, and what they show instead of the target.

Without this, a model that draws noise for target prompts would count as a perfect erasure, because noise does not show
the target. `quality` is the share of images that the judge considers a well-formed image of anything; `CRA_target`
(accuracy.py) measures whether they follow the rest of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from erasure.evaluation.metrics.target import JudgedImage, Share, Target

GOOD = 0.5  # probability above which an image counts as well formed
NOT_JUDGED = "not judged"


def is_well_formed(image: JudgedImage) -> bool:
    """Return whether the judge considers an image well formed; one that could not be judged counts as broken."""
    return image.quality is not None and image.quality > GOOD


def quality_shares(images: list[JudgedImage], target: Target) -> Iterator[Share]:
    """Yield `quality` of the target images and `quality_kept` of the kept images, if the judge measures quality.

    An image that could not be judged counts as broken.

    Args:
        images: the images of one run.
        target: what should be erased.
    """
    if all(image.quality is None for image in images):
        return
    kept = [image for image in images if target.is_kept(image)]
    for name, part, whose in (("quality", target.plain_images(images), "target"), ("quality_kept", kept, "kept")):
        meaning = f"{whose} images that are well formed, whatever they show"
        yield Share(name, part, [is_well_formed(image) for image in part], True, meaning)


def anchor_share(images: list[JudgedImage], target: Target) -> Share:
    """Return the share of target images that show the anchor; it is empty if no anchor is a label of the judge.

    An image that could not be judged counts as not showing it.

    Args:
        images: the images of one run.
        target: what should be erased.
    """
    asked = [
        (image, labels)
        for image in target.plain_images(images)
        if (labels := target.anchors.get(image.record.labels[target.domain]))
    ]
    marks = [image.verdict is not None and image.top_label(target.domain) in labels for image, labels in asked]
    names = ", ".join(dict.fromkeys(label for labels in target.anchors.values() for label in labels))
    return Share("anchor", [image for image, _ in asked], marks, True, f"target images that show the anchor, {names}")


def drawn_instead(runs: dict[str, list[JudgedImage]], target: Target) -> dict[str, dict[str, int]]:
    """Count the judge's labels for the images of target prompts.

    Args:
        runs: "base" and "patched" -> judged images of the same prompts.
        target: what should be erased.

    Returns:
        "base" and "patched" -> label -> number of images; the most frequent label of the patched run comes first. The
        label `none` means that the judge found none of its other labels, `not judged` that it failed on the image.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, images in runs.items():
        counts[name] = {}
        for image in target.plain_images(images):
            label = NOT_JUDGED if image.verdict is None else image.top_label(target.domain)
            counts[name][label] = counts[name].get(label, 0) + 1
    order = sorted({label for run in counts.values() for label in run}, key=lambda x: (-counts["patched"].get(x, 0), x))
    return {name: {label: run[label] for label in order if label in run} for name, run in counts.items()}
