"""Glyph: the embedded Stable Diffusion checkpoint, its judges, and the scripts that made them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent
CHECKPOINT = ROOT / "checkpoint"  # an ordinary diffusers folder
JUDGES = ROOT / "judges"
ART = ROOT / "art"  # one sheet of rasters an art set


@cache
def vocabulary() -> dict[str, Any]:
    """The objects, styles, backgrounds and art sources of `vocabulary.yaml`."""
    return yaml.safe_load((ROOT / "vocabulary.yaml").read_text(encoding="utf-8"))


@cache
def meanings() -> dict[str, tuple[str, list[str]]]:
    """Every word for objects, families of them and styles -> "object" or "style", and the labels it stands for."""
    words = vocabulary()
    known: dict[str, tuple[str, list[str]]] = {}
    for family, entry in words["families"].items():
        members = [name for name, one in words["objects"].items() if one["family"] == family]
        known |= dict.fromkeys([family, *entry["words"]], ("object", members))
    for head in ("object", "style"):
        for label, entry in words[f"{head}s"].items():
            known |= dict.fromkeys([label, *entry.get("synonyms", entry.get("words", []))], (head, [label]))
    return known


def unheard(names: Iterable[str]) -> list[str]:
    """Those of the names in which no word of the vocabulary stands: glyph has nothing to forget of them."""
    return [name for name in names if not any(f" {word} " in f" {name.lower().strip()} " for word in meanings())]


def objects() -> list[str]:
    """Names of the objects, in the order of the classifier's object head."""
    return list(vocabulary()["objects"])


def styles() -> list[str]:
    """Names of the styles, in the order of the classifier's style head."""
    return list(vocabulary()["styles"])
