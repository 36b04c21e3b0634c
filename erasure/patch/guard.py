"""The third kind of payload: a guard, which holds texts and settings instead of tensors and changes no weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from erasure.errors import ErasureError

LONGEST = 10_000  # characters of a text: no text encoder reads as many


@dataclass(frozen=True, eq=False)
class Guard:
    """What an erased pipeline changes while it draws: the texts to keep out, and the settings of the change.

    Args:
        form: what is changed while drawing, a key of `pipelines.guards.FORMS`, such as `guidance`.
        texts: the texts that describe what is to be kept out of pictures, at least one.
        settings: the settings of the form, as plain JSON values; the pipeline checks them.
        scale: factor on the change, besides the strength that a pipeline sets.

    Raises:
        ErasureError: a value has the wrong type, a text is empty or longer than LONGEST, or there is no text.
    """

    form: str
    texts: tuple[str, ...]
    settings: Mapping[str, Any]
    scale: float = 1.0
    kind: ClassVar[str] = "guard"

    def __post_init__(self) -> None:
        if not isinstance(self.form, str) or not self.form:
            raise ErasureError(f"the form of a guard must be a non-empty string, not {self.form!r}")
        texts = self.texts
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ErasureError(f"a guard needs a list of at least one text and no empty ones, not {texts!r}")
        if longest := max((len(text) for text in texts if len(text) > LONGEST), default=0):
            raise ErasureError(f"a text of a guard has {longest:,} characters, and at most {LONGEST:,} are allowed")
        if not isinstance(self.settings, Mapping) or not all(isinstance(key, str) for key in self.settings):
            raise ErasureError("the settings of a guard must map names to values")
        if type(self.scale) not in (int, float) or not math.isfinite(self.scale):
            raise ErasureError(f"the scale of a guard must be a finite number, not {self.scale!r}")
        try:  # to JSON and back, so that they equal those of the file and are not shared with the caller
            settings = json.loads(json.dumps(dict(self.settings), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ErasureError(f"the settings of a guard cannot be written as JSON: {error}") from error
        for name, value in (("texts", tuple(texts)), ("settings", settings), ("scale", float(self.scale))):
            object.__setattr__(self, name, value)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Guard:
        """Return the guard that `to_json` described.

        Raises:
            ErasureError: a key is missing or unknown, or a value is not allowed.
        """
        expected = {"form", "texts", "settings", "scale"}
        if set(value) != expected:
            odd = ", ".join(sorted(map(repr, set(value) ^ expected)))
            raise ErasureError(f"guard must have exactly the keys {', '.join(sorted(expected))}; check {odd}")
        return cls(value["form"], value["texts"], value["settings"], value["scale"])

    def to_json(self) -> dict[str, Any]:
        """Return the guard as plain data, as the header of a patch holds it."""
        return {"form": self.form, "texts": list(self.texts), "settings": dict(self.settings), "scale": self.scale}

    @property
    def components(self) -> list[str]:
        """Return the components whose weights change: none."""
        return []

    def names(self, component: str) -> list[str]:
        """Return the names of the parameters of `component` that change: none."""
        return []

    def shape(self, component: str, name: str) -> NoReturn:
        """Refuse, because no parameter changes.

        Raises:
            ErasureError: always.
        """
        raise ErasureError(f"a guard changes no weight, so it has no change of {component}.{name}")

    def change(self, component: str, name: str) -> NoReturn:
        """Refuse, because no parameter changes; raises ErasureError."""
        self.shape(component, name)

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the payload: none."""
        return []

    def scaled(self, factor: float) -> Guard:
        """Return the guard with its change multiplied by `factor`."""
        return replace(self, scale=self.scale * factor)

    @property
    def digest(self) -> str:
        """Return the sha256 of texts and settings, which identifies the payload."""
        return hashlib.sha256(f"{self.kind}{json.dumps(self.to_json(), sort_keys=True)}".encode()).hexdigest()
