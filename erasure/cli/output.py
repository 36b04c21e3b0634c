"""What the commands print: pages of text and tables, by rich.

They are plain text where stdout is not a terminal or NO_COLOR is set. rich is imported by the functions that need it,
so that `--help` does not wait for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN, WIDEST = 100, 120  # columns where no terminal says how many it has, and at most
INDENT = "  "


def styled(stream: TextIO) -> bool:
    """Return whether colours and bold type suit a stream: a terminal, without NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width() -> int:
    """Return how many columns a page may take: COLUMNS, else the terminal's own, else PLAIN."""
    return min(shutil.get_terminal_size((PLAIN, 24)).columns, WIDEST) if _sized() else PLAIN


def _sized() -> bool:
    return sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()


def say(args: argparse.Namespace, data: Any, *blocks: Any) -> None:
    """Print the result of a command: `data` as one JSON document with --json, else a page of blocks.

    Only the first of the processes that a launcher started prints.

    Args:
        args: the command line.
        data: plain JSON values.
        blocks: texts, in which Markdown tables become tables of the page, and what `table` and `facts` return.
    """
    from erasure.distributed import speaks

    if speaks():
        print(json.dumps(data, indent=1) if args.json else page(*blocks))


def page(*blocks: Any) -> str:
    """Lay out blocks one below the other, wrapped to the width; nothing is cut."""
    import io

    from rich.console import Console

    columns, bright = width(), styled(sys.stdout)
    console = Console(
        file=io.StringIO(),
        width=columns,
        force_terminal=bright,
        no_color=not bright,
        color_system="standard" if bright else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    parts = [part for block in blocks for part in (_parts(block) if isinstance(block, str) else [block])]
    with console.capture() as capture:
        for part in parts:
            console.print(wrapped(part, columns) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _parts(text: str) -> Iterator[Any]:
    """Split a text into prose and its Markdown tables."""
    for is_table, lines in _runs(text.split("\n")):
        if is_table:
            cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
            yield table(cells[0], [row for row in cells[1:] if set("".join(row)) - set("-: ")])
        else:
            yield "\n".join(lines)


def _runs(lines: Iterable[str]) -> list[tuple[bool, list[str]]]:
    runs: list[tuple[bool, list[str]]] = []
    for line in lines:
        is_table = line.startswith("|") and line.rstrip().endswith("|")
        if not runs or runs[-1][0] != is_table:
            runs.append((is_table, []))
        runs[-1][1].append(line)
    return runs


def wrapped(text: str, columns: int) -> str:
    """Wrap lines of prose that are too long; lines that are laid out in columns stay."""
    return "\n".join(
        line if len(line) <= columns or re.search(r"\S {3,}\S", line) else _filled(line, columns)
        for line in text.split("\n")
    )


def _filled(line: str, columns: int) -> str:
    start = line[: len(line) - len(line.lstrip())]
    indent = start + INDENT if start else ""
    return textwrap.fill(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def reflowed(text: str) -> str:
    """Join the lines of each paragraph of a docstring, so that it wraps to any width; indented blocks stay."""
    paragraphs = re.split(r"\n{2,}", text.strip("\n"))
    return "\n\n".join(
        paragraph if any(line.startswith(" ") for line in paragraph.split("\n")) else " ".join(paragraph.split())
        for paragraph in paragraphs
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> Any:
    """Make a table; cells wrap inside their column, and the first column is kept whole where there is room.

    Args:
        heads: titles of the columns.
        rows: cells, as texts or what `str` makes of them.
        right: titles of the columns whose cells are aligned at the right.
    """
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, head in enumerate(heads):
        grid.add_column(
            head, justify="right" if head in right else "left", overflow="fold", style="cyan" if place == 0 else None
        )
    for row in rows:
        grid.add_row(*map(str, row))
    return grid


def facts(title: str, pairs: Iterable[tuple[str, object]]) -> Any:
    """Make a section of a page: a title, and below it a name and a value a line."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", overflow="fold")
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, str(value))
    return Group(heading(title), Padding(grid, (0, 0, 0, len(INDENT))))


def heading(title: str) -> Any:
    """Make the title of a section, with an empty line before it."""
    from rich.text import Text

    return Text.assemble("\n", (title, "bold"))


def fail(message: str, word: str = "error") -> None:
    """Print why a command stopped on stderr, as `erasure: error: MESSAGE`."""
    prefix = f"erasure: {word}: " if word else "erasure: "
    if not styled(sys.stderr):
        print(f"{prefix}{message}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False).print(Text.assemble((prefix, "bold red"), message), soft_wrap=True)


@contextmanager
def waiting(args: argparse.Namespace, text: str) -> Iterator[None]:
    """Show a spinner with a text on stderr while something takes long; on a terminal, and without --json, alone."""
    if args.json or not styled(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
