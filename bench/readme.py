"""Put the tables of bench/results into README: `python bench/readme.py`. A test compares the two."""

from __future__ import annotations

import json
from pathlib import Path

from erasure.benchmark.table import Table

ROOT = Path(__file__).resolve().parents[1]
SHOWN, COSTS = ("UA", "leak", "IRA", "neighbours", "CRA", "H"), ("F", "B")


def blocks() -> dict[str, str]:
    """Name of a block of README -> what stands in it."""
    results = ROOT / "bench" / "results"
    methods = Table.from_json(json.loads((results / "glyph.json").read_text(encoding="utf-8")))
    parts = {name: (results / f"{name}.md").read_text(encoding="utf-8").split("\n\n") for name in ("attack", "costs")}
    return {
        "methods": methods.summary(SHOWN, COSTS),
        "attacked": parts["attack"][1].strip(),
        "costs": parts["costs"][1].strip(),
    }


def filled(text: str) -> str:
    """README with its blocks as the results have them.

    Raises:
        ValueError: one is not there.
    """
    for name, body in blocks().items():
        head, opened, rest = text.partition(f"<!-- {name} -->\n")
        _, closed, tail = rest.partition(f"<!-- /{name} -->")
        if not opened or not closed:
            raise ValueError(f"README lacks the block {name}")
        text = f"{head}{opened}{body}\n{closed}{tail}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
