"""Commands that erase: demo, erase, plan, bench."""

from __future__ import annotations

import argparse
from typing import Any

from erasure.cli.inputs import base, say
from erasure.errors import ErasureError


def run_demo(given: argparse.Namespace) -> None:
    """`erasure demo`."""
    from erasure.benchmark.demo import demo
    from erasure.model.loading import quiet

    quiet()
    tell = (lambda _: None) if given.json else print
    found = demo(given.concept, given.out, progress=not given.json, say=tell)
    say(given, found.to_json(), f"{found.summary}\n4. {found.seconds:.0f} s; the report: {found.report}")


def named(given: argparse.Namespace) -> list[Any]:
    """The concepts of the command line.

    Raises:
        ErasureError: an alias, an anchor or a neighbour for several concepts at once.
    """
    details = {"aliases": given.alias, "anchor": given.anchor, "keep": given.keep, "kind": given.kind}
    details = {key: value for key, value in details.items() if value}
    if len(given.concept) > 1 and details.keys() - {"kind"}:
        raise ErasureError(
            "--alias, --anchor and --keep belong to one concept: erase several from Python, "
            "erase(model, [{'name': .., 'anchor': ..}, ..])"
        )
    return [{"name": name, **details} if details else name for name in given.concept]


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """The settings of the command line: of the method, and how to compute."""
    from dataclasses import fields

    from erasure.config import parse_overrides
    from erasure.training.compute import Computing

    named = {field.name: getattr(given, field.name) for field in fields(Computing)}
    return {**parse_overrides(given.set), **{key: value for key, value in named.items() if value is not None}}


def run_erase(given: argparse.Namespace) -> None:
    """`erasure erase`."""
    from erasure.erasing import erase

    concepts = named(given)
    patch = erase(
        base(given),
        concepts,
        given.method,
        out=given.out,
        config=given.config,
        seed=given.seed,
        progress=False if given.json else None,
        preview_every=given.preview_every,
        trackers=given.log,
        **settings(given),
    )
    names = ", ".join(repr(one.name) for one in concepts)
    costs = patch.costs
    text = f"{given.out}: {given.method} erases {names}, {costs['F']} F + {costs['B']} B, {costs['seconds']} s"
    say(given, {"patch": str(given.out), **patch.info()}, text)


def run_plan(given: argparse.Namespace) -> None:
    """`erasure plan`."""
    from erasure.config import read_yaml
    from erasure.forecast import plan

    concepts = named(given)
    file = read_yaml(given.config) if given.config else {}
    options: dict[str, Any] = {"seed": given.seed, "processes": given.processes}
    found = plan(base(given), concepts, given.method, **options, **{**file, **settings(given)})
    say(given, found.to_json(), found.text())


def run_bench(given: argparse.Namespace) -> None:
    """`erasure bench`."""
    from erasure.benchmark.run import bench
    from erasure.config import parse_overrides
    from erasure.model.loading import quiet

    quiet()
    table = bench(
        given.methods,
        given.concepts,
        given.out,
        limit=given.limit,
        progress=not given.json,
        overrides=parse_overrides(given.set),
    )
    say(given, table.to_json(), table.markdown())
