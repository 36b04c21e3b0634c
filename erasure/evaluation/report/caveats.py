"""What to know of a report's figures, in sentences, and what each of several judges says alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from erasure.evaluation.metrics.metric import Metric, share_metric
from erasure.evaluation.metrics.target import NEIGHBOUR_ROLES, TARGET_ROLES, JudgedImage, Target

if TYPE_CHECKING:
    from erasure.evaluation.judges.judge import Judge
    from erasure.prompts.prompt_set import PromptSet

MISSED = 0.5  # UA of the base from which a sentence says so


def caveats(rows: PromptSet, chosen: PromptSet, target: Target) -> list[str]:
    """Sentences about the prompts that were drawn.

    Args:
        rows: the prompt set.
        chosen: what was drawn of it.
    """
    before, after = (sum(row.labels.get(target.domain) in target.labels for row in one.rows) for one in (rows, chosen))
    return [f"{after} target images are of {before} prompts, with several seeds each"] if after > before else []


def renamed_labels(names: list[str], target: Target) -> list[str]:
    """A sentence where what was asked for goes by other labels: a family of them, or another word for one."""
    other = [name for name in names if name not in target.labels]
    if not other:
        return []
    return [f"{', '.join(map(repr, other))} is judged as {', '.join(target.labels)}"]


def judge_misses(judge: Judge, base: Metric | None) -> list[str]:
    """A sentence where the judge misses the target in the base's own images: what was never seen cannot be erased.

    Args:
        base: UA of the base.
    """
    if base is None or base.value < MISSED:
        return []
    return [
        f"{judge.name} sees the target in only {1 - base.value:.0%} of the base's own target images, so that most of "
        "UA is there without a patch: the base does not draw it, or the judge does not know it"
    ]


def member_metrics(judge: Judge, judged: list[JudgedImage], target: Target) -> list[Metric]:
    """UA and IRA as each judge of an ensemble gives them, and how often they differ; nothing for one judge.

    What all of them say together is UA and IRA themselves. An image that could not be judged is a failure here as
    there.
    """
    members: dict[str, Any] = getattr(judge, "members", {})
    who = [name for name, one in members.items() if target.domain in one.heads]
    if len(who) < 2:
        return []
    rest = [j for j in judged if j.role not in TARGET_ROLES]
    erased = [j for j in rest if target.matches(j.record)]
    label = target.domain
    kept = [j for j in rest if target.is_kept(j) and j.record.labels.get(label) and j.role not in NEIGHBOUR_ROLES]
    found: list[Metric | None] = []
    for name in who:
        head = f"{label}@{name}"
        gone = [j.verdict is not None and j.top_label(head) not in target.labels for j in erased]
        right = [j.verdict is not None and j.top_label(head) == j.record.labels[label] for j in kept]
        found.append(share_metric(f"UA@{name}", gone, True, f"target images without the target, by {name} alone"))
        found.append(share_metric(f"IRA@{name}", right, True, f"other {label}s drawn right, by {name} alone"))
    differ = [j.verdict.get("disagreement", {}).get(label, 0) > 0 for j in rest if j.verdict is not None]
    found.append(
        share_metric("disagreement", differ, False, f"images on whose {label} a judge disagrees with the ensemble")
    )
    return [metric for metric in found if metric is not None]
