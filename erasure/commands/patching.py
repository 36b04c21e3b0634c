"""`erasure patch`: look into a patch, carry it from and to the files of published code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from erasure.commands import say


def run_patch(given: argparse.Namespace) -> None:
    """`erasure patch ACTION`."""
    ACTIONS[given.action](given)


def info(given: argparse.Namespace) -> None:
    """`erasure patch info`."""
    from erasure.patch import Patch

    found = Patch.load(given.file).info()
    width = max(map(len, found))
    lines = [f"{key:{width}}  {value if isinstance(value, str) else json.dumps(value)}" for key, value in found.items()]
    say(given, found, "\n".join(lines))


def import_(given: argparse.Namespace) -> None:
    """`erasure patch import`."""
    from erasure.base import quiet
    from erasure.formats import import_patch

    quiet()
    import_patch(given.file, given.format, given.model).save(given.out)
    say(given, {"file": str(given.out)}, f"{given.out}: written")


def export(given: argparse.Namespace) -> None:
    """`erasure patch export`."""
    from erasure.formats import export_patch
    from erasure.patch import Patch

    export_patch(Patch.load(given.file), given.out, given.format)
    say(given, {"file": str(given.out)}, f"{given.out}: written")


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {"info": info, "import": import_, "export": export}
