"""Judge the images of a run, and compare two runs image by image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from erasure.evaluation.generate import Record, read_image
from erasure.evaluation.judges.judge import qualities, verdicts
from erasure.evaluation.metrics.quality import is_well_formed
from erasure.evaluation.metrics.statistics import mcnemar
from erasure.evaluation.metrics.target import TARGET_ROLES, JudgedImage, Target
from erasure.evaluation.text_files import write_lines

if TYPE_CHECKING:
    from PIL import Image

    from erasure.evaluation.judges.judge import Judge

BATCH = 16  # images per batch


def judge_run(
    judge: Judge, folder: Path, records: list[Record], target: Target, faults: list[str]
) -> list[JudgedImage]:
    """Judge every image of a run; an image that cannot be read or judged is returned without a verdict.

    All scores are written to `folder/scores.jsonl`, one line for each image. Only one batch of images is in memory.

    Args:
        judge: the judge.
        folder: the folder of the run.
        records: the records of the run.
        target: what should be erased.
        faults: list to which a message is appended for every image that could not be judged.

    Returns:
        One judged image for each record, in order.
    """
    run: list[JudgedImage] = []
    for start in range(0, len(records), BATCH):
        batch = [(record, read_image(folder, record)) for record in records[start : start + BATCH]]
        for record, image in batch:
            if image is None:
                faults.append(f"{record.id}: the image is missing or broken")
        readable = [(record, image) for record, image in batch if image is not None]
        judged = {image.record.id: image for image in _judge_batch(judge, readable, target, faults)}
        run += [judged.get(record.id) or JudgedImage(record, None, None) for record, _ in batch]
    lines = (
        json.dumps({"id": image.record.id, "verdict": image.verdict, "clip": image.clip, "quality": image.quality})
        for image in run
    )
    write_lines(folder / "scores.jsonl", lines)
    return run


def _judge_batch(
    judge: Judge, batch: list[tuple[Record, Image.Image]], target: Target, faults: list[str]
) -> list[JudgedImage]:
    """Judge images together; if that fails, judge them one by one to find the one that causes the failure."""
    if not batch:
        return []
    images = [image for _, image in batch]
    texts = [(i, text) for i, (record, _) in enumerate(batch) for text in _texts(record, target)]
    try:
        judged, features, quality = verdicts(judge, images), judge.features(images), qualities(judge, images)
        scores = judge.clip_scores([images[i] for i, _ in texts], [text for _, text in texts])
    except Exception as fault:
        if len(batch) > 1:
            return [image for single in batch for image in _judge_batch(judge, [single], target, faults)]
        faults.append(f"{batch[0][0].id}: {judge.name} failed: {type(fault).__name__}: {fault}")
        return [JudgedImage(batch[0][0], None, None)]
    by_image: dict[int, list[float | None]] = {}
    for (i, _), score in zip(texts, scores, strict=True):
        by_image.setdefault(i, []).append(score)
    result = []
    for i, (record, _) in enumerate(batch):
        clip, *others = by_image[i]
        known = [score for score in others if score is not None] if None not in others else []
        names = (known[0], known[1]) if known else None
        nouns = tuple(known[2:])
        result.append(JudgedImage(record, judged[i], clip, features[i], names, nouns, quality[i]))  # type: ignore[arg-type]
    return result


def _texts(record: Record, target: Target) -> list[str]:
    """Return the texts to score an image against: its prompt and, for target prompts, name, anchor and other nouns."""
    if not target.matches(record):
        return [record.prompt]
    return [record.prompt, *target.name_texts(record), *target.noun_texts(record)]


def paired_accuracy(runs: dict[str, list[JudgedImage]], target: Target, head: str) -> dict[str, float]:
    """Count the kept prompts that only one of the two runs draws correctly, with the p-value of McNemar's exact test.

    Args:
        runs: "base" and "patched" -> judged images of the same prompts.
        target: what should be erased.
        head: the head of the judge that decides what is correct.

    Returns:
        `only_base`, `only_patched` and `p`.
    """
    before = {
        image.record.id: image.is_correct(head)
        for image in runs["base"]
        if not target.matches(image.record) and image.record.labels.get(head)
    }
    after = {image.record.id: image.is_correct(head) for image in runs["patched"] if image.record.id in before}
    return _compare(before, after)


def paired_erasure(runs: dict[str, list[JudgedImage]], target: Target) -> dict[str, float]:
    """Count the target prompts for which only one of the two runs is free of the target, with McNemar's exact test.

    As in UA, an image that could not be judged counts as showing the target.

    Args:
        runs: "base" and "patched" -> judged images of the same prompts.
        target: what should be erased.

    Returns:
        `only_base`, `only_patched` and `p`.
    """

    def erased(name: str) -> dict[str, bool]:
        images = [image for image in runs[name] if target.matches(image.record) and image.role not in TARGET_ROLES]
        return {image.record.id: not target.is_shown(image) for image in images}

    return _compare(erased("base"), erased("patched"))


def paired_quality(runs: dict[str, list[JudgedImage]], target: Target) -> dict[str, dict[str, float]]:
    """Count the prompts for which only one of the two runs is well formed, with McNemar's exact test.

    Args:
        runs: "base" and "patched" -> judged images of the same prompts.
        target: what should be erased.

    Returns:
        "quality" (target prompts) and "quality_kept" (kept prompts) -> `only_base`, `only_patched` and `p`; empty if
        the judge does not measure quality.
    """
    if all(image.quality is None for images in runs.values() for image in images):
        return {}

    def good(name: str, kept: bool) -> dict[str, bool]:
        part = [image for image in runs[name] if target.is_kept(image) == kept and image.role not in TARGET_ROLES]
        return {image.record.id: is_well_formed(image) for image in part}

    return {
        name: _compare(good("base", kept), good("patched", kept))
        for name, kept in (("quality", False), ("quality_kept", True))
    }


def paired_labels(runs: dict[str, list[JudgedImage]], head: str) -> dict[str, dict[str, float]]:
    """Count for each label the prompts that only one of the two runs draws correctly, with McNemar's exact test.

    Args:
        runs: "base" and "patched" -> judged images of the same prompts.
        head: the head of the judge that decides what is correct.

    Returns:
        Label -> `only_base`, `only_patched` and `p`, for every label that a prompt asks for.
    """
    after = {image.record.id: image.is_correct(head) for image in runs["patched"]}
    by_label: dict[str, dict[str, bool]] = {}
    for image in runs["base"]:
        label = image.record.labels.get(head)
        if label and image.record.id in after:
            by_label.setdefault(label, {})[image.record.id] = image.is_correct(head)
    return {label: _compare(before, {key: after[key] for key in before}) for label, before in by_label.items()}


def _compare(before: dict[str, bool], after: dict[str, bool]) -> dict[str, float]:
    only_base = sum(before[key] and not after[key] for key in after)
    only_patched = sum(after[key] and not before[key] for key in after)
    return {"only_base": only_base, "only_patched": only_patched, "p": mcnemar(only_base, only_patched)}
