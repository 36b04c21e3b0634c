"""What the judge alone does not give: distances over other features, LPIPS, a reference folder, a scorer.

Whatever is not installed on this machine is listed in the report as missing; everything else is still measured.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from erasure.errors import ErasureError
from erasure.evaluation.generate import Record, read_image
from erasure.evaluation.judges.judge import Judge
from erasure.evaluation.judges.registry import find_judge
from erasure.evaluation.metrics.kid_fid import enough_images
from erasure.evaluation.metrics.metric import Metric, mean_metric
from erasure.evaluation.metrics.scorers import Scorer, find_scorer, scorer_metrics
from erasure.evaluation.metrics.set_distances import distances_to_reference, frechet_name
from erasure.evaluation.metrics.target import TARGET_ROLES, JudgedImage, Target
from erasure.evaluation.text_files import write_lines

if TYPE_CHECKING:
    from erasure.evaluation.metrics.lpips import Lpips

BATCH = 16  # images per batch
MIN_REFERENCE = 8  # images that a reference folder must contain
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class BorrowedFeatures:
    """A judge whose image features come from another judge, or which has none."""

    def __init__(self, judge: Judge, lender: Judge | None) -> None:
        """Combine a judge with another judge's features.

        Args:
            judge: the judge that gives verdicts and CLIP scores.
            lender: the judge that gives features; None: no features.
        """
        self._judge, self._lender = judge, lender

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)

    def features(self, images: list[Image.Image]) -> np.ndarray | list[None]:
        """Return the lender's features [n, d], or None for each image if there is no lender."""
        return [None] * len(images) if self._lender is None else self._lender.features(images)


@dataclass(frozen=True)
class ImageDistances:
    """A judge together with the networks and images that the distances of a report need.

    Args:
        judge: the judge, with the features that were requested.
        feature_source: name of the network whose features are compared.
        features_requested: whether features were requested by name.
        lpips: the LPIPS network, or None.
        scorer: the network that rates the images, or None.
        reference: paths of the reference images.
        missing: what was requested but is not available, and why.
        provenance: names, versions and hashes for the report.
    """

    judge: Judge
    feature_source: str
    features_requested: bool = False
    lpips: Lpips | None = None
    scorer: Scorer | None = None
    reference: tuple[Path, ...] = ()
    missing: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        judge: Judge,
        features: str | Judge | None = None,
        lpips: str | None = None,
        reference: str | os.PathLike[str] | None = None,
        scorer: str | Scorer | None = None,
    ) -> ImageDistances:
        """Load what an evaluation requests; networks that are not installed are listed in `missing`.

        Args:
            judge: the judge of the evaluation.
            features: a judge, or the name of one, whose features KID and FD compare; default: `judge`.
            lpips: an LPIPS backbone, or BACKBONE:FILE; default: no LPIPS.
            reference: a folder of reference images; default: none.
            scorer: a scorer, or the name of one as `find_scorer` reads it; default: none.

        Raises:
            ErasureError: there is no such judge, backbone or scorer, or the folder contains too few images.
        """
        from erasure.evaluation.judges.networks import NotInstalled

        missing: list[str] = []

        def available(load: Callable[[], Any]) -> Any:
            try:
                return load()
            except NotInstalled as fault:
                missing.append(str(fault))
                return None

        lender: Judge | None = judge
        if features is not None:
            lender = available(lambda: find_judge(features)) if isinstance(features, str) else features
        network = None
        if lpips is not None:
            from erasure.evaluation.metrics.lpips import Lpips

            network = available(lambda: Lpips(lpips))
        rating = available(lambda: find_scorer(scorer)) if isinstance(scorer, str) else scorer
        source = "none" if lender is None else lender.name
        provenance: dict[str, Any] = {"features": source, "KID and FD": "erasure's own, in float64"}
        if lender is not None and lender is not judge:
            provenance["features"] = {"name": source, **lender.versions()}
        if network is not None:
            provenance["LPIPS"] = network.versions()
        if rating is not None:
            provenance["scorer"] = {"name": rating.name, **rating.versions()}
        images = _image_paths(Path(reference)) if reference is not None else ()
        combined = judge if lender is judge else cast(Judge, BorrowedFeatures(judge, lender))
        return cls(combined, source, features is not None, network, rating, images, missing, provenance)

    def metrics(
        self, runs: Mapping[str, list[JudgedImage]], folders: Mapping[str, Path], target: Target
    ) -> dict[str, list[Metric]]:
        """Measure LPIPS, the scores and the distances to the reference images, for the base and the patched run.

        Args:
            runs: "base" and "patched" -> judged images.
            folders: "base" and "patched" -> folder of the run.
            target: what should be erased.

        Returns:
            "base" and "patched" -> metrics. A distance that cannot be measured is listed in `missing` instead.
        """
        metrics: dict[str, list[Metric]] = {name: [] for name in runs}
        if self.lpips is not None:
            with self._or_missing("LPIPS"):
                records = [image.record for image in runs["patched"] if image.role not in TARGET_ROLES]
                measured = _lpips_metrics(self.lpips, records, folders, target)
                patched = [metric for metric in measured if metric is not None]
                metrics["patched"] += patched
                # The base's distance to itself is 0 and needs no measurement.
                metrics["base"] += [replace(metric, value=0.0, low=0.0, high=0.0) for metric in patched]
                kept = [record for record in records if not target.matches(record)]
                floor = _lpips_between_seeds(self.lpips, kept, folders["base"])
                for name in metrics:
                    metrics[name] += [floor] if floor is not None else []
        if self.scorer is not None:
            with self._or_missing(self.scorer.name):
                for name, scores in scorer_metrics(self.scorer, runs, folders, target).items():
                    metrics[name] += scores
        if self.reference:
            with self._or_missing(f"distances to {self.reference[0].parent.name}"):
                reference = self._reference_features()
                for name, run in runs.items():
                    metrics[name] += distances_to_reference(run, target, reference, self.feature_source)
        self._note_missing_frechet(runs["patched"], target)
        return metrics

    @contextmanager
    def _or_missing(self, noun: str) -> Iterator[None]:
        """List any failure as missing: it must not cost the run its other metrics."""
        try:
            yield
        except ErasureError as fault:
            self.missing.append(f"{noun}: {fault}")
        except Exception as fault:
            self.missing.append(f"{noun}: {type(fault).__name__}: {fault}")

    def _reference_features(self) -> np.ndarray:
        """Return the features [m, d] of the reference images.

        Raises:
            ErasureError: the judge has no features, or an image cannot be read.
        """
        digest, parts = hashlib.sha256(), []
        for start in range(0, len(self.reference), BATCH):
            images = []
            for path in self.reference[start : start + BATCH]:
                try:
                    digest.update(path.read_bytes())
                    with Image.open(path) as image:
                        images.append(image.convert("RGB"))
                except (OSError, SyntaxError) as fault:
                    raise ErasureError(f"{path.name} cannot be read: {fault}") from None
            features = self.judge.features(images)
            if not isinstance(features, np.ndarray):
                raise ErasureError("the judge has no features to compare")
            parts.append(features)
        name = self.reference[0].parent.name
        self.provenance["reference"] = {"folder": name, "images": len(self.reference), "sha256": digest.hexdigest()}
        return np.concatenate(parts)

    def _note_missing_frechet(self, images: list[JudgedImage], target: Target) -> None:
        """List the Frechet distance as missing if features were requested that need more images than there are."""
        widths = [len(image.features) for image in images if image.features is not None and target.is_kept(image)]
        if self.features_requested and widths and not enough_images(len(widths), widths[0]):
            self.missing.append(
                f"{frechet_name(self.feature_source)} over {widths[0]} features needs {2 * widths[0] + 2} kept "
                f"images; this run has {len(widths)}, so only KID is reported"
            )


