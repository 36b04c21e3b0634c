"""Loading models by name, choosing modules to train, and encoding prompts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from erasure.errors import ErasureError
from erasure.glyph import CHECKPOINT
from erasure.model.base import Base
from erasure.model.loading import resolve
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline, write_tiny

SD1 = {"cross_attention_dim": 768, "sample_size": 64}
SD2 = {**SD1, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}


@pytest.mark.parametrize(
    ("config", "variant", "modules", "millions"),
    [
        (SD1, "x", 64, 43.96),
        (SD1, "x-strict", 32, 19.17),
        (SD1, "selfattn", 64, 49.57),
        (SD1, "u", None, 815.36),
        (SD2, "x", 64, 50.35),
        (SD2, "x-strict", 32, 25.56),
    ],
)
def test_targets_on_the_real_architectures(config, variant, modules, millions):
    with torch.device("meta"):
        base = Base("sd", SimpleNamespace(unet=UNet2DConditionModel(**config)))
    targets = base.targets(variant)
    assert modules is None or len(targets) == modules
    assert round(sum(p.numel() for m in targets.values() for p in m.parameters(recurse=False)) / 1e6, 2) == millions


def test_no_target_is_an_error():
    class Plain(torch.nn.Module):
        config = SimpleNamespace()

    with pytest.raises(ErasureError, match="matches no module"):
        Base("plain", SimpleNamespace(unet=Plain())).targets("x")


def test_names_folders_and_hub_ids(tmp_path):
    assert resolve("glyph") == str(CHECKPOINT)
    assert resolve("stable-diffusion-v1-5/stable-diffusion-v1-5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    folder = write_tiny(tmp_path / "tiny")
    assert resolve(folder) == str(folder)
    (tmp_path / "a.ckpt").write_bytes(b"pickle")
    for name, message in [
        ("glpyh", "glyph"),
        (str(tmp_path), "model_index.json"),
        (str(tmp_path / "a.ckpt"), "only .safetensors"),
        (str(tmp_path / "no" / "where"), "unknown model"),
        ("missing.safetensors", "unknown model"),
    ]:
        with pytest.raises(ErasureError, match=message):
            resolve(name)


def test_prompts_are_encoded_once_and_never_cut():
    base = Base("tiny", tiny_pipeline())
    calls = []
    base.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    states = base.encode(["cat", "", "cat"])
    assert states.shape == (3, 12, 32) and torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])
    base.encode(["cat", ""])
    assert len(calls) == 2
    with pytest.raises(ErasureError, match="tokens"):
        base.encode(["cat " * 40])


def test_a_patched_pipeline_is_no_base():
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.load_patch(delta_patch(pipe), name="first")
    with pytest.raises(ErasureError, match="has active patches .first."):
        Base.of(pipe)
    pipe.set_patches({})
    assert Base.of(pipe).pipe is pipe


def test_other_objects_are_no_base():
    with pytest.raises(ErasureError, match="not a Stable Diffusion pipeline"):
        Base.of(torch.nn.Linear(2, 2))


def test_inpainting_pipelines_are_no_base():
    pipe = tiny_pipeline()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ErasureError, match="reads 9 channels, 4 of them latents"):
        Base.of(pipe)


def test_ddim_does_not_clip_where_the_schedule_does_not_say():
    """XL's Euler scheduler has no such entry, and DDIM's default would clip the latents at 1."""
    base = Base("tiny", tiny_pipeline(kind="sdxl"))
    assert "clip_sample" not in base.scheduler.config and base.sampler("ddim").config.clip_sample is False
    assert Base("tiny", tiny_pipeline()).sampler("pndm").config.prediction_type == "epsilon"
