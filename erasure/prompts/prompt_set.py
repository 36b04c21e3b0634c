"""Prompt sets: named lists of prompts with ids, seeds and labels, read from and written to CSV files."""

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
# Names of the fixed columns in each CSV format; labels follow under their own names.
FORMS = {"ours": FIXED, "published": ("case_number", "prompt", "evaluation_seed", "evaluation_guidance")}


def names() -> list[str]:
    """List the names of the prompt sets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


@dataclass(frozen=True)
class PromptSet:
    """A named list of prompts whose ids are all different.

    Args:
        name: name of the set, for reports and messages.
        rows: the prompts.

    Raises:
        ErasureError: there are no rows, or an id occurs twice.
    """

    name: str
    rows: Sequence[Prompt]

    def __post_init__(self) -> None:
        """Check that there are rows and that their ids differ."""
        object.__setattr__(self, "rows", tuple(self.rows))
        if not self.rows:
            raise ErasureError(f"prompt set {self.name!r} has no rows")
        seen: set[str] = set()
        for number, row in enumerate(self.rows, 2):
            if row.id in seen:
                raise ErasureError(f"{self.name}, row {number}, column 'id': {row.id!r} occurs twice")
            seen.add(row.id)

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> PromptSet:
        """Read a prompt set of the package, from a file, or from a data set on the hub.

        Our own CSV format has the columns id, prompt, seed and optionally guidance; every other column is a label. The
        formats and column names of published prompt sets are understood as well: see readers.py.

        Args:
            source: the name of a set in the package, the path of a CSV, JSON or text file, or
                `hub:owner/name/file.csv`.

        Raises:
            ErasureError: there is no such set or file, it has no column of prompts, or a cell is invalid; the message
                names its row and column.
        """
        # These modules import Prompt, and only reading needs them.
        from erasure.prompts import hub_sets, readers

        text = os.fspath(source)
        if text.startswith(hub_sets.PREFIX):
            path = hub_sets.fetch(text)
        else:
            path = FOLDER / f"{text}.csv" if text in names() else Path(text)
        if not path.is_file():
            prefix = f"{text} is a folder, not a file. " if path.is_dir() else ""
            raise ErasureError(
                f"{prefix}{unknown('prompt set', text, names())}; or give the path of an existing CSV, JSON or text "
                f"file, or {hub_sets.PREFIX}owner/name"
            )
        return cls(path.stem, readers.read(path))

    def write(self, path: str | os.PathLike[str], form: str = "ours") -> None:
        """Write the set as a CSV file, under a temporary name until it is complete.

        Args:
            path: the file to write.
            form: one of FORMS: `ours`, or `published` for the column names that published scripts expect.

        Raises:
            ErasureError: the form is unknown, a label has a name that the form reserves, or the file cannot be
                written.
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
        """Return the set as CSV text.

        Args:
            form: one of FORMS, as in `write`.

        Raises:
            ErasureError: the form is unknown, or a label has a name that the form reserves.
        """
        if form not in FORMS:
            raise unknown("form of a prompt set", form, FORMS)
        labels = list(dict.fromkeys(label for row in self.rows for label in row.labels))
        if form != "ours":
            from erasure.prompts.readers import reserved

            clash = [label for label in labels if label.casefold() in reserved()]
            if clash:
                raise ErasureError(
                    f"{self.name}: the label {clash[0]!r} has the name of a column that the {form} form reserves"
                )
        has_guidance = any(row.guidance is not None for row in self.rows)
        columns = [*FORMS[form][: None if has_guidance else -1], *labels]
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(columns)
        for row in self.rows:
            fixed = [row.id, row.prompt, row.seed, *([row.guidance] if has_guidance else [])]
            writer.writerow([*fixed, *(row.labels.get(label, "") for label in labels)])
        return buffer.getvalue()

    def labelled(self, *labels: str) -> PromptSet:
        """Return the set with the given labels added to every row.

        Published lists about a single concept carry no label for it; this method adds one.

        Args:
            labels: labels as `HEAD=VALUE`, such as `object=church`.

        Raises:
            ErasureError: a label has another form, its head is one of the fixed columns, or a row already has a
                different value for it.
        """
        added: dict[str, str] = {}
        for text in labels:
            head, sign, value = (part.strip() for part in text.partition("="))
            if not (head and sign and value) or head in FIXED:
                raise ErasureError(f"label {text!r}: expected HEAD=VALUE, such as object=church or nudity=nudity")
            conflict = next((row for row in self.rows if row.labels.get(head, value) != value), None)
            if conflict is not None:
                raise ErasureError(
                    f"label {text!r}: row {conflict.id!r} of {self.name} already has {head}={conflict.labels[head]}"
                )
            added[head] = value
        return PromptSet(self.name, [replace(row, labels={**row.labels, **added}) for row in self.rows])

    def where(self, *conditions: str) -> PromptSet:
        """Return the rows that meet every condition.

        Args:
            conditions: texts such as `nudity_percentage>50` or `categories=sexual`. The columns are id, prompt, seed,
                guidance and the labels; row_filter.py defines the signs.

        Raises:
            ErasureError: a condition is malformed, its column is unknown, a cell cannot be compared, or no row is
                left.
        """
        parsed = [Condition.parse(text) for text in conditions]
        columns = [*FIXED, *dict.fromkeys(label for row in self.rows for label in row.labels)]
        for condition in parsed:
            if condition.column not in columns:
                raise unknown(f"column of prompt set {self.name!r}", condition.column, columns)
        rows = [row for row in self.rows if all(self._meets(row, condition) for condition in parsed)]
        name = f"{self.name}[{', '.join(map(str, parsed))}]" if parsed else self.name
        if not rows:
            raise ErasureError(f"{name}: none of the {len(self.rows)} rows meets the conditions")
        return PromptSet(name, rows)

    def _meets(self, row: Prompt, condition: Condition) -> bool:
        cell = getattr(row, condition.column) if condition.column in FIXED else row.labels.get(condition.column)
        try:
            return condition.holds("" if cell is None else str(cell))
        except ErasureError as fault:
            raise ErasureError(f"{self.name}, row {row.id!r}, column {condition.column!r}: {fault}") from None

    @property
    def sha256(self) -> str:
        """Return the SHA-256 digest of the CSV text, in hexadecimal."""
        return hashlib.sha256(self.csv().encode()).hexdigest()

    def label_values(self, label: str) -> list[str]:
        """List the distinct values of a label in the order of the rows, ignoring rows without it."""
        return list(dict.fromkeys(row.labels[label] for row in self.rows if row.labels.get(label)))


def order_by_hash(rows: list[Prompt]) -> list[Prompt]:
    """Return the rows in an order that looks random but depends on their ids alone."""
    return sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).hexdigest())


def reseed(row: Prompt, copy: int) -> Prompt:
    """Return a copy of a row with another seed and id; copy 0 is the row itself.

    Args:
        row: the row.
        copy: number of the copy, from 0.
    """
    return row if copy == 0 else replace(row, id=f"{row.id}-{copy}", seed=row.seed + 1_000_003 * copy)
