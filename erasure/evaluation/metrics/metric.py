"""One measured value with its sample size and 95 % interval, and how such values are written as text."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from erasure.evaluation.metrics.statistics import bootstrap_mean, effective_size, wilson

# Decimals of scores, by the beginning of the metric's name. Every other metric is a share and is written in percent.
DECIMALS = {"CLIP": 1, "KID": 1, "FD": 1, "FID": 1, "LPIPS": 3, "SCORE": 2, "CS": 2, "margin": 4}


@dataclass(frozen=True)
class Metric:
    """A value measured over n images, with a 95 % interval.

    Args:
        name: short name of the metric, such as UA.
        value: a share in [0, 1], or a score in its own unit (CLIP score, KID, FD, LPIPS).
        n: number of images, or of other units if `meaning` says so.
        low: lower end of the interval.
        high: upper end of the interval.
        higher_is_better: whether a larger value means a better erasure.
        meaning: one phrase that explains the metric to readers of a report.
        effective_n: number of independent images that say as much (`statistics.effective_size`); None: n.
    """

    name: str
    value: float
    n: int
    low: float
    high: float
    higher_is_better: bool
    meaning: str
    effective_n: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data, without the effective number of images if it is n."""
        return {key: value for key, value in asdict(self).items() if key != "effective_n" or value is not None}


def share_metric(
    name: str,
    marks: Iterable[bool],
    higher_is_better: bool,
    meaning: str,
    groups: Sequence[Hashable] | None = None,
) -> Metric | None:
    """Return the share of true marks with its Wilson interval, or None if there are no marks.

    Args:
        name: name of the metric.
        marks: one mark for each image.
        higher_is_better: whether a larger share means a better erasure.
        meaning: one phrase that explains the metric.
        groups: the group of each mark, such as its prompt; the interval is that of the effective number of images
            (Korn and Graubard 1998). None: every image is independent.
    """
    values = list(marks)
    if not values:
        return None
    share, size = sum(values) / len(values), float(len(values))
    if groups is not None:
        size = effective_size(values, groups)
    low, high = wilson(share * size, size)
    effective = None if size == len(values) else size
    return Metric(name, share, len(values), low, high, higher_is_better, meaning, effective)


def mean_metric(
    name: str, values: list[float], higher_is_better: bool, meaning: str, groups: Sequence[Hashable] | None = None
) -> Metric | None:
    """Return the mean of the values with its bootstrap interval, or None if there are no values.

    Args:
        name: name of the metric.
        values: one value for each image.
        higher_is_better: whether a larger mean means a better erasure.
        meaning: one phrase that explains the metric.
        groups: the group of each value, such as its prompt; see `bootstrap_mean`.
    """
    if not values:
        return None
    low, high = bootstrap_mean(values, groups=groups)
    return Metric(name, sum(values) / len(values), len(values), low, high, higher_is_better, meaning)


def format_value(name: str, value: float, percent_decimals: int = 0) -> str:
    """Return a metric's value as text: a share in percent, a score with the decimals that suit it.

    Args:
        name: name of the metric, which decides between share and score.
        value: the value.
        percent_decimals: decimals of a percentage.
    """
    decimals = next((count for start, count in DECIMALS.items() if name.startswith(start)), None)
    return f"{value:.{percent_decimals}%}" if decimals is None else f"{value:.{decimals}f}"


def format_interval(name: str, low: float, high: float, separator: str = ", ") -> str:
    """Return both ends of an interval as text, without the percent sign.

    Args:
        name: name of the metric, which decides between share and score.
        low: lower end.
        high: upper end.
        separator: text between the two ends.
    """
    return separator.join(format_value(name, end).removesuffix("%") for end in (low, high))


def format_estimate(name: str, value: float, low: float, high: float) -> str:
    """Return a value and its interval as text, such as `88% [64, 97]`.

    Args:
        name: name of the metric, which decides between share and score.
        value: the value.
        low: lower end of the interval.
        high: upper end of the interval.
    """
    return f"{format_value(name, value)} [{format_interval(name, low, high)}]"
