"""Trackers and previews of a run."""

from __future__ import annotations

import pytest
import torch

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.training import callbacks
from tests.tiny import tiny_pipeline

QUICK = {
    "iterations": 3,
    "batch_size": 2,
    "trajectories": 2,
    "sample_steps": 3,
    "learning_rate": 1e-3,
    "progress": False,
}


def test_losses_go_to_the_trackers_step_by_step(monkeypatch, tmp_path):
    seen = []

    class Fake:
        def __init__(self, names, folder, settings):
            seen.append((tuple(names), folder.name, settings["method"]))

        def log(self, values, step):
            seen.append((step, sorted(values)))

        def close(self):
            seen.append("closed")

    monkeypatch.setattr(callbacks, "Trackers", Fake)
    erase(tiny_pipeline(), "cat", "esd", out=tmp_path / "p.safetensors", trackers=["tensorboard"], **QUICK)
    assert seen[0] == (("tensorboard",), "p.safetensors.logs", "esd")
    assert seen[1:4] == [(step, ["learning_rate", "loss/esd"]) for step in (1, 2, 3)] and seen[4] == "closed"


def test_a_tracker_that_is_not_known_or_not_there_is_told(tmp_path):
    with pytest.raises(ErasureError, match="unknown tracker"):
        callbacks.Trackers(["tensorbord"], tmp_path, {})
    if not callbacks.available()["wandb"]:
        with pytest.raises(ErasureError, match="pip install wandb"):
            callbacks.Trackers(["wandb"], tmp_path, {})


@pytest.mark.parametrize("wish", [{"trackers": ["tensorboard"]}, {"preview_every": 2}])
def test_previews_and_logs_need_a_place(wish):
    with pytest.raises(ErasureError, match="next to the patch"):
        erase(tiny_pipeline(), "cat", "esd", **wish, **QUICK)


def test_a_preview_every_zero_steps_is_refused(tmp_path):
    with pytest.raises(ErasureError, match="at least 1"):
        erase(tiny_pipeline(), "cat", "esd", out=tmp_path / "p.safetensors", preview_every=0, **QUICK)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_previews_of_a_half_precision_base(tmp_path, precision):
    """Its autoencoder too computes in fp32 for them, and is given back as it was."""
    pipe = tiny_pipeline().to(torch.bfloat16)
    kept = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    place = tmp_path / "p.safetensors"
    erase(pipe, "cat", "esd", out=place, preview_every=3, precision=precision, **QUICK)
    assert len(list((tmp_path / "p.safetensors.previews").glob("*.png"))) == 2
    after = pipe.vae.state_dict()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, kept[name]) for name, value in after.items())
