"""A run: its seed, its folder with the state that a resumed run reads, its costs, its previews and trackers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erasure.distributed import ProcessGroup
from erasure.errors import ErasureError
from erasure.model.diffusion import Counts
from erasure.patch import Payload
from erasure.training.callbacks import Previews, Trackers
from erasure.training.compute import Engine
from erasure.training.curves import Curves
from erasure.training.stopping import StopRule


def run_key(settings: Mapping[str, Any]) -> str:
    """Return the digest by which a run knows its own state again.

    Args:
        settings: everything that decides the result, as plain data.
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FitResult:
    """The result of a method: what the patch holds, and the gate that decides when it acts."""

    payload: Payload
    gate: dict[str, Any] = field(default_factory=lambda: {"kind": "always"})


@dataclass
class Run:
    """One run of a method, as the method sees it.

    Args:
        seed: seed of everything random in the run.
        folder: where checkpoints and pools are kept; None keeps nothing.
        progress: whether to show a progress bar.
        previews: draws pictures during the run; None draws none.
        trackers: take the losses; None logs nothing.
        costs: UNet calls and seconds so far.
        engine: how the UNet computes, already entered; None: as the base is, in this process alone.
        curves: how much is erased and kept in the course of the run; None measures nothing.
        rule: ends the run by its curves; None takes every update.
        search: the measurements by which a number was chosen after the last update; None if none was.
        group: the processes that work on the run together.
    """

    seed: int = 0
    folder: Path | None = None
    progress: bool = True
    previews: Previews | None = None
    trackers: Trackers | None = None
    costs: Counts = field(default_factory=Counts)
    engine: Engine | None = None
    curves: Curves | None = None
    rule: StopRule | None = None
    search: dict[str, Any] | None = None
    group: ProcessGroup = field(default_factory=ProcessGroup)

    def open(self, settings: dict[str, Any]) -> None:
        """Create the folder, or check that it holds this same run.

        Args:
            settings: everything that decides the result, as plain data.

        Raises:
            ErasureError: the folder holds a run with other settings or cannot be written to, or the processes of the
                launch were started with different settings.
        """
        key = run_key(settings)
        if len(set(self.group.each(lambda: key))) > 1:
            raise ErasureError("the processes of this launch were given different runs; they can only do one together")
        self.group.first(lambda: self._open(key, settings))

    def _open(self, key: str, settings: dict[str, Any]) -> None:
        if self.folder is None:
            return
        note = self.folder / "run.json"
        shutil.rmtree(self._discarded(self.folder), ignore_errors=True)
        try:
            if note.is_file():
                if json.loads(note.read_text()).get("key") != key:
                    raise ErasureError(
                        f"{self.folder} holds an unfinished run with other settings; it was left untouched. "
                        "Use the settings it was started with, choose another output, or delete the folder"
                    )
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(".tmp")
            temporary.write_text(json.dumps({"key": key, **settings}, indent=1))
            os.replace(temporary, note)
        except OSError as fault:
            raise ErasureError(f"{self.folder} cannot be written to: {fault.strerror or fault}") from None
        except json.JSONDecodeError:
            raise ErasureError(f"{note} cannot be read; delete {self.folder} to start again") from None

    def measure(self, step: int) -> bool:
        """Measure how much is erased and kept if it is due after a step, in all processes, and return whether it was.

        Its cost is counted only if a rule ends the run by it.
        """
        last = self.rule is not None and step == self.rule.limit
        if self.curves is None or not (last or self.curves.due(step)):
            return False
        forward = self.costs.forward
        self.curves.measure(step)
        if self.rule is None:
            self.costs.forward = forward
        return True

    def record(self) -> dict[str, Any] | None:
        """Return for a patch's header the curves and why the rule ended the run, or the search; None without both."""
        if self.curves is None or not self.curves.steps:
            return self.search
        return {**self.curves.to_json(), **({"stop": self.rule.to_json()} if self.rule is not None else {})}

    def watch(self, step: int, terms: dict[str, Tensor], figures: Mapping[str, float]) -> None:
        """Log the losses and figures of a step and draw a preview that is due, in the main process, free of cost."""
        if not self.group.main:
            return
        if self.trackers is not None:
            values = {f"loss/{name}": value.item() for name, value in terms.items()}
            self.trackers.log({**values, **figures}, step)
        if self.previews is not None and self.previews.due(step):
            forward = self.costs.forward
            self.draw(step)
            self.costs.forward = forward

    def draw(self, step: int) -> None:
        """Draw the preview of a step, in the main process."""
        if self.previews is not None and self.group.main:
            with self.engine.alone() if self.engine else nullcontext():
                self.previews.draw(step, self.curves)

    def scaler(self) -> torch.amp.GradScaler:
        """Return the scaler of the loss, which does something in fp16 only."""
        return self.engine.scaler() if self.engine else torch.amp.GradScaler("cpu", enabled=False)

    def path(self, name: str) -> Path | None:
        """Return the path of a file of the run, or None if this process must neither read nor write it.

        Every process gets the path if the main one sees the file; otherwise only the main one does, to write it.
        """
        if self.folder is None:
            return None
        path = self.folder / name
        exists = self.group.first(path.is_file)
        return path if exists or self.group.main else None

    def close(self) -> None:
        """Delete the state, once the patch is written.

        The folder is renamed first: deleted only in part, it could be taken for the state of another run.
        """
        if self.folder is None or not self.group.main:
            return
        discarded = self._discarded(self.folder)
        with suppress(OSError):
            os.replace(self.folder, discarded)
        shutil.rmtree(discarded, ignore_errors=True)

    @staticmethod
    def _discarded(folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.discarded")
