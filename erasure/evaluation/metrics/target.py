"""What an evaluation erases and keeps: the target's labels, the roles of prompts, and images with their verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from erasure.concepts.concept import Concept
from erasure.evaluation.generate import Record
from erasure.evaluation.judges.judge import Verdict
from erasure.evaluation.metrics.metric import Metric, share_metric

# Values of the label `role`. The first group asks for the target in other ways, and its rows are measured apart from
# the target's plain prompts; the second group asks for concepts close to the target.
TARGET_ROLES = ("synonym", "translation", "adversarial", "selective")
NEIGHBOUR_ROLES = ("neighbour", "pinpoint")
NOUN_PROMPT = "a photo of {}"  # text that CLIP compares with an image for each noun of selective alignment


@dataclass(frozen=True)
class JudgedImage:
    """One image of a run, with what the judge returned for it.

    Args:
        record: how the image was drawn.
        verdict: the judge's scores; None if the image is missing, broken or could not be judged.
        clip: CLIP score of the image and its prompt (100 cos), or None.
        features: feature vector [d] for distances between image sets, or None.
        name_scores: for an image of the target, the CLIP scores of the concept's name and of its anchor.
        quality: probability that the image is well formed, whatever it shows, or None if the judge does not measure it.
        noun_scores: for an image of the target, the CLIP scores of the other nouns its row lists, in order; empty if
            there are none, or if the image could not be judged.
    """

    record: Record
    verdict: Verdict | None
    clip: float | None
    features: np.ndarray | None = None
    name_scores: tuple[float, float] | None = None
    noun_scores: tuple[float, ...] = ()
    quality: float | None = None

    @property
    def role(self) -> str:
        """Return the role of the prompt, or an empty string if its row has none."""
        return self.record.labels.get("role", "")

    def is_correct(self, head: str) -> bool:
        """Return whether the judge's most probable label of this head is the one the prompt asks for."""
        return self.verdict is not None and self.top_label(head) == self.record.labels.get(head)

    def top_label(self, head: str) -> str:
        """Return the most probable label of a head, or an empty string if there are no scores for it."""
        scores = (self.verdict or {}).get(head) or {"": 0.0}
        return max(scores, key=lambda label: scores[label])


@dataclass(frozen=True)
class Target:
    """The labels that should be erased, with the judge's heads that measure the erasure.

    Args:
        domain: head of the judge that the labels belong to, such as object or style.
        labels: the labels.
        other: a second head that the prompts have labels for, or None.
        anchor: what should appear in the concept's place; empty if nothing in particular.
        anchors: label of the target -> labels of its anchor, where the judge knows the anchor.
    """

    domain: str
    labels: tuple[str, ...]
    other: str | None
    anchor: str = ""
    anchors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def matches(self, record: Record) -> bool:
        """Return whether the record's prompt asks for the target."""
        return record.labels.get(self.domain) in self.labels

    def plain_images(self, images: Iterable[JudgedImage]) -> list[JudgedImage]:
        """Return the images of prompts that ask for the target plainly, not in one of the ways of TARGET_ROLES."""
        return [image for image in images if image.role not in TARGET_ROLES and self.matches(image.record)]

    def is_kept(self, image: JudgedImage) -> bool:
        """Return whether the prompt should be unaffected: it does not ask for the target in any words."""
        return image.role not in TARGET_ROLES and not self.matches(image.record)

    def is_shown(self, image: JudgedImage) -> bool:
        """Return whether the image shows the target; an image without a verdict counts as showing it."""
        return image.verdict is None or image.top_label(self.domain) in self.labels

    def noun_texts(self, record: Record) -> list[str]:
        """Return CLIP texts for the other nouns that a target prompt lists (HUB, arXiv 2410.05664).

        Each noun appears once, and the target's own labels are left out. The list is empty for prompts that do not ask
        for the target.
        """
        listed = record.labels.get("nouns", "") if self.matches(record) else ""
        nouns = dict.fromkeys(noun.strip().casefold() for noun in listed.split(","))
        return [NOUN_PROMPT.format(noun) for noun in nouns if noun and noun not in map(str.casefold, self.labels)]

    def name_texts(self, record: Record) -> tuple[str, str]:
        """Return two CLIP texts for a target prompt: the concept's name alone, and its anchor."""
        kind = "style" if self.domain == "style" else "object"
        return Concept(record.labels[self.domain], kind=kind).prompt_pairs()[0][0], self.anchor


@dataclass(frozen=True)
class Share:
    """A share of images: the images that it is taken over, each with its outcome.

    Args:
        name: name of the metric.
        images: the images.
        marks: the outcome of each image.
        higher_is_better: whether a larger share means a better erasure.
        meaning: one phrase that explains the metric.
    """

    name: str
    images: list[JudgedImage]
    marks: list[bool]
    higher_is_better: bool
    meaning: str

    def metric(self) -> Metric | None:
        """Return the share with its interval, in which images of one prompt count as alike; None without images."""
        prompts = [image.record.prompt for image in self.images]
        return share_metric(self.name, self.marks, self.higher_is_better, self.meaning, prompts)

    def outcomes(self) -> dict[str, bool]:
        """Return id of each image -> its outcome."""
        return {image.record.id: mark for image, mark in zip(self.images, self.marks, strict=True)}
