"""Conditions that select rows of a prompt set, written as text: `nudity_percentage>50`, `categories=sexual`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from erasure.errors import ErasureError

ORDERINGS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
PATTERN = re.compile(r"\s*(?P<column>[^=<>!]+?)\s*(?P<sign>>=|<=|!=|=|>|<)\s*(?P<value>.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """A condition on one column: the column's name, one of = != < <= > >=, and a value.

    `=` is true if the cell is the value, equals it as a number, or is a comma-separated list that contains it; case
    does not matter. `!=` is the opposite, so a row without the column passes. The orderings compare numbers, and a row
    without the column does not pass.
    """

    column: str
    sign: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse a condition from text, such as `nudity_percentage>50`.

        Raises:
            ErasureError: the text has another form, or an ordering compares with something that is not a number.
        """
        match = PATTERN.fullmatch(text)
        if not match or not match["value"] or match["value"][0] in "=<>":
            raise ErasureError(
                f"condition {text!r}: expected a column, one of = != < <= > >=, and a value, "
                "such as nudity_percentage>50 or categories=sexual"
            )
        condition = cls(**match.groupdict())
        if condition.sign in ORDERINGS and _number(condition.value) is None:
            raise ErasureError(f"condition {text!r}: {condition.value!r} is not a number")
        return condition

    def __str__(self) -> str:
        return f"{self.column}{self.sign}{self.value}"

    def holds(self, cell: str) -> bool:
        """Return whether a cell meets the condition; an empty cell stands for a row without the column.

        Raises:
            ErasureError: the condition is an ordering, and the cell is not a number.
        """
        if self.sign in ORDERINGS:
            if not cell.strip():
                return False
            limit, number = _number(self.value), _number(cell)
            if number is None or limit is None:
                raise ErasureError(f"{cell!r} is not a number, as {self} requires")
            return ORDERINGS[self.sign](number, limit)
        equal = any(_equal(member, self.value) for member in (cell, *cell.split(",")))
        return equal == (self.sign == "=")


def _equal(cell: str, value: str) -> bool:
    if cell.strip().casefold() == value.casefold():
        return True
    number = _number(cell)
    return number is not None and number == _number(value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
