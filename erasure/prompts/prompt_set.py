"""Prompt sets: rows of id, prompt, seed and labels, read from and written to CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from erasure.errors import ErasureError, unknown
from erasure.prompts.row import FIXED, Prompt
from erasure.prompts.row_filter import Condition

FOLDER = Path(__file__).resolve().parent
# How the columns are called when written; labels follow under their own names.
FORMS = {"ours": FIXED, "published": ("case_number", "prompt", "evaluation_seed", "evaluation_guidance")}


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
        """A set by its name in the package, from a file, or of a data set on the hub (`hub:owner/name/file.csv`).

        Our columns are id, prompt, seed, optionally guidance; every other column is a label. Published forms and
        their column names are understood as well: see readers.py.

        Raises:
            ErasureError: no such set or file, no column of prompts, or a bad cell, with its row and column.
        """
        # Both need Prompt from here.
        from erasure.prompts import hub_sets, readers

        text = os.fspath(source)
        if text.startswith(hub_sets.PREFIX):
            path = hub_sets.fetch(text)
        else:
            path = FOLDER / f"{text}.csv" if text in names() else Path(text)
        if not path.is_file():
            where = f"{text}: a folder, and no file. " if path.is_dir() else ""
            raise ErasureError(
                f"{where}{unknown('prompt set', text, names())}, or the path of a CSV, JSON or text file (none lies "
                f"there), or {hub_sets.PREFIX}owner/name"
            )
        return cls(path.stem, readers.read(path))

    def write(self, path: str | os.PathLike[str], form: str = "ours") -> None:
        """Write as CSV in one of FORMS, under a temporary name first.

        Raises:
            ErasureError: an unknown form, a label whose name the form needs itself, an unwritable path.
        """
        target = Path(path)
        text = self.csv(form)
        temporary = target.with_name(f"{target.name}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8", newline="")
            os.replace(temporary, target)
        except OSError as fault:
            raise ErasureError(f"{target}: cannot be written: {fault.strerror or fault}") from None

    def csv(self, form: str = "ours") -> str:
        """The set as CSV text in one of FORMS.

        Raises:
            ErasureError: an unknown form, a label whose name the form needs itself.
        """
        if form not in FORMS:
            raise unknown("form of a prompt set", form, FORMS)
        labels = list(dict.fromkeys(label for row in self.rows for label in row.labels))
        if form != "ours":
            from erasure.prompts.readers import reserved

            clash = [label for label in labels if label.casefold() in reserved()]
            if clash:
                raise ErasureError(f"{self.name}: a label is named {clash[0]!r}, which the {form} form needs itself")
        guided = any(row.guidance is not None for row in self.rows)
        columns = [*FORMS[form][: None if guided else -1], *labels]
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        for row in self.rows:
            fixed = [row.id, row.prompt, row.seed, *([row.guidance] if guided else [])]
            writer.writerow([*fixed, *(row.labels.get(label, "") for label in labels)])
        return out.getvalue()

    def labelled(self, *labels: str) -> PromptSet:
        """Every row with these labels as well, given as `HEAD=VALUE`: published lists about one concept have none.

        Raises:
            ErasureError: another form, a head that is a column of every row, or one whose value a row has already.
        """
        added: dict[str, str] = {}
        for text in labels:
            head, sign, value = (part.strip() for part in text.partition("="))
            if not (head and sign and value) or head in FIXED:
                raise ErasureError(f"label {text!r}: HEAD=VALUE is needed, such as object=church or nudity=nudity")
            other = next((row for row in self.rows if row.labels.get(head, value) != value), None)
            if other is not None:
                raise ErasureError(f"label {text!r}: {self.name}, row {other.id!r} has {head}={other.labels[head]}")
            added[head] = value
        return PromptSet(self.name, [replace(row, labels={**row.labels, **added}) for row in self.rows])

    def where(self, *conditions: str) -> PromptSet:
        """The rows that meet every condition, such as `nudity_percentage>50` or `categories=sexual`.

        The columns are id, prompt, seed, guidance and the labels; see condition.py for what the signs mean.

        Raises:
            ErasureError: a malformed condition, an unknown column, a cell that cannot be compared, no row left.
        """
        wanted = [Condition.parse(text) for text in conditions]
        columns = [*FIXED, *dict.fromkeys(label for row in self.rows for label in row.labels)]
        for one in wanted:
            if one.column not in columns:
                raise unknown(f"column of prompt set {self.name!r}", one.column, columns)
        found = [row for row in self.rows if all(self._meets(row, one) for one in wanted)]
        called = f"{self.name}[{', '.join(map(str, wanted))}]" if wanted else self.name
        if not found:
            raise ErasureError(f"{called}: none of the {len(self.rows)} rows is left")
        return PromptSet(called, found)

    def _meets(self, row: Prompt, condition: Condition) -> bool:
        cell = getattr(row, condition.column) if condition.column in FIXED else row.labels.get(condition.column)
        try:
            return condition.holds("" if cell is None else str(cell))
        except ErasureError as fault:
            raise ErasureError(f"{self.name}, row {row.id!r}, column {condition.column!r}: {fault}") from None

    @property
    def sha256(self) -> str:
        """Of the CSV text."""
        return hashlib.sha256(self.csv().encode()).hexdigest()

    def label_values(self, label: str) -> list[str]:
        """The distinct values of a label, in order of their rows; rows without it are left out."""
        return list(dict.fromkeys(row.labels[label] for row in self.rows if row.labels.get(label)))


def order_by_hash(rows: list[Prompt]) -> list[Prompt]:
    """Rows in an order that depends on their ids alone."""
    return sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).hexdigest())


def reseed(row: Prompt, copy: int) -> Prompt:
    """The row with another seed and id, for copy 1 and more."""
    return row if copy == 0 else replace(row, id=f"{row.id}-{copy}", seed=row.seed + 1_000_003 * copy)
