"""SAFREE's patch: the names and numbers that it holds, its settings on other models, and parity."""

from __future__ import annotations

import pytest

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import choose
from erasure.model.presets import Family, find
from tests.tiny import LENGTH, tiny_pipeline
from tests.tiny_transformers import tiny_transformer

PUBLISHED = {"margin": 0.01, "steps": 0.2, "midpoint": 0.5333, "slope": 50.0, "padding": False}


def test_the_patch_holds_every_name_and_the_numbers():
    concepts = [{"name": "cat", "aliases": ["dog"]}, {"name": "van gogh", "kind": "style"}]
    patch = erase(tiny_pipeline(), concepts, "safree", progress=False, margin=0.3)
    assert patch.payload.form == "tokens" and patch.gate == {"kind": "always"}
    assert patch.payload.texts == ("cat", "dog", "van gogh", "van gogh style")
    assert patch.payload.settings == {
        **{"margin": 0.3, "steps": 1.0, "midpoint": 0.0, "slope": 50.0, "padding": True, "negative": False},
        **{"reattention": False, "wide_scale": 0.9, "narrow_scale": 0.2, "published": False},
    }


@pytest.mark.parametrize(("kind", "midpoint", "slope"), [("object", 0.5333, 50.0), ("style", 0.55, 70.0)])
def test_parity_is_the_published_code(kind, midpoint, slope):
    patch = erase(tiny_pipeline(), {"name": "cat", "kind": kind}, "safree", progress=False, parity=True)
    changed = {"midpoint": midpoint, "slope": slope, "negative": True, "published": True}
    settings = patch.payload.settings
    assert {key: settings[key] for key in (*PUBLISHED, *changed)} == {**PUBLISHED, **changed}
    assert not settings["reattention"]  # inert in the published scripts


def test_parity_is_refused_on_xl():
    with pytest.raises(ErasureError, match="parity follows the published code for one text encoder"):
        erase(tiny_pipeline(kind="sdxl"), "cat", "safree", progress=False, parity=True)


def test_names_that_are_too_long_are_refused():
    with pytest.raises(ErasureError, match=f"the text encoder reads {LENGTH}"):
        erase(tiny_pipeline(), "cat dog red car blue tree night church a an the", "safree", progress=False)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_published_numbers_have_a_source(family):
    chosen = choose("safree", "object", {}, family=Family(find(family), "by its name"))
    wanted = PUBLISHED if family != "sdxl" else {**PUBLISHED, "steps": 1.0, "midpoint": 0.0}
    assert {name: getattr(chosen.method, name) for name in wanted} == wanted
    assert all("2410.12761" in chosen.sources[name] or "script" in chosen.sources[name] for name in PUBLISHED)
    style = choose("safree", "style", {}, family=Family(find(family), "by its name")).method
    assert style.slope == (50.0 if family == "sdxl" else 70.0)


def test_transformers_are_refused_with_the_reason():
    with pytest.raises(ErasureError, match="safree cannot erase from.*Flux.*state at its end token.*Nothing was"):
        erase(tiny_transformer("flux"), "cat", "safree", progress=False)
