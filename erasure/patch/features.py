"""The fourth kind of payload: features of a sparse autoencoder, which a pipeline switches off in one block's output.

For an output x [d] of the block at the timestep t, with the rows e_i, d_i of the encoder and the decoder,

    z_i = <e_i, x> + b_i        x <- x + sum_i [z_i > limit_ti] gain_ti z_i d_i

so an output in which no feature passes its limit keeps every bit. A payload holds the rows of its own features alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from erasure.errors import ErasureError
from erasure.patch.checked_tensor import checked_copy
from erasure.patch.fingerprint import tensor_bytes
from erasure.patch.module_keys import NETWORKS

MOST_TIMESTEPS = 10_000
TENSORS = ("encoder", "bias", "decoder", "limits", "gains")


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a sparse autoencoder, and what becomes of each of them at each timestep.

    Args:
        component: the network, such as `unet`.
        block: path of the block in it whose output [n, d, h, w] is changed.
        made_on: the parameters by whose values the base is recognised, with their shapes; none of them changes.
        timesteps: t of the rows of `limits` and `gains`, distinct; at another t the nearest row counts.
        encoder: e [k, d].
        bias: b [k].
        decoder: d [k, d].
        limits: what z must exceed [T, k].
        gains: what z is multiplied with to give the change along d [T, k]; 0 leaves the feature alone.
        about: what the features are and how good the autoencoder is, as plain JSON values.

    Raises:
        ErasureError: a value has the wrong type, or shapes do not agree.
    """

    component: str
    block: str
    made_on: Mapping[str, Sequence[int]]
    timesteps: Sequence[float]
    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    limits: Tensor
    gains: Tensor
    about: Mapping[str, Any]
    kind: ClassVar[str] = "features"

    def __post_init__(self) -> None:
        if self.component not in NETWORKS:
            raise ErasureError(f"features are of a block of {' or '.join(NETWORKS)}, not of {self.component!r}")
        if not isinstance(self.block, str) or not self.block:
            raise ErasureError(f"the block of features must be the path of a module, not {self.block!r}")
        object.__setattr__(self, "timesteps", _timesteps(self.timesteps))
        object.__setattr__(self, "made_on", _shapes(self.made_on))
        for name in TENSORS:
            object.__setattr__(self, name, checked_copy(f"features.{name}", getattr(self, name)))
        count, width = self.encoder.shape if self.encoder.dim() == 2 else (0, 0)
        table = (len(self.timesteps), count)
        expected = {"encoder": (count, width), "bias": (count,), "decoder": (count, width)}
        for name, shape in {**expected, "limits": table, "gains": table}.items():
            if tuple(getattr(self, name).shape) != shape or not count:
                raise ErasureError(
                    f"features.{name} has the shape {list(getattr(self, name).shape)}; with an encoder "
                    f"{list(self.encoder.shape)} and {len(self.timesteps)} timesteps it must be {list(shape)}"
                )
        if not isinstance(self.about, Mapping):
            raise ErasureError(f"about must be a JSON dict, not {type(self.about).__name__}")
        try:  # to JSON and back, so that it equals that of the file
            object.__setattr__(self, "about", json.loads(json.dumps(dict(self.about), allow_nan=False)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ErasureError(f"what is said about the features cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Features:
        """Return the payload that `to_json` described, with its tensors by the names of TENSORS.

        Raises:
            ErasureError: a key is missing or unknown, or a value is not allowed.
        """
        expected = {"component", "block", "made_on", "timesteps", "about"}
        if set(value) != expected:
            odd = ", ".join(sorted(map(repr, set(value) ^ expected)))
            raise ErasureError(f"features must have exactly the keys {', '.join(sorted(expected))}; check {odd}")
        return cls(**{**value, **tensors})

    def to_json(self) -> dict[str, Any]:
        """Return everything but the tensors as plain data, as the header of a patch holds it."""
        return {
            "component": self.component,
            "block": self.block,
            "made_on": {name: list(shape) for name, shape in self.made_on.items()},
            "timesteps": list(self.timesteps),
            "about": dict(self.about),
        }

    @property
    def count(self) -> int:
        """Return the number of features."""
        return len(self.encoder)

    @property
    def components(self) -> list[str]:
        """Return the network in which the features act."""
        return [self.component]

    def names(self, component: str) -> list[str]:
        """Return the names of the parameters by which the base is recognised; none of them changes."""
        return sorted(self.made_on) if component == self.component else []

    def shape(self, component: str, name: str) -> tuple[int, ...]:
        """Return the shape of one of these parameters."""
        return tuple(self.made_on[name])

    def change(self, component: str, name: str) -> NoReturn:
        """Refuse, because no parameter changes.

        Raises:
            ErasureError: always.
        """
        raise ErasureError(f"features change no weight, so they have no change of {component}.{name}")

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of TENSORS."""
        return [getattr(self, name) for name in TENSORS]

    def scaled(self, factor: float) -> Features:
        """Return the features with their change multiplied by `factor`."""
        return replace(self, gains=self.gains * factor)

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of everything but `about`, which identifies the payload."""
        described = {key: value for key, value in self.to_json().items() if key != "about"}
        digest = hashlib.sha256(f"{self.kind}{json.dumps(described, sort_keys=True)}".encode())
        for tensor in self.tensors():
            digest.update(f"{list(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


def _timesteps(values: Any) -> tuple[float, ...]:
    good = isinstance(values, list | tuple) and 0 < len(values) <= MOST_TIMESTEPS
    if not good or not all(type(t) in (int, float) and math.isfinite(t) for t in values):
        raise ErasureError("the timesteps of features must be a list of finite numbers")
    if len(set(values)) != len(values):
        raise ErasureError("a timestep of the features occurs twice")
    return tuple(float(t) for t in values)


def _shapes(values: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(values, Mapping) or not values:
        raise ErasureError("features need at least one parameter by which their base is recognised")
    for name, shape in values.items():
        good = isinstance(shape, list | tuple) and 0 < len(shape) <= 8 and all(type(n) is int and n > 0 for n in shape)
        if not isinstance(name, str) or not name or not good:
            raise ErasureError(f"made_on: the shape of {name!r} must be a list of 1 to 8 whole numbers above 0")
    return {name: tuple(values[name]) for name in sorted(values)}
