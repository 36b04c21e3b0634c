"""Commands that erase: demo, erase, plan, bench."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from erasure.cli import choices, name_list
from erasure.cli.arguments import FILE, Commands, Options, Parser
from erasure.cli.inputs import base
from erasure.cli.options import add_device, add_file, add_folder, add_model, add_seed, add_settings
from erasure.cli.output import facts, heading, page, say
from erasure.errors import ErasureError

APP = (
    "Next: `erasure app` opens a page in the browser on which you erase whatever you like and look at it "
    "(needs Gradio: pip install 'erasure-diffusion[app]')."
)


def add_commands(commands: Commands) -> None:
    """Add demo, erase, plan and bench."""
    commands.add(
        "demo",
        "Erase a concept from the bundled model and measure the result",
        run_demo,
        _demo_arguments,
        "Erases the concept from glyph by the method that is best in glyph's tables, loads the patch, compares images "
        "drawn with and without it, and writes a report. Takes about two minutes on a CPU and needs no network.",
    )
    commands.add(
        "erase",
        "Erase concepts from a model and write a patch",
        run_erase,
        _erase_arguments,
        "An interrupted run is resumed by the same command. Where the erasure has to resist attacks, the method to "
        "name depends on the attack: docs/which-method.md.",
        "erasure erase cat -o cat.safetensors\n"
        "erasure erase cat dog --method spm --set iterations=200 -o pets.safetensors\n"
        "erasure erase --list names.yaml --model sd15.safetensors -o p.safetensors",
    )
    commands.add(
        "plan",
        "Forecast the cost of an erasure",
        run_plan,
        _plan_arguments,
        "Reports the UNet forwards and backwards, the seconds and the memory that `erasure erase` would take with the "
        "same arguments. Nothing is trained or written.",
        "erasure plan cat dog --method spm",
    )
    commands.add(
        "bench",
        "Compare methods on concepts of the bundled model",
        run_bench,
        _bench_arguments,
        "Erases every concept with every method, evaluates each patch, and writes a table, a picture and a page.",
        'erasure bench --methods esd spm --concepts cat "cat+dog" --limit 80',
    )


def _demo_arguments(parser: Parser) -> None:
    Options(parser, "concept").add(
        "concept", nargs="?", default="cat", metavar="CONCEPT", help="Object or style that glyph can draw"
    )
    add_folder(Options(parser, "output"), "erasure-demo")


def _erase_arguments(parser: Parser) -> None:
    _what_arguments(parser)
    output = Options(parser, "output")
    add_file(output, "patch.safetensors", "Patch file to write")
    output.add(
        "--preview-every",
        type=int,
        metavar="STEPS",
        shown="no previews",
        help="Draw the concept and its neighbours every so many steps, into FILE.previews",
    )
    output.add(
        "--log",
        metavar="TRACKER",
        names=choices.TRACKERS,
        repeat=True,
        help="Log the losses into FILE.logs with one of these trackers",
    )


def _plan_arguments(parser: Parser) -> None:
    _what_arguments(parser).add(
        "--processes", type=int, default=1, metavar="N", help="Number of distributed processes to plan for"
    )


def _what_arguments(parser: Parser) -> Options:
    """Add what is erased, from what and how; returns the group about computing."""
    concept = Options(parser, "concept")
    concept.add(
        "concept", nargs="*", metavar="CONCEPT", help="Name of a concept; several are erased together, by one patch"
    )
    concept.add(
        "--list",
        type=Path,
        metavar="FILE",
        completes=FILE,
        help="Erase the names of this YAML file instead, and keep those that it lists, by one closed-form solve",
    )
    concept.add(
        "--kind",
        metavar="KIND",
        names=choices.KINDS,
        shown="what the model's vocabulary or our word lists say; a name that they lack needs it",
        help="Kind of concept",
    )
    concept.add("--alias", metavar="NAME", repeat=True, help="Another name of the concept")
    concept.add(
        "--anchor",
        metavar="TEXT",
        shown="left to the method",
        help="What the concept's prompts should show instead",
    )
    concept.add(
        "--keep",
        metavar="NAME",
        repeat=True,
        shown="neighbours found by the text encoder",
        help="Neighbour to preserve. A method without a retain term, such as esd, only records it",
    )
    method = Options(parser, "method and settings")
    method.add(
        "--method",
        metavar="METHOD",
        names=choices.methods(),
        shown="what the preset of the model's family says for the kind of concept; speed for a list",
        see="erasure list methods",
        help="Method of erasing",
    )
    method.add("--config", type=Path, metavar="FILE", completes=FILE, help="YAML file with settings of the method")
    add_settings(method, "the method, over those of --config", "erasure list methods NAME")
    method.add(
        "--preset",
        metavar="PRESET",
        names=choices.presets(),
        shown="that of the model's family",
        see="erasure list presets",
        help="Preset whose settings are taken",
    )
    method.add(
        "--stop",
        metavar="WHEN",
        names=choices.STOPS,
        shown="what the settings say, which is never unless a preset or a file says auto",
        help="When training ends: after all updates, or (auto) once the concept is gone on states held out of training",
    )
    add_seed(method)
    add_model(parser, "to erase from")
    computing = Options(parser, "computing")
    add_device(computing)
    computing.add(
        "--precision",
        metavar="DTYPE",
        names=choices.DTYPES,
        shown="bf16 on GPUs that support it, else fp32; trained weights are always fp32",
        help="Data type that the UNet computes in",
    )
    for flag, text in (
        ("--channels-last", "Use the channels-last memory layout, which is faster for convolutions on GPUs"),
        ("--compile", "Compile the UNet, which pays off in long runs"),
        ("--gradient-checkpointing", "Use less memory and about a third more time"),
    ):
        computing.add(flag, action="store_true", default=None, help=text)
    return computing


def _bench_arguments(parser: Parser) -> None:
    runs = Options(parser, "runs")
    runs.add(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="METHOD",
        names=("all", *choices.methods()),
        shown="all",
        help="Methods to compare",
    )
    runs.add(
        "--concepts",
        nargs="+",
        metavar="CONCEPT",
        shown="those of configs/concepts/glyph.yaml",
        help='Concepts to erase; "a+b" by one patch, "a&b" by two stacked patches',
    )
    runs.add("--limit", type=int, metavar="N", shown="all", help="Number of prompts per concept, approximately")
    add_settings(runs, "every run")
    runs.add(
        "--rows-from",
        type=Path,
        metavar="FILE",
        help="Take rows from an earlier table (bench.json) with the same settings instead of measuring them again",
    )
    add_folder(Options(parser, "output"), "build/bench")


def run_demo(args: argparse.Namespace) -> None:
    """Run `erasure demo`."""
    from erasure.benchmark.demo import demo
    from erasure.model.loading import quiet

    quiet()
    tell = (lambda _: None) if args.json else lambda text: print(page(text))
    result = demo(args.concept, args.out, progress=not args.json, say=tell)
    say(args, result.to_json(), f"{result.summary}\n4. {result.seconds:.0f} s; the report: {result.report}\n{APP}")


def named(args: argparse.Namespace) -> list[Any]:
    """Return the concepts of the command line.

    Raises:
        ErasureError: an alias, an anchor or a neighbour for several concepts at once.
    """
    if not args.concept:
        raise ErasureError("which concept should be erased? Give CONCEPT, or a list of names with --list")
    details = {"aliases": args.alias, "anchor": args.anchor, "keep": args.keep, "kind": args.kind}
    details = {key: value for key, value in details.items() if value}
    if len(args.concept) > 1 and details.keys() - {"kind"}:
        raise ErasureError(
            "--alias, --anchor and --keep belong to one concept, and several are given: write them into a list "
            "(--list), or erase from Python: erase(model, [{'name': .., 'anchor': ..}, ..])"
        )
    return [{"name": name, **details} if details else name for name in args.concept]


def check_kinds(model: Any, concepts: list[Any]) -> None:
    """Refuse names of which neither the command line nor a list says what kind of concept they are.

    Glyph, and what has its architecture, is for trying things out: there an unknown name is an object.

    Raises:
        ErasureError: naming them, and the choices.
    """
    from erasure.erasing import unlisted

    preset = model.family().preset
    missing = unlisted(model, concepts) if preset is None or preset.checkpoint is None else ()
    if missing:
        raise ErasureError(
            f"no list knows {', '.join(map(repr, missing))}: say with --kind what it is, one of "
            f"{', '.join(choices.KINDS)}. The kind decides which layers a method trains and which prompts it erases "
            "from. Nothing was changed"
        )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the command line: of the method, and how to compute."""
    from dataclasses import fields

    from erasure.config import parse_overrides
    from erasure.training.compute import Computing

    flags = {name: getattr(args, name) for name in ("stop", *(field.name for field in fields(Computing)))}
    return {**parse_overrides(args.set), **{key: value for key, value in flags.items() if value is not None}}


