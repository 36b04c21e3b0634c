"""All metrics of one run that come from its judged images."""

from __future__ import annotations

from erasure.evaluation.metrics.accuracy import accuracy_metrics, mace_harmonic_mean
from erasure.evaluation.metrics.clip_metrics import clip_metrics, name_metrics
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.metrics.quality import anchor_metric, quality_metrics
from erasure.evaluation.metrics.set_distances import distances_to_base
from erasure.evaluation.metrics.target import TARGET_ROLES, JudgedImage, Target


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
    erased = [image for image in images if image.role not in TARGET_ROLES and target.matches(image.record)]
    kept = [image for image in images if target.is_kept(image)]
    measured = [
        *accuracy_metrics(images, target),
        *quality_metrics(images, target),
        anchor_metric(images, target),
        *clip_metrics(images, target, base_by_id),
        *distances_to_base(kept, base_by_id, feature_source),
        *name_metrics(erased),
    ]
    metrics = [metric for metric in measured if metric is not None]
    mace = mace_harmonic_mean(metrics)
    return metrics if mace is None else [*metrics, mace]
