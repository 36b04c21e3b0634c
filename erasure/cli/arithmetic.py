"""`erasure patch scale|negate|merge|subtract|average|remove|resize|diff|conflicts`: patches made of patches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from erasure.cli import choices
from erasure.cli.arguments import FILE, FOLDER, Commands, Options, Parser
from erasure.cli.inputs import strength
from erasure.cli.options import add_file
from erasure.cli.output import say, table
from erasure.errors import ErasureError

PATCH = "Patch file, or the name of a patch on the hub"


def add_actions(actions: Commands) -> None:
    """Add the actions that make patches of patches."""
    actions.add("scale", "Multiply every change of a patch by a factor", run_scale, _scale_arguments)
    actions.add("negate", "Make the patch that undoes a patch", run_negate, _negate_arguments)
    actions.add(
        "merge",
        "Make one patch that does what several do, weighted",
        run_merge,
        _merge_arguments,
        examples="erasure patch merge cat.safetensors dog.safetensors:0.5 -o both.safetensors",
    )
    actions.add("subtract", "Take what one patch does out of another", run_subtract, _subtract_arguments)
    actions.add(
        "average",
        "Make the average of patches, from which each can be taken out again",
        run_average,
        _average_arguments,
        examples="erasure patch average ann.safetensors ben.safetensors -o both.safetensors",
    )
    actions.add("remove", "Take one of the patches out of an average", run_remove, _remove_arguments)
    actions.add("resize", "Make a smaller patch, or show what each rank would lose", run_resize, _resize_arguments)
    actions.add(
        "diff",
        "Make the patch that leads from one checkpoint to another",
        run_diff,
        _diff_arguments,
        examples="erasure patch diff glyph erased.safetensors --concept cat -o cat.safetensors",
    )
    actions.add(
        "conflicts",
        "Show which patches change the same weights, and whether in the same direction",
        run_conflicts,
        lambda parser: Options(parser, "patches").add(
            "file", nargs="+", metavar="FILE", completes=FILE, help=f"{PATCH}; two or more"
        ),
    )


def _scale_arguments(parser: Parser) -> None:
    patch = Options(parser, "patch")
    patch.add("file", metavar="FILE", completes=FILE, help=PATCH)
    patch.add("factor", type=float, metavar="FACTOR", help="Factor, such as 0.5 or -1")
    _output(parser)


def _negate_arguments(parser: Parser) -> None:
    Options(parser, "patch").add("file", metavar="FILE", completes=FILE, help=PATCH)
    _output(parser)


def _merge_arguments(parser: Parser) -> None:
    patches = Options(parser, "patches")
    patches.add(
        "file",
        nargs="+",
        metavar="FILE[:WEIGHT]",
        completes=FILE,
        help=f"{PATCH}, and a factor for its changes (default: 1)",
    )
    _gate(patches)
    _base(parser)
    _output(parser)


def _subtract_arguments(parser: Parser) -> None:
    patches = Options(parser, "patches")
    patches.add("file", metavar="FILE", completes=FILE, help=PATCH)
    patches.add("other", metavar="OTHER", completes=FILE, help="Patch to take out of it")
    _gate(patches)
    _base(parser)
    _output(parser)


def _average_arguments(parser: Parser) -> None:
    patches = Options(parser, "patches")
    patches.add("file", nargs="+", metavar="FILE", completes=FILE, help=f"{PATCH}; one for each contributor")
    _gate(patches)
    _base(parser)
    _output(parser)


def _remove_arguments(parser: Parser) -> None:
    patches = Options(parser, "patches")
    patches.add("file", metavar="FILE", completes=FILE, help="Average that `erasure patch average` has written")
    patches.add("other", metavar="OTHER", completes=FILE, help="Patch to take out of it")
    patches.add("--force", action="store_true", help="Accept an average that was stored in half precision")
    _output(parser)


def _resize_arguments(parser: Parser) -> None:
    Options(parser, "patch").add("file", metavar="FILE", completes=FILE, help=PATCH)
    new = Options(parser, "size")
    new.add("--rank", type=int, metavar="N", help="Largest rank of a layer")
    new.add("--energy", type=float, metavar="SHARE", help="Share of each layer's squared change to keep, such as 0.9")
    new.add("--drop", action="store_true", help="Leave out biases, norms and embeddings, and count them as error")
    new.add("--report", action="store_true", help="Show what each rank would take and lose, and write no patch")
    _base(parser)
    output = Options(parser, "output")
    output.add(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        completes=FILE,
        help="Patch file to write; with --report, a chart as PNG",
    )
    _dtype(output)


def _diff_arguments(parser: Parser) -> None:
    models = Options(parser, "checkpoints")
    models.add(
        "base",
        metavar="BASE",
        completes=FOLDER,
        help="Checkpoint to start from: glyph, a hub id, a diffusers folder or a .safetensors file",
    )
    models.add("other", metavar="ERASED", completes=FOLDER, help="Checkpoint with the concept erased, given likewise")
    models.add("--concept", metavar="NAME", required=True, repeat=True, help="Concept that is erased in ERASED")
    models.add(
        "--component",
        metavar="NAME",
        repeat=True,
        default=None,
        names=choices.COMPONENTS,
        shown="all",
        help="Component to compare",
    )
    _output(parser)


def _gate(patches: Options) -> None:
    patches.add("--drop-gate", action="store_true", help="Let the result act on every prompt")


def _base(parser: Parser) -> None:
    model = Options(parser, "model")
    model.add(
        "--model", metavar="MODEL", shown="the one that the patches name", help="Base of the patches, where it is read"
    )
    model.add("--force", action="store_true", help="Accept different or unrecorded bases, as long as the shapes fit")


def _output(parser: Parser) -> None:
    output = Options(parser, "output")
    add_file(output, text="Patch file to write")
    _dtype(output)


def _dtype(output: Options) -> None:
    output.add("--dtype", metavar="DTYPE", names=choices.DTYPES, shown="fp32", help="Data type of the written tensors")


def run_scale(args: argparse.Namespace) -> None:
    """Run `erasure patch scale`."""
    from erasure.patch.ops.arithmetic import scale

    _write(args, scale(_load(args.file), args.factor))


def run_negate(args: argparse.Namespace) -> None:
    """Run `erasure patch negate`."""
    from erasure.patch.ops.arithmetic import negate

    _write(args, negate(_load(args.file)))


def run_merge(args: argparse.Namespace) -> None:
    """Run `erasure patch merge`."""
    from erasure.patch.ops.arithmetic import merge

    parts = [(_load(path), weight) for path, weight in map(strength, args.file)]
    _write(args, merge(parts, **_options(args), drop_gate=args.drop_gate))


def run_subtract(args: argparse.Namespace) -> None:
    """Run `erasure patch subtract`."""
    from erasure.patch.ops.arithmetic import subtract

    patch, other = _load(args.file), _load(args.other)
    _write(args, subtract(patch, other, **_options(args), drop_gate=args.drop_gate))


def run_average(args: argparse.Namespace) -> None:
    """Run `erasure patch average`."""
    from erasure.patch.ops.soup import average

    _write(args, average([_load(path) for path in args.file], **_options(args), drop_gate=args.drop_gate))


def run_remove(args: argparse.Namespace) -> None:
    """Run `erasure patch remove`."""
    from erasure.patch.ops.soup import remove

    _write(args, remove(_load(args.file), _load(args.other), force=args.force))


def run_resize(args: argparse.Namespace) -> None:
    """Run `erasure patch resize`."""
    from erasure.patch.ops.resize import resize

    if args.report:
        _report_sizes(args)
        return
    if args.out is None:
        raise ErasureError("give the file to write with -o FILE, or --report to see what each rank would lose")
    patch = resize(_load(args.file), args.rank, args.energy, drop=args.drop, **_options(args))
    error = patch.config["error"]
    _write(args, patch, f", relative error {error:.2%}", {"error": error, "errors": patch.config["errors"]})


def _report_sizes(args: argparse.Namespace) -> None:
    from erasure.patch.ops.rank_report import sizes

    ranks = None if args.rank is None else [args.rank]
    report = sizes(_load(args.file), ranks, dtype=args.dtype or "fp32", drop=args.drop)
    now = report.now
    rows = [
        (
            row["rank"],
            f"{row['bytes']:,}",
            f"{row['bytes'] / now['bytes']:.1%}",
            f"{row['error']:.2%}",
            f"{row['worst_error']:.1%} in {row['worst']}",
        )
        for row in report.rows
    ]
    heads = ("rank", "bytes", "of now", "error", "worst layer")
    say(
        args,
        report.to_json(),
        f"now: {now['kind']}, {now['bytes']:,} bytes in {report.dtype}\n",
        table(heads, rows, right=heads[:4]),
        *([f"\nChart: {report.chart(args.out)}"] if args.out else []),
    )


def run_diff(args: argparse.Namespace) -> None:
    """Run `erasure patch diff`."""
    from erasure.model.loading import quiet
    from erasure.patch.ops.diff import diff

    quiet()
    _write(args, diff(args.base, args.other, args.concept, components=args.component))


def run_conflicts(args: argparse.Namespace) -> None:
    """Run `erasure patch conflicts`."""
    from erasure.patch.ops.conflicts import conflicts

    rows = conflicts({path: _load(path) for path in args.file})
    lines = [row.text() for row in rows] or ["No two of these patches change the same weights."]
    say(args, [row.to_json() for row in rows], *lines)


def _load(path: str) -> Any:
    from erasure.patch import Patch

    return Patch.load(path)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"base": args.model, "force": args.force}


def _write(args: argparse.Namespace, patch: Any, more: str = "", data: dict[str, Any] | None = None) -> None:
    """Save the patch in the dtype of the command line, else in fp32, and report what it is."""
    from erasure.patch import Patch

    path = patch.save(Path(args.out), dtype=args.dtype or "fp32")
    info = Patch.load(path).info()
    shape = f"{info['kind']}, rank {'/'.join(map(str, info['rank']))}" if info["rank"] else info["kind"]
    text = f"{path}: {shape}, {info['tensors']} tensors, {info['bytes']:,} bytes, gate {info['gate']}{more}"
    say(args, {"patch": str(path), **info, **(data or {})}, text)
