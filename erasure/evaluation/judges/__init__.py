"""Judges, which look at images and score labels; one file for each judge. `find_judge` builds one from a text."""

from erasure.evaluation.judges.judge import Judge, LabelsOnly, Verdict, qualities, verdicts
from erasure.evaluation.judges.registry import check_judge, find_judge, kinds

__all__ = ["Judge", "LabelsOnly", "Verdict", "check_judge", "find_judge", "kinds", "qualities", "verdicts"]
