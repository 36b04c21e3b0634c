"""Evaluation: draw prompt sets with a pipeline and with its base, judge the images, and report metrics."""

from erasure.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
