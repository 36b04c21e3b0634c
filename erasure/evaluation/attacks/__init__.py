"""Attacks that try to recover an erased concept: the abstract class, one file per family, the runner and the report."""

from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim, find, make, names

__all__ = ["Attack", "Attempt", "Case", "Victim", "find", "make", "names"]
