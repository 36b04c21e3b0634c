"""Evaluation: a pipeline measured over prompt sets by judges, the base beside it."""

from erasure.evaluation.run import evaluate

__all__ = ["evaluate"]
