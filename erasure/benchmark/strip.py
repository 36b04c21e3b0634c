"""Small images of a benchmark for the top of its page: the base and every method, drawn from the same seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from erasure.benchmark.row import Row, members
from erasure.evaluation.report.html import Shot

CONCEPTS = 2  # concepts that are shown


def strip(
    rows: Sequence[Row],
    reports: Mapping[tuple[str, str], Mapping[str, Any]],
    folders: Mapping[tuple[str, str], Path],
    base: Path,
) -> dict[str, list[Shot]]:
    """Return heading -> one column for the base and for each method, of the first concepts with images.

    Each column has a target prompt above a prompt to keep. Concepts that settings were tuned on come last; groups of
    concepts are left out.

    Args:
        rows: rows of the table.
        reports: (method, concept) -> the content of the run's report.json.
        folders: (method, concept) -> folder of the run.
        base: folder of the base's images.
    """
    single = sorted((row for row in rows if len(members(row.concept)) == 1), key=lambda row: row.tuned)
    groups: dict[str, list[Shot]] = {}
    for concept in dict.fromkeys(row.concept for row in single):
        methods = list(dict.fromkeys(row.method for row in single if row.concept == concept))
        ids = _example_ids(folders[methods[0], concept] / "patched" / "records.jsonl", reports[methods[0], concept])
        places = {"base": base, **{method: folders[method, concept] / "patched" for method in methods}}
        if not ids or len(groups) == CONCEPTS:
            continue
        groups[f"{concept}: above, a prompt for it; below, one to keep"] = [
            Shot({name: _image(place, identity) for name, identity in ids.items()}, "", note=name)
            for name, place in places.items()
        ]
    return groups


def _example_ids(records: Path, report: Mapping[str, Any]) -> dict[str, str]:
    """Return the ids of the first prompt for the target ("target") and of the first other prompt ("kept")."""
    if not records.is_file():
        return {}
    ids: dict[str, str] = {}
    for line in records.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if not record["labels"].get("role"):
            hit = record["labels"].get(report["domain"]) in report["concept"]
            ids.setdefault("target" if hit else "kept", record["id"])
    return {name: ids[name] for name in ("target", "kept") if name in ids}


def _image(folder: Path, identity: str) -> Image.Image | None:
    path = folder / "images" / f"{identity}.png"
    return Image.open(path).convert("RGB") if path.is_file() else None
