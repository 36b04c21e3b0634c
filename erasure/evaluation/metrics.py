"""What was erased and what was kept: UA, IRA, CRA and CLIP score, each with n and a 95 % interval.

UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846): for a concept e of domain D and the other domain D',
UA = 1 - accuracy in D over images prompted with e; IRA = mean accuracy in D over images prompted with other
concepts of D; CRA = mean accuracy in D' over images NOT prompted with e. CRA over the images prompted with e
is given apart, as CRA_target.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from erasure.evaluation.generate import Record
from erasure.evaluation.intervals import bootstrap_mean, wilson
from erasure.evaluation.judges import Verdict


@dataclass(frozen=True)
class Metric:
    """A figure over n images with its interval; shares in [0, 1], CLIP scores in their own unit."""

    name: str
    value: float
    n: int
    low: float
    high: float
    higher_is_better: bool
    meaning: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Judged:
    """One image and what the judge said; `verdict` None is an image that is missing, broken or not judged."""

    record: Record
    verdict: Verdict | None
    clip: float | None

    def right(self, head: str) -> bool:
        """Whether the judge sees the label of the prompt."""
        return self.verdict is not None and self.top(head) == self.record.labels.get(head)

    def top(self, head: str) -> str:
        """The most probable label."""
        scores = (self.verdict or {}).get(head) or {"": 0.0}
        return max(scores, key=lambda label: scores[label])


@dataclass(frozen=True)
class Target:
    """The labels to be erased, in their domain, and the other domain (None: the prompts name no other)."""

    domain: str
    labels: tuple[str, ...]
    other: str | None

    def hits(self, record: Record) -> bool:
        """Whether the record's prompt names the concept."""
        return record.labels.get(self.domain) in self.labels


def share(name: str, marks: Iterable[bool], better: bool, meaning: str) -> Metric | None:
    """A share with its Wilson interval; None where there is nothing to measure."""
    values = list(marks)
    if not values:
        return None
    low, high = wilson(sum(values), len(values))
    return Metric(name, sum(values) / len(values), len(values), low, high, better, meaning)


def mean(name: str, values: list[float], better: bool, meaning: str) -> Metric | None:
    """A mean with its bootstrap interval."""
    if not values:
        return None
    low, high = bootstrap_mean(values)
    return Metric(name, sum(values) / len(values), len(values), low, high, better, meaning)


def measure(judged: list[Judged], target: Target) -> list[Metric]:
    """UA, IRA, CRA, CRA_target and CLIP scores of one run.

    An image that is missing or could not be judged is a failure: it counts as not erased in UA and as not kept
    in IRA and CRA.
    """
    erased = [j for j in judged if target.hits(j.record)]
    kept = [j for j in judged if not target.hits(j.record)]
    domain, other = target.domain, target.other
    gone = [j.verdict is not None and j.top(domain) not in target.labels for j in erased]
    rivals = [j.right(domain) for j in kept if j.record.labels.get(domain)]
    found = [
        share("UA", gone, True, "target prompts on which the target is not seen"),
        share("IRA", rivals, True, f"prompts of other {domain}s drawn right"),
    ]
    if other is not None:
        found += [
            share(
                "CRA",
                [j.right(other) for j in kept if j.record.labels.get(other)],
                True,
                f"kept prompts: {other} right",
            ),
            share(
                "CRA_target",
                [j.right(other) for j in erased if j.record.labels.get(other)],
                True,
                f"target prompts: {other} right",
            ),
        ]
    clips = {which: [j.clip for j in rows if j.clip is not None] for which, rows in (("t", erased), ("k", kept))}
    found += [
        mean("CLIP_target", clips["t"], False, "100 cos of target images and their prompts"),
        mean("CLIP_kept", clips["k"], True, "100 cos of kept images and their prompts"),
    ]
    return [metric for metric in found if metric is not None]


def accuracies(judged: list[Judged], head: str) -> dict[str, tuple[int, int]]:
    """Label -> (right, n), in the order of the prompts."""
    found: dict[str, tuple[int, int]] = {}
    for j in judged:
        label = j.record.labels.get(head)
        if label:
            right, n = found.get(label, (0, 0))
            found[label] = (right + j.right(head), n + 1)
    return found
