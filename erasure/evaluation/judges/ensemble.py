"""Several judges combined into one: means or votes over the heads they share, with the rate of disagreement.

A headline number should not depend on the judge that a method was tuned against. A second judge in the same run shows
how much the number depends on the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from erasure.errors import ErasureError, unknown
from erasure.evaluation.judges.judge import Judge, Verdict, qualities

RULES = ("mean", "any", "all")


class EnsembleJudge:
    """A judge that combines several others: shared heads are decided jointly, other heads by their only judge.

    With the rule `mean`, each label gets the mean of the judges' probabilities. With `any` or `all`, a label other than
    none is detected if any judge, or every judge, ranks it first; the scores are then 1 and 0.

    Verdicts also contain each judge's own scores, under `<head>@<judge>`, and under `disagreement` the share of judges
    that would have decided differently, by head. CLIP scores and features come from the first judge that has them. If
    one judge fails on an image, the ensemble fails on it.
    """

    def __init__(self, judges: Sequence[Judge], rule: str = "mean") -> None:
        """Combine judges.

        Args:
            judges: at least two judges; heads of the same name must have the same labels.
            rule: one of RULES.

        Raises:
            ErasureError: there are fewer than two judges, the rule is unknown, judges have different labels for the
                same head, or there is no shared head to vote on.
        """
        if len(judges) < 2:
            raise ErasureError(f"an ensemble needs at least two judges, not {len(judges)}")
        if rule not in RULES:
            raise unknown("rule of an ensemble", rule, RULES)
        self.rule = rule
        self.members: dict[str, Judge] = {}
        for judge in judges:
            same = sum(key.partition("#")[0] == judge.name for key in self.members)
            self.members[f"{judge.name}#{same + 1}" if same else judge.name] = judge
        self.name = f"{rule}({'+'.join(self.members)})"
        self.heads: dict[str, list[str]] = {}
        for key, judge in self.members.items():
            for head, labels in judge.heads.items():
                self._check_head(key, head, labels)
                self.heads.setdefault(head, list(labels))
        self.parts = {
            f"{parts}@{key}": threshold
            for key, judge in self.members.items()
            for parts, threshold in getattr(judge, "parts", {}).items()
        }
        self.shared = [head for head in self.heads if sum(head in judge.heads for judge in judges) > 1]
        if rule != "mean" and not self.shared:
            raise ErasureError(f"{self.name}: the judges share no head to vote on; heads: {', '.join(self.heads)}")

    def _check_head(self, key: str, head: str, labels: list[str]) -> None:
        different = sorted(set(labels) ^ set(self.heads.get(head, labels)))
        if different:
            shown = ", ".join(different[:8]) + (" ..." if len(different) > 8 else "")
            raise ErasureError(f"{key} differs from the judges before it in the labels of {head!r}: {shown}")
        shared = head in self.heads
        if shared and self.rule != "mean" and "none" not in labels:
            raise ErasureError(f"rule {self.rule!r} needs a label `none` in the shared head {head!r}, which has none")

    def find(self, name: str) -> tuple[str, list[str]]:
        """Return the head and the labels that a name stands for, from the first judge that knows it.

        Raises:
            ErasureError: no judge knows the name.
        """
        faults = []
        for key, judge in self.members.items():
            try:
                return judge.find(name)
            except ErasureError as fault:
                faults.append(f"{key}: {fault}")
        raise ErasureError("; ".join(faults))

    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """Return, for each image, the joint scores and each judge's own."""
        by_member = {key: judge.judge(images) for key, judge in self.members.items()}
        return [self._combine({key: verdicts[i] for key, verdicts in by_member.items()}) for i in range(len(images))]

    def _combine(self, verdicts: dict[str, Verdict]) -> Verdict:
        """Combine the verdicts of all judges on one image."""
        joint: Verdict = {}
        disagreement: dict[str, float] = {}
        for head, labels in self.heads.items():
            votes = [verdict[head] for key, verdict in verdicts.items() if head in self.members[key].heads]
            joint[head] = self._decide(labels, votes)
            winner = _top_label(joint[head])
            if head in self.shared:
                disagreement[head] = sum(_top_label(vote) != winner for vote in votes) / len(votes)
        for key, verdict in verdicts.items():
            joint |= {f"{head}@{key}": scores for head, scores in verdict.items()}
        return {**joint, "disagreement": disagreement} if disagreement else joint

    def _decide(self, labels: list[str], votes: list[dict[str, float]]) -> dict[str, float]:
        if len(votes) == 1:
            return dict(votes[0])
        means = {label: sum(vote[label] for vote in votes) / len(votes) for label in labels}
        if self.rule == "mean":
            return means
        counts = Counter(_top_label(vote) for vote in votes)
        detected = [label for label in counts if label != "none"]
        if self.rule == "all":
            detected = [label for label in detected if counts[label] == len(votes)]
        winner = max(detected, key=lambda label: (counts[label], means[label]), default="none")
        return {label: float(label == winner) for label in labels}

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> Sequence[float | None]:
        """Return the CLIP scores of the first judge that has them, or None for each image.

        Args:
            images: n images.
            texts: n texts.
        """
        for judge in self.members.values():
            scores = judge.clip_scores(images, texts)
            if all(score is not None for score in scores):
                return scores
        return [None] * len(images)

    def features(self, images: list[Image.Image]) -> np.ndarray | list[None]:
        """Return the features [n, d] of the first judge that has them, or None for each image."""
        for judge in self.members.values():
            features = judge.features(images)
            if isinstance(features, np.ndarray):
                return features
        return [None] * len(images)

    def quality(self, images: list[Image.Image]) -> Sequence[float | None]:
        """Return the image quality by the first judge that measures it, or None for each image."""
        for judge in self.members.values():
            values = qualities(judge, images)
            if all(value is not None for value in values):
                return values
        return [None] * len(images)

    def versions(self) -> dict[str, str]:
        """Return the rule, and the versions of each judge under its name."""
        versions = {"rule": self.rule}
        for key, judge in self.members.items():
            versions |= {f"{key}.{name}": value for name, value in judge.versions().items()}
        return versions


def _top_label(scores: dict[str, float]) -> str:
    return max(scores, key=lambda label: scores[label])
