"""Fill the tables of README and docs/ from bench/results: `python bench/readme.py`. A test compares them."""

from __future__ import annotations

import json
from pathlib import Path

from erasure.benchmark import choosing
from erasure.benchmark.comparison import differences
from erasure.benchmark.table import Table
from erasure.formats import matrix

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COSTS = ("F", "B")
COLUMNS = ("UA", "quality", "leak", "IRA", "neighbours", "CRA", "H")  # of the table in docs/results.md
TOGETHER_COLUMNS = tuple(name for name in COLUMNS if name != "quality")  # measured before there was a quality
README_COLUMNS = ("UA", "quality", "leak", "IRA", "H")
README_GROUPS = ("objects", "styles")


def section(name: str, number: int) -> str:
    """Return one block of a Markdown file in bench/results, where empty lines separate the blocks."""
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8").split("\n\n")[number].strip()


def summary(table: Table) -> str:
    """Return README's table: the means over objects and over styles, with fewer columns."""
    head, rule, *rows = table.summary(README_COLUMNS, ()).splitlines()
    return "\n".join(
        [head, rule, *(row for row in rows if row.startswith(tuple(f"| {group}" for group in README_GROUPS)))]
    )


def pages() -> dict[str, dict[str, str]]:
    """Return path of a page -> name of a block -> the text of the block."""
    methods, together, many = (
        Table.from_json(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
        for name in ("glyph", "together", "many")
    )
    return {
        "README.md": {"summary": summary(methods)},
        "docs/closed-forms.md": {"many": many.summary(COLUMNS, ()), "true-size": section("closed_form", 0)},
        "docs/formats.md": {"formats": matrix()},
        "docs/which-method.md": {
            "by-kind": choosing.by_kind(methods),
            "by-number": choosing.by_number([many, together]),
            "by-computing": choosing.by_computing(methods),
            "by-threat": choosing.by_threat(
                json.loads((RESULTS / "attack.json").read_text(encoding="utf-8"))["reports"]
            ),
        },
        "docs/results.md": {
            "methods": methods.summary(COLUMNS, COSTS),
            "differences": differences(methods.comparisons),
            "together": together.summary(TOGETHER_COLUMNS, COSTS),
            "attacked": section("attack", 1),
            "costs": section("costs", 1),
            "stopping": section("stopping", 1),
            "membranes": "\n\n".join(
                [section("membranes", 0).partition("\n")[2], section("membranes", 1), section("membranes", 2)]
            ),
            "drawing": "\n\n".join([section("pipelines", 0).partition("\n")[2], section("pipelines", 1)]),
        },
    }


def filled(page: str, text: str) -> str:
    """Return the text of a page with its blocks filled from the results.

    Args:
        page: path from the root of the repository, such as `docs/results.md`.
        text: the current text of the page.

    Raises:
        ValueError: the text lacks a block.
    """
    for name, body in pages()[page].items():
        head, opening, remainder = text.partition(f"<!-- {name} -->\n")
        _, closing, tail = remainder.partition(f"<!-- /{name} -->")
        if not opening or not closing:
            raise ValueError(f"{page} lacks the block {name}")
        text = f"{head}{opening}{body}\n{closing}{tail}"
    return text


if __name__ == "__main__":
    for page in pages():
        path = ROOT / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")
