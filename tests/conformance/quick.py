"""What the conformance suites share: a small run of each method, and comparisons of weights and patches."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable

import pytest
import torch

from erasure.patch import RUNTIME, Patch
from erasure.training import loop
from tests.tiny import write_tiny_clip

CLIP = tempfile.mkdtemp(prefix="erasure-clip-")  # the text encoders of all tiny checkpoints have its shapes
write_tiny_clip(CLIP)
atexit.register(shutil.rmtree, CLIP, ignore_errors=True)
# A small run of each method. The list is written by hand, so that a lost method turns the suite red.
SMALL = {"iterations": 4, "batch_size": 2, "trajectories": 2, "sample_steps": 3}
# The text states of the concept alone: the vocabulary's would take longer to read than all the rest.
ALONE = {"guide": "empty", "contexts": False, "keep": "listed"}
QUICK = {
    "adavd": {"slope": 0.0, "centre": 0.0},
    "advunlearn": {
        **SMALL,
        "retain_trajectories": 3,
        "retain_sample_steps": 2,
        "retain_batch_size": 2,
        "attack_steps": 2,
        "attack_init": "latest",
        "warm_up": 1,
        "learning_rate": 1e-2,
    },
    "doco": {
        "iterations": 4,
        "batch_size": 2,
        "warm_up": 2,
        "anchor_count": 2,
        "retain_count": 2,
        "sample_steps": 2,
        "learning_rate": 1e-3,
    },
    "dp": ALONE,
    "eraseflow": {
        **SMALL,
        "last_steps": 1,
        "random_steps": 1,
        "retain_trajectories": 2,
        "retain_batch_size": 2,
        "learning_rate": 1e-2,
    },
    "esd": {**SMALL, "learning_rate": 1e-3},
    "gem": {
        "iterations": 4,
        "early_steps": 2,
        "sample_steps": 3,
        "retain_trajectories": 2,
        "retain_batch_size": 2,
        "learning_rate": 1e-2,
    },
    "mace": {
        "guide": "empty",
        "contexts": False,
        "keep": "listed",
        "iterations": 4,
        "batch_size": 2,
        "images": 3,
        "sample_steps": 2,
        "learning_rate": 1e-2,
    },
    "negmerge": {
        "iterations": 4,
        "fine_tunes": 2,
        "batch_size": 2,
        "image_count": 2,
        "sample_steps": 2,
        "scale_steps": 2,
        "learning_rate": 1e-3,
    },
    "saeuron": {
        "words": 3,
        "trajectories": 1,
        "sample_steps": 3,
        "concept_trajectories": 2,
        "expansion": 4,
        "active": 4,
        "epochs": 1,
        "batch_size": 64,
        "features": 3,
        "multiplier": -10.0,
        "cache": False,
        "learning_rate": 1e-3,
    },
    "salun": {
        "iterations": 4,
        "batch_size": 2,
        "forget_count": 3,
        "retain_count": 3,
        "sample_steps": 2,
        "learning_rate": 1e-3,
    },
    "rece": ALONE,
    "receler": {**SMALL, "attack_steps": 2, "attack_rows": 3, "rank": 2, "learning_rate": 1e-2},
    "safree": {},
    "sld": {},
    "slug": {"clip": CLIP, "step": 0.3, "forget_count": 3, "retain_count": 3, "sample_steps": 2},
    "speed": ALONE,
    "spm": {**SMALL, "learning_rate": 1e-2, "refresh": 2},
    "stereo": {
        **SMALL,
        "rounds": 1,
        "search_iterations": 1,
        "inversion_iterations": 1,
        "inversion_batch_size": 2,
        "images": 2,
        "anchors": 2,
        "learning_rate": 1e-3,
    },
    "uce": ALONE,
    "unguide": {**SMALL, "learning_rate": 1e-2, "weight_off": 0.0, "repeats": 2, "ratio": 1.0},
}


def weights(pipe) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder")
        for name, value in getattr(pipe, part).state_dict().items()
    }


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def changes(patch: Patch) -> dict[str, torch.Tensor]:
    """What a patch changes by name; of a guard and of features, their digest."""
    if patch.payload.kind in RUNTIME:
        return {patch.payload.kind: torch.tensor(list(bytes.fromhex(patch.payload.digest)))}
    return {
        f"{part}.{name}": patch.payload.change(part, name)
        for part in patch.payload.components
        for name in patch.payload.names(part)
    }


def left_at_a_checkpoint(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], at: int = 2) -> None:
    """Leave a run right after its first checkpoint, at its second update or another, as a kill there would."""
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", at)
    real = loop._write

    def killed(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop, "_write", killed)
        run()


def small(method: str) -> dict:
    """Settings of a quick run; the defaults of the sketches are quick."""
    return QUICK.get(method, {})
