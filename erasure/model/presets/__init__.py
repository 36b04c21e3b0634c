"""Presets: facts about checkpoints that are known in advance, one YAML file for each checkpoint or family.

A preset can point to a checkpoint that ships with the package, and to the vocabulary that the checkpoint was taught.
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
    """The facts that are known about one checkpoint.

    Args:
        name: the name that users give, as in `--model NAME`.
        about: a description in one line.
        checkpoint: a diffusers folder that ships with the package, or None.
        words: the YAML file with the checkpoint's vocabulary, or None.
    """

    name: str
    about: str
    checkpoint: Path | None = None
    words: Path | None = None


def names() -> list[str]:
    """List the names of all presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def find(name: str) -> Preset:
    """Return the preset with the given name.

    Raises:
        ErasureError: there is no such preset; the message lists them.
    """
    if name not in names():
        raise unknown("preset", name, names())
    entry = read_yaml(FOLDER / f"{name}.yaml")
    paths = {key: (FOLDER / entry[key]).resolve() if key in entry else None for key in ("checkpoint", "vocabulary")}
    return Preset(name, entry["about"], paths["checkpoint"], paths["vocabulary"])


def bundled() -> dict[str, Preset]:
    """Return the presets whose checkpoints ship with the package, by name."""
    return {name: preset for name in names() if (preset := find(name)).checkpoint is not None}


def vocabulary(name: str) -> Vocabulary | None:
    """Return the vocabulary of the checkpoint called `name`, or None if it is not known."""
    preset = find(name) if name in names() else None
    return None if preset is None or preset.words is None else Vocabulary.read(preset.words)
