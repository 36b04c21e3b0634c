"""The kind of method that makes guards: patches of texts and settings, which change no weight."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from erasure.concepts.concept import Concept
from erasure.config import setting
from erasure.dtypes import DTYPES
from erasure.method import RuntimeMethod, resident_bytes
from erasure.model.architectures import Architecture
from erasure.model.base import Base
from erasure.patch import Guard
from erasure.pipelines.guards import Form
from erasure.training.compute import Computing
from erasure.training.dry_run import Forecast
from erasure.training.run import FitResult, Run


@dataclass(frozen=True, kw_only=True)
class GuardMethod(RuntimeMethod):
    """A method whose patch holds texts and settings and no tensors: `guard` chooses them, in no time.

    What they change while pictures are drawn is a form in `pipelines/guards`. Such a patch fits every checkpoint in
    whose network the form can act; it has no fingerprint of a base, because it changes no weight.

    Args:
        gate: `always`, or `text` to act on prompts near the concept's names alone.
        gate_threshold: similarity of a prompt to a name from which on a text gate lets the guard act, at full strength.
    """

    STOCHASTIC: ClassVar[bool] = False
    CALLS_UNET: ClassVar[bool] = False

    gate: Literal["always", "text"] = "always"
    gate_threshold: float = setting(0.9, at_least=0, at_most=1)

    @abstractmethod
    def guard(self, base: Base, concepts: list[Concept]) -> Guard:
        """Return the texts to keep out and the settings with which the pipeline does so."""

    @classmethod
    @abstractmethod
    def form(cls) -> type[Form]:
        """Return the form of the guards."""

    @classmethod
    def unsuited(cls, architecture: Architecture) -> str:
        """Return why the form cannot act in networks of an architecture; an empty string where it can."""
        return cls.form().unsuited(architecture)

    def collect(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Return the guard, after checking that its texts can be encoded, and its gate.

        Raises:
            ErasureError: a text has more tokens than the text encoder reads.
        """
        guard = self.guard(base, concepts)
        if self.gate == "always":
            return FitResult(guard)
        names = [name for concept in concepts for name in concept.names]
        return FitResult(guard, {"kind": "text", "texts": names, "power": 0.0, "threshold": self.gate_threshold})

    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Return that nothing is computed: the cost comes with each picture, as the form's file says."""
        precision = next((name for name, dtype in DTYPES.items() if dtype == base.network.dtype), "fp32")
        return Forecast(0, 0, 0.0, resident_bytes(base), 0, 0, precision=precision, processes=processes)
