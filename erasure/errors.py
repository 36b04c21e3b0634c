"""The one error users meet: what was given, what is allowed, what was left untouched."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ErasureError(ValueError):
    """Bad input or a run that cannot go on. The command prints it without a traceback and exits with 2."""


def unknown(noun: str, given: object, allowed: Iterable[str]) -> ErasureError:
    """An error for a value outside its choices, nearest choices first.

    >>> print(unknown("method", "esdd", ["spm", "esd"]))
    unknown method 'esdd': did you mean 'esd'? Allowed: esd, spm
    """
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(repr(name) for name in near)}?" if near else "."
    rest = [name for name in names if name not in near]
    return ErasureError(f"unknown {noun} {given!r}{hint} Allowed: {', '.join(near + rest) or 'none'}")
