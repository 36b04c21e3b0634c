"""Evaluation: a pipeline measured over prompt sets by judges, the base beside it."""

from erasure.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
