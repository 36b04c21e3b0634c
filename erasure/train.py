"""The one training loop: steps, NaN guard, checkpoints, resume, progress, previews, trackers, counts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure.adapters import Adapter
from erasure.base import Base
from erasure.concept import Concept
from erasure.diffusion import Counts, counting
from erasure.errors import ErasureError
from erasure.monitor import Previews, Trackers
from erasure.patch import Delta, LowRank

CHECKPOINT_EVERY = 25  # steps


@dataclass(frozen=True)
class Learnt:
    """What a method learnt: the tensors of the patch, and when it acts."""

    payload: Delta | LowRank
    gate: dict[str, Any] = field(default_factory=lambda: {"kind": "always"})


class Gradient:
    """A method that trains: a frozen dataclass of its settings, with `prepare` and `loss`.

    What `loss` gives may depend on the state, the step and the trained tensors alone, so that a resumed run is the
    same run; anything else that changes on the way goes through `snapshot` and `restore`.
    """

    # Settings of which several concepts, erased together, get as much each as one alone.
    PER_CONCEPT: ClassVar[tuple[str, ...]] = ()

    iterations: int
    learning_rate: float
    weight_decay: float = 0.0
    weight_rounding: str = "none"

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> Any:
        """The state of a run, with an `adapter`: prompts, pools, everything that does not change with the step."""
        raise NotImplementedError

    def loss(self, state: Any, step: int) -> dict[str, Tensor]:
        """The terms of the loss at a step; their sum is descended."""
        raise NotImplementedError

    def rate(self, step: int) -> float:
        """Factor on the learning rate at a step."""
        return 1.0

    def gate(self, state: Any) -> dict[str, Any]:
        """The gate of the patch, when training has ended."""
        return {"kind": "always"}

    def snapshot(self, state: Any) -> dict[str, Tensor]:
        """Tensors that change from step to step beside the trained ones."""
        return {}

    def restore(self, state: Any, tensors: dict[str, Tensor]) -> None:
        """Put back what `snapshot` gave."""

    def fit(self, base: Base, concepts: list[Concept], run: Run) -> Learnt:
        """Train; the base is as it was afterwards."""
        state = train(self, base, concepts, run)
        try:
            with counting(base.unet, run.costs):
                return Learnt(state.adapter.payload(), self.gate(state))
        finally:
            state.adapter.remove()


@dataclass
class Run:
    """Where a run keeps its state, and its seed.

    Args:
        seed: of everything random in the run.
        folder: for checkpoints and pools; None keeps nothing.
        progress: show a bar.
        previews: draws pictures on the way; None draws none.
        trackers: take the losses; None keeps them to the bar.
    """

    seed: int = 0
    folder: Path | None = None
    progress: bool = True
    previews: Previews | None = None
    trackers: Trackers | None = None
    costs: Counts = field(default_factory=Counts)

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder, or check that what lies there is this very run.

        Raises:
            ErasureError: the folder holds a run with other settings, or cannot be written.
        """
        if self.folder is None:
            return
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        note = self.folder / "run.json"
        try:
            if note.is_file():
                if json.loads(note.read_text()).get("key") != key:
                    raise ErasureError(
                        f"{self.folder} holds an unfinished run with other settings; it was left untouched. "
                        "Give the settings it was started with, another output, or delete the folder"
                    )
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(".tmp")
            temporary.write_text(json.dumps({"key": key, **settings}, indent=1))
            os.replace(temporary, note)
        except OSError as fault:
            raise ErasureError(f"{self.folder}: cannot be written: {fault.strerror or fault}") from None
        except json.JSONDecodeError:
            raise ErasureError(f"{note}: unreadable; delete {self.folder} to start again") from None

    def watch(self, step: int, terms: dict[str, Tensor], rate: float) -> None:
        """Log the losses of a step and draw its preview; what the pictures cost is not counted."""
        if self.trackers is not None:
            values = {f"loss/{name}": value.item() for name, value in terms.items()}
            self.trackers.log({**values, "learning_rate": rate}, step)
        if self.previews is not None and self.previews.due(step):
            forward = self.costs.forward
            self.previews.draw(step)
            self.costs.forward = forward

    def path(self, name: str) -> Path | None:
        """A file of the run, or None when nothing is kept."""
        return None if self.folder is None else self.folder / name

    def close(self) -> None:
        """The patch is written: the state is no longer needed."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def train(method: Gradient, base: Base, concepts: list[Concept], run: Run) -> Any:
    """Run a gradient method to its end and return its state; the adapter is still on.

    Raises:
        ErasureError: a term of the loss is NaN or infinite; the last checkpoint is kept.
    """
    from tqdm import tqdm

    restored = _read(run)
    if restored:
        run.costs.forward, run.costs.backward = int(restored["costs"][0]), int(restored["costs"][1])
        run.costs.seconds = float(restored["costs"][2])
    if run.previews is not None and not restored:
        run.previews.draw(0)
    with counting(base.unet, Counts() if restored else run.costs):
        state = method.prepare(base, concepts, run)
    adapter: Adapter = state.adapter
    params = adapter.parameters()
    try:
        optimizer = torch.optim.AdamW(params.values(), lr=method.learning_rate, weight_decay=method.weight_decay)
        start = _restore(restored, params, optimizer)
        if restored:
            method.restore(state, {key[6:]: value for key, value in restored.items() if key.startswith("extra.")})
        with counting(base.unet, run.costs):
            bar = tqdm(
                range(start, method.iterations),
                initial=start,
                total=method.iterations,
                desc="erasing",
                unit="step",
                disable=None if run.progress else True,
            )
            clock = time.perf_counter()
            for step in bar:
                optimizer.param_groups[0]["lr"] = method.learning_rate * method.rate(step)
                terms = method.loss(state, step)
                loss = torch.stack(list(terms.values())).sum()
                if not torch.isfinite(loss):
                    raise _diverged(terms, step, run)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                _round(params, method.weight_rounding)
                run.watch(step + 1, terms, optimizer.param_groups[0]["lr"])
                bar.set_postfix({name: f"{value.item():.4g}" for name, value in terms.items()}, refresh=False)
                if (step + 1) % CHECKPOINT_EVERY == 0:
                    spent = run.costs.seconds + time.perf_counter() - clock
                    _write(run, params, optimizer, step + 1, spent, method.snapshot(state))
    except BaseException:
        adapter.remove()
        raise
    return state


def _diverged(terms: dict[str, Tensor], step: int, run: Run) -> ErasureError:
    figures = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
    kept = f"; the last checkpoint is kept in {run.folder}" if run.folder else ""
    return ErasureError(
        f"the loss is not a number at step {step} ({figures}): no patch was written{kept}. "
        "A lower learning_rate or fp32 mostly helps"
    )


@torch.no_grad()
def _round(params: dict[str, torch.nn.Parameter], to: str) -> None:
    """Reproduce training in half precision: what an update changes below half an ulp is lost."""
    if to == "bf16":
        for param in params.values():
            param.copy_(param.bfloat16().float())


def _write(
    run: Run, params: dict, optimizer: torch.optim.Optimizer, step: int, seconds: float, extra: dict[str, Tensor]
) -> None:
    path = run.path("state.safetensors")
    if path is None:
        return
    tensors = {
        "step": torch.tensor(step),
        "costs": torch.tensor([run.costs.forward, run.costs.backward, seconds], dtype=torch.float64),
    }
    tensors |= {f"extra.{name}": value for name, value in extra.items()}
    for name, param in params.items():
        moments = optimizer.state[param]
        tensors |= {f"weight.{name}": param.data, f"first.{name}": moments["exp_avg"]}
        tensors |= {f"second.{name}": moments["exp_avg_sq"]}
    temporary = path.with_suffix(".tmp")
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        os.replace(temporary, path)
    except OSError as fault:
        raise ErasureError(f"{path}: the checkpoint cannot be written: {fault.strerror or fault}") from None


def _read(run: Run) -> dict[str, Tensor]:
    path = run.path("state.safetensors")
    return load_file(path) if path is not None and path.is_file() else {}


@torch.no_grad()
def _restore(state: dict[str, Tensor], params: dict, optimizer: torch.optim.Optimizer) -> int:
    if not state:
        return 0
    step = int(state["step"])
    for name, param in params.items():
        param.copy_(state[f"weight.{name}"])
        optimizer.state[param] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"first.{name}"].to(param.device).clone(),
            "exp_avg_sq": state[f"second.{name}"].to(param.device).clone(),
        }
    return step
