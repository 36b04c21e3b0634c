"""What a method of erasing is: its settings, and how they turn a checkpoint and concepts into the tensors of a patch.

There are three kinds. A `GradientMethod` trains, in the one loop of `training/loop.py`. A `ClosedFormMethod` solves for
new weights from texts alone. A `RuntimeMethod` leaves the weights as they are and collects what a gate or a hook needs.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from erasure.concepts.concept import Concept
from erasure.config import check_settings
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.closed_form import Columns, Edit
from erasure.model.diffusion import counting
from erasure.patch import LowRank
from erasure.training.compute import Computing
from erasure.training.dry_run import Forecast, forecast_edit, forecast_runtime, forecast_training
from erasure.training.loop import train
from erasure.training.run import FitResult, Run


class Method(ABC):
    """A method of erasing: a frozen dataclass whose fields are the settings, declared with `config.setting`."""

    method: ClassVar[str]  # the file's name, and the method's
    PARITY: ClassVar[dict[str, Any]] = {}  # what `parity=True` sets: the published script's values
    # Settings of which several concepts, erased together, get as much each as one alone.
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ()
    WATCHED: ClassVar[bool] = False  # whether there are training steps, to log and to draw previews of

    def __post_init__(self) -> None:
        """Check every setting against its declared range and choices; raises ErasureError."""
        check_settings(self)

    @abstractmethod
    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Erase the concepts and return the tensors of the patch and its gate; the base is as it was afterwards.

        Args:
            base: the checkpoint.
            concepts: what to erase; several are erased together.
            run: the seed, the folder, the progress bar and the costs, to which the method adds its own.
        """

    @abstractmethod
    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Return what `fit` will cost, without running it; the base is left as it was.

        Raises:
            ErasureError: the UNet has no weights and the method looks at them before it starts.
        """

    def check_watched(self, preview_every: int | None, trackers: Sequence[str]) -> None:
        """Refuse previews and logs where there are no training steps to draw or log.

        Raises:
            ErasureError: either was asked for, and the method has no steps.
        """
        if self.WATCHED or (preview_every is None and not trackers):
            return
        asked = [*(["previews"] if preview_every is not None else []), *(["logs"] if trackers else [])]
        raise ErasureError(
            f"{self.method} has no training steps, so there is nothing for {' and '.join(asked)} to show: leave "
            "--preview-every and --log out, and draw pictures with `erasure generate --patch`. Nothing was changed"
        )


class GradientMethod(Method):
    """A method that trains: settings with `prepare` and `loss`, run by the one training loop.

    What `loss` returns may depend only on the state, the step and the trained tensors, so that a resumed run is the
    same run; anything else that changes from step to step goes through `snapshot` and `restore`.
    """

    WATCHED: ClassVar[bool] = True

    iterations: int
    learning_rate: float
    weight_decay: float = 0.0
    weight_rounding: str = "none"

    @abstractmethod
    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> Any:
        """Return the state of a run: an object with an `adapter`, and all that does not change with the step."""

    @abstractmethod
    def loss(self, state: Any, step: int) -> dict[str, Tensor]:
        """Return the terms of the loss at a step, by name; their sum is minimised."""

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate at a step."""
        return 1.0

    def gate(self, state: Any) -> dict[str, Any]:
        """Return the gate of the patch, once training has ended."""
        return {"kind": "always"}

    def snapshot(self, state: Any) -> dict[str, Tensor]:
        """Return the tensors, besides the trained ones, that change from step to step."""
        return {}

    def restore(self, state: Any, tensors: dict[str, Tensor]) -> None:
        """Put back what `snapshot` returned, when a run is resumed."""

    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Train, and return the trained tensors and the gate."""
        state = train(self, base, concepts, run)
        try:
            with counting(base.unet, run.costs):
                return FitResult(state.adapter.payload(), self.gate(state))
        finally:
            state.adapter.remove()

    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Go through the run with a UNet that answers at once, counting its calls; time one real call."""
        return forecast_training(self, base, concepts, computing, seed, processes)


class ClosedFormMethod(Method):
    """A method that solves for new weights: no loop, no seed, no UNet call, seconds.

    `columns` says which text states are edited, to what, and which are kept; the weights of every module in `variant`
    follow by regularised least squares (`model/closed_form.py`) as an exact low-rank change.
    """

    variant: str = "x-strict"

    @abstractmethod
    def columns(self, base: Base, concepts: list[Concept]) -> Columns:
        """Return the text states to edit, what each should answer like instead, and those to keep."""

    def solve(self, edit: Edit, module: nn.Module) -> tuple[Tensor, Tensor, float]:
        """Return the change of one module's weight as factors (down [n, in], up [out, n], alpha)."""
        return edit.factors(module.get_parameter("weight"))

    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Solve for every module of the variant, and return the factors."""
        begun = time.perf_counter()
        edit = Edit(self.columns(base, concepts))
        layers = {path: self.solve(edit, module) for path, module in base.targets(self.variant).items()}
        run.costs.seconds += time.perf_counter() - begun
        return FitResult(LowRank({"unet": layers}))

    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Collect the columns, solve for one module, and multiply its seconds by the number of weights."""
        targets = base.targets(self.variant)
        return forecast_edit(base, targets, lambda: Edit(self.columns(base, concepts)), self.solve)


class RuntimeMethod(Method):
    """A method that changes no weight of the model's own: it collects the data that a gate or a hook acts with."""

    @abstractmethod
    def collect(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Return the data that the patch holds, and its gate."""

    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Collect, counting the UNet's calls."""
        with counting(base.unet, run.costs):
            return self.collect(base, concepts, run)

    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Go through `collect` with a UNet that answers at once, counting its calls; time one real call."""
        return forecast_runtime(self, base, concepts, computing, seed, processes)