def run_erase(args: argparse.Namespace) -> None:
    """Run `erasure erase`."""
    from erasure.config import read_yaml
    from erasure.distributed import speaks
    from erasure.erasing import LAYERS, erase, settle
    from erasure.training.compute import Computing

    if args.list is not None:
        name_list.run_erase(args, settings(args))
        return
    concepts, model, own = named(args), base(args), settings(args)
    check_kinds(model, concepts)
    layers = Computing.split(read_yaml(args.config) if args.config else {}, own)[1]
    settled = settle(model, concepts, args.method, dict(zip(LAYERS, layers, strict=True)), preset=args.preset)
    if not args.json and speaks():
        print(page("\n".join(settled.lines())), file=sys.stderr)
    method = settled.chosen.method.method
    patch = erase(
        model,
        concepts,
        method,
        out=args.out,
        config=args.config,
        seed=args.seed,
        progress=False if args.json else None,
        preview_every=args.preview_every,
        trackers=args.log,
        preset=args.preset,
        **own,
    )
    names = ", ".join(repr(name) for name in args.concept)
    costs = patch.costs
    text = (
        f"{args.out}: erases {names} by {method}; took {costs['F']:,} forwards, {costs['B']:,} backwards "
        f"and {costs['seconds']:.1f} s"
    )
    if patch.curves is not None and "stop" in patch.curves:
        text += f"; {patch.curves['stop']['text']}"
    say(args, {"patch": str(args.out), **patch.info(), "sources": settled.lines()}, text)


