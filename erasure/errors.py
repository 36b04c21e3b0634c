"""The error class that users see, and the error for a value that is not among its choices.

A message says what was given, what is allowed and what was left untouched.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ErasureError(ValueError):
    """An error that the user can act on: invalid input, or a run that cannot continue.

    The command prints the message without a traceback and exits with code 2.
    """


def unknown(noun: str, given: object, allowed: Iterable[str]) -> ErasureError:
    """Return an error for a value that is not among its choices; similar choices are listed first.

    Args:
        noun: what the value should be, such as `method`.
        given: the value, as the user wrote it.
        allowed: every allowed value.

    >>> print(unknown("method", "esdd", ["spm", "esd"]))
    unknown method 'esdd': did you mean 'esd'? Allowed: esd, spm
    """
    names = [str(name) for name in allowed]
    similar = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(repr(name) for name in similar)}?" if similar else "."
    others = [name for name in names if name not in similar]
    return ErasureError(f"unknown {noun} {given!r}{hint} Allowed: {', '.join(similar + others) or 'none'}")
