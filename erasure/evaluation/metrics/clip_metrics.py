"""Metrics from CLIP scores: how well images match their prompts, their nouns, and the concept's name.

A CLIP score is 100 cos(image, text) by the judge's CLIP. CS and CER are SPM's (arXiv 2312.16145). Selective alignment
is HUB's (arXiv 2410.05664): target prompts with the label `nouns` name what else should be in the image. It is a mean
over nouns, not over prompts, as in HUB's script; HUB asks a vision-language model, here CLIP scores each noun.
"""

from __future__ import annotations

from collections.abc import Iterator

from erasure.evaluation.metrics.metric import Metric, mean_metric, share_metric
from erasure.evaluation.metrics.target import JudgedImage, Target


def clip_metrics(images: list[JudgedImage], target: Target, base: dict[str, JudgedImage]) -> Iterator[Metric | None]:
    """Yield CLIP_selective, CLIP_selective_change, CLIP_target, CLIP_kept and CLIP_change, in this order.

    Args:
        images: the images of one run.
        target: what should be erased.
        base: record id -> the base model's image of the same prompt and seed.

    Yields:
        A metric, or None where there are no scores for it.
    """
    erased = target.plain_images(images)
    kept = [image for image in images if target.is_kept(image)]
    yield from selective_alignment([image for image in images if target.noun_texts(image.record)], base)
    yield mean_metric("CLIP_target", _scores(erased), False, "100 cos of target images and their prompts")
    yield mean_metric("CLIP_kept", _scores(kept), True, "100 cos of kept images and their prompts")
    yield clip_change(kept, base)


def selective_alignment(images: list[JudgedImage], base: dict[str, JudgedImage]) -> Iterator[Metric | None]:
    """Yield CLIP_selective and CLIP_selective_change: do target images still show the other nouns of their prompts?

    Both are means over nouns, with intervals over prompts. Images that could not be judged have no scores and are left
    out.

    Args:
        images: images of the target whose rows list other nouns.
        base: record id -> the base model's image of the same prompt and seed.
    """
    scores = [(score, image.record.prompt) for image in images for score in image.noun_scores]
    meaning = "100 cos of target images and the other nouns of their prompts"
    yield mean_metric("CLIP_selective", [score for score, _ in scores], True, meaning, [text for _, text in scores])
    pairs = [(image, base[image.record.id]) for image in images if image.record.id in base]
    changes = [
        (after - before, image.record.prompt)
        for image, other in pairs
        if image.noun_scores and other.noun_scores
        for after, before in zip(image.noun_scores, other.noun_scores, strict=True)
    ]
    meaning = "change of CLIP_selective from the base's images of the same seed"
    values = [change for change, _ in changes]
    yield mean_metric("CLIP_selective_change", values, True, meaning, [text for _, text in changes])


def clip_change(kept: list[JudgedImage], base: dict[str, JudgedImage]) -> Metric | None:
    """Return the mean change of the CLIP score from the base image of the same seed (paired bootstrap).

    Args:
        kept: images of prompts that should be unaffected.
        base: record id -> the base model's image of the same prompt and seed.
    """
    changes = []
    for image in kept:
        before = base[image.record.id].clip if image.record.id in base else None
        if image.clip is not None and before is not None:
            changes.append((image.clip - before, image.record.prompt))
    meaning = "change of the CLIP score of kept images from the base's of the same seed"
    return mean_metric(
        "CLIP_change", [change for change, _ in changes], True, meaning, [prompt for _, prompt in changes]
    )


def name_metrics(erased: list[JudgedImage]) -> list[Metric | None]:
    """Return SPM's CS and CER (arXiv 2312.16145) of target images; an empty list without CLIP scores.

    CS is the mean of max(0, 2.5 cos) of target images and the concept's name. CER is the share of target images that
    are at least as close to the anchor as to the concept's name; images that could not be judged do not count as such.
    """
    scored = [image.name_scores for image in erased if image.name_scores is not None]
    if not scored:
        return []
    closer = [image.name_scores is not None and image.name_scores[1] >= image.name_scores[0] for image in erased]
    scores = [max(0.0, 2.5 * name / 100) for name, _ in scored]
    prompts = [image.record.prompt for image in erased]
    meaning = "target images at least as close to the anchor as to the concept's name"
    return [
        mean_metric("CS", scores, False, "2.5 cos of target images and the concept's name"),
        share_metric("CER", closer, True, meaning, prompts),
    ]


def _scores(images: list[JudgedImage]) -> list[float]:
    return [image.clip for image in images if image.clip is not None]
