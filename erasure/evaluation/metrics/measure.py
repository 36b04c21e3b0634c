"""All metrics of one run that come from its judged images."""

from __future__ import annotations

from erasure.evaluation.metrics.accuracy import HARMONIC_PARTS, accuracy_shares, harmonic, mace_harmonic_mean
from erasure.evaluation.metrics.clip_metrics import clip_metrics, name_metrics
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.metrics.quality import anchor_share, quality_shares
from erasure.evaluation.metrics.set_distances import distances_to_base
from erasure.evaluation.metrics.target import JudgedImage, Share, Target


def measure(
    images: list[JudgedImage], target: Target, base: list[JudgedImage], feature_source: str = "the judge"
) -> list[Metric]:
    """Compute every metric of one run.

    An image that is missing or could not be judged counts as a failure: as not erased in UA and leak, as not kept
    elsewhere.

    Args:
        images: the run's images.
        target: what should be erased.
        base: the base model's images of the same prompts.
        feature_source: name of the network whose features KID and FD compare.

    Returns:
        The metrics that could be measured, in the order of the report.
    """
    base_by_id = {image.record.id: image for image in base}
    kept = [image for image in images if target.is_kept(image)]
    of_shares = [metric for share in shares(images, target) if (metric := share.metric())]
    main = [metric for metric in of_shares if metric.name in (*HARMONIC_PARTS, "CRA_target")]
    measured = [
        *main,
        harmonic(main),
        *(metric for metric in of_shares if metric not in main),
        *clip_metrics(images, target, base_by_id),
        *distances_to_base(kept, base_by_id, feature_source),
        *name_metrics(target.plain_images(images)),
    ]
    metrics = [metric for metric in measured if metric is not None]
    other = mace_harmonic_mean(metrics)
    return metrics if other is None else [*metrics, other]


def shares(images: list[JudgedImage], target: Target) -> list[Share]:
    """Return every share of images that can be measured, in the order of the report: UA first, its quality beside it.

    Args:
        images: the run's images.
        target: what should be erased.
    """
    erased, *accuracies = accuracy_shares(images, target)
    quality, *others = [*quality_shares(images, target)] or [Share("quality", [], [], True, "")]
    return [share for share in (erased, quality, *accuracies, *others, anchor_share(images, target)) if share.images]


def outcomes(images: list[JudgedImage], target: Target) -> dict[str, dict[str, bool]]:
    """Return name of a share -> id of an image -> whether it counts.

    Two runs over the same prompts can be compared image by image with these.
    """
    return {share.name: share.outcomes() for share in shares(images, target)}
