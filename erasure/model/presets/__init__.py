"""Presets: what is known in advance about checkpoints, one YAML file for each bundled checkpoint or family.

A preset holds the settings that suit its checkpoints, each with its source (`preset.py` describes the files). A bundled
one also points to its checkpoint and to the vocabulary that the checkpoint was taught.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from erasure.concepts.vocabulary import Vocabulary
from erasure.errors import unknown
from erasure.model.presets.preset import Preset, Sampling, read_preset

__all__ = ["Family", "Preset", "Sampling", "bundled", "family", "find", "names", "vocabulary"]

FOLDER = Path(__file__).resolve().parent


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
    return read_preset(FOLDER, name)


def bundled() -> dict[str, Preset]:
    """Return the presets whose checkpoints ship with the package, by name."""
    return {name: preset for name in names() if (preset := find(name)).checkpoint is not None}


def vocabulary(name: str) -> Vocabulary | None:
    """Return the vocabulary of the checkpoint called `name`, or None if it is not known."""
    preset = find(name) if name in names() else None
    return None if preset is None or preset.words is None else Vocabulary.read(preset.words)


@dataclass(frozen=True)
class Family:
    """The family that a checkpoint belongs to.

    Args:
        preset: its preset; None if the checkpoint belongs to none of the known families.
        why: in words, how this was found out.
        named: whether the preset was asked for, or names the checkpoint; if not, its architecture decided.
    """

    preset: Preset | None
    why: str
    named: bool = True

    @property
    def text(self) -> str:
        """Return the preset and how it was chosen, as one phrase."""
        return f"{'no preset' if self.preset is None else f'preset {self.preset.name}'} ({self.why})"


def family(pipe: Any, name: str, given: str | None = None) -> Family:
    """Return the family of a checkpoint: the one that is asked for, that names it, or that has its architecture.

    Args:
        pipe: the pipeline with the checkpoint's networks.
        name: the checkpoint's name.
        given: the name of the preset that the user asks for.

    Raises:
        ErasureError: there is no such preset.
    """
    if given is not None:
        return Family(find(given), "as asked for")
    for preset in map(find, names()):
        if name == preset.name and preset.checkpoint is not None or name in preset.checkpoints:
            return Family(preset, f"{name} is one of its checkpoints")
    facts = _architecture(pipe)
    text = _text(facts)
    for preset in map(find, names()):
        if preset.architecture and preset.architecture.items() <= facts.items():
            return Family(preset, f"by its architecture: its {text}", named=False)
    return Family(None, f"no family is known whose {text}", named=False)


def _architecture(pipe: Any) -> dict[str, Any]:
    """Return what families are told apart by: the width of the text states, and of a UNet the number of encoders."""
    transformer = getattr(pipe, "transformer", None)
    config = getattr(transformer or getattr(pipe, "unet", None), "config", None)
    if transformer is not None:
        keys = ("joint_attention_dim", "caption_channels")
        width = next((getattr(config, key) for key in keys if isinstance(getattr(config, key, None), int)), None)
        facts = {"network": type(transformer).__name__, "text_width": width}
        return facts | {key: getattr(config, key) for key in ("guidance_embeds",) if hasattr(config, key)}
    width = getattr(config, "cross_attention_dim", None)
    encoders = sum(getattr(pipe, part, None) is not None for part in ("text_encoder", "text_encoder_2"))
    return {"text_width": width if isinstance(width, int) else None, "text_encoders": encoders}


def _text(facts: Mapping[str, Any]) -> str:
    """Return the facts as the end of a sentence."""
    width, encoders = facts["text_width"], facts.get("text_encoders")
    if encoders is None:
        return f"network is a {facts['network']} that reads text states of width {width}"
    return f"UNet reads text states of width {width} from {encoders} text encoder{'s' * (encoders != 1)}"
