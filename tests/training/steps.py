"""What each process of a launch does for tests/training/test_distributed.py; run by torchrun with a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.methods import names
from erasure.methods.esd import ESD
from erasure.training import loop as training
from tests.conformance.quick import QUICK
from tests.tiny import tiny_pipeline

RANK = os.environ.get("RANK", "0")
TRAINED = names(GradientMethod)
BATCH = {name: "retain_batch_size" if name == "gem" else "batch_size" for name in TRAINED}
# Batches that two processes cannot share evenly.
ODD = {name: {**QUICK[name], BATCH[name]: 3} for name in TRAINED}
OPTIONS = {"reweight": "static", "surgery": "first"}  # of a run of SPM
ODD["advunlearn"] |= {"retain_batch_size": 4, "learning_rate": 1e-3}
STOP = 3  # the update after which a run is interrupted


def interrupted(out: Path) -> None:
    """A run of ESD that is left after STOP updates, with a checkpoint at the second."""
    real, training.CHECKPOINT_EVERY = training.Run.watch, 2

    def watch(run: training.Run, step: int, *rest: object) -> None:
        if step == STOP:
            raise KeyboardInterrupt
        real(run, step, *rest)

    training.Run.watch = watch
    try:
        erase(tiny_pipeline(), "cat", "esd", out=out, progress=False, **ODD["esd"])
    except KeyboardInterrupt:
        pass
    finally:
        training.Run.watch = real


def broken(folder: Path) -> str:
    """A run in which the second process's weights are NaN from the second update on."""
    real = ESD.loss

    def loss(self, state, step):
        if step == 1 and RANK == "1":
            for param in state.adapter.parameters().values():
                param.data.fill_(torch.nan)
        return real(self, state, step)

    ESD.loss = loss
    try:
        return message_of(folder / "broken.safetensors")
    finally:
        ESD.loss = real


def message_of(out: Path, **more: object) -> str:
    try:
        erase(tiny_pipeline(), "cat", "esd", out=out, progress=False, **more, **ODD["esd"])
    except ErasureError as fault:
        return str(fault)
    return "no error"


def main(folder: Path) -> None:
    record: dict[str, object] = {"costs": {}}
    for name in TRAINED:
        patch = erase(tiny_pipeline(), "cat", name, out=folder / f"{name}.safetensors", progress=False, **ODD[name])
        record["costs"][name] = patch.costs
    erase(tiny_pipeline(), "cat", "spm", out=folder / "options.safetensors", progress=False, **ODD["spm"], **OPTIONS)
    interrupted(folder / "resumed.safetensors")
    record["left"] = sorted(path.name for path in (folder / "resumed.safetensors.run").iterdir())
    erase(tiny_pipeline(), "cat", "esd", out=folder / "resumed.safetensors", progress=False, **ODD["esd"])
    interrupted(folder / "alone.safetensors")
    watched = {"progress": False, "preview_every": 2, **ODD["esd"]}
    erase(tiny_pipeline(), "cat", "esd", out=folder / "watched.safetensors", **watched)
    record["nan"] = broken(folder)
    record["apart"] = message_of(folder / f"apart{RANK}.safetensors", seed=int(RANK))
    (folder / f"record-{RANK}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
