"""`erasure patch`: look into a patch, carry it from and to the files of published code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from erasure.cli import arithmetic
from erasure.cli.inputs import say


def run_patch(given: argparse.Namespace) -> None:
    """`erasure patch ACTION`."""
    ACTIONS[given.action](given)


def info(given: argparse.Namespace) -> None:
    """`erasure patch info`."""
    from erasure.formats import as_it_is, exports
    from erasure.patch import Patch

    patch = Patch.load(given.file)
    found = patch.info()
    tables = {"loads": as_it_is(patch), "exports": exports(patch)}
    width = max(map(len, [*found, *tables]))
    lines = [f"{key:{width}}  {value if isinstance(value, str) else json.dumps(value)}" for key, value in found.items()]
    for title, table in tables.items():
        inner = max(map(len, table))
        lines += [title, *(f"  {key:{inner}}  {value}" for key, value in table.items())]
    say(given, {**found, **tables}, "\n".join(lines))


def formats(given: argparse.Namespace) -> None:
    """`erasure patch formats`."""
    from erasure.formats import METHODS, rows

    found = rows()
    lines = [
        f"{row['format']:13}{'read, written' if row['writes'] else 'read':14}{row['about']}; "
        f"loads in {', '.join(row['loaders'])}"
        for row in found
    ]
    lines += [f"{name:13}{kind}, and says that {name} made it" for name, kind in METHODS.items()]
    say(given, found, "\n".join(lines))


def import_(given: argparse.Namespace) -> None:
    """`erasure patch import`."""
    from erasure.formats import FORMATS, METHODS, import_patch
    from erasure.model.loading import quiet

    quiet()
    patch = import_patch(
        given.file,
        given.format,
        given.model,
        concepts=given.concept,
        allow_pickle=given.allow_pickle,
    )
    patch.save(given.out)
    form = patch.config["format"]
    count = sum(len(patch.payload.names(part)) for part in patch.components)
    taken = f"{given.file}: taken for {form} ({FORMATS[METHODS.get(form, form)].about})"
    facts = {"file": str(given.out), "format": form, "kind": patch.payload.kind, "tensors": count}
    erased = ", ".join(map(repr, patch.names)) + (
        "" if given.concept else " by what the file says or is called (--concept names it)"
    )
    made = f"{patch.payload.kind}, {count} tensors of {', '.join(patch.components)}, erases {erased}"
    text = f"{taken}\n{given.out}: written, {made}"
    say(given, {**facts, "components": patch.components, "concepts": patch.names}, text)


def export(given: argparse.Namespace) -> None:
    """`erasure patch export`."""
    from erasure.formats import export_patch
    from erasure.model.loading import quiet
    from erasure.patch import Patch

    quiet()
    done = export_patch(
        Patch.load(given.file),
        given.out,
        given.format,
        given.model,
        rank=given.rank,
        force=given.force,
    )
    lines = [f"{done.path}: written as {done.format}"]
    if done.error is not None:
        lines.append(f"cut to rank {given.rank}: relative error {done.error:.3g}")
    facts = {"file": str(done.path), "format": done.format, "error": done.error, "notes": list(done.notes)}
    say(given, facts, "\n".join([*lines, *done.notes]))


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "info": info,
    "formats": formats,
    "import": import_,
    "export": export,
    "scale": arithmetic.run_scale,
    "negate": arithmetic.run_negate,
    "merge": arithmetic.run_merge,
    "subtract": arithmetic.run_subtract,
    "resize": arithmetic.run_resize,
    "diff": arithmetic.run_diff,
    "conflicts": arithmetic.run_conflicts,
}
