"""The parser class of the command: help in groups, with choices and defaults, and a usage line without every option."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

WIDEST = 100  # columns of a help page, at most
FILE, FOLDER = "file", "folder"  # what the shell completes


class WrongUse(Exception):
    """A command line that cannot be parsed, with the parser that refused it."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """A parser that groups its help, raises WrongUse, and keeps the general options for the end."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Help, **settings, "add_help": False})

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            WrongUse: always; main prints it.
        """
        raise WrongUse(self, message)


class Help(argparse.RawDescriptionHelpFormatter):
    """The layout of a help page."""

    def __init__(self, prog: str) -> None:
        columns = min(shutil.get_terminal_size().columns, WIDEST)
        super().__init__(prog, width=columns - 2)

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        """Show what has to be given; the options are listed below by group."""
        words = [_usage_word(action) for action in actions if action.required or not action.option_strings]
        line = " ".join([self._prog, "[options]", *filter(None, words)])
        super().add_usage(line.replace("%", "%%") if usage is None else usage, [], [], prefix)

    def add_text(self, text: str | None) -> None:
        """Wrap a description's prose; lines that are indented stay."""
        if text is None or text is argparse.SUPPRESS:
            return
        paragraphs = text.split("\n\n")
        filled = [part if "\n " in part else self._fill_prose(part) for part in paragraphs]
        super().add_text("\n\n".join(filled))

    def _fill_prose(self, text: str) -> str:
        return "\n".join(self._split_lines(text, self._width))

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap at spaces only: names with hyphens stay whole."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return `-o, --out FILE`, not `-o FILE, --out FILE`."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = self._format_args(action, (action.dest or "").upper())
        return f"{', '.join(action.option_strings)} {metavar}"

    def _format_action(self, action: argparse.Action) -> str:
        sections: dict[str, Sequence[str]] | None = getattr(action, "sections", None)
        if sections is None or not isinstance(action, argparse._SubParsersAction):
            return super()._format_action(action)
        about = {entry.dest: entry.help or "" for entry in action._choices_actions}
        column = max(map(len, about)) + 4
        lines = []
        for title, names in sections.items():
            lines.append(f"  {title}:")
            for name in names:
                first, *rest = self._split_lines(about[name], max(self._width - column - 2, 11))
                lines.append(f"    {name:{column - 2}}{first}")
                lines += [f"{'':{column + 2}}{line}" for line in rest]
        return "\n".join([*lines, ""])


def _usage_word(action: argparse.Action) -> str:
    if action.help is argparse.SUPPRESS:
        return ""
    word = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.option_strings:
        return f"{action.option_strings[0]} {word}"
    if isinstance(action, argparse._SubParsersAction):
        return f"{word} ..."
    return {"?": f"[{word}]", "*": f"[{word} ...]", "+": f"{word} [{word} ...]"}.get(str(action.nargs), word)


class Options:
    """A titled group of arguments of one command."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def add(
        self,
        *flags: str,
        help: str,
        names: Sequence[str] = (),
        shown: str = "",
        repeat: bool = False,
        see: str = "",
        completes: str = "",
        **settings: Any,
    ) -> None:
        """Add an argument whose help ends with its choices, its default and whether it may be repeated.

        Args:
            flags: `-o`, `--out`; or the name of a positional argument.
            help: what it does, as one sentence without a full stop.
            names: values to show and to complete; others are not refused here.
            shown: the default in words, where the parser's own is None.
            repeat: collect the values of several uses in a list.
            see: a command that tells more.
            completes: FILE or FOLDER, for the shell.
            settings: what argparse takes.
        """
        if repeat:
            settings = {"action": "append", "default": [], **settings}
        default = settings.get("default")
        if not shown and default is not None and default != [] and settings.get("action") != "store_true":
            shown = str(default)
        remarks = [
            f"default: {shown}" if shown else "",
            "may be repeated" if repeat else "",
            f"see `{see}`" if see else "",
        ]
        text = f"{help}: {', '.join(names)}" if names else help
        ending = "; ".join(filter(None, remarks))
        action = self._group.add_argument(
            *flags, help=f"{text} ({ending})".replace("%", "%%") if ending else text.replace("%", "%%"), **settings
        )
        action.names, action.completes, action.about = tuple(names), completes, help  # type: ignore[attr-defined]


class Commands:
    """The subcommands of a parser; each ends with the options that all of them have."""

    def __init__(self, parser: argparse.ArgumentParser, dest: str, metavar: str, sections: dict[str, Any]) -> None:
        self._commands = parser.add_subparsers(
            title=dest + "s", dest=dest, metavar=metavar, required=True, parser_class=Parser, prog=parser.prog
        )
        self._commands.sections = sections  # type: ignore[attr-defined]

    def add(
        self,
        name: str,
        about: str,
        run: Callable[[argparse.Namespace], int | None] | None,
        arguments: Callable[[Parser], None] = lambda parser: None,
        details: str = "",
        examples: str = "",
    ) -> Parser:
        """Add a subcommand.

        Args:
            name: as users type it.
            about: what it does, as one sentence without a full stop.
            run: does it, given the parsed command line, and returns the exit code; None stands for 0.
            arguments: adds its own arguments, in groups.
            details: more for its help page.
            examples: command lines, one a line.
        """
        parser: Parser = self._commands.add_parser(
            name,
            help=about.replace("%", "%%"),
            description=("\n\n" if "\n" in details else " ").join(filter(None, [f"{about}.", details])),
            epilog=f"examples:\n{_indented(examples)}" if examples else None,
        )
        arguments(parser)
        add_general(parser)
        parser.set_defaults(parser=parser, **({} if run is None else {"run": run}))
        return parser


def add_general(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has."""
    general = Options(parser, "general")
    general.add("-h", "--help", action="help", help="Show this help and exit")
    # Their defaults are the top parser's: `erasure patch --json info` must not be undone by the inner parser.
    unset = argparse.SUPPRESS
    general.add(
        "--json", action="store_true", default=unset, help="Print the result as one JSON document and nothing else"
    )
    general.add("--debug", action="store_true", default=unset, help="Show the traceback of an unexpected error")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())
