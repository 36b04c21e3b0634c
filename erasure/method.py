"""What a method of erasing is: its settings, and how they turn a checkpoint and concepts into the tensors of a patch.

There are three kinds. A `GradientMethod` trains, in the one loop of `training/loop.py`. A `ClosedFormMethod` solves for
new weights from text states alone. A `RuntimeMethod` trains nothing: it collects the data with which a gated term acts
when images are made; one whose patch holds texts and settings alone: `guard_method.py`. Each kind forecasts its own
cost, and refuses the options of a run that have no meaning for it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasure.concepts.concept import MOST, Concept
from erasure.concepts.name_list import MOST_NAMES
from erasure.config import check_settings
from erasure.dtypes import DTYPES
from erasure.errors import ErasureError
from erasure.model.architectures import Architecture
from erasure.model.base import Base
from erasure.model.closed_form import Columns, Edit, Factors, StateMap, applied, readers_gram
from erasure.model.conditioning import text_encoders
from erasure.model.diffusion import Counts, counting
from erasure.model.listed_base import ListedBase
from erasure.model.trajectories import TrajectoryPool, build_pool
from erasure.patch import LowRank
from erasure.training.compute import Computing, Engine
from erasure.training.dry_run import Forecast, forecast_runtime, forecast_training
from erasure.training.loop import train
from erasure.training.memory import size_of
from erasure.training.objective import ObjectiveOptions, Terms, check_objective
from erasure.training.reweighting import Samples, squared
from erasure.training.run import FitResult, Run
from erasure.training.sparsity import SparsityOptions, check_sparsity


class Method(ABC):
    """A method of erasing: a frozen dataclass whose fields are its settings, declared with `config.setting`."""

    method: ClassVar[str]  # the name that users give, which is also the file's
    PARITY: ClassVar[dict[str, Any]] = {}  # what `parity=True` sets: the values of the published script
    PARITY_KINDS: ClassVar[dict[str, dict[str, Any]]] = {}  # what it sets besides for a kind of concept
    # Settings that grow with the number of concepts erased together, so that each gets as much as one alone.
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ()
    MOST: ClassVar[int] = MOST  # concepts in one run
    STOCHASTIC: ClassVar[bool] = True  # whether another seed gives another patch
    NETWORKS: ClassVar[tuple[str, ...]] = ("unet",)  # architectures that it can erase from, by name
    ELSEWHERE: ClassVar[str] = "it has not been carried over from the UNet to transformers yet"  # why from no others
    LOGS: ClassVar[bool] = False  # whether there are training steps whose losses can be logged
    PREVIEWS: ClassVar[bool] = False  # whether `fit` draws the run's previews
    CALLS_UNET: ClassVar[bool] = True  # whether the settings of `Computing` have any effect

    def __post_init__(self) -> None:
        """Check every setting against its declared range and choices; raises ErasureError."""
        check_settings(self)

    @abstractmethod
    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Erase the concepts and return the tensors of the patch and its gate; leave the base as it was.

        Args:
            base: the checkpoint.
            concepts: what to erase; several are erased together.
            run: the seed, the folder, the progress bar and the costs, to which the method adds its own.
        """

    @abstractmethod
    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Return what `fit` will cost, without doing it; leave the base as it was.

        Raises:
            ErasureError: the base has no weights, and the method reads them before it starts.
        """

    @classmethod
    def unsuited(cls, architecture: Architecture) -> str:
        """Return why the method cannot erase from networks of an architecture; an empty string where it can."""
        return "" if architecture.name in cls.NETWORKS else cls.ELSEWHERE

    def check_options(
        self, computing: Computing, preview_every: int | None = None, trackers: Sequence[str] = ()
    ) -> None:
        """Refuse options of a run that have no meaning for this kind of method; none is silently ignored.

        Raises:
            ErasureError: naming the options, and why they have no effect.
        """
        faults = []
        if trackers and not self.LOGS:
            faults.append("it has no training steps to log (--log)")
        if preview_every is not None and not self.PREVIEWS:
            faults.append("it has no intermediate results to draw (--preview-every)")
        if not self.CALLS_UNET:
            changed = [field.name for field in fields(computing) if getattr(computing, field.name) != field.default]
            if changed:
                faults.append(f"it makes no UNet calls, so {', '.join(changed)} would have no effect")
        if faults:
            raise ErasureError(f"{self.method}: {'; '.join(faults)}. Leave the option out; nothing was changed")


class GradientMethod(ObjectiveOptions, SparsityOptions, Method):
    """A method that trains: settings with `prepare` and `loss`, run by the one training loop.

    What `loss` returns may depend only on the state, the step and the trained tensors, so that a resumed run is the
    same run; anything else that changes from step to step goes through `snapshot` and `restore`.
    """

    LOGS: ClassVar[bool] = True
    PREVIEWS: ClassVar[bool] = True
    FORGET: ClassVar[str] = ""  # the term of the loss that `forgotten` returns, for `reweight`; empty: there is none
    RETAIN: ClassVar[tuple[str, ...]] = ()  # the terms that keep something, which `surgery` protects from all others

    iterations: int
    learning_rate: float
    weight_decay: float = 0.0
    weight_rounding: str = "none"
    measure_every: int = 0
    stop: str = "never"
    NO_CURVATURE: ClassVar[str] = ""  # why surgery=uno has no meaning for the method; empty where it has
    NO_STOP: ClassVar[str] = ""  # why stop=auto has no meaning for the method; empty where it has
    NO_SPARSITY: ClassVar[str] = ""  # why sparsity has no meaning for the method; empty where it has

    def __post_init__(self) -> None:
        """Check every setting, and that the options suit the method; raises ErasureError."""
        super().__post_init__()
        check_objective(self, self.method, self.FORGET, self.NO_CURVATURE)
        check_sparsity(self, self.NO_SPARSITY)
        why = "the published script takes all its updates" if getattr(self, "parity", False) else self.NO_STOP
        if self.stop == "auto" and self.measure_every:
            raise ErasureError(
                f"measure_every={self.measure_every}: stop=auto chooses its own measurements. Leave one of them out; "
                "nothing was changed"
            )
        if self.stop == "auto" and why:
            raise ErasureError(
                f"{self.method}: stop=auto has no meaning here: {why}. Leave stop out; nothing was changed"
            )

    def check_options(
        self, computing: Computing, preview_every: int | None = None, trackers: Sequence[str] = ()
    ) -> None:
        """Refuse options of a run that its settings leave no place for.

        Raises:
            ErasureError: a compiled network, of whose gradients there are none, with UNO's term.
        """
        super().check_options(computing, preview_every, trackers)
        if self.surgery == "uno" and computing.compile:
            raise ErasureError(
                "surgery=uno differentiates gradients, and a compiled network has no second derivatives: leave compile "
                "out. Nothing was changed"
            )

    @abstractmethod
    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> Any:
        """Return the state of a run: an object with an `adapter`, and all that does not change with the step."""

    @abstractmethod
    def loss(self, state: Any, step: int) -> Terms:
        """Return the terms of the loss at a step, by name; their sum is minimised.

        Terms are numbers; the one that FORGET names comes from `forgotten`.
        """

    def forgotten(
        self, losses: Tensor, t: Tensor, *, now: Tensor, truth: Tensor, before: Callable[[], Tensor]
    ) -> Tensor | Samples:
        """Return the term that forgets, the mean of losses; with `reweight`, the losses and what decides their weights.

        Args:
            losses: of the samples [n].
            t: timesteps [n].
            now: the network's prediction for the samples as training data [n, c, h, w].
            truth: what the prediction would be if it fitted the samples perfectly.
            before: returns the original network's prediction; called for `reweight=static` alone.
        """
        if self.reweight == "none":
            return losses.mean()
        with torch.no_grad():
            known = before() if self.reweight == "static" else now
            own = squared(known, truth)
        return Samples(losses, own, t)

    def forgotten_states(
        self, base: Base, losses: Tensor, output: Tensor, batch: TrajectoryPool, guidance: float
    ) -> Tensor | Samples:
        """Return `forgotten` for states of a sampler, whose truth is the guided prediction that the sampler followed.

        Args:
            base: the checkpoint, for how its pipeline guides.
            losses: of the states [n].
            output: the network's output for the concept's prompt [n, c, h, w].
            batch: the states, with the original network's outputs.
            guidance: scale of classifier-free guidance that the states were sampled with.
        """
        neutral, concept = batch.neutral.to(output), batch.concept.to(output)
        truth = base.guided(neutral, concept, guidance)
        return self.forgotten(losses, batch.t, now=output, truth=truth, before=lambda: concept)

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate at a step."""
        return 1.0

    def restarts(self, step: int) -> bool:
        """Return whether Adam begins anew at a step, without the moments of the steps before."""
        return False

    def conclude(self, state: Any, run: Run) -> None:
        """Do what follows the last update and precedes the patch; its calls of the UNet are counted and forecast."""

    def gate(self, state: Any) -> dict[str, Any]:
        """Return the gate of the patch, once training has ended."""
        return {"kind": "always"}

    def held_out(self, state: Any, **options: Any) -> tuple[TrajectoryPool, list[str]]:
        """Return states to measure on, and the prompt for each of their pairs (`training/curves.py`).

        Args:
            state: of the run, with `pairs` of the concept's prompts and neutral ones.
            options: of `build_pool`.

        Returns:
            A pool whose outputs give the objective's target by `away`, and the prompts that the target is for.
        """
        return build_pool(state.base, state.pairs, **options), [prompt for prompt, _ in state.pairs]

    def snapshot(self, state: Any) -> dict[str, Tensor]:
        """Return the tensors, besides the trained ones, that change from step to step."""
        return {}

    def restore(self, state: Any, tensors: dict[str, Tensor]) -> None:
        """Put back what `snapshot` returned, when a run is resumed."""

    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Train, and return the trained tensors and the gate."""
        state = train(self, base, concepts, run)
        try:
            with counting(base.network, run.costs):
                self.conclude(state, run)
                return FitResult(state.adapter.payload(), self.gate(state))
        finally:
            state.adapter.remove()

    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Go through the run with a UNet that answers at once, and count its calls; time one real call."""
        return forecast_training(self, base, concepts, computing, seed, processes)


