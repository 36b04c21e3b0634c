"""Commands that share patches: push, pull."""

from __future__ import annotations

import argparse
from pathlib import Path

from erasure.cli.arguments import FILE, FOLDER, Commands, Options, Parser
from erasure.cli.output import say


def add_commands(commands: Commands) -> None:
    """Add push and pull."""
    commands.add(
        "push",
        "Upload a patch with its model card to the Hugging Face Hub",
        run_push,
        _push_arguments,
        examples="erasure push cat.safetensors me/cat-erased --license openrail",
    )
    commands.add(
        "pull",
        "Download a patch from the Hugging Face Hub and check it",
        run_pull,
        _pull_arguments,
        examples="erasure pull owner/name -o cat.safetensors",
    )


def _push_arguments(parser: Parser) -> None:
    patch = Options(parser, "patch")
    patch.add("file", type=Path, metavar="FILE", completes=FILE, help="Patch file")
    patch.add("--license", metavar="NAME", help="License of the patch by its name on the hub, such as openrail")
    target = Options(parser, "repository")
    target.add("repository", metavar="OWNER/NAME", help="Repository on the hub; it is created if it does not exist")
    target.add("--private", action="store_true", help="Create the repository as a private one")
    target.add("--message", metavar="TEXT", help="Commit message")
    target.add(
        "--folder",
        type=Path,
        metavar="FOLDER",
        completes=FOLDER,
        help="Write the files of the repository into this folder and upload nothing",
    )


def _pull_arguments(parser: Parser) -> None:
    Options(parser, "source").add(
        "source",
        metavar="SOURCE",
        completes=FOLDER,
        help="Repository as owner/name[@revision][/file.safetensors], or a folder that holds its files",
    )
    output = Options(parser, "output")
    output.add(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        completes=FILE,
        shown="the patch's own name, in the current folder",
        help="File to write",
    )
    output.add("--overwrite", action="store_true", help="Replace the file if it exists with other content")


def run_push(args: argparse.Namespace) -> None:
    """Run `erasure push`."""
    from erasure.formats.hub import push

    pushed = push(
        args.file,
        args.repository,
        folder=args.folder,
        private=args.private,
        license=args.license,
        message=args.message,
    )
    say(args, pushed.to_json(), pushed.text())


def run_pull(args: argparse.Namespace) -> None:
    """Run `erasure pull`."""
    from erasure.formats.hub import pull

    pulled = pull(args.source, args.out, overwrite=args.overwrite)
    say(args, pulled.to_json(), pulled.text())
