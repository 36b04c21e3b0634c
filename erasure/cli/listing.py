"""Commands that list what is available: `erasure list KIND [NAME]`, and the short forms `erasure methods` and so on."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from erasure.cli import choices
from erasure.cli.arguments import Commands, Options, Parser
from erasure.cli.output import facts, heading, reflowed, say, table
from erasure.cli.preset_tables import run_presets
from erasure.cli.settings import parameters, rows, shown
from erasure.errors import unknown

ABOUT = {
    "methods": "methods of erasing; with a name, its paper, equation and settings",
    "attacks": "attacks on an erasure; with a name, its settings",
    "judges": "judges that say what an image shows; with a name, its options",
    "models": "bundled models; with any model, what each variant of a method trains",
    "presets": "families of models; with a name, their settings with the sources",
    "suites": "bundled evaluation suites; with a name, its parts",
    "prompts": "bundled prompt sets; with a name, its prompts",
}
NAMES: dict[str, Callable[[], tuple[str, ...]]] = {
    "methods": choices.methods,
    "models": lambda: (*choices.models(), *choices.checkpoint_kinds(), *choices.networks()),
    "suites": choices.suites,
    "prompts": choices.prompt_sets,
}
ALIASES = tuple(NAMES)
NEIGHBOURHOOD = "prompts about the concept itself, its other names, its neighbours, and others"  # a part named "about"


def add_commands(commands: Commands) -> None:
    """Add list, and its short forms."""
    commands.add(
        "list",
        "List methods, attacks, judges, models, presets, suites or prompt sets",
        run_list,
        _list_arguments,
        "Kinds:\n" + "\n".join(f"  {kind:9}{about}" for kind, about in ABOUT.items()),
        "erasure list methods\nerasure list methods esd\nerasure list models sd1",
    )
    for kind in ALIASES:
        commands.add(kind, f"Short for `erasure list {kind}`", RUN[kind], partial(_name_argument, names=NAMES[kind]()))


def _list_arguments(parser: Parser) -> None:
    listed = Options(parser, "what to list")
    listed.add("kind", nargs="?", metavar="KIND", names=tuple(ABOUT), help="What to list")
    listed.add("name", nargs="?", metavar="NAME", help="Show the details of this one")


def _name_argument(parser: Parser, names: Sequence[str]) -> None:
    Options(parser, "what to list").add(
        "name", nargs="?", metavar="NAME", names=names, shown="list all", help="Show the details of this one"
    )


def run_list(args: argparse.Namespace) -> None:
    """Run `erasure list`."""
    if args.kind is None:
        say(args, ABOUT, table(("kind", "what it lists"), ABOUT.items()), "\nGive a kind: erasure list KIND [NAME]")
        return
    if args.kind not in RUN:
        raise unknown("kind of list", args.kind, RUN)
    RUN[args.kind](args)


def run_methods(args: argparse.Namespace) -> None:
    """Run `erasure list methods`."""
    from erasure import methods

    if args.name:
        _method(args)
        return
    summaries = {name: _summary(inspect.getmodule(methods.find(name))) for name in methods.names()}
    say(
        args,
        summaries,
        table(("method", "what it is"), summaries.items()),
        "\nDetails and settings: erasure list methods NAME",
    )


def _method(args: argparse.Namespace) -> None:
    from erasure import methods
    from erasure.model import presets

    cls = methods.find(args.name)
    settings = rows(cls)
    data = {
        row.name: {"default": row.default, "type": row.type, "allowed": row.allowed, "about": row.about}
        for row in settings
    }
    tuned = presets.find("glyph")
    changed = {kind: tuned.settings(args.name, kind) for kind in choices.KINDS}
    lines = [f"kind {kind}: {_values({k: v for k, (v, _) in own.items()})}" for kind, own in changed.items() if own]
    others = [name for name in presets.names() if name != tuned.name and args.name in presets.find(name).groups]
    lines += [f"other models: erasure list presets {name}" for name in others]
    parity = getattr(cls, "PARITY", {})
    lines += [f"parity=true: {_values(parity)}"] if parity else []
    lines += [f"parity=true, kind {kind}: {_values(more)}" for kind, more in getattr(cls, "PARITY_KINDS", {}).items()]
    deviations = (inspect.getdoc(cls) or "").partition("Args:")[0].partition("\n\n")[2].strip()
    say(
        args,
        data,
        reflowed(inspect.getdoc(inspect.getmodule(cls)) or ""),
        *(["\n" + re.sub(r"\n +", " ", deviations)] if deviations else []),  # one line for each item
        heading("Settings (--set NAME=VALUE)"),
        table(("name", "default", "allowed", "meaning"), [row.cells() for row in settings]),
        *([heading("Other defaults"), *lines] if lines else []),
    )


def _values(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in settings.items())


def run_attacks(args: argparse.Namespace) -> None:
    """Run `erasure list attacks`, and `erasure attack --list`."""
    from erasure.evaluation.attacks import detuning
    from erasure.evaluation.attacks.attack import find, names

    known, name = (*names(), detuning.NAME), getattr(args, "name", None)
    if name is None:
        summaries = {name: _summary(find(name)) for name in names()}
        summaries[detuning.NAME] = _summary(detuning.detuning)
        say(
            args,
            summaries,
            table(("attack", "what it does"), summaries.items()),
            "\nDetails and settings: erasure list attacks NAME",
        )
    elif name == detuning.NAME:
        _attack(args, detuning.Detuning, detuning, "exported weights", {})
    elif name in known:
        _attack(args, find(name), find(name), find(name).access, find(name).LITE)
    else:
        raise unknown("attack", name, known)


def _attack(args: argparse.Namespace, cls: type[Any], documented: Any, access: str, lite: dict[str, Any]) -> None:
    """Show one attack: what it does, what the attacker needs, and what its two budgets set."""
    settings = rows(cls)
    data = {
        row.name: {
            "default": row.default,
            "lite": lite.get(row.name, row.default),
            "type": row.type,
            "about": row.about,
        }
        for row in settings
    }
    about = (inspect.getdoc(documented) or "").partition("Args:")[0].strip()
    values = [(row.shown, shown(lite.get(row.name, row.default))) for row in settings]
    cells = [(row.name, *value, row.allowed, row.about) for row, value in zip(settings, values, strict=True)]
    say(
        args,
        data,
        f"{args.name}: {reflowed(about)}",
        f"\nThe attacker needs: {access}.",
        *_section(
            "Settings (--set NAME=VALUE), with --budget full (as published) and lite (adapted)",
            ("name", "full", "lite", "allowed", "meaning"),
            cells,
            "It has no settings.",
        ),
    )


def run_judges(args: argparse.Namespace) -> None:
    """Run `erasure list judges`."""
    from erasure.evaluation.judges.registry import SPEC, factory, kinds

    if args.name is None:
        summaries = {kind: _summary(factory(kind)) for kind in kinds()}
        say(
            args,
            summaries,
            table(("judge", "what it says"), summaries.items()),
            f"\nWritten as {SPEC}.\nDetails and options: erasure list judges NAME",
        )
        return
    if args.name not in kinds():
        raise unknown("judge", args.name, kinds())
    make = factory(args.name)
    options = parameters(make)
    say(
        args,
        {row.name: {"default": row.default, "type": row.type, "about": row.about} for row in options},
        f"{args.name}: {reflowed(inspect.getdoc(make) or '')}",
        *_section(
            f"Options (--judge {args.name}{':SOURCE' if _sourced(make) else ''}?OPTION=VALUE&...)",
            ("name", "default", "allowed", "meaning"),
            [row.cells() for row in options],
            "It takes no options.",
        ),
    )


def _section(title: str, heads: Sequence[str], cells: Sequence[Sequence[object]], none: str) -> list[Any]:
    return [heading(title), table(heads, cells)] if cells else [f"\n{none}"]


def _sourced(make: Any) -> bool:
    return "source" in inspect.signature(make).parameters


def run_models(args: argparse.Namespace) -> None:
    """Run `erasure list models`."""
    from erasure.model import presets

    if args.name:
        _model(args)
        return
    models = {name: preset.about for name, preset in presets.bundled().items()}
    say(
        args,
        models,
        table(("model", "what it is"), models.items()),
        "\n--model also takes a hub id (owner/name), a diffusers folder, or a .safetensors file of Stable Diffusion "
        "1, 2 or XL. What each variant of a method would train: erasure list models MODEL, or a type of checkpoint: "
        f"{', '.join((*choices.checkpoint_kinds(), *choices.networks()))}",
    )


def _model(args: argparse.Namespace) -> None:
    from erasure.model.loading import quiet
    from erasure.model.meta import counts, load_meta

    quiet()
    base = load_meta(args.name)
    variants = counts(base)
    cells = [
        (name, row["modules"], f"{row['weights']:,}", f"{row['rank_1']:,}", base.architecture.variants[name][0])
        for name, row in variants.items()
    ]
    heads = ("variant", "modules", "weights", "rank-1 term", "what trains")
    roles = base.architecture.count(base.pipe)
    say(
        args,
        {"about": base.about, "variants": variants, "architecture": base.architecture.name, "roles": roles},
        f"{args.name}: {base.about}\n",
        table(heads, cells, right=heads[1:4]),
        heading("Modules by role"),
        table(("role", "modules"), roles.items(), right=("modules",)),
    )


def run_suites(args: argparse.Namespace) -> None:
    """Run `erasure list suites`."""
    from erasure.evaluation.suite import Suite, names

    if args.name:
        _suite(args)
        return
    about = {name: Suite.read(name).about for name in names()}
    say(
        args,
        about,
        table(("suite", "what it measures"), about.items()),
        "\nParts, judge and attacks: erasure list suites NAME",
    )


def _suite(args: argparse.Namespace) -> None:
    from erasure.evaluation.suite import Suite

    suite = Suite.read(args.name)
    parts = {
        name: part.prompts or f"{part.template} ({', '.join(f'{len(v)} {k}' for k, v in part.fill.items())})"
        for name, part in suite.parts.items()
    }
    data: dict[str, Any] = {
        "about": suite.about,
        "source": suite.source,
        "base": suite.base,
        "judge": suite.judge,
        "parts": parts,
        "attacks": list(suite.attacks),
        "cases": suite.cases if suite.attacks else None,
        "peers": {kind: list(peers.concepts) for kind, peers in suite.peers.items()},
    }
    protocol = [("source", suite.source), ("made for", suite.base), ("judge", suite.judge)]
    protocol += [("attacks", f"{', '.join(suite.attacks)}, on {suite.cases} prompts")] if suite.attacks else []
    protocol += [("differs", suite.differs)] if suite.differs else []
    protocol += [(f"{kind} concepts", ", ".join(peers.concepts)) for kind, peers in suite.peers.items()]
    say(
        args,
        data,
        f"{args.name}: {suite.about}",
        facts("Protocol", protocol),
        facts("Parts", [(name, NEIGHBOURHOOD if text == "about" else text) for name, text in parts.items()]),
    )


def run_prompts(args: argparse.Namespace) -> None:
    """Run `erasure list prompts`."""
    from erasure.prompts.prompt_set import PromptSet, names

    if args.name:
        prompts = PromptSet.read(args.name).rows
        data = [{"id": row.id, "prompt": row.prompt, "seed": row.seed, **row.labels} for row in prompts]
        cells = [(row.id, row.seed, row.prompt, _values(row.labels)) for row in prompts]
        say(args, data, table(("id", "seed", "prompt", "labels"), cells, right=("seed",)))
        return
    sets = {name: PromptSet.read(name).rows for name in names()}
    counted = [(name, len(prompts), prompts[0].prompt) for name, prompts in sets.items()]
    say(
        args,
        {name: len(prompts) for name, prompts in sets.items()},
        table(("prompt set", "prompts", "first prompt"), counted, right=("prompts",)),
        "\nAll prompts of a set: erasure list prompts NAME",
    )


def _summary(thing: Any) -> str:
    """Return the first sentence of a docstring."""
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.?!])\s+(?=[A-Z])", paragraph)[0]


RUN = {
    "methods": run_methods,
    "attacks": run_attacks,
    "judges": run_judges,
    "models": run_models,
    "presets": run_presets,
    "suites": run_suites,
    "prompts": run_prompts,
}
