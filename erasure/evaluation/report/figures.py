"""How one metric is written in a report: its value, its interval, and the direction that is better."""

from __future__ import annotations

from PIL import Image

from erasure.evaluation.generate import Record
from erasure.evaluation.metrics.metric import Metric, format_value

ARROWS = {True: "↑", False: "↓"}  # whether a higher value is better
# A record, whether its prompt asks for the target, and its images by the base and by the patched pipeline.
ImagePair = tuple[Record, bool, Image.Image | None, Image.Image | None]


def value_text(metric: Metric, value: float) -> str:
    """Return a value of a metric as text: a share in percent with one decimal, a score in its own unit.

    Args:
        metric: the metric, whose name decides the format.
        value: the value, which may be an end of the interval.
    """
    return format_value(metric.name, value, percent_decimals=1)


def interval_text(metric: Metric) -> str:
    """Return a metric's interval as text, such as `64.0% to 97.0%`; a single value has no interval."""
    if metric.n < 2 and metric.low == metric.high:
        return "one value"
    return f"{value_text(metric, metric.low)} to {value_text(metric, metric.high)}"
