"""The parts of a suite: prompt sets and templates, with the rows that each contributes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from erasure.errors import ErasureError
from erasure.evaluation.metrics.target import NEIGHBOUR_ROLES, TARGET_ROLES
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt
from erasure.prompts.spread import spread

ROLES = ("", *TARGET_ROLES, *NEIGHBOUR_ROLES)
HEADS = ("object", "style", "identity")  # heads whose labels a suite can pass on to its judge


@dataclass(frozen=True)
class Part:
    """One part of a suite, whose rows come either from a prompt set (`prompts`) or from a template.

    In `prompts`, `template` and `where`, {concept} stands for the name of the first concept, and {data} for the user's
    data folder.

    Args:
        prompts: name, file or hub source of a prompt set; "about": glyph's prompts about the concepts, with roles.
        where: conditions that rows must meet.
        labels: name of a column in the file -> head of the judge.
        put: labels to add to every row.
        only: concepts for which the part is used; empty: all.
        role: role of the rows, one of ROLES (target.py).
        first: number of rows to take from the beginning; None: all.
        limit: largest number of those rows, spread over labels and seeds (`spread`); None: all.
        template: a text with names of `fill` in braces; every combination of their values becomes a row.
        fill: name -> its values; names that are heads become labels.
        seeds: seeds with which every row of a template is repeated.
        get: where the user can get the file, for the message about a missing part.
    """

    prompts: str | None = None
    where: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    put: dict[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    role: str = ""
    first: int | None = None
    limit: int | None = None
    template: str | None = None
    fill: dict[str, list[str]] = field(default_factory=dict)
    seeds: tuple[str, ...] = ("0",)
    get: str = ""

    def rows(self, name: str, concepts: Sequence[str], data: Path | None) -> list[Prompt]:
        """Return the rows of the part, whose ids begin with its name.

        Args:
            name: name of the part.
            concepts: names of the concepts.
            data: the user's data folder, or None.

        Raises:
            ErasureError: a file or the data folder is missing, or the part is malformed.
        """
        if self.only and not set(self.only) & set(concepts):
            return []
        values = {"concept": concepts[0], "data": "" if data is None else os.fspath(data)}
        source_rows = self._source_rows(concepts, values, data)
        rows: Sequence[Prompt] = [
            replace(row, id=f"{name}-{row.id}", labels=self._with_labels(row.labels, values)) for row in source_rows
        ]
        if self.where:
            rows = PromptSet(name, rows).where(*(substitute(text, values) for text in self.where)).rows
        rows = rows[: self.first]
        if self.limit is None or self.prompts == "about":
            return list(rows)
        return spread(rows, self.limit, [*HEADS, *self.fill, "language"], lambda row: _names(row, concepts))

    def _source_rows(self, concepts: Sequence[str], values: dict[str, str], data: Path | None) -> Sequence[Prompt]:
        if self.template is not None:
            return self._template_rows(values)
        if self.prompts == "about":
            from erasure.prompts.concept_prompts import concept_prompts

            return concept_prompts(concepts, self.limit).rows
        source = substitute(self.prompts or "", values)
        if "{data}" in (self.prompts or "") and data is None:
            raise ErasureError(f"{self.prompts} needs a data folder: give one with --data")
        return PromptSet.read(source).rows

    def _with_labels(self, labels: Mapping[str, str], values: dict[str, str]) -> dict[str, str]:
        renamed = {self.labels.get(key, key): value for key, value in labels.items()}
        renamed |= {key: substitute(value, values) for key, value in self.put.items()}
        return {**renamed, "role": self.role} if self.role else renamed

    def _template_rows(self, values: dict[str, str]) -> list[Prompt]:
        names = list(self.fill)
        rows: list[Prompt] = []
        for combination in itertools.product(*self.fill.values()):
            chosen = {name: substitute(value, values) for name, value in zip(names, combination, strict=True)}
            text = substitute(self.template or "", {**values, **chosen})
            for seed in self.seeds:
                rows.append(Prompt(f"{len(rows):05d}", text, int(seed), None, chosen))
        return rows


def _names(row: Prompt, concepts: Sequence[str]) -> bool:
    return bool(set(concepts) & set(row.labels.values()))


def substitute(text: str, values: Mapping[str, str]) -> str:
    """Fill in the fields of a text.

    Args:
        text: a text with names in braces.
        values: name -> its value.

    Raises:
        ErasureError: the text has another field, or a brace of its own.
    """
    try:
        return text.format(**values)
    except (KeyError, IndexError, ValueError) as fault:
        raise ErasureError(
            f"{text!r}: cannot fill in {fault}; the allowed fields are {', '.join(f'{{{name}}}' for name in values)}"
        ) from None
