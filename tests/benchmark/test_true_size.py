"""bench/true_size.py, without training at the true size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "bench"
ROW = {"model": "sd1", "method": "spm", "concept": "object", "precision": "fp32", "checkpointing": False}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("true_size")


@pytest.mark.parametrize(("kind", "weights"), [("sd1", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_shapes_are_the_true_ones(bench, kind, weights):
    assert sum(param.numel() for param in bench.parts_of(kind).unet.parameters()) == weights


def test_a_row_that_does_not_fit_says_so_and_nothing_is_trained(bench, monkeypatch):
    monkeypatch.setattr(bench, "free", lambda: 2e9)
    monkeypatch.setattr(bench, "train", None)
    monkeypatch.setattr(bench, "plan", lambda *_, **__: type("Forecast", (), {"peak_bytes": 3e9}))
    drawn = []
    monkeypatch.setattr(bench, "pipeline", lambda *_, weights: drawn.append(weights))
    row = bench.measure(dict(ROW))
    assert (row["forecast_bytes"], row["free_bytes"], drawn) == (3e9, 2e9, [False])
    assert "| 3.0 | does not fit into 2.0 |" in bench.page([row])


def test_a_row_is_put_in_the_place_of_the_one_with_its_key(bench, tmp_path):
    out = tmp_path / "rows.json"
    figures = {"forecast_bytes": 8e9, "peak_bytes": 10e9, "libraries_bytes": 1e9, "F": 3, "B": 1, "cpu_seconds": 7}
    for row in ({**ROW, **figures}, {**ROW, **figures, "checkpointing": True}, {**ROW, **figures, "peak_bytes": 9e9}):
        bench.add(out, row, list(ROW))
    assert [row["peak_bytes"] for row in json.loads(out.read_text())] == [9e9, 10e9]
    assert "| sd1 | spm | object | fp32 | no | 8.0 | 9.0 | 1.12 | 3 | 1 | 7 |" in out.with_suffix(".md").read_text()
    assert not list(tmp_path.glob("*.part"))


def test_another_model_is_refused(bench, capsys):
    with pytest.raises(SystemExit) as fault:
        bench.main(["sd9"])
    assert fault.value.code == 2 and "sd9 is not measured; choose from sd1, sdxl" in capsys.readouterr().err


def test_weights_are_random_and_of_the_scale_of_their_inputs(bench, monkeypatch):
    from types import SimpleNamespace

    part = torch.nn.Linear(400, 300, device="meta")
    monkeypatch.setattr(bench, "parts_of", lambda _: SimpleNamespace(unet=part))
    monkeypatch.setattr(
        bench, "PIPELINES", {"sd1": lambda **parts: SimpleNamespace(set_progress_bar_config=dict, **parts)}
    )
    unet = bench.pipeline("sd1", torch.bfloat16, weights=True).unet
    assert unet.weight.dtype == torch.bfloat16 and unet.weight.float().std() == pytest.approx(1 / 20, rel=0.05)
    assert not unet.bias.any() and not unet.weight.requires_grad
