"""Prompt sets: rows of id, prompt, seed and labels, from a CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from erasure.errors import ErasureError, unknown

FOLDER = Path(__file__).resolve().parent.parent / "prompts"
REQUIRED = ("id", "prompt", "seed")
FIXED = (*REQUIRED, "guidance")


@dataclass(frozen=True)
class Prompt:
    """One row. `labels` say what the prompt names, such as object and style; `guidance` None is the run's own."""

    id: str
    prompt: str
    seed: int
    guidance: float | None = None
    labels: dict[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """The prompt sets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


@dataclass(frozen=True)
class PromptSet:
    """Named rows, each id once."""

    name: str
    rows: Sequence[Prompt]

    def __post_init__(self) -> None:
        """Raises ErasureError for no rows or an id that stands twice."""
        object.__setattr__(self, "rows", tuple(self.rows))
        if not self.rows:
            raise ErasureError(f"prompt set {self.name!r} has no rows")
        seen: set[str] = set()
        for number, row in enumerate(self.rows, 2):
            if row.id in seen:
                raise ErasureError(f"{self.name}, row {number}, column 'id': {row.id!r} stands twice")
            seen.add(row.id)

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> PromptSet:
        """A set by its name in the package, or from a CSV file.

        The columns are id, prompt, seed, optionally guidance; every other column is a label.

        Raises:
            ErasureError: no such set or file, a missing column, or a bad cell, with its row and column.
        """
        text = os.fspath(source)
        path = FOLDER / f"{text}.csv" if text in names() else Path(text)
        if not path.is_file():
            raise unknown("prompt set", text, names())
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as fault:
            raise ErasureError(f"{path}: cannot be read: {fault}") from None
        lines = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        try:
            columns = lines.fieldnames or []
            for column in REQUIRED:
                if column not in columns:
                    raise ErasureError(
                        f"{path}: column {column!r} is missing; it has {', '.join(columns) or 'no columns'}"
                    )
            rows = [_row(path, number, cells) for number, cells in enumerate(lines, 2)]
        except csv.Error as fault:
            raise ErasureError(f"{path}, line {lines.line_num}: {fault}") from None
        return cls(path.stem, rows)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write as CSV, under a temporary name first."""
        target = Path(path)
        temporary = target.with_suffix(".tmp")
        temporary.write_text(self.csv(), encoding="utf-8")
        os.replace(temporary, target)

    def csv(self) -> str:
        """The set as CSV text."""
        labels = list(dict.fromkeys(label for row in self.rows for label in row.labels))
        guided = any(row.guidance is not None for row in self.rows)
        columns = [*REQUIRED, *(["guidance"] if guided else []), *labels]
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in self.rows:
            cells = {"id": row.id, "prompt": row.prompt, "seed": row.seed, **row.labels}
            writer.writerow({**cells, "guidance": "" if row.guidance is None else row.guidance})
        return out.getvalue()

    @property
    def sha256(self) -> str:
        """Of the CSV text."""
        return hashlib.sha256(self.csv().encode()).hexdigest()

    def label_values(self, label: str) -> list[str]:
        """The distinct values of a label, in order of their rows; rows without it are left out."""
        return list(dict.fromkeys(row.labels[label] for row in self.rows if row.labels.get(label)))


def _row(path: Path, number: int, cells: dict[str, str]) -> Prompt:
    if None in cells or None in cells.values():
        raise ErasureError(f"{path}, row {number}: has another number of cells than the header")
    if not cells["id"].strip():
        raise ErasureError(f"{path}, row {number}, column 'id': empty")
    try:
        seed = int(cells["seed"])
    except ValueError:
        raise ErasureError(f"{path}, row {number}, column 'seed': {cells['seed']!r} is no whole number") from None
    try:
        guidance = float(cells["guidance"]) if cells.get("guidance") else None
    except ValueError:
        raise ErasureError(f"{path}, row {number}, column 'guidance': {cells['guidance']!r} is no number") from None
    labels = {key: value for key, value in cells.items() if key not in FIXED and value}
    return Prompt(cells["id"], cells["prompt"], seed, guidance, labels)


def mixed(rows: list[Prompt]) -> list[Prompt]:
    """Rows in an order that depends on their ids alone."""
    return sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).hexdigest())


def again(row: Prompt, copy: int) -> Prompt:
    """The row with another seed and id, for copy 1 and more."""
    return row if copy == 0 else replace(row, id=f"{row.id}-{copy}", seed=row.seed + 1_000_003 * copy)
