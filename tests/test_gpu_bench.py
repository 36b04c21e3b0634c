"""bench/gpu.py, on a tiny UNet without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "bench" / "gpu.py"


def bench():
    spec = importlib.util.spec_from_file_location("gpu", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_training_and_drawing(tmp_path):
    module = bench()
    few = ["--steps", "2", "--rounds", "1", "--sampling", "2", "--methods", "esd"]
    module.main(["--tiny", *few, "--out", str(tmp_path / "gpu")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = found["training"]["esd"]
    assert rows.keys() == {"ours", "lean", "published"}
    assert all(row["step_seconds"] > 0 and row["peak_bytes"] is None for row in rows.values())
    assert rows["lean"]["forecast_bytes"] < rows["ours"]["forecast_bytes"]
    assert rows["published"]["iterations"] == 200
    assert found["images"].keys() == {"unpatched", "folded", "gated"}
    assert "a CPU" in (tmp_path / "gpu.md").read_text()


def test_the_true_shapes_are_those_of_stable_diffusion_1():
    pipe = bench().pipeline("meta", weights=False)
    assert sum(param.numel() for param in pipe.unet.parameters()) == 859_520_964
    assert sum(param.numel() for param in pipe.text_encoder.parameters()) == 123_060_480
