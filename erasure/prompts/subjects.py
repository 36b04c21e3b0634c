"""Prompt sets about subjects that ordinary checkpoints know, built from the names and templates of subjects.yaml."""

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
    """Load subjects.yaml: `templates` (label -> prompt templates) and `sets` (name -> names, label, templates)."""
    content: dict[str, Any] = yaml.safe_load((FOLDER / "subjects.yaml").read_text(encoding="utf-8"))
    return content


def fill(names: Sequence[str], label: str, templates: Sequence[str] | None = None, first_seed: int = 0) -> PromptSet:
    """Build a prompt set that puts every name into every template.

    Args:
        names: the subjects, such as `["owl", "cat"]`.
        label: the label under which each row stores its name, such as object, style or identity.
        templates: texts with {x} for the name and {a} for its article; default: the templates of subjects.yaml for
            this label.
        first_seed: seed of the first row; every further row takes the next seed.

    Raises:
        ErasureError: there are no names, subjects.yaml has no templates for the label, or a template lacks {x} or
            contains other fields.
    """
    if templates is None:
        known = load_subjects()["templates"]
        if label not in known:
            raise unknown("label with templates", label, known)
        templates = known[label]
    rows: list[Prompt] = []
    for name in names:
        for template in templates:
            index = len(rows)
            text = _fill_template(template, name)
            rows.append(Prompt(f"{label}-{index:04d}", text, first_seed + index, None, {label: name}))
    return PromptSet(f"{label}-templates", rows)


def _fill_template(template: str, name: str) -> str:
    if "{x}" not in template:
        raise ErasureError(f"template {template!r} has no {{x}}, the place of the subject's name")
    try:
        return template.format(a=article(name), x=name)
    except (KeyError, IndexError, ValueError) as fault:
        raise ErasureError(
            f"template {template!r} cannot be filled in ({fault}): the only fields allowed are {{x}} and {{a}}"
        ) from None


def build_subjects(name: str, first_seed: int) -> PromptSet:
    """Build one of the prompt sets defined in subjects.yaml.

    Args:
        name: name of the set.
        first_seed: seed of the first row.
    """
    entry = load_subjects()["sets"][name]
    return PromptSet(name, fill(entry["names"], entry["label"], entry["templates"], first_seed).rows)


def article(words: str) -> str:
    """Return the indefinite article for a phrase: `an` before a vowel, otherwise `a`."""
    return "an" if words[:1] in "aeiou" else "a"
