"""The method that is taken where none is named: what presets say, that the tables bear it out, and who tells it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from erasure.concepts.concept import KINDS, Concept
from erasure.erasing import erase, settle
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.methods import default, find
from erasure.model import presets
from erasure.model.base import Base
from erasure.model.meta import parts_of
from erasure.model.presets import Family
from erasure.model.presets.preset import read_preset
from tests.tiny import tiny_pipeline

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
GLYPH = Family(presets.find("glyph"), "as asked for")


def taken(family: str | None, kinds: tuple[str, ...] = ("object",), network: str = "sd1") -> str:
    """The name of the default method for concepts of these kinds."""
    concepts = [Concept(f"thing {place}", kind=kind) for place, kind in enumerate(kinds)]
    known = Family(None if family is None else presets.find(family), "for a test")
    return default(concepts, known, Base("mine", parts_of(network)).architecture)[0]


def test_each_family_says_which_method_suits_a_kind():
    for family in ("sd1", "sd2", "sdxl"):
        chosen = {kind: taken(family, (kind,), family) for kind in KINDS}
        assert chosen == {"object": "uce", "style": "uce", "identity": "uce", "content": "esd"}
    assert {taken("glyph", (kind,)) for kind in KINDS} == {"uce"}
    for family in ("sd3", "flux-dev", "flux-schnell", "pixart", "glyph-dit", "glyph-mmdit", None):
        assert taken(family) == taken(family, ("style",) * 20) == "esd"


def test_many_names_and_mixed_kinds():
    assert (taken("glyph", ("object",) * 9), taken("glyph", ("object",) * 10)) == ("uce", "speed")
    assert taken("sd1", ("style", "content")) == taken("sd1", ("content", "object")) == "esd"
    assert taken("sd1", ("style", "object")) == "uce" and taken("sd1", ("style",) * 10) == "speed"


def test_a_method_that_cannot_erase_from_the_network_is_passed_over():
    class Joint:
        name = "other"

        def drift(self, what):
            return f"{what} change with depth"

    assert find("uce").unsuited(Joint())
    assert default([Concept("cat")], GLYPH, Joint())[0] == "esd"


def test_glyphs_tables_bear_its_choice_out():
    """No loss against the base is significant, and no method is significantly better than the default in any column."""
    table = json.loads((RESULTS / "glyph.json").read_text(encoding="utf-8"))
    chosen = taken("glyph")
    found = 0
    for row in table["comparisons"]:
        pair = (row["first"], row["second"])
        if chosen in pair:
            found += 1
            ahead = row["difference"] if pair[0] == chosen else -row["difference"]
            worse = (ahead > 0) == row["lower_is_better"] and ahead != 0
            assert not worse or row["corrected"] >= 0.05 or row["low"] <= 0 <= row["high"], row
    assert found > 30 and "base" in {row["second"] for row in table["comparisons"] if row["first"] == chosen}
    many = json.loads((RESULTS / "many.json").read_text(encoding="utf-8"))
    for size in ("10 together", "20 together"):
        kept = {row["method"]: row["IRA"]["value"] for row in many["means"] if row["group"] == size}
        assert max(kept, key=kept.get) == taken("glyph", ("object",) * 10)


def test_the_choice_and_its_reason_are_told(caplog):
    tiny = Base("tiny", tiny_pipeline())
    free, named = (settle(tiny, "cat", method, {}, preset="glyph") for method in (None, "uce"))
    assert free.chosen == named.chosen
    assert free.lines() == [f"method uce, as none is named: {free.reason}", *named.lines()]
    assert "preset glyph: bench/results/glyph.json" in free.reason and not named.reason
    with caplog.at_level(logging.INFO, "erasure"):
        patch = erase(tiny, "cat", preset="glyph", progress=False)
    assert patch.method == "uce" and patch.costs["F"] == 0 and free.lines()[0] in caplog.text
    forecast = plan(tiny, "cat", preset="glyph")
    assert (forecast.method, forecast.sources[0]) == ("uce", free.lines()[0])


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"iterations": 3}, "unknown config key 'iterations'"),
        ({"stop": "auto"}, "no meaning"),
        ({"rank": 0}, "at least"),
    ],
)
def test_settings_of_another_method_say_which_one_was_taken(wish, says):
    with pytest.raises(ErasureError, match=f"{says}.*uce was taken because no method is named"):
        erase(Base("tiny", tiny_pipeline()), "cat", preset="glyph", progress=False, **wish)
    with pytest.raises(ErasureError, match="no UNet calls"):
        erase(Base("tiny", tiny_pipeline()), "cat", preset="glyph", progress=False, precision="bf16")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{source: paper}", "no method"),
        ("{method: esd}", "no source"),
        ("{method: esd, source: paper, kind: style}", "did you mean 'kinds'"),
        ("esd", "must be a mapping"),
    ],
)
def test_faults_of_an_entry_are_named(tmp_path, text, says):
    sampled = "{steps: 3, guidance: 2, source: paper}"
    (tmp_path / "x.yaml").write_text(f"about: x\nsampling: {sampled}\npreview: {sampled}\ndefault: [{text}]\n")
    with pytest.raises(ErasureError, match=says):
        read_preset(tmp_path, "x")
