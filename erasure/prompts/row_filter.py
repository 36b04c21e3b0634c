"""Conditions on the rows of a prompt set, as text: `nudity_percentage>50`, `categories=sexual`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from erasure.errors import ErasureError

ORDERS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
FORM = re.compile(r"\s*(?P<column>[^=<>!]+?)\s*(?P<sign>>=|<=|!=|=|>|<)\s*(?P<value>.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """A column, one of = != < <= > >=, and a value.

    `=` holds where the cell is the value, equals it as a number, or is a list with commas that has it among its
    members; case does not matter. `!=` is its opposite, so that a row without the column passes. The orders
    compare numbers; a row without the column does not pass.
    """

    column: str
    sign: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """From text.

        Raises:
            ErasureError: another form, or an order against something that is no number.
        """
        match = FORM.fullmatch(text)
        if not match or not match["value"] or match["value"][0] in "=<>":
            raise ErasureError(
                f"condition {text!r}: a column, one of = != < <= > >= and a value are needed, "
                "such as nudity_percentage>50 or categories=sexual"
            )
        found = cls(**match.groupdict())
        if found.sign in ORDERS and _number(found.value) is None:
            raise ErasureError(f"condition {text!r}: {found.value!r} is no number")
        return found

    def __str__(self) -> str:
        return f"{self.column}{self.sign}{self.value}"

    def holds(self, cell: str) -> bool:
        """Whether a cell meets it; empty is a row without the column.

        Raises:
            ErasureError: an order, and the cell is no number.
        """
        if self.sign in ORDERS:
            if not cell.strip():
                return False
            wanted, number = _number(self.value), _number(cell)
            if number is None or wanted is None:
                raise ErasureError(f"{cell!r} is no number, which {self} needs")
            return ORDERS[self.sign](number, wanted)
        same = any(_same(one, self.value) for one in (cell, *cell.split(",")))
        return same == (self.sign == "=")


def _same(cell: str, value: str) -> bool:
    if cell.strip().casefold() == value.casefold():
        return True
    number = _number(cell)
    return number is not None and number == _number(value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
