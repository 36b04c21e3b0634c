"""Judge the pictures of a run and compare two runs picture by picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from erasure.evaluation.generate import Record, read_image
from erasure.evaluation.judges.judge import verdicts
from erasure.evaluation.metrics.statistics import mcnemar
from erasure.evaluation.metrics.target import TARGET_ROLES, JudgedImage, Target
from erasure.evaluation.text_files import write_lines

if TYPE_CHECKING:
    from PIL import Image

    from erasure.evaluation.judges.judge import Judge

BATCH = 16  # pictures judged at once


def judge_run(
    judge: Judge, folder: Path, records: list[Record], target: Target, faults: list[str]
) -> list[JudgedImage]:
    """What the judge says of every picture; a picture it cannot read or judge is kept as a failure.

    All that it said goes to `folder/scores.jsonl`, a line a picture. Only one batch of pictures is in memory.
    """
    found: list[JudgedImage] = []
    for start in range(0, len(records), BATCH):
        part = [(record, read_image(folder, record)) for record in records[start : start + BATCH]]
        for record, image in part:
            if image is None:
                faults.append(f"{record.id}: the image is missing or broken")
        there = [(record, image) for record, image in part if image is not None]
        judged = {one.record.id: one for one in _batch(judge, there, target, faults)}
        found += [judged.get(record.id) or JudgedImage(record, None, None) for record, _ in part]
    lines = (json.dumps({"id": j.record.id, "verdict": j.verdict, "clip": j.clip}) for j in found)
    write_lines(folder / "scores.jsonl", lines)
    return found


def _batch(
    judge: Judge, part: list[tuple[Record, Image.Image]], target: Target, faults: list[str]
) -> list[JudgedImage]:
    """Judge pictures together; where that fails, one by one, to know which it is."""
    if not part:
        return []
    images = [image for _, image in part]
    # With the prompt of every picture, and the concept's name and its stand-in where the prompt asks for it.
    asked = [(i, text) for i, (record, _) in enumerate(part) for text in _texts(record, target)]
    try:
        said, features = verdicts(judge, images), judge.features(images)
        scores = judge.clip_scores([images[i] for i, _ in asked], [text for _, text in asked])
    except Exception as fault:
        if len(part) > 1:
            return [one for each in part for one in _batch(judge, [each], target, faults)]
        faults.append(f"{part[0][0].id}: {judge.name} failed: {type(fault).__name__}: {fault}")
        return [JudgedImage(part[0][0], None, None)]
    by_row: dict[int, list[float | None]] = {}
    for (i, _), score in zip(asked, scores, strict=True):
        by_row.setdefault(i, []).append(score)
    found = []
    for i, (record, _) in enumerate(part):
        clip, *others = by_row[i]
        told = [score for score in others if score is not None] if None not in others else []
        pair = (told[0], told[1]) if told else None
        found.append(JudgedImage(record, said[i], clip, features[i], pair, tuple(told[2:])))  # type: ignore[arg-type]
    return found


def _texts(record: Record, target: Target) -> list[str]:
    """The prompt; of the concept also its name, its stand-in, and what else the row names."""
    return [
        record.prompt,
        *((*target.name_texts(record), *target.noun_texts(record)) if target.matches(record) else ()),
    ]


def paired_accuracy(runs: dict[str, list[JudgedImage]], target: Target, head: str) -> dict[str, float]:
    """Kept prompts that one of the two rows draws right and the other does not; exact McNemar."""
    before = {
        j.record.id: j.is_correct(head)
        for j in runs["base"]
        if not target.matches(j.record) and j.record.labels.get(head)
    }
    return _apart(before, {j.record.id: j.is_correct(head) for j in runs["patched"] if j.record.id in before})


def paired_erasure(runs: dict[str, list[JudgedImage]], target: Target) -> dict[str, float]:
    """Target prompts on which only one of the two rows is without the target; exact McNemar.

    As in UA, an image that could not be judged shows it.
    """

    def without(name: str) -> dict[str, bool]:
        rows = [j for j in runs[name] if target.matches(j.record) and j.role not in TARGET_ROLES]
        return {j.record.id: not target.is_shown(j) for j in rows}

    return _apart(without("base"), without("patched"))


def _apart(before: dict[str, bool], after: dict[str, bool]) -> dict[str, float]:
    lost = sum(before[key] and not after[key] for key in after)
    won = sum(after[key] and not before[key] for key in after)
    return {"only_base": lost, "only_patched": won, "p": mcnemar(lost, won)}
