"""SLD's patch: the texts and numbers that it holds, and its settings on other models."""

from __future__ import annotations

import pytest

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import choose
from erasure.model.presets import Family, find
from tests.tiny import LENGTH, tiny_pipeline
from tests.tiny_transformers import tiny_transformer

MAX = {"safety_scale": 5000.0, "threshold": 1.0, "warm_up": 0.0, "momentum": 0.5, "momentum_decay": 0.7}


def test_the_patch_holds_every_name_and_the_paper_s_numbers():
    concepts = [{"name": "cat", "aliases": ["dog"]}, {"name": "van gogh", "kind": "style"}]
    patch = erase(tiny_pipeline(), concepts, "sld", progress=False)
    assert patch.payload.to_json() == {
        "form": "guidance",
        "texts": ["cat", "dog", "van gogh style"],
        "settings": MAX,
        "scale": 1.0,
    }
    assert patch.gate == {"kind": "always"}


def test_a_gate_reads_the_names():
    patch = erase(tiny_pipeline(), {"name": "cat", "aliases": ["dog"]}, "sld", progress=False, gate="text")
    assert patch.gate == {"kind": "text", "texts": ["cat", "dog"], "power": 0.0, "threshold": 0.9}


def test_more_names_than_the_encoder_reads_are_refused():
    with pytest.raises(ErasureError, match=f"the text encoder reads {LENGTH}"):
        erase(tiny_pipeline(), ["cat", "dog", "red car", "blue tree", "night", "star"], "sld", progress=False)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_published_numbers_have_a_source(family):
    chosen = choose("sld", "object", {}, family=Family(find(family), "by its name"))
    assert {name: getattr(chosen.method, name) for name in MAX} == MAX
    assert all("2211.05105" in chosen.sources[name] or "paper" in chosen.sources[name] for name in MAX)


def test_flux_is_refused_with_the_reason():
    with pytest.raises(ErasureError, match="sld cannot erase from.*Flux.*guidance is an input.*Nothing was"):
        erase(tiny_transformer("flux"), "cat", "sld", progress=False)
