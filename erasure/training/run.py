"""A run: its seed, its folder with the state that a resumed run reads, its costs, and what watches it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erasure.distributed import ProcessGroup
from erasure.errors import ErasureError
from erasure.model.diffusion import Counts
from erasure.patch import Delta, LowRank
from erasure.training.callbacks import Previews, Trackers
from erasure.training.compute import Engine


@dataclass(frozen=True)
class FitResult:
    """What a method learnt: the tensors of the patch, and when it acts."""

    payload: Delta | LowRank
    gate: dict[str, Any] = field(default_factory=lambda: {"kind": "always"})


@dataclass
class Run:
    """Where a run keeps its state, and its seed.

    Args:
        seed: of everything random in the run.
        folder: for checkpoints and pools; None keeps nothing.
        progress: show a bar.
        previews: draws pictures on the way; None draws none.
        trackers: take the losses; None keeps them to the bar.
        engine: how the UNet computes, which must be on; None: as it stands, in this process alone.
        group: the processes that do the run together.
    """

    seed: int = 0
    folder: Path | None = None
    progress: bool = True
    previews: Previews | None = None
    trackers: Trackers | None = None
    costs: Counts = field(default_factory=Counts)
    engine: Engine | None = None
    group: ProcessGroup = field(default_factory=ProcessGroup)

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder, or check that what lies there is this very run.

        Raises:
            ErasureError: the folder holds a run with other settings, or cannot be written; the processes were given
                different runs.
        """
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        if len(set(self.group.each(lambda: key))) > 1:
            raise ErasureError("the processes of this launch were given different runs: they do one together")
        self.group.first(lambda: self._open(key, settings))

    def _open(self, key: str, settings: dict[str, Any]) -> None:
        if self.folder is None:
            return
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
        """Log the losses of a step and draw its preview, in the main process; the pictures' cost is not counted."""
        if not self.group.main:
            return
        if self.trackers is not None:
            values = {f"loss/{name}": value.item() for name, value in terms.items()}
            self.trackers.log({**values, "learning_rate": rate}, step)
        if self.previews is not None and self.previews.due(step):
            forward = self.costs.forward
            self.draw(step)
            self.costs.forward = forward

    def draw(self, step: int) -> None:
        """Draw the preview of a step, in the main process."""
        if self.previews is not None and self.group.main:
            with self.engine.alone() if self.engine else nullcontext():
                self.previews.draw(step)

    def scaler(self) -> torch.amp.GradScaler:
        """What scales the loss; it does nothing but in fp16."""
        return self.engine.scaler() if self.engine else torch.amp.GradScaler("cpu", enabled=False)

    def path(self, name: str) -> Path | None:
        """A file of the run, or None when nothing is kept.

        All processes read it if it is there, as the main one sees it; if not, only the main one is told where to write.
        """
        if self.folder is None:
            return None
        path = self.folder / name
        there = self.group.first(path.is_file)
        return path if there or self.group.main else None

    def close(self) -> None:
        """The patch is written: the state is no longer needed."""
        if self.folder is not None and self.group.main:
            shutil.rmtree(self.folder, ignore_errors=True)
