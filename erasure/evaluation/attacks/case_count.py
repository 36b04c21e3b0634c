"""The smallest number of cases that an attack is reported for."""

from __future__ import annotations

from erasure.errors import ErasureError

LEAST = 2  # the smallest number of cases that an attack success rate is reported for


def check_case_count(cases: int) -> None:
    """Reject a number of cases that is too small to report an attack success rate.

    Raises:
        ErasureError: `cases` is below 2.
    """
    if cases < LEAST:
        raise ErasureError(f"cases={cases}: an attack needs at least {LEAST} cases; nothing was attacked")
