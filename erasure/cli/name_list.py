"""`erase --list` and `plan --list`: a list of names, by one closed-form solve."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.cli.inputs import load_options
from erasure.cli.output import facts, heading, say, table, waiting
from erasure.errors import ErasureError

if TYPE_CHECKING:
    from erasure.takedown.lists import ListForecast

HARDEST = 20  # names that a page shows; --json has all


def run_erase(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Run `erasure erase --list`."""
    from erasure.takedown.lists import erase_list

    model, names, options = _read(args, settings)
    with waiting(args, f"Erasing {len(names.concepts)} names"):
        patch = erase_list(model, names, out=args.out, **options)
    info = {**patch.info(), "bytes": Path(args.out).stat().st_size}
    error = _error(args.out)
    text = (
        f"{args.out}: erases {_count(len(patch.concepts), 'name')} by {patch.method}; "
        f"{info['bytes'] / 1e6:.1f} MB, rank {max(info['rank'])}, relative error of fp16 {error:.2%}; solved in "
        f"{patch.costs['seconds']:.1f} s"
    )
    say(args, {"patch": str(args.out), **info, "dtype_error": error}, text)


def run_plan(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Run `erasure plan --list`."""
    from erasure.takedown.lists import plan_list

    model, names, options = _read(args, settings)
    with waiting(args, f"Reading {len(names.concepts)} names"):
        forecast = plan_list(model, names, **options)
    say(args, forecast.to_json(), *_page(args, forecast))


def _read(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return the model, the list and the options of `erase_list` that a command line names.

    Raises:
        ErasureError: options that have no meaning for a list, or names of unknown kind.
    """
    from erasure.concepts.name_list import NameList
    from erasure.config import read_yaml
    from erasure.model.readers_only import open_readers
    from erasure.takedown.lists import METHOD

    given = {"CONCEPT": args.concept, "--alias": args.alias, "--anchor": args.anchor, "--keep": args.keep}
    given |= {"--preview-every": getattr(args, "preview_every", None), "--log": getattr(args, "log", [])}
    if wrong := [name for name, value in given.items() if value]:
        raise ErasureError(
            f"{', '.join(wrong)} cannot be used with --list: names, aliases, anchors and kept words stand in the file. "
            "Nothing was changed"
        )
    if args.quantize is not None:
        raise ErasureError(
            "--quantize cannot be used with --list: closed forms solve for whole weights, and read few of them. "
            "Nothing was changed"
        )
    with waiting(args, f"Loading {args.model}"):
        model = open_readers(args.model, device=args.device, **load_options(args))
    names = NameList.read(args.list, model.words, args.kind)
    preset = model.family().preset
    if names.assumed and (preset is None or preset.checkpoint is None):
        shown = ", ".join(map(repr, names.assumed[:5])) + (" ..." if len(names.assumed) > 5 else "")
        raise ErasureError(
            f"no list knows {_count(len(names.assumed), 'name')} ({shown}): say what they are with `kind` in the file, "
            "or with --kind for all entries without one. Nothing was changed"
        )
    file = read_yaml(args.config) if args.config else {}
    return model, names, {"method": args.method or METHOD, "preset": args.preset, "file": file, **settings}


def _error(path: Path) -> float:
    """Return the relative error of a patch file's number format."""
    from erasure.patch import read_header

    return float(read_header(path)["erasure.dtype_error"])


def _page(args: argparse.Namespace, forecast: ListForecast) -> list[Any]:
    """Lay out the forecast of a list."""
    rows = [
        (
            row.name if row.name == row.concept else f"{row.name} ({row.concept})",
            f"{row.left:.0%}",
            f"{row.outside:.1%}",
            ", ".join(f"{name} {cosine:.2f}" for name, cosine in row.nearest),
            row.hard,
        )
        for row in forecast.rows[:HARDEST]
    ]
    hard = sum(bool(row.hard) for row in forecast.rows)
    summary = [
        ("names", f"{len(forecast.rows):,}, of which {hard:,} are expected to be hard"),
        ("kept words", f"{forecast.kept:,}; their answers move by {forecast.moved:.1%} of their length"),
        ("free directions", f"{forecast.free} of {forecast.width}, which hold 1 % of the kept states' squared lengths"),
        ("patch", f"rank {forecast.rank}, which holds {forecast.held_share:.2%} of the squared change"),
    ]
    if forecast.left_out:
        shown = ", ".join(forecast.left_out[:8]) + (" ..." if len(forecast.left_out) > 8 else "")
        summary.append(("not kept", f"{shown}: to be erased, or nearly so"))
    more = f" (the {HARDEST} hardest; --json has all)" if len(forecast.rows) > HARDEST else ""
    return [
        facts(f"To erase the names of {args.list} from {args.model}", summary),
        heading(f"What is expected of each name, the hardest first{more}"),
        "not reached: share of the wanted change; outside: share of the states outside of the kept space",
        table(("name", "not reached", "outside", "nearest kept", "hard"), rows, ("not reached", "outside")),
        heading("Settings, and where they come from"),
        "\n".join(forecast.sources),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
