"""Attacks: what they search, how an erased model is attacked with them, and the report. One file a family."""

from erasure.evaluation.attacks.attack import Attack, Attempt, Case, Victim, find, make, names

__all__ = ["Attack", "Attempt", "Case", "Victim", "find", "make", "names"]
