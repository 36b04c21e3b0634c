"""How one figure is written in a report: its value, its interval, the direction that is better."""

from __future__ import annotations

from PIL import Image

from erasure.evaluation.generate import Record
from erasure.evaluation.metrics import metrics
from erasure.evaluation.metrics.metrics import Metric

ARROWS = {True: "↑", False: "↓"}
Shown = tuple[Record, bool, Image.Image | None, Image.Image | None]


def figure(metric: Metric, value: float) -> str:
    """Shares as percentages, scores as they are."""
    return metrics.figure(metric.name, value, percent=1)


def bounds(metric: Metric) -> str:
    """The interval in words; one value has none, whatever a bootstrap of it gives."""
    if metric.n < 2 and metric.low == metric.high:
        return "one value"
    return f"{figure(metric, metric.low)} to {figure(metric, metric.high)}"
