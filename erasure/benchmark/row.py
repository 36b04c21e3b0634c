"""One result of a benchmark: a method on a concept, with its metrics and the outcome of every image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Outcomes = Mapping[str, Mapping[str, bool]]  # name of a share -> id of an image -> whether it counts
JOINT, STACK = "+", "&"  # separators of names: erased together by one patch, or one stacked patch for each


def members(concept: str) -> list[str]:
    """Return the names of the concepts in "a", "a+b" or "a&b"."""
    return concept.split(STACK if STACK in concept else JOINT)


@dataclass(frozen=True)
class Cell:
    """One metric of one run, with the base model's value for comparison.

    Args:
        value: value with the patch.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        n: number of images.
        base: value of the base model; not a number if it was not measured.
    """

    value: float
    low: float
    high: float
    n: int
    base: float


@dataclass(frozen=True)
class Row:
    """The result of one method on one concept, or on several concepts at once.

    Args:
        method: name of the method.
        concept: name of the concept; "a+b" and "a&b" as `members` reads them.
        kind: kind of the concept, such as object or style.
        tuned: whether settings were tuned on the concept; such rows are left out of the means.
        cells: name of a metric -> its values.
        costs: samples forward (F) and backward (B) through the UNet, and seconds.
        bytes: size of all patch files.
        outcomes: name of a share -> id of an image -> whether it counts; empty if only the cells are known.
        base: the same for the base model.
    """

    method: str
    concept: str
    kind: str
    tuned: bool
    cells: dict[str, Cell]
    costs: dict[str, float]
    bytes: int
    outcomes: Outcomes = field(default_factory=dict)
    base: Outcomes = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """Build a row from the plain data that `dataclasses.asdict` returns for it."""
        return cls(**{**data, "cells": {name: Cell(**cell) for name, cell in data["cells"].items()}})

    def cell(self, name: str) -> Cell | None:
        """Return a metric of this row, or None if it was not measured.

        The name `kept` stands for the mean of IRA and CRA, or for the one of them that was measured. The two share
        some of their images, so its interval is the mean of their intervals, which assumes full correlation.
        """
        if name != "kept":
            return self.cells.get(name)
        parts = [self.cells[part] for part in ("IRA", "CRA") if part in self.cells]
        if not parts:
            return None
        mean = {key: sum(getattr(cell, key) for cell in parts) / len(parts) for key in ("value", "low", "high", "base")}
        return Cell(**mean, n=min(cell.n for cell in parts))

    @property
    def group(self) -> str:
        """Return the title of the group that this row is averaged with, such as "objects" or "2 stacked"."""
        if len(names := members(self.concept)) > 1:
            return f"{len(names)} {'stacked' if STACK in self.concept else 'together'}"
        return {"identity": "identities"}.get(self.kind, f"{self.kind}s")
