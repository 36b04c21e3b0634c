"""Several judges as one: means or votes over the heads they share, and how much they disagree.

A headline number should not rest on the judge that a method was tuned against; a second judge in the same run shows
how far the number depends on the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from erasure.errors import ErasureError, unknown
from erasure.evaluation.judges.judge import Judge, Verdict

RULES = ("mean", "any", "all")


class EnsembleJudge:
    """Judges side by side; a head that several have is decided together, any other by the judge that has it.

    mean: labels get the mean of the judges' probabilities. any, all: a label other than none is detected when any
    judge, or every judge, puts it first; verdicts are then 1 and 0. Verdicts also hold each judge's own, under
    `<head>@<judge>`, and under `disagreement` the share of judges that would have decided otherwise, by head.
    CLIP scores and features come from the first judge that has them. One judge that fails fails the image.
    """

    def __init__(self, judges: Sequence[Judge], rule: str = "mean") -> None:
        """Put judges together.

        Raises:
            ErasureError: fewer than two judges, an unknown rule, or a shared head with other labels.
        """
        if len(judges) < 2:
            raise ErasureError(f"an ensemble needs two judges or more, not {len(judges)}")
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
                self._fits(key, head, labels)
                self.heads.setdefault(head, list(labels))
        self.parts = {
            f"{parts}@{key}": above
            for key, judge in self.members.items()
            for parts, above in getattr(judge, "parts", {}).items()
        }
        self.shared = [head for head in self.heads if sum(head in judge.heads for judge in judges) > 1]
        if rule != "mean" and not self.shared:
            raise ErasureError(f"{self.name}: the judges share no head to vote on; heads: {', '.join(self.heads)}")

    def _fits(self, key: str, head: str, labels: list[str]) -> None:
        differ = sorted(set(labels) ^ set(self.heads.get(head, labels)))
        if differ:
            shown = ", ".join(differ[:8]) + (" ..." if len(differ) > 8 else "")
            raise ErasureError(f"{key} has other labels of {head!r} than the judges before it: {shown}")
        shared = head in self.heads
        if shared and self.rule != "mean" and "none" not in labels:
            raise ErasureError(f"rule {self.rule!r} asks whether something is there: {head!r} has no label none")

    def find(self, name: str) -> tuple[str, list[str]]:
        """What the first judge that knows the name says.

        Raises:
            ErasureError: none of them knows it.
        """
        faults = []
        for key, judge in self.members.items():
            try:
                return judge.find(name)
            except ErasureError as fault:
                faults.append(f"{key}: {fault}")
        raise ErasureError("; ".join(faults))

    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        """The verdicts together, each judge's own beside them, for each image."""
        said = {key: judge.judge(images) for key, judge in self.members.items()}
        return [self._together({key: verdicts[i] for key, verdicts in said.items()}) for i in range(len(images))]

    def _together(self, said: dict[str, Verdict]) -> Verdict:
        found: Verdict = {}
        differ: dict[str, float] = {}
        for head, labels in self.heads.items():
            votes = [verdict[head] for key, verdict in said.items() if head in self.members[key].heads]
            found[head] = self._decide(labels, votes)
            chosen = _top(found[head])
            if head in self.shared:
                differ[head] = sum(_top(vote) != chosen for vote in votes) / len(votes)
        for key, verdict in said.items():
            found |= {f"{head}@{key}": scores for head, scores in verdict.items()}
        return {**found, "disagreement": differ} if differ else found

    def _decide(self, labels: list[str], votes: list[dict[str, float]]) -> dict[str, float]:
        if len(votes) == 1:
            return dict(votes[0])
        means = {label: sum(vote[label] for vote in votes) / len(votes) for label in labels}
        if self.rule == "mean":
            return means
        counts = Counter(_top(vote) for vote in votes)
        seen = [label for label in counts if label != "none"]
        if self.rule == "all":
            seen = [label for label in seen if counts[label] == len(votes)]
        chosen = max(seen, key=lambda label: (counts[label], means[label]), default="none")
        return {label: float(label == chosen) for label in labels}

    def clip_scores(self, images: list[Image.Image], texts: list[str]) -> Sequence[float | None]:
        """CLIP scores of the first judge that has them."""
        for judge in self.members.values():
            found = judge.clip_scores(images, texts)
            if all(value is not None for value in found):
                return found
        return [None] * len(images)

    def features(self, images: list[Image.Image]) -> np.ndarray | list[None]:
        """Features of the first judge that has them."""
        for judge in self.members.values():
            found = judge.features(images)
            if isinstance(found, np.ndarray):
                return found
        return [None] * len(images)

    def versions(self) -> dict[str, str]:
        """The rule, and what each judge says of itself under its name."""
        found = {"rule": self.rule}
        for key, judge in self.members.items():
            found |= {f"{key}.{what}": value for what, value in judge.versions().items()}
        return found


def _top(scores: dict[str, float]) -> str:
    return max(scores, key=lambda label: scores[label])
