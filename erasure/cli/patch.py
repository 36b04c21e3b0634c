"""`erasure patch`: inspect a patch, convert it from and to the files of other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from erasure.cli import arithmetic, choices, patch_page
from erasure.cli.arguments import FILE, Commands, Options, Parser
from erasure.cli.options import add_file, add_model_config
from erasure.cli.output import say, table

SECTIONS = {
    "Inspect": ("info", "conflicts"),
    "Convert": ("formats", "import", "export"),
    "Combine and change": ("scale", "negate", "merge", "subtract", "average", "remove", "resize", "diff"),
}


def add_commands(commands: Commands) -> None:
    """Add patch with its actions."""
    commands.add("patch", "Inspect, convert, combine and resize patches", None, _add_actions)


def _add_actions(parser: Parser) -> None:
    actions = Commands(parser, "action", "ACTION", SECTIONS)
    actions.add(
        "info",
        "Show what a patch holds, which programs can load it and what it can be exported as",
        run_info,
        lambda parser: Options(parser, "patch").add(
            "file", type=Path, metavar="FILE", completes=FILE, help="Patch file"
        ),
    )
    actions.add("formats", "List the published formats that can be read and written", run_formats)
    actions.add(
        "import",
        "Make a patch of a file or folder in a published format",
        run_import,
        _import_arguments,
        examples="erasure patch import unet.safetensors --model sd1.safetensors -o p.safetensors",
    )
    actions.add(
        "export",
        "Write a patch as a file or folder in a published format",
        run_export,
        _export_arguments,
        "The patch itself is left as it is.",
        "erasure patch export p.safetensors --format kohya --rank 8 -o lora.safetensors",
    )
    arithmetic.add_actions(actions)


def _import_arguments(parser: Parser) -> None:
    source = Options(parser, "file")
    source.add("file", metavar="FILE", completes=FILE, help="File or folder to read")
    source.add(
        "--format",
        default="auto",
        metavar="FORMAT",
        names=("auto", *choices.READ, *choices.CODES),
        shown="auto, recognised by the names of its tensors",
        see="erasure patch formats",
        help="Format of the file",
    )
    source.add(
        "--concept", metavar="NAME", repeat=True, shown="what the file says, else its name", help="What it erases"
    )
    source.add(
        "--allow-pickle", action="store_true", help="Read a .pt or .pth file, as data only: nothing in it is executed"
    )
    model = Options(parser, "model")
    model.add(
        "--model",
        default="glyph",
        metavar="MODEL",
        help="Model that the file was made for; full weights are compared with it",
    )
    add_model_config(model)
    add_file(Options(parser, "output"), text="Patch file to write")


def _export_arguments(parser: Parser) -> None:
    Options(parser, "patch").add("file", type=Path, metavar="FILE", completes=FILE, help="Patch file")
    target = Options(parser, "format")
    target.add(
        "--format",
        required=True,
        metavar="FORMAT",
        names=(*choices.WRITTEN, *choices.CODES),
        see="erasure patch formats",
        help="Format to write",
    )
    target.add(
        "--rank",
        type=int,
        metavar="N",
        help="Reduce differences of weights to a LoRA of this rank; the error that this makes is printed",
    )
    model = Options(parser, "model")
    model.add(
        "--model",
        metavar="MODEL",
        shown="the model that the patch names",
        help="Model to take the weights from, for formats that hold whole weights",
    )
    add_model_config(model)
    model.add("--force", action="store_true", help="Use another base than the patch was made from if the shapes fit")
    add_file(Options(parser, "output"), text="File to write, or folder for whole models")


def run_info(args: argparse.Namespace) -> None:
    """Run `erasure patch info`."""
    from erasure.formats import as_it_is, exports
    from erasure.patch import Patch

    patch = Patch.load(args.file)
    loads, written = as_it_is(patch), exports(patch)
    say(
        args,
        {**patch.info(), "loads": loads, "exports": written},
        *patch_page.blocks(str(args.file), patch, loads, written),
    )


def run_formats(args: argparse.Namespace) -> None:
    """Run `erasure patch formats`."""
    from erasure.formats import METHODS, rows

    formats = rows()
    cells = [
        (
            row["format"],
            "yes" if row["writes"] else "no",
            row["about"],
            ", ".join(row["loaders"]),
        )
        for row in formats
    ]
    codes = "; ".join(f"{name} for {kind}" for name, kind in METHODS.items())
    say(
        args,
        formats,
        table(("format", "written", "what it is", "loads in"), cells),
        f"\nAll of them are read. --format also takes the name of a published code, which is then recorded as the "
        f"method: {codes}.",
    )


def run_import(args: argparse.Namespace) -> None:
    """Run `erasure patch import`."""
    from erasure.formats import FORMATS, METHODS, import_patch
    from erasure.model.loading import quiet

    quiet()
    patch = import_patch(
        args.file,
        args.format,
        args.model,
        concepts=args.concept,
        allow_pickle=args.allow_pickle,
        config=args.model_config,
    )
    patch.save(args.out)
    name = patch.config["format"]
    count = sum(len(patch.payload.names(part)) for part in patch.components)
    data = {"file": str(args.out), "format": name, "kind": patch.payload.kind, "tensors": count}
    erased = ", ".join(map(repr, patch.names))
    source = "" if args.concept else " (the name comes from the file; override it with --concept)"
    say(
        args,
        {**data, "components": patch.components, "concepts": patch.names},
        f"{args.file}: detected as {name} ({FORMATS[METHODS.get(name, name)].about})",
        f"{args.out}: written, a {patch.payload.kind} patch of {count} tensors of {', '.join(patch.components)} "
        f"that erases {erased}{source}",
    )


def run_export(args: argparse.Namespace) -> None:
    """Run `erasure patch export`."""
    from erasure.formats import export_patch
    from erasure.model.loading import quiet
    from erasure.patch import Patch

    quiet()
    export = export_patch(
        Patch.load(args.file),
        args.out,
        args.format,
        args.model,
        rank=args.rank,
        force=args.force,
        config=args.model_config,
    )
    lines: list[Any] = [f"{export.path}: written as {export.format}"]
    if export.error is not None:
        lines.append(f"reduced to rank {args.rank}: relative error {export.error:.3g}")
    data = {"file": str(export.path), "format": export.format, "error": export.error, "notes": list(export.notes)}
    say(args, data, *lines, *(f"note: {text}" for text in export.notes))
