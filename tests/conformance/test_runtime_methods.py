"""What every runtime method keeps: it trains nothing, and its UNet calls are counted and forecast; guards make none."""

from __future__ import annotations

import pytest
import torch

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.formats import FORMATS, export_patch
from erasure.guard_method import GuardMethod
from erasure.method import RuntimeMethod
from erasure.patch import Features, Guard, Patch
from erasure.patch.loaders import as_it_is
from erasure.patch.ops.arithmetic import merge
from erasure.patch.ops.resize import resize
from erasure.pipelines import ErasedStableDiffusionPipeline, load_patch
from tests.conformance.quick import small
from tests.conformance.sketches import those
from tests.tiny import latents, tiny_pipeline

COLLECTING = [method for method in those(RuntimeMethod) if method not in those(GuardMethod)]


@pytest.mark.parametrize("method", COLLECTING)
def test_it_trains_nothing_and_counts_its_calls(method):
    patch = erase(tiny_pipeline(), ["cat", "dog"], method, progress=False, **small(method))
    assert patch.costs["F"] > 0 == patch.costs["B"]
    assert patch.gate["kind"] != "always" or isinstance(patch.payload, Features)
    forecast = plan(tiny_pipeline(), ["cat", "dog"], method, **small(method))
    assert forecast.F == patch.costs["F"] and forecast.training_bytes == 0 < forecast.prepare_bytes


@pytest.mark.parametrize("method", those(GuardMethod))
def test_a_guard_holds_no_tensors_and_says_what_cannot_be_done_with_it(method, tmp_path):
    file = tmp_path / "p.safetensors"
    patch = erase(tiny_pipeline(), "cat", method, out=file, progress=False, **small(method))
    assert isinstance(patch.payload, Guard) and patch.payload.tensors() == [] and not patch.base_fingerprint
    assert file.stat().st_size < 3000 and Patch.load(file).payload.to_json() == patch.payload.to_json()
    answers = {name: answer for name, answer in as_it_is(patch).items() if name != "erasure"}
    assert answers and all(answer.startswith("no: it is a guard") for answer in answers.values())
    for name, entry in FORMATS.items():
        if not entry.only_read:
            with pytest.raises(ErasureError, match="is a guard.*changes no weight.*Nothing was written"):
                export_patch(patch, tmp_path / "out", name, tiny_pipeline())
    for refused in (lambda: merge([(patch, 1.0), (patch.scale(2.0), 1.0)]), lambda: resize(patch, 4)):
        with pytest.raises(ErasureError, match="is a guard"):
            refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", those(GuardMethod))
def test_a_guard_scales_reads_its_gate_and_is_refused_by_plain_pipelines(method):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    patch = erase(pipe, "cat", method, progress=False, **small(method), gate="text", gate_threshold=0.999)
    base = latents(pipe, ["cat", "a red car"])
    pipe.load_patch(patch, name="cat")
    found = latents(pipe, ["cat", "a red car"])
    assert pipe.gate_log == [{"cat": 1.0}, {"cat": 0.0}]
    assert torch.equal(found[1], base[1]) and not torch.equal(found[0], base[0])
    pipe.unload_patches()
    pipe.load_patch(patch.scale(0.0))
    assert torch.equal(latents(pipe, ["cat", "a red car"]), base)
    with pytest.raises(ErasureError, match="is a guard, which StableDiffusionPipeline cannot run"):
        load_patch(tiny_pipeline(), patch)
