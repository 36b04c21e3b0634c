"""The one training loop: steps, NaN guard, checkpoints, resume, progress, previews, trackers, counts.

Several processes run it in lockstep (`compute.py` shares the UNet's work); only the main one writes files and shows
progress.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure.concepts.concept import Concept
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.diffusion import Counts, counting
from erasure.model.trajectories import TrajectoryPool
from erasure.training.adapters import Adapter
from erasure.training.curves import Curves
from erasure.training.objective import Objective, Optioned, Terms, kernels
from erasure.training.run import Run
from erasure.training.sparsity import Sparse, Sparsity
from erasure.training.stopping import StopRule

CHECKPOINT_EVERY = 25  # steps
STATE = "state.safetensors"
PREPARED = "prepared.json"


class Trainable(Optioned, Sparse, Protocol):
    """The part of a gradient method that the loop uses; see `erasure.method.GradientMethod`."""

    @property
    def iterations(self) -> int:
        """Return the number of updates; with `stop` the largest."""

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of Adam."""

    @property
    def weight_decay(self) -> float:
        """Return the weight decay of AdamW."""

    @property
    def weight_rounding(self) -> str:
        """Return "none", or "bf16" to round the weights after every update."""

    @property
    def measure_every(self) -> int:
        """Return the updates between measurements of what is erased and kept; 0 for none."""

    @property
    def stop(self) -> str:
        """Return "auto" if the run ends by its measurements, or "never"."""

    def prepare(self, base: Base, concepts: list[Concept], run: Run) -> Any:
        """Return the state of a run, with an `adapter`."""

    def held_out(self, state: Any, **options: Any) -> tuple[TrajectoryPool, list[str]]:
        """Return states to measure on, with outputs that give the target, and the prompt of each of their pairs."""

    def loss(self, state: Any, step: int) -> Terms:
        """Return the terms of the loss at a step."""

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate at a step."""

    def restarts(self, step: int) -> bool:
        """Return whether Adam begins anew at a step, without its moments."""

    def snapshot(self, state: Any) -> dict[str, Tensor]:
        """Return the tensors, besides the trained ones, that change from step to step."""

    def restore(self, state: Any, tensors: dict[str, Tensor]) -> None:
        """Put back what `snapshot` returned."""


def train(method: Trainable, base: Base, concepts: list[Concept], run: Run) -> Any:
    """Train with a gradient method to its last step, and return its state; its adapter is still in place.

    Raises:
        ErasureError: a term of the loss is NaN or infinite; the last checkpoint is kept. Or several processes cannot
            share the run.
    """
    check_shared(method, run.group.count)
    # From the preparation on: what a resumed run prepares anew, another one computed at an update.
    with kernels(method):
        return _train(method, base, concepts, run)


def _train(method: Trainable, base: Base, concepts: list[Concept], run: Run) -> Any:
    restored = _read(run)
    spent = restored.get("costs", _read_prepared(run))
    if not restored:
        run.draw(0)
    # A resumed run reads its pools from files: what they cost was counted when they were made.
    counts = run.costs if spent is None else Counts()
    with counting(base.network, counts):
        state = method.prepare(base, concepts, run)
    try:
        observe(method, base, concepts, state, run, counts)
        if spent is None:
            _write_prepared(run)
        else:
            run.costs.forward, run.costs.backward, run.costs.seconds = int(spent[0]), int(spent[1]), float(spent[2])
        _descend(method, base, state, run, restored)
        if run.rule is not None and run.group.main:
            run.rule.log()
    except BaseException:
        state.adapter.remove()
        raise
    return state


def check_shared(method: Optioned, processes: int) -> None:
    """Refuse several processes where the objective needs the graphs of gradients, which do not leave a process.

    Raises:
        ErasureError: there is more than one process, and the method has UNO's term.
    """
    if method.surgery == "uno" and processes > 1:
        raise ErasureError(
            f"surgery=uno differentiates gradients, and those of {processes} processes are averaged by a step that "
            "cannot be differentiated: use one process, or surgery=first. Nothing was changed"
        )


def observe(method: Trainable, base: Base, concepts: list[Concept], state: Any, run: Run, counts: Counts) -> None:
    """Give a run its curves and its stopping rule; sampling held-out states counts only where the rule uses them."""
    ends = method.stop == "auto"
    if ends or method.measure_every:
        with counting(base.network, counts if ends else Counts()):
            run.curves = Curves.start(method, base, concepts, state, method.measure_every, run.seed)
    if ends:
        run.rule = StopRule.start(method.iterations, state.adapter.parameters())


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one part of a checkpoint, without the part's name."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _descend(method: Trainable, base: Base, state: Any, run: Run, restored: dict[str, Tensor]) -> None:
    """Take all steps, from the first or from the checkpoint `restored`."""
    adapter: Adapter = state.adapter
    params = adapter.parameters()
    if run.engine is not None:
        run.engine.settle(params, inside=adapter.component == base.component)
    optimizer = torch.optim.AdamW(
        params.values(),
        lr=method.learning_rate,
        weight_decay=method.weight_decay,
        fused=base.device.type == "cuda" or None,  # None: torch's own choice
    )
    scaler = run.scaler()
    start = _restore(restored, params, optimizer, scaler)
    curves, rule = run.curves, run.rule
    objective = Objective(method, base.scheduler.config.num_train_timesteps)
    sparsity = Sparsity(method, adapter, run.seed)
    if restored:
        method.restore(state, _part(restored, "extra"))
        objective.restore(_part(restored, "objective"))
        sparsity.restore(_part(restored, "sparsity"))
        if curves is not None:
            curves.restore(_part(restored, "curves"))
        if rule is not None:
            rule.restore(_part(restored, "stop"))
    with counting(base.network, run.costs):
        bar = _bar(start, method.iterations, run)
        clock = time.perf_counter()
        for step in bar:
            factor = 1.0 if rule is None else rule.rate
            optimizer.param_groups[0]["lr"] = method.learning_rate * method.rate(step) * factor
            if sparsity.begin(step) or method.restarts(step):
                optimizer.state.clear()
            terms = objective.reduce(method.loss(state, step))
            if not torch.isfinite(torch.stack(list(terms.values())).sum()):
                raise _diverged(terms, step, run)
            objective.backward(terms, params, scaler)
            sparsity.gradients(step, scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()  # the next calls shall not be held beside gradients that nobody needs
            _round(params, method.weight_rounding)
            sparsity.settle(optimizer.param_groups[0]["lr"])
            if run.measure(step + 1) and curves is not None and rule is not None:
                rule.see(step + 1, curves.erased[-1], curves.drift[-1], params, optimizer)
            run.watch(step + 1, terms, {"learning_rate": optimizer.param_groups[0]["lr"], **objective.figures})
            bar.set_postfix({name: f"{value.item():.4g}" for name, value in terms.items()}, refresh=False)
            if rule is not None and rule.why:
                break
            if (step + 1) % CHECKPOINT_EVERY == 0 and run.folder is not None and run.group.main:
                parts = {"extra": method.snapshot(state), "objective": objective.tensors()}
                parts |= {"sparsity": sparsity.tensors()}
                parts |= {"curves": curves.tensors()} if curves is not None else {}
                parts |= {"stop": rule.tensors()} if rule is not None else {}
                extra = {f"{part}.{name}": value for part, found in parts.items() for name, value in found.items()}
                extra["scaler"] = torch.tensor([scaler.get_scale(), scaler.state_dict().get("_growth_tracker", 0)])
                _write(run, params, optimizer, step + 1, run.costs.seconds + time.perf_counter() - clock, extra)


def _bar(start: int, total: int, run: Run) -> Any:
    """Return the steps that are left, with a progress bar in the main process."""
    from tqdm import tqdm

    hidden = None if run.progress and run.group.main else True  # None: shown on a terminal only
    return tqdm(range(start, total), initial=start, total=total, desc="erasing", unit="step", disable=hidden)


def _diverged(terms: dict[str, Tensor], step: int, run: Run) -> ErasureError:
    figures = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
    kept = f"; the last checkpoint is kept in {run.folder}" if run.folder else ""
    return ErasureError(
        f"the loss is not a number at step {step} ({figures}): no patch was written{kept}. "
        "A lower learning_rate or --precision fp32 usually helps"
    )


@torch.no_grad()
def _round(params: dict[str, torch.nn.Parameter], to: str) -> None:
    """Round the weights as training in half precision does: updates below half an ulp are lost."""
    if to == "bf16":
        for param in params.values():
            param.copy_(param.bfloat16().float())


def _write(
    run: Run, params: dict, optimizer: torch.optim.Optimizer, step: int, seconds: float, extra: dict[str, Tensor]
) -> None:
    if run.folder is None:
        return
    path = run.folder / STATE
    tensors = {
        "step": torch.tensor(step),
        "costs": torch.tensor([run.costs.forward, run.costs.backward, seconds], dtype=torch.float64),
        **extra,
    }
    for name, param in params.items():
        tensors[f"weight.{name}"] = param.data
        moments = optimizer.state.get(param)
        if not moments:  # no step has trained it yet
            continue
        tensors[f"first.{name}"] = moments["exp_avg"]
        # In fp16 a step that overflows is skipped, so Adam may have taken fewer steps than the loop.
        tensors |= {f"second.{name}": moments["exp_avg_sq"], f"taken.{name}": moments["step"]}
    temporary = path.with_suffix(".tmp")
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        os.replace(temporary, path)
    except OSError as fault:
        raise ErasureError(f"{path}: the checkpoint cannot be written: {fault.strerror or fault}") from None


def _write_prepared(run: Run) -> None:
    """Note what the preparation cost, for a run that is resumed before its first checkpoint."""
    if run.folder is None or not run.group.main:
        return
    path = run.folder / PREPARED
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps([run.costs.forward, run.costs.backward, run.costs.seconds]))
        os.replace(temporary, path)
    except OSError as fault:
        raise ErasureError(f"{path}: the costs cannot be written: {fault.strerror or fault}") from None


def reached(folder: Path) -> tuple[int, int]:
    """Return the step from which a stopped run goes on, and the forward passes until then; 0 and 0 where it begins.

    Args:
        folder: the folder of the run, `<out>.run`.
    """
    if (path := folder / STATE).is_file():
        with safe_open(path, "pt") as file:
            return int(file.get_tensor("step")), int(file.get_tensor("costs")[0])
    if (path := folder / PREPARED).is_file():
        return 0, int(json.loads(path.read_text())[0])
    return 0, 0


def _read_prepared(run: Run) -> Any:
    path = run.path(PREPARED)
    return json.loads(path.read_text()) if path is not None and path.is_file() else None


def _read(run: Run) -> dict[str, Tensor]:
    path = run.path(STATE)
    return load_file(path) if path is not None and path.is_file() else {}


@torch.no_grad()
def _restore(
    state: dict[str, Tensor], params: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> int:
    if not state:
        return 0
    step = int(state["step"])
    fused = bool(optimizer.defaults.get("fused"))  # a fused optimizer counts its steps on the weights' device
    for name, param in params.items():
        param.copy_(state[f"weight.{name}"])
        if f"first.{name}" not in state:
            continue
        taken = state.get(f"taken.{name}", torch.tensor(float(step)))
        optimizer.state[param] = {
            "step": taken.to(param.device) if fused else taken,
            "exp_avg": torch.empty_like(param).copy_(state[f"first.{name}"]),
            "exp_avg_sq": torch.empty_like(param).copy_(state[f"second.{name}"]),
        }
    if scaler.is_enabled():
        scale, tracked = state["scaler"].tolist()
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracked)})
    return step
