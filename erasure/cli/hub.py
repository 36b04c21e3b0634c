"""Commands that share patches: push, pull."""

from __future__ import annotations

import argparse

from erasure.cli.inputs import say


def run_push(given: argparse.Namespace) -> None:
    """`erasure push`."""
    from erasure.formats.hub import push

    found = push(
        given.file,
        given.repository,
        folder=given.folder,
        private=given.private,
        license=given.license,
        message=given.message,
    )
    say(given, found.to_json(), found.text())


def run_pull(given: argparse.Namespace) -> None:
    """`erasure pull`."""
    from erasure.formats.hub import pull

    found = pull(given.source, given.out, overwrite=given.overwrite)
    say(given, found.to_json(), found.text())
