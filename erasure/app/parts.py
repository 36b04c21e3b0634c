"""The components of the page by name: `page` lays them out, `events` changes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Parts:
    """The components of the page that events read or change."""

    picker: Any = None
    concept: Any = None
    model: Any = None
    method: Any = None
    kind: Any = None
    anchor: Any = None
    path: Any = None
    forecast: Any = None
    erase: Any = None
    stop: Any = None
    status: Any = None
    live: Any = None
    pair: Any = None
    rows: list[Any] = field(default_factory=list)
    sliders: list[Any] = field(default_factory=list)
    removes: list[Any] = field(default_factory=list)
    prompt: Any = None
    draw: Any = None
    chips: list[Any] = field(default_factory=list)
    readings: Any = None
    upload: Any = None
    later: Any = None
    which: Any = None
    files: list[Any] = field(default_factory=list)
    leaves_out: Any = None
    given: Any = None
    given_note: Any = None
    prompts: Any = None
    prompt_file: Any = None
    label: Any = None
    judge: Any = None
    images: Any = None
    measure: Any = None
    measured: Any = None
    attack: Any = None
    cases: Any = None
    no_attack: Any = None
    try_attack: Any = None
    attacked: Any = None