class ClosedFormMethod(Method):
    """A method that solves for new weights: no training loop, no seed, no UNet call, seconds.

    `columns` says which text states are edited, towards what, and which are kept; the weights of every layer that reads
    them follow by regularised least squares (`model/closed_form.py`) as an exact low-rank change. A method that solves
    something else overrides `edit`. The previews show the base (step 0) and the result (step 1).
    """

    MOST: ClassVar[int] = MOST_NAMES
    EXACT: ClassVar[bool] = False  # whether the kept states must be exact: their span may decide the result
    STOCHASTIC: ClassVar[bool] = False
    PREVIEWS: ClassVar[bool] = True
    CALLS_UNET: ClassVar[bool] = False
    NETWORKS: ClassVar[tuple[str, ...]] = ("unet", "pixart", "sana")

    @classmethod
    def unsuited(cls, architecture: Architecture) -> str:
        """Return why there is no closed form: it needs text states that are the same at every depth."""
        if drift := architecture.drift("the text states which a layer reads"):
            return f"{drift}, and no closed form is exact; the pooled text would be left as a second route"
        return super().unsuited(architecture)

    @abstractmethod
    def columns(self, base: Base, concepts: list[Concept]) -> Columns:
        """Return the text states to edit, those that each should answer like instead, and those to keep."""

    def modules(self, base: Base) -> dict[str, nn.Module]:
        """Return the layers to solve for, by path: those that read text states, keys and values of cross-attention."""
        return base.targets("x-strict")

    def edit(self, base: Base, concepts: list[Concept]) -> StateMap:
        """Return what all layers share of the change: by default, the minimum of the objective for `columns`."""
        return Edit(self.columns(base, concepts))

    def state_map(self, base: Base, concepts: list[Concept]) -> StateMap:
        """Return `edit`, of no greater rank than the base allows, if it limits the rank."""
        edit = self.edit(base, concepts)
        if not isinstance(base, ListedBase) or base.most_rank is None or edit.rank <= base.most_rank:
            return edit
        states = torch.cat([states for states, _ in base.last_blocks])
        edit, base.held_share = edit.truncated(base.most_rank, readers_gram(base.network), states)
        return edit

    def solve(self, edit: StateMap, path: str, module: nn.Module) -> Factors:
        """Return the change of one module's weight; override it where the wanted answers are not those of guides."""
        return edit.factors(module.get_parameter("weight"))

    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Solve for every layer, and return the factors."""
        modules = self.modules(base)
        with counting(base.network, run.costs):
            edit = self.state_map(base, concepts)
            layers = {path: self.solve(edit, path, module) for path, module in modules.items()}
        if run.previews is not None:
            with Engine(base, Computing(precision="fp32")):
                run.draw(0)
                with applied(modules, layers):
                    run.draw(1)
        return FitResult(LowRank({base.component: layers}))

    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Collect the columns and factorise, solve for one layer, and scale its seconds to all of them.

        Raises:
            ErasureError: the text encoder has no weights.
        """
        modules = self.modules(base)
        if any(param.is_meta for _, encoder in text_encoders(base.pipe) for param in encoder.parameters()):
            raise ErasureError(f"{self.method} reads the text encoder, which has no weights here: it cannot be planned")
        counts = Counts()
        with counting(base.network, counts):
            edit = self.state_map(base, concepts)
        seconds = 0.0
        if base.device.type != "meta":
            seconds = counts.seconds + self._seconds(edit, modules)
        shapes = [module.get_parameter("weight").shape for module in modules.values()]
        width = shapes[0][1]
        return Forecast(
            F=counts.forward,
            B=counts.backward,
            seconds=seconds,
            model_bytes=resident_bytes(base),
            # In float64 G, its Cholesky factor and one layer; in float32 the factors of all layers.
            training_bytes=8 * (2 * width**2 + max(map(_numbers, modules.values())))
            + 4 * edit.rank * sum(sum(shape) for shape in shapes),
            activation_bytes=0,
            precision=next((name for name, dtype in DTYPES.items() if dtype == base.network.dtype), "fp32"),
            processes=processes,
            modules=len(modules),
            weights=sum(map(_numbers, modules.values())),
        )

    def _seconds(self, edit: StateMap, modules: Mapping[str, nn.Module]) -> float:
        """Return the seconds of all solves, from a timed one for the largest layer."""
        path, largest = max(modules.items(), key=lambda item: _numbers(item[1]))
        self.solve(edit, path, largest)
        begun = time.perf_counter()
        self.solve(edit, path, largest)
        return (time.perf_counter() - begun) * sum(map(_numbers, modules.values())) / _numbers(largest)


