"""The technique that eval-unlearn calls draws as an erased pipeline does."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import erasure
from erasure.errors import ErasureError
from erasure.formats.eval_unlearn import ErasureTechnique
from erasure.pipelines import ErasedStableDiffusionPipeline, load_pipeline
from tests.patch.making import low_rank_patch
from tests.tiny import tiny_pipeline

PROMPTS = ["a photo of a cat by van gogh", "a red dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("technique")
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipe.save_pretrained(place / "model")
    low_rank_patch(pipe, gate={"kind": "text", "texts": ["van gogh"]}, size=0.5).save(place / "a.safetensors")
    return place


def technique(folder, **config):
    given = {"erase_concept": "van gogh", "model_id": str(folder / "model"), "device": "cpu", **config}
    return ErasureTechnique(num_inference_steps=2, guidance_scale=3.0, **given)


def test_it_draws_one_image_a_prompt_from_its_own_seed(folder):
    made = technique(folder, patches=str(folder / "a.safetensors"), strength=0.5)
    images = made.generate(prompts=PROMPTS, seed=7)
    pipe = load_pipeline(folder / "model", device="cpu")
    pipe.load_patch(folder / "a.safetensors", strength=0.5)
    for number, prompt in enumerate(PROMPTS):
        noise = torch.Generator("cpu").manual_seed(7 + number)
        (expected,) = pipe(prompt, num_inference_steps=2, guidance_scale=3.0, generator=noise).images
        assert np.array_equal(images[number], expected)
    plain = load_pipeline(folder / "model", device="cpu")
    noise = torch.Generator("cpu").manual_seed(7)
    (base,) = plain(PROMPTS[0], num_inference_steps=2, guidance_scale=3.0, generator=noise).images
    assert not np.array_equal(images[0], base)
    assert len(made.generate(PROMPTS, num_inference_steps=1)) == 2


def test_it_erases_by_a_method_of_the_package(folder):
    made = technique(folder, method="uce", settings={"ridge": 0.25}, erase_concept="cat")
    (described,) = made.pipe.get_list_patches().values()
    assert described["method"] == "uce" and described["concepts"] == ["cat"]
    plain = technique(folder, patches=str(folder / "a.safetensors"), strength=0.0)
    (image,), (base,) = (each.generate(["a cat"], seed=1) for each in (made, plain))
    assert not np.array_equal(image, base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patches": "a", "method": "esd"}, "either `patches` or `method`"),
        ({}, "either `patches` or `method`"),
        ({"patches": "a", "erase_concept": " "}, "needs `erase_concept`"),
        ({"patches": "a", "strenth": 1}, "did you mean 'strength'"),
        ({"patches": "nowhere.safetensors"}, "nowhere"),
        ({"method": "esdd"}, "did you mean 'esd'"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(folder, config, message):
    with pytest.raises(ErasureError, match=message):
        technique(folder, **config)


def test_it_is_declared_where_eval_unlearn_looks():
    """The entry point is read from pyproject.toml, because the package may have been installed before it was added."""
    project = tomllib.loads((Path(erasure.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["eval_unlearn.techniques"]["erasure"].partition(":")
    assert getattr(importlib.import_module(module), name) is ErasureTechnique
