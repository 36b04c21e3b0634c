"""`erasure patch scale|negate|merge|subtract|resize|diff|conflicts`: patches from patches and from checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from erasure.cli.inputs import say, strength
from erasure.errors import ErasureError


def run_scale(given: argparse.Namespace) -> None:
    """`erasure patch scale`."""
    from erasure.patch.ops.arithmetic import scale

    _write(given, scale(_load(given.file), given.factor))


def run_negate(given: argparse.Namespace) -> None:
    """`erasure patch negate`."""
    from erasure.patch.ops.arithmetic import negate

    _write(given, negate(_load(given.file)))


def run_merge(given: argparse.Namespace) -> None:
    """`erasure patch merge`."""
    from erasure.patch.ops.arithmetic import merge

    parts = [(_load(path), weight) for path, weight in map(strength, given.file)]
    _write(given, merge(parts, **_options(given), drop_gate=given.drop_gate))


def run_subtract(given: argparse.Namespace) -> None:
    """`erasure patch subtract`."""
    from erasure.patch.ops.arithmetic import subtract

    one, other = _load(given.file), _load(given.other)
    _write(given, subtract(one, other, **_options(given), drop_gate=given.drop_gate))


def run_resize(given: argparse.Namespace) -> None:
    """`erasure patch resize`."""
    from erasure.patch.ops.resize import resize

    if given.report:
        from erasure.patch.ops.rank_report import sizes

        ranks = None if given.rank is None else [given.rank]
        table = sizes(_load(given.file), ranks, dtype=given.dtype or "fp32", drop=given.drop)
        chart = f"\n{table.chart(given.out)}: the chart" if given.out else ""
        say(given, table.to_json(), table.text() + chart)
        return
    if given.out is None:
        raise ErasureError("say where to write: -o FILE; or --report for what each rank would take and lose")
    patch = _load(given.file)
    made = resize(patch, given.rank, given.energy, drop=given.drop, **_options(given))
    error = made.config["error"]
    _write(given, made, f", relative error {error:.2%}", {"error": error, "errors": made.config["errors"]})


def run_diff(given: argparse.Namespace) -> None:
    """`erasure patch diff`."""
    from erasure.model.loading import quiet
    from erasure.patch.ops.diff import diff

    quiet()
    _write(given, diff(given.base, given.other, given.concept, components=given.component))


def run_conflicts(given: argparse.Namespace) -> None:
    """`erasure patch conflicts`."""
    from erasure.patch.ops.conflicts import conflicts

    rows = conflicts({path: _load(path) for path in given.file})
    text = "\n".join(row.text() for row in rows) or "no two of them touch the same weights"
    say(given, [row.to_json() for row in rows], text)


def _load(path: str) -> Any:
    from erasure.patch import Patch

    return Patch.load(path)


def _options(given: argparse.Namespace) -> dict[str, Any]:
    return {"base": given.model, "force": given.force}


def _write(given: argparse.Namespace, made: Any, more: str = "", data: dict[str, Any] | None = None) -> None:
    """Save the patch in the dtype asked for, else in fp32, and say what it is."""
    from erasure.patch import Patch

    path = made.save(Path(given.out), dtype=given.dtype or "fp32")
    info = Patch.load(path).info()
    shape = f"{info['kind']}, rank {'/'.join(map(str, info['rank']))}" if info["rank"] else info["kind"]
    text = f"{path}: {shape}, {info['tensors']} tensors, {info['bytes']:,} bytes, gate {info['gate']}{more}"
    say(given, {"patch": str(path), **info, **(data or {})}, text)
