"""Judges: images to labels and scores. One file a judge; `find_judge` makes one from a text."""

from erasure.evaluation.judges.judge import Judge, LabelsOnly, Verdict, verdicts
from erasure.evaluation.judges.registry import check_judge, find_judge, kinds

__all__ = ["Judge", "LabelsOnly", "Verdict", "check_judge", "find_judge", "kinds", "verdicts"]
