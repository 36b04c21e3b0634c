"""`erasure completion SHELL`: a script that completes commands, options, names and files; shtab writes it."""

from __future__ import annotations

import argparse
from typing import Any

from erasure.cli.arguments import FILE, FOLDER, Commands, Options, Parser
from erasure.cli.output import say
from erasure.errors import unknown

SHELLS = ("bash", "zsh", "fish")


def add_commands(commands: Commands) -> None:
    """Add the command `completion`."""
    commands.add(
        "completion",
        "Print a script that completes the command in a shell",
        run_completion,
        _arguments,
        "How to install it:\n"
        '  bash  eval "$(erasure completion bash)", as a line of ~/.bashrc\n'
        "  zsh   erasure completion zsh > FOLDER/_erasure, where FOLDER is in $fpath\n"
        "  fish  erasure completion fish > ~/.config/fish/completions/erasure.fish",
    )


def _arguments(parser: Parser) -> None:
    Options(parser, "shell").add("shell", metavar="SHELL", names=SHELLS, help="Shell to write it for")


def run_completion(args: argparse.Namespace) -> None:
    """Run `erasure completion`."""
    if args.shell not in SHELLS:
        raise unknown("shell", args.shell, SHELLS)
    text = script(args.root, args.shell)
    if args.json:
        say(args, {"shell": args.shell, "script": text})
    else:
        print(text)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a parser, which is changed on the way: do not parse with it afterwards."""
    import shtab

    _mark(parser, {FILE: shtab.FILE, FOLDER: shtab.DIRECTORY})
    return shtab.complete(parser, shell=shell)


def _mark(parser: argparse.ArgumentParser, completers: dict[str, Any]) -> None:
    """Give shtab the names that the help shows, as choices, the arguments that are paths, and short descriptions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _mark(child, completers)
            continue
        action.help = getattr(action, "about", action.help)
        names, completes = getattr(action, "names", ()), getattr(action, "completes", "")
        if names:
            action.choices = names
        elif completes:
            action.complete = completers[completes]  # type: ignore[attr-defined]
