"""Notes that a reader needs to interpret a report, and the metrics of each judge of an ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from erasure.evaluation.metrics.metric import Metric, share_metric
from erasure.evaluation.metrics.target import NEIGHBOUR_ROLES, TARGET_ROLES, JudgedImage, Target

if TYPE_CHECKING:
    from erasure.evaluation.judges.judge import Judge
    from erasure.prompts.prompt_set import PromptSet

MAX_BASE_UA = 0.5  # UA of the base from which a note says that the judge misses the target


def caveats(chosen: PromptSet, target: Target) -> list[str]:
    """Return notes about the prompts that were drawn.

    Args:
        chosen: the rows that were drawn, which may repeat prompts with other seeds.
        target: what should be erased.
    """
    texts = [row.prompt for row in chosen.rows if row.labels.get(target.domain) in target.labels]
    distinct = len(set(texts))
    if distinct == len(texts):
        return []
    prompts = "1 prompt" if distinct == 1 else f"{distinct} prompts"
    return [
        f"the {len(texts)} target images come from {prompts}, repeated with other seeds; images of one prompt count as "
        "alike in the intervals"
    ]


def renamed_labels(names: list[str], target: Target) -> list[str]:
    """Return a note if the judge uses other labels than the user's names, such as the members of a family.

    Args:
        names: names of the concept as the user wrote them.
        target: what should be erased.
    """
    renamed = [name for name in names if name not in target.labels]
    if not renamed:
        return []
    return [f"{', '.join(map(repr, renamed))} is judged by the labels {', '.join(target.labels)}"]


def judge_misses(judge: Judge, base: Metric | None) -> list[str]:
    """Return a note if the judge misses the target in the base's own images, where it should be visible.

    Args:
        judge: the judge.
        base: UA of the base, or None if it was not measured.
    """
    if base is None or base.value < MAX_BASE_UA:
        return []
    return [
        f"{judge.name} recognises the target in only {1 - base.value:.0%} of the base's target images, so that most of "
        "UA does not come from the patch: either the base cannot draw the target, or the judge does not know it"
    ]


def member_metrics(judge: Judge, images: list[JudgedImage], target: Target) -> list[Metric]:
    """Return UA and IRA by each judge of an ensemble alone, and how often a judge disagrees with the ensemble.

    The ensemble's joint decision gives UA and IRA themselves. An image that could not be judged counts as a failure
    here as well.

    Args:
        judge: the judge; the list is empty unless it is an ensemble with several judges for the target's head.
        images: the images of one run.
        target: what should be erased.
    """
    members: dict[str, Any] = getattr(judge, "members", {})
    names = [name for name, member in members.items() if target.domain in member.heads]
    if len(names) < 2:
        return []
    plain = [image for image in images if image.role not in TARGET_ROLES]
    erased = [image for image in plain if target.matches(image.record)]
    domain = target.domain
    kept = [
        image
        for image in plain
        if target.is_kept(image) and image.record.labels.get(domain) and image.role not in NEIGHBOUR_ROLES
    ]
    metrics: list[Metric | None] = []
    for name in names:
        head = f"{domain}@{name}"
        absent = [image.verdict is not None and image.top_label(head) not in target.labels for image in erased]
        correct = [image.verdict is not None and image.top_label(head) == image.record.labels[domain] for image in kept]
        metrics.append(share_metric(f"UA@{name}", absent, True, f"target images without the target, by {name} alone"))
        metrics.append(
            share_metric(f"IRA@{name}", correct, True, f"images of other {domain}s recognised as such, by {name} alone")
        )
    differ = [image.verdict.get("disagreement", {}).get(domain, 0) > 0 for image in plain if image.verdict is not None]
    metrics.append(
        share_metric("disagreement", differ, False, f"images on whose {domain} a judge disagrees with the ensemble")
    )
    return [metric for metric in metrics if metric is not None]
