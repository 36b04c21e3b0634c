"""What looks at the pictures beside the judge: features of another network, LPIPS, pictures to be like.

What is not on this machine is said in the report and left out; the rest goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from erasure.evaluation.metrics.set_distances import distances_to_reference, frechet_name
from erasure.evaluation.metrics.target import TARGET_ROLES, JudgedImage, Target

if TYPE_CHECKING:
    from erasure.evaluation.metrics.lpips import Lpips

BATCH = 16  # pictures looked at together
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class BorrowedFeatures:
    """A judge with the features of another one; None: with none."""

    def __init__(self, judge: Judge, lender: Judge | None) -> None:
        self._judge, self._lender = judge, lender

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)

    def features(self, images: list[Image.Image]) -> np.ndarray | list[None]:
        """The lender's."""
        return [None] * len(images) if self._lender is None else self._lender.features(images)


@dataclass(frozen=True)
class ImageDistances:
    """The judge with whatever else was asked for.

    Args:
        judge: who judges, with the features that were asked for.
        of: whose features they are.
        asked: whether features were asked for by name.
        lpips: the network, or None.
        reference: pictures that the kept ones should be like.
        missing: what was asked for and is not on this machine.
        facts: for the report.
    """

    judge: Judge
    of: str
    asked: bool = False
    lpips: Lpips | None = None
    reference: tuple[Path, ...] = ()
    missing: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(
        cls,
        judge: Judge,
        features: str | Judge | None = None,
        lpips: str | None = None,
        reference: str | os.PathLike[str] | None = None,
    ) -> ImageDistances:
        """Load what `evaluate` was asked for.

        Raises:
            ErasureError: no such judge, backbone or folder; what is only absent goes into `missing`.
        """
        from erasure.evaluation.judges.networks import NotInstalled

        missing: list[str] = []

        def there(make: Callable[[], Any]) -> Any:
            try:
                return make()
            except NotInstalled as fault:
                missing.append(str(fault))
                return None

        lender: Judge | None = judge
        if features is not None:
            lender = there(lambda: find_judge(features)) if isinstance(features, str) else features
        net = None
        if lpips is not None:
            from erasure.evaluation.metrics.lpips import Lpips

            net = there(lambda: Lpips(lpips))
        of = "none" if lender is None else lender.name
        facts: dict[str, Any] = {"features": of, "KID and FD": "erasure's own, in float64"}
        if lender is not None and lender is not judge:
            facts["features"] = {"name": of, **lender.versions()}
        if net is not None:
            facts["LPIPS"] = net.versions()
        pictures = _pictures(Path(reference)) if reference is not None else ()
        seen = judge if lender is judge else cast(Judge, BorrowedFeatures(judge, lender))
        return cls(seen, of, features is not None, net, pictures, missing, facts)

    def metrics(
        self, runs: Mapping[str, list[JudgedImage]], places: Mapping[str, Path], target: Target
    ) -> dict[str, list[Metric]]:
        """LPIPS and the distances to the reference, for the base's row and the patched one."""
        found: dict[str, list[Metric]] = {name: [] for name in runs}
        if self.lpips is not None:
            with self._or_missing("LPIPS"):
                records = [j.record for j in runs["patched"] if j.role not in TARGET_ROLES]
                patched = list(_lpips(self.lpips, records, places, target))
                found["patched"] += patched
                # The same picture twice: what the base's row says needs no measuring.
                found["base"] += [replace(metric, value=0.0, low=0.0, high=0.0) for metric in patched]
                floor = _floor(self.lpips, [r for r in records if not target.matches(r)], places["base"])
                for name in found:
                    found[name] += [floor] if floor is not None else []
        if self.reference:
            with self._or_missing(f"distances to {self.reference[0].parent.name}"):
                wanted = self._reference()
                for name, run in runs.items():
                    found[name] += distances_to_reference(run, target, wanted, self.of)
        self._too_few(runs["patched"], target)
        return found

    @contextmanager
    def _or_missing(self, what: str) -> Iterator[None]:
        """Whatever fails is said: it must not cost a run its pictures' other figures."""
        try:
            yield
        except ErasureError as fault:
            self.missing.append(f"{what}: {fault}")
        except Exception as fault:
            self.missing.append(f"{what}: {type(fault).__name__}: {fault}")

    def _reference(self) -> np.ndarray:
        """Features [m, d] of the reference pictures.

        Raises:
            ErasureError: there are no features, or a picture cannot be read.
        """
        digest, parts = hashlib.sha256(), []
        for at in range(0, len(self.reference), BATCH):
            images = []
            for path in self.reference[at : at + BATCH]:
                try:
                    digest.update(path.read_bytes())
                    with Image.open(path) as image:
                        images.append(image.convert("RGB"))
                except (OSError, SyntaxError) as fault:
                    raise ErasureError(f"{path.name} cannot be read: {fault}") from None
            found = self.judge.features(images)
            if not isinstance(found, np.ndarray):
                raise ErasureError("there are no features to compare")
            parts.append(found)
        name = self.reference[0].parent.name
        self.facts["reference"] = {"folder": name, "images": len(self.reference), "sha256": digest.hexdigest()}
        return np.concatenate(parts)

    def _too_few(self, run: list[JudgedImage], target: Target) -> None:
        """Says that there is no FD, where features were asked for and are too wide for the pictures there are."""
        widths = [len(j.features) for j in run if j.features is not None and target.is_kept(j)]
        if self.asked and widths and not enough_images(len(widths), widths[0]):
            self.missing.append(
                f"{frechet_name(self.of)} over {widths[0]} features needs {2 * widths[0] + 2} kept images; "
                f"here are {len(widths)}, so KID stands alone"
            )


