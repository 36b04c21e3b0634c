"""KID and FD between a run's kept images and the base's, or a folder of reference images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from erasure.evaluation.metrics.kid_fid import enough_images, frechet, half_split_distances, kid, paired_kid
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.metrics.statistics import Z95
from erasure.evaluation.metrics.target import JudgedImage, Target

Distance = Callable[[np.ndarray, np.ndarray], float]
MIN_IMAGES = 8  # fewer images give no distance
TITLES = {"KID": "1000 KID", "FD": "Frechet distance", "FID": "Frechet distance"}


def frechet_name(feature_source: str) -> str:
    """Return the name of the Frechet distance over these features: FID for Inception's, FD for any others."""
    return "FID" if feature_source == "inception" else "FD"


def distances_to_base(kept: list[JudgedImage], base: dict[str, JudgedImage], feature_source: str) -> list[Metric]:
    """Return 1000 KID and FD between the kept images and the base's.

    KID is `paired_kid`, which is 0 for the base itself; its interval is a bootstrap over images. FD is biased by the
    number of images, so it is the mean over disjoint random halves, and the base's own value is its noise floor. FD is
    left out if there are too few images for it.

    Args:
        kept: images of prompts that should be unaffected.
        base: record id -> the base model's image of the same prompt and seed.
        feature_source: name of the network whose features are compared.

    Returns:
        KID and FD (FID over Inception's features); an empty list for fewer than MIN_IMAGES pairs.
    """
    pairs = [(image.features, base[image.record.id].features) for image in kept if image.record.id in base]
    complete = [(after, before) for after, before in pairs if after is not None and before is not None]
    if len(complete) < MIN_IMAGES:
        return []
    features, base_features = np.stack([after for after, _ in complete]), np.stack([before for _, before in complete])
    of_kept = f"of kept images to the base's ({feature_source}'s features)"
    value, low, high = (1000 * number for number in paired_kid(features, base_features))
    metrics = [Metric("KID", value, len(complete), low, high, False, f"1000 KID {of_kept}; 0: the same distribution")]
    if enough_images(*features.shape):
        halves = np.array(half_split_distances(frechet, features, base_features))
        low, high = np.percentile(halves, [2.5, 97.5])
        meaning = f"Frechet distance {of_kept}; the base's own value is the noise floor"
        mean = float(halves.mean())
        name = frechet_name(feature_source)
        metrics.append(Metric(name, mean, len(complete), float(low), float(high), False, meaning))
    return metrics


def distances_to_reference(
    images: list[JudgedImage], target: Target, reference: np.ndarray, feature_source: str
) -> list[Metric]:
    """Return 1000 KID and FD between a run's kept images and reference images.

    The interval is the delete-half jackknife's (Shao and Wu 1989) over the run's images, with the reference fixed: 1.96
    times the standard deviation of the distance over random halves.

    Args:
        images: the images of one run.
        target: what should be erased.
        reference: features [m, d] of the reference images.
        feature_source: name of the network whose features are compared.

    Returns:
        KID_reference and FD_reference (FID_reference); an empty list for fewer than MIN_IMAGES kept images.
    """
    kept = [image.features for image in images if target.is_kept(image) and image.features is not None]
    if len(kept) < MIN_IMAGES:
        return []
    features, metrics = np.stack(kept), []
    full_rank = enough_images(*features.shape) and len(reference) > features.shape[1]
    for name, distance, scale in _distances(feature_source, full_rank):
        value = scale * distance(features, reference)
        halves = half_split_distances(_to_reference(reference, distance), features, features)
        reach = Z95 * scale * float(np.std(halves))
        meaning = f"{TITLES[name]} of kept images to the reference images ({feature_source}'s features)"
        metrics.append(Metric(f"{name}_reference", value, len(features), value - reach, value + reach, False, meaning))
    return metrics


def _distances(feature_source: str, with_frechet: bool) -> Iterator[tuple[str, Distance, float]]:
    """Yield the name, the function and the scale of each distance."""
    yield "KID", kid, 1000
    if with_frechet:
        yield frechet_name(feature_source), frechet, 1


def _to_reference(reference: np.ndarray, distance: Distance) -> Distance:
    """Return a distance that ignores its second set and compares the first one with the reference."""
    return lambda features, _: distance(features, reference)
