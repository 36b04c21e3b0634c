"""Prompt sets of subjects that ordinary models know: from names and templates (subjects.yaml)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import yaml

from erasure.errors import ErasureError, unknown
from erasure.prompts.prompt_set import FOLDER, PromptSet
from erasure.prompts.row import Prompt


@cache
def load_subjects() -> dict[str, Any]:
    """The file's content."""
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "subjects.yaml").read_text(encoding="utf-8"))
    return loaded


def fill(names: Sequence[str], label: str, templates: Sequence[str] | None = None, first_seed: int = 0) -> PromptSet:
    """Every name in every template.

    Args:
        names: what to ask for.
        label: under which the rows hold the name; object, style and identity have templates of their own.
        templates: with {x} for the name and {a} for its article; default: those that the label has.
        first_seed: of the first row; each further row has the next one.

    Raises:
        ErasureError: no names, a label without templates, a template without {x} or with other fields.
    """
    if templates is None:
        if label not in load_subjects()["templates"]:
            raise unknown("label with templates", label, load_subjects()["templates"])
        templates = load_subjects()["templates"][label]
    rows: list[Prompt] = []
    for name in names:
        for template in templates:
            at = len(rows)
            rows.append(Prompt(f"{label}-{at:04d}", _filled(template, name), first_seed + at, None, {label: name}))
    return PromptSet(f"{label}-templates", rows)


def _filled(template: str, name: str) -> str:
    if "{x}" not in template:
        raise ErasureError(f"template {template!r}: {{x}} for the name is missing")
    try:
        return template.format(a=article(name), x=name)
    except (KeyError, IndexError, ValueError) as fault:
        raise ErasureError(f"template {template!r}: {fault}; only {{x}} and {{a}} are filled in") from None


def build_subjects(name: str, first_seed: int) -> PromptSet:
    """One of the sets of subjects.yaml."""
    entry = load_subjects()["sets"][name]
    return PromptSet(name, fill(entry["names"], entry["label"], entry["templates"], first_seed).rows)


def article(words: str) -> str:
    """`an` before a vowel, else `a`."""
    return "an" if words[:1] in "aeiou" else "a"
