"""What the subcommands do: parses nothing, calls the Python API, prints. Heavy imports stay inside the functions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def say(given: argparse.Namespace, data: Any, text: str) -> None:
    """Print the result: text, or with --json one document."""
    from erasure.processes import speaks

    if speaks():  # one of the processes that a launcher started
        print(json.dumps(data, indent=1) if given.json else text)


def base(given: argparse.Namespace) -> Any:
    """The checkpoint of the command line; what a single file was taken for is said."""
    from erasure.base import DTYPES, Base, quiet
    from erasure.errors import unknown

    quiet()
    options = {"variant": given.variant, "config": given.model_config}
    if given.dtype is not None:
        if given.dtype not in DTYPES:
            raise unknown("dtype", given.dtype, DTYPES)
        options["dtype"] = DTYPES[given.dtype]
    found = Base.load(
        given.model, device=given.device, **{key: value for key, value in options.items() if value is not None}
    )
    if Path(given.model).is_file():
        print(f"{given.model}: taken for {found.about}", file=sys.stderr)
    return found


def model(given: argparse.Namespace) -> Any:
    """The model without patches."""
    pipe = base(given).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(given: argparse.Namespace) -> Any:
    """The model with the patches of the command line, which are read first: they fail quicker."""
    from erasure.patch import Patch

    files = [(Patch.load(path), factor) for path, factor in map(strength, given.patch)]
    pipe = model(given)
    for patch, factor in files:
        pipe.load_patch(patch, strength=factor, force=given.force)
    return pipe


def strength(item: str) -> tuple[str, float]:
    """`file` or `file:0.5`.

    Raises:
        ErasureError: what follows an existing file's name is no number.
    """
    import math

    from erasure.errors import ErasureError

    path, sign, number = item.rpartition(":")
    if not sign or Path(item).is_file():
        return item, 1.0
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if math.isfinite(factor):
        return path, factor
    if Path(path).is_file():
        raise ErasureError(f"{item}: the strength {number!r} is no number; give {path}, or {path}:0.5")
    return item, 1.0