def _pictures(folder: Path) -> tuple[Path, ...]:
    found = tuple(sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES))
    if len(found) < 8:
        raise ErasureError(f"{folder}: {len(found)} pictures ({', '.join(SUFFIXES)}); a reference needs at least 8")
    return found


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A file of lines, under its name only when it is whole.

    Raises:
        ErasureError: it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as fault:
        raise ErasureError(f"{path.parent}: {path.name} cannot be written: {fault.strerror or fault}") from None


def _floor(net: Lpips, records: list[Record], place: Path) -> Metric | None:
    """LPIPS of the base's pictures of one prompt at two seeds, what a seed alone changes; None: no prompt has two."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.prompt, []).append(record)
    pairs = [
        pair for rows in groups.values() for pair in zip(rows, rows[1:], strict=False) if pair[0].seed != pair[1].seed
    ]
    found: list[tuple[float, str]] = []
    for one, other in pairs:
        first, second = read_image(place, one), read_image(place, other)
        if first is not None and second is not None and first.size == second.size:
            found.append((net([first], [second])[0], one.prompt))
    said = f"LPIPS ({net.backbone}) of the base's own kept images of one prompt at two seeds: what a seed changes"
    return mean_metric("LPIPS_seeds", [value for value, _ in found], False, said, [prompt for _, prompt in found])


def _lpips(net: Lpips, records: list[Record], places: Mapping[str, Path], target: Target) -> Iterator[Metric]:
    """Of kept pictures, which should stay as they were, and of the target's, which should not."""
    apart: dict[str, float] = {}
    for at in range(0, len(records), BATCH):
        part = records[at : at + BATCH]
        pairs = [(r, read_image(places["patched"], r), read_image(places["base"], r)) for r in part]
        sizes: dict[tuple[int, int], list[tuple[str, Image.Image, Image.Image]]] = {}
        for record, made, before in pairs:
            if made is not None and before is not None and made.size == before.size:
                sizes.setdefault(made.size, []).append((record.id, made, before))
        for same in sizes.values():
            found = net([made for _, made, _ in same], [before for _, _, before in same])
            apart |= dict(zip((name for name, _, _ in same), found, strict=True))
    lines = (json.dumps({"id": name, "lpips": value}) for name, value in apart.items())
    write_lines(places["patched"] / "lpips.jsonl", lines)
    for name, hit in (("kept", False), ("target", True)):
        rows = [(apart[r.id], r.prompt) for r in records if target.matches(r) == hit and r.id in apart]
        said = f"LPIPS ({net.backbone}) of {name} images and the base's of the same seed"
        metric = mean_metric(f"LPIPS_{name}", [value for value, _ in rows], hit, said, [prompt for _, prompt in rows])
        if metric is not None:
            yield metric