def run_plan(args: argparse.Namespace) -> None:
    """Run `erasure plan`."""
    from erasure.config import read_yaml
    from erasure.forecast import plan

    if args.list is not None:
        name_list.run_plan(args, settings(args))
        return
    concepts, model = named(args), base(args)
    check_kinds(model, concepts)
    file = read_yaml(args.config) if args.config else {}
    options: dict[str, Any] = {"seed": args.seed, "processes": args.processes, "preset": args.preset, "file": file}
    forecast = plan(model, concepts, args.method, **options, **settings(args))
    say(args, forecast.to_json(), *_plan_page(args, forecast.to_json()))


def _plan_page(args: argparse.Namespace, costs: dict[str, Any]) -> list[Any]:
    """Lay out a forecast, from its plain data."""
    shared = f" in each of {costs['processes']} processes" if costs["processes"] > 1 else ""
    changes = f"{costs['modules']:,} modules, {costs['weights']:,} weights"
    most = "at most " if costs["at_most"] else ""
    time = f"about {costs['seconds']:,.1f} s on this machine" if costs["seconds"] else "not measured without weights"
    return [
        f"To erase {', '.join(map(repr, args.concept))} from {args.model} by {costs['method']}:",
        facts(
            "Work",
            [
                ("changes", changes),
                ("UNet calls", f"{most}{costs['F']:,} F + {costs['B']:,} B (forwards and backwards, per sample)"),
                ("time", time),
            ],
        ),
        facts(
            f"Memory{shared}, in {costs['precision']}",
            [
                (name, size(costs[f"{part}_bytes"]))
                for name, part in (
                    ("peak", "peak"),
                    ("model", "model"),
                    ("working state", "training"),
                    ("activations", "activation"),
                    ("while preparing", "prepare"),
                )
                if costs[f"{part}_bytes"]
            ],
        ),
        heading("Settings, and where they come from"),
        "\n".join(costs["sources"]),
    ]


def size(count: int) -> str:
    """Return a number of bytes in words: 63 MB, 1.2 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def run_bench(args: argparse.Namespace) -> None:
    """Run `erasure bench`."""
    from erasure.benchmark.run import bench
    from erasure.config import parse_overrides
    from erasure.model.loading import quiet

    quiet()
    results = bench(
        args.methods,
        args.concepts,
        args.out,
        limit=args.limit,
        progress=not args.json,
        overrides=parse_overrides(args.set),
        rows_from=args.rows_from,
    )
    say(args, results.to_json(), results.markdown())
