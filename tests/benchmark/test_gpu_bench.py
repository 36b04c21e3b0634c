"""bench/gpu.py, on a tiny UNet without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"


def bench():
    spec = importlib.util.spec_from_file_location("gpu", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_training_and_drawing(tmp_path):
    module = bench()
    few = ["--steps", "1", "--rounds", "1", "--sampling", "2", "--methods", "esd", "advunlearn"]
    module.main(["--tiny", *few, "--out", str(tmp_path / "gpu")])
    results = json.loads((tmp_path / "gpu.json").read_text())
    for method, published in (("esd", 200), ("advunlearn", 1000)):
        rows = results["training"][method]
        assert rows.keys() == {"ours", "lean", "published"}
        assert all(row["step_seconds"] > 0 and row["peak_bytes"] is None for row in rows.values())
        assert rows["lean"]["forecast_bytes"] < rows["ours"]["forecast_bytes"]
        assert rows["published"]["iterations"] == published
    assert results["images"].keys() == {"unpatched", "folded", "gated"}
    assert "a CPU" in (tmp_path / "gpu.md").read_text()


def test_the_true_shapes_are_those_of_stable_diffusion_1():
    pipe = bench().pipeline("meta", weights=False)
    assert sum(param.numel() for param in pipe.unet.parameters()) == 859_520_964
    assert sum(param.numel() for param in pipe.text_encoder.parameters()) == 123_060_480


def test_every_method_that_trains_is_measured_and_has_settings_for_the_tiny_mode():
    module = bench()
    assert list(module.TINY) and set(module.TINY) == set(module.names(module.GradientMethod))


def test_what_does_not_fit_into_memory_does_not_stop_the_rest(monkeypatch):
    module = bench()

    def steps_of(pipe, method, steps, computing, **settings):
        if settings.get("parity"):
            raise torch.cuda.OutOfMemoryError("full")
        return {"batch_size": 1, "step_seconds": 1.0, "iterations": 2, "whole_seconds": 3, "peak_bytes": 4 * 10**9} | {
            "forecast_bytes": 5 * 10**9
        }

    monkeypatch.setattr(module, "steps_of", steps_of)
    rows = module.training(None, "esd", 2, {}, {})
    assert rows["published"] is None and rows["lean"]["peak_bytes"]
    head = {"model": "SD", "card": "card", "torch": "2", "precision": "bf16"}
    lines = module.page({**head, "training": {"esd": rows}}).splitlines()
    assert "| esd | published | out of memory | | | | | |" in lines
    assert len({line.count("|") for line in lines if line.startswith("| ")}) == 1