class RuntimeMethod(Method):
    """A method that changes no weight by training or solving: it collects the data of a term that acts at run time.

    The term is a low-rank one with a gate, which decides for each prompt how strongly it acts (`pipelines/gates`), or a
    guard, which holds no tensors (`guard_method.py`).
    """

    @abstractmethod
    def collect(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Return the data that the patch holds, and its gate.

        In a forecast the UNet answers with zeros: the data must be finite for those as well.
        """

    def fit(self, base: Base, concepts: list[Concept], run: Run) -> FitResult:
        """Collect the data, and count the UNet's calls."""
        with counting(base.network, run.costs):
            return self.collect(base, concepts, run)

    def forecast(
        self, base: Base, concepts: list[Concept], computing: Computing, seed: int, processes: int
    ) -> Forecast:
        """Go through `collect` with a UNet that answers at once, and count its calls; time one real call."""
        return forecast_runtime(self, base, concepts, computing, seed, processes)


def resident_bytes(base: Base) -> int:
    """Return the bytes of the checkpoint in memory; text encoders are held in fp32 during a run."""
    parts = {name: part for name, part in base.pipe.components.items() if isinstance(part, nn.Module)}
    return sum(
        4 * sum(p.numel() for p in part.parameters()) if name.startswith("text_encoder") else size_of(part)
        for name, part in parts.items()
    )


def _numbers(module: nn.Module) -> int:
    """Return the number of entries of a module's weight."""
    return module.get_parameter("weight").numel()
