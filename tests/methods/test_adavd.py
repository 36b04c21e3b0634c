"""AdaVD's patch, and the centre of its shift, which is measured on the words that stay."""

from __future__ import annotations

import pytest
import torch

from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import choose
from erasure.methods.adavd import measured
from erasure.model.base import Base
from erasure.model.presets import Family, find
from tests.tiny import tiny_pipeline
from tests.tiny_transformers import tiny_transformer


def test_the_patch_holds_names_and_three_numbers():
    concepts = [{"name": "cat", "aliases": ["dog"]}, {"name": "van gogh", "kind": "style"}]
    patch = erase(tiny_pipeline(), concepts, "adavd", progress=False, centre=0.5)
    assert patch.payload.form == "values"
    assert patch.payload.texts == ("cat", "dog", "van gogh", "van gogh style")
    assert patch.payload.settings == {"peak": 2.0, "slope": 100.0, "centre": 0.5}


def test_the_centre_is_the_quantile_of_the_kept_words_cosines():
    base = Base("", tiny_pipeline())
    cosines = []
    with torch.no_grad():
        for path, module in base.unet.named_modules():
            if path.endswith("attn2.to_v"):
                target = module(base.encode(["cat"])[0, 1])
                for word, end in (("dog", 3), ("red car", 4)):  # the start token is left out, the end token is not
                    for state in base.encode([word])[0, 1:end]:
                        cosines.append(float(torch.cosine_similarity(module(state), target, dim=0)))
    for far in (0.5, 1.0):
        wanted = float(torch.tensor(cosines).quantile(far))
        assert measured(base, ["cat"], ["dog", "red car"], far) == pytest.approx(wanted, abs=1e-4)


def test_without_kept_words_the_centre_must_be_given():
    with pytest.raises(ErasureError, match="centre cannot be measured.*--set centre"):
        measured(Base("", tiny_pipeline()), ["cat"], [], 0.9)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_published_numbers_have_a_source(family):
    chosen = choose("adavd", "object", {}, family=Family(find(family), "by its name"))
    assert (chosen.method.peak, chosen.method.slope, chosen.method.centre) == (2.0, 100.0, None)
    assert "2412.06143" in chosen.sources["slope"] and "derived" in chosen.sources["centre"]


def test_flux_is_refused_with_the_reason():
    with pytest.raises(ErasureError, match="adavd cannot erase from.*Flux.*share one attention.*Nothing was"):
        erase(tiny_transformer("flux"), "cat", "adavd", progress=False)


def test_parity_takes_the_published_settings_and_the_bare_names():
    concepts = [{"name": "van gogh", "kind": "style", "aliases": ["vincent"]}]
    guard = erase(tiny_pipeline(), concepts, "adavd", progress=False, parity=True).payload
    assert guard.texts == ("van gogh", "vincent")
    assert guard.settings == {"peak": 2.0, "slope": 100.0, "centre": 0.93, "published": True}
    with pytest.raises(ErasureError, match="parity follows the published code, which knows one text encoder"):
        erase(tiny_pipeline(kind="sdxl"), "cat", "adavd", progress=False, parity=True)
