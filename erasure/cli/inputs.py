"""From the command line to what the library takes: checkpoints, patches, prompts, judges."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from erasure.cli.output import waiting
from erasure.errors import ErasureError


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return how to load the checkpoint of the command line; the detected type of a single file is printed."""
    from erasure.dtypes import DTYPES
    from erasure.errors import unknown
    from erasure.model.loading import look, quiet

    quiet()
    options = {"variant": args.variant, "config": args.model_config, "quantize": args.quantize}
    if args.dtype is not None:
        if args.dtype not in DTYPES:
            raise unknown("dtype", args.dtype, DTYPES)
        options["dtype"] = DTYPES[args.dtype]
    options = {key: value for key, value in options.items() if value is not None}
    if Path(args.model).is_file():
        print(f"{args.model}: detected as {look(args.model, **options).about}", file=sys.stderr)
    return options


def base(args: argparse.Namespace) -> Any:
    """Load the checkpoint of the command line to erase from it."""
    with waiting(args, f"Loading {args.model}"):
        from erasure.model.base import Base

        return Base.load(args.model, device=args.device, **load_options(args))


def model(args: argparse.Namespace) -> Any:
    """Load the checkpoint of the command line as a pipeline that can hold patches."""
    with waiting(args, f"Loading {args.model}"):
        from erasure.pipelines import load_pipeline

        pipe = load_pipeline(args.model, device=args.device, **load_options(args))
        pipe.set_progress_bar_config(disable=True)
        return pipe


def pipeline(args: argparse.Namespace) -> Any:
    """Load the checkpoint of the command line with its patches; those are read first, because they fail sooner."""
    from erasure.patch import Patch

    patches = [(Patch.load(path), factor) for path, factor in map(strength, args.patch)]
    pipe = model(args)
    for patch, factor in patches:
        pipe.load_patch(patch, strength=factor, force=args.force)
    return pipe


def strength(item: str) -> tuple[str, float]:
    """Read `file` or `file:0.5`.

    Raises:
        ErasureError: what follows an existing file's name is not a number.
    """
    import math

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
        raise ErasureError(f"{item}: the strength {number!r} is not a number; give {path}, or {path}:0.5")
    return item, 1.0


def prompt_rows(args: argparse.Namespace) -> Any:
    """Return the prompt set of the command line, filtered and labelled; None where none is named.

    Raises:
        ErasureError: conditions or labels without a prompt set, or that do not fit it.
    """
    from erasure.prompts.prompt_set import PromptSet

    labels = getattr(args, "label", [])
    if not args.prompts:
        if args.where or labels:
            raise ErasureError("--where and --label apply to the rows of --prompts, which is missing")
        return None
    rows = PromptSet.read(args.prompts)
    rows = rows.where(*args.where) if args.where else rows
    return rows.labelled(*labels) if labels else rows


def judge(args: argparse.Namespace) -> Any:
    """Make the judge of the command line; None for the default one."""
    from erasure.evaluation.judges.registry import find_judge

    return find_judge(args.judge) if args.judge else None


def erased_concepts(args: argparse.Namespace) -> Any:
    """Return what should be gone: the concept of the command line, or those that its patches name."""
    if args.concept is not None:
        return args.concept
    return concepts_of([strength(item)[0] for item in args.patch])


def concepts_of(files: list[str]) -> list[str]:
    """Read from the headers of patch files which concepts they erase.

    Raises:
        ErasureError: no file, or a folder, or one that is not a patch.
    """
    from erasure.patch import read_header

    if not files or any(Path(file).is_dir() for file in files):
        raise ErasureError("which concept should be gone? Give CONCEPT, or a patch with --patch")
    return [entry["name"] for file in files for entry in json.loads(read_header(file)["erasure.concepts"])]