def _image_paths(folder: Path) -> tuple[Path, ...]:
    paths = tuple(sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES))
    if len(paths) < MIN_REFERENCE:
        raise ErasureError(
            f"{folder} contains {len(paths)} images ({', '.join(SUFFIXES)}); "
            f"a reference folder needs at least {MIN_REFERENCE}"
        )
    return paths


def _lpips_between_seeds(network: Lpips, records: list[Record], folder: Path) -> Metric | None:
    """Return LPIPS between the base's images of one prompt at two seeds, as the effect of the seed alone.

    The result is None if no prompt has two seeds.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.prompt, []).append(record)
    pairs = [
        pair for rows in groups.values() for pair in zip(rows, rows[1:], strict=False) if pair[0].seed != pair[1].seed
    ]
    distances: list[tuple[float, str]] = []
    for first, second in pairs:
        first_image, second_image = read_image(folder, first), read_image(folder, second)
        if first_image is not None and second_image is not None and first_image.size == second_image.size:
            distances.append((network([first_image], [second_image])[0], first.prompt))
    meaning = (
        f"LPIPS ({network.backbone}) between the base's kept images of one prompt at two seeds: "
        "what the seed alone changes"
    )
    values, prompts = [value for value, _ in distances], [prompt for _, prompt in distances]
    return mean_metric("LPIPS_seeds", values, False, meaning, prompts)


def _lpips_metrics(
    network: Lpips, records: list[Record], folders: Mapping[str, Path], target: Target
) -> Iterator[Metric | None]:
    """Yield LPIPS to the base for kept images, which should not change, and for target images, which should."""
    distances: dict[str, float] = {}
    for start in range(0, len(records), BATCH):
        by_size: dict[tuple[int, int], list[tuple[str, Image.Image, Image.Image]]] = {}
        for record in records[start : start + BATCH]:
            patched, base = read_image(folders["patched"], record), read_image(folders["base"], record)
            if patched is not None and base is not None and patched.size == base.size:
                by_size.setdefault(patched.size, []).append((record.id, patched, base))
        for triples in by_size.values():
            values = network([patched for _, patched, _ in triples], [base for _, _, base in triples])
            distances |= dict(zip((name for name, _, _ in triples), values, strict=True))
    lines = (json.dumps({"id": name, "lpips": value}) for name, value in distances.items())
    write_lines(folders["patched"] / "lpips.jsonl", lines)
    for name, hit in (("kept", False), ("target", True)):
        rows = [(distances[r.id], r.prompt) for r in records if target.matches(r) == hit and r.id in distances]
        meaning = f"LPIPS ({network.backbone}) between {name} images and the base's of the same seed"
        yield mean_metric(f"LPIPS_{name}", [value for value, _ in rows], hit, meaning, [prompt for _, prompt in rows])
