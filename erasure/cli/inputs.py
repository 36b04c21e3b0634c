"""What the subcommands do: parses nothing, calls the Python API, prints. Heavy imports stay inside the functions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def say(given: argparse.Namespace, data: Any, text: str) -> None:
    """Print the result: text, or with --json one document."""
    from erasure.distributed import speaks

    if speaks():  # one of the processes that a launcher started
        print(json.dumps(data, indent=1) if given.json else text)


def options(given: argparse.Namespace) -> dict[str, Any]:
    """Return how to load the checkpoint of the command line; the detected kind of a single file is printed."""
    from erasure.dtypes import DTYPES
    from erasure.errors import unknown
    from erasure.model.loading import look, quiet

    quiet()
    found = {"variant": given.variant, "config": given.model_config}
    if given.dtype is not None:
        if given.dtype not in DTYPES:
            raise unknown("dtype", given.dtype, DTYPES)
        found["dtype"] = DTYPES[given.dtype]
    found = {key: value for key, value in found.items() if value is not None}
    if Path(given.model).is_file():
        print(f"{given.model}: detected as {look(given.model, **found).about}", file=sys.stderr)
    return found


def base(given: argparse.Namespace) -> Any:
    """Load the checkpoint of the command line to erase from it."""
    from erasure.model.base import Base

    return Base.load(given.model, device=given.device, **options(given))


def model(given: argparse.Namespace) -> Any:
    """Load the checkpoint of the command line as a pipeline that can hold patches."""
    from erasure.pipelines import load_pipeline

    pipe = load_pipeline(given.model, device=given.device, **options(given))
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
