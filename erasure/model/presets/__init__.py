"""Presets: what is known of a checkpoint beforehand. One YAML file a checkpoint or family, found by its name.

A preset may bring a checkpoint that ships with the package, and the vocabulary that the checkpoint was taught.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from erasure.concepts.vocabulary import Vocabulary
from erasure.config import read_yaml
from erasure.errors import unknown

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Preset:
    """What is known of one checkpoint.

    Args:
        name: what users call it, as in `--model NAME`.
        about: one line for lists.
        checkpoint: a diffusers folder that ships with the package, or None.
        words: the vocabulary file of the checkpoint, or None.
    """

    name: str
    about: str
    checkpoint: Path | None = None
    words: Path | None = None


def names() -> list[str]:
    """List the names of all presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def find(name: str) -> Preset:
    """Read a preset by its name.

    Raises:
        ErasureError: there is no such preset; the message lists them.
    """
    if name not in names():
        raise unknown("preset", name, names())
    entry = read_yaml(FOLDER / f"{name}.yaml")
    paths = {key: (FOLDER / entry[key]).resolve() if key in entry else None for key in ("checkpoint", "vocabulary")}
    return Preset(name, entry["about"], paths["checkpoint"], paths["vocabulary"])


def bundled() -> dict[str, Preset]:
    """Return the presets whose checkpoint ships with the package, by name."""
    return {name: preset for name in names() if (preset := find(name)).checkpoint is not None}


def vocabulary(name: str) -> Vocabulary | None:
    """Return the vocabulary of the checkpoint that a preset is called after; None where nothing is known of it."""
    preset = find(name) if name in names() else None
    return None if preset is None or preset.words is None else Vocabulary.read(preset.words)
