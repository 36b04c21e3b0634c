"""How one figure is written in a report: its value, its interval, the direction that is better."""

from __future__ import annotations

from PIL import Image

from erasure.evaluation.generate import Record
from erasure.evaluation.metrics.metric import Metric, format_value

ARROWS = {True: "↑", False: "↓"}
ImagePair = tuple[Record, bool, Image.Image | None, Image.Image | None]


def value_text(metric: Metric, value: float) -> str:
    """Shares as percentages, scores as they are."""
    return format_value(metric.name, value, percent_decimals=1)


def interval_text(metric: Metric) -> str:
    """The interval in words; one value has none, whatever a bootstrap of it gives."""
    if metric.n < 2 and metric.low == metric.high:
        return "one value"
    return f"{value_text(metric, metric.low)} to {value_text(metric, metric.high)}"
