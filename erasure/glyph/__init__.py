"""Glyph: the embedded Stable Diffusion checkpoint, its judges, and (in `build`) the scripts that made them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent
CHECKPOINT = ROOT / "checkpoint"  # in the layout of diffusers
JUDGES = ROOT / "judges"  # weights of the classifier and of CLIP's image tower
ART = ROOT / "art"  # one sheet of rasterised icons per art set
VOCABULARY = ROOT / "vocabulary.yaml"


@cache
def vocabulary() -> dict[str, Any]:
    """Read the objects, styles, backgrounds and art sources of `vocabulary.yaml`."""
    return yaml.safe_load(VOCABULARY.read_text(encoding="utf-8"))


def objects() -> list[str]:
    """List the names of the objects, in the order of the classifier's object head."""
    return list(vocabulary()["objects"])


def styles() -> list[str]:
    """List the names of the styles, in the order of the classifier's style head."""
    return list(vocabulary()["styles"])
