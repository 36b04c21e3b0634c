"""The documentation page of each method, from its docstring, its settings and the tables of results.

A new method file appears by itself. mkdocs asks for the pages while it builds the site (bench/docs_site.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from erasure import methods
from erasure.benchmark.choosing import figures
from erasure.benchmark.table import Table
from erasure.cli.settings import rows
from erasure.method import ClosedFormMethod, GradientMethod, RuntimeMethod

KINDS = {
    GradientMethod: "trains",
    ClosedFormMethod: "solves for weights, without training",
    RuntimeMethod: "changes no weights: it acts while images are made",
}


def method_page(name: str, tables: Mapping[str, Table]) -> str:
    """Return the Markdown page of a method.

    Args:
        name: name of the method.
        tables: what was measured -> its table.
    """
    cls = methods.find(name)
    doc = inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or ""
    measured = figures(name, tables) or f"Not in the tables yet. `erasure bench --methods {name}` measures it."
    settings = [
        "| `--set` | default | allowed | meaning |",
        "|---|---|---|---|",
        *(f"| {' | '.join(_cell(cell) for cell in row.cells())} |" for row in rows(cls)),
    ]
    parts = [
        f"# {name}",
        f"This method {kind(name)}. The text is that of `erasure list methods {name}`.",
        doc,
        f"```bash\nerasure erase cat --method {name} -o cat.safetensors\n```",
        "## Figures\nOn glyph, with 95 % intervals; [results](../results.md) says what the columns mean, and "
        "[which method](../which-method.md) compares the methods.",
        measured,
        "## Settings\nDefaults of the code; a model's [preset](../presets.md) may set others.",
        "\n".join(settings),
    ]
    return "\n\n".join(parts) + "\n"


def method_list(tables: Mapping[str, Table]) -> str:
    """Return the Markdown page that lists the methods.

    Args:
        tables: what was measured -> its table.
    """
    lines = ["| method | what it is | it | measured |", "|---|---|---|---|"]
    for name in methods.names():
        about = summary(name)
        seen = [title for title, table in tables.items() if any(row.method == name for row in table.rows)]
        lines.append(f"| [{name}]({name}.md) | {_cell(about)} | {kind(name)} | {', '.join(seen)} |")
    return "# Methods\n\n" + "\n".join(lines) + "\n"


def summary(name: str) -> str:
    """Return the first paragraph of a method's docstring on one line."""
    cls = methods.find(name)
    doc = inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or ""
    return " ".join(doc.split("\n\n")[0].split())


def kind(name: str) -> str:
    """Return what a method does, in words, from the class that it derives from."""
    cls = methods.find(name)
    return next((words for parent, words in KINDS.items() if issubclass(cls, parent)), "works in a way of its own")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
