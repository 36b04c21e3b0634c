"""The one error that users meet: it says what was given, what is allowed, and what was left untouched."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ErasureError(ValueError):
    """Bad input, or a run that cannot go on. The command prints it without a traceback and exits with code 2."""


def unknown(noun: str, given: object, allowed: Iterable[str]) -> ErasureError:
    """Return an error for a value that is not among the allowed ones, which are listed with the nearest first.

    >>> print(unknown("method", "esdd", ["spm", "esd"]))
    unknown method 'esdd': did you mean 'esd'? Allowed: esd, spm
    """
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(repr(name) for name in near)}?" if near else "."
    rest = [name for name in names if name not in near]
    return ErasureError(f"unknown {noun} {given!r}{hint} Allowed: {', '.join(near + rest) or 'none'}")
