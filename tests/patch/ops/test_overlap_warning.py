"""The warning about overlaps while patches are loaded: one line, exact cosines, and bounded comparisons."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from erasure.patch import Delta
from erasure.patch.ops import overlap_warning
from erasure.patch.ops.arithmetic import add, negate, scale
from erasure.patch.ops.conflicts import conflicts
from erasure.patch.ops.overlap_warning import warn_of_overlap
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.patch.making import low_rank_patch
from tests.tiny import tiny_pipeline

BOTH = ("unet", "text_encoder")


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def lines(caplog):
    found = [record.getMessage() for record in caplog.records if record.name == "erasure"]
    caplog.clear()
    return found


def test_any_number_of_overlaps_is_one_warning(pipe, caplog):
    one = low_rank_patch(pipe, 1, rank=1)
    other, last = (low_rank_patch(pipe, seed, rank=1) for seed in (9, 10))
    near = [scale(one, factor) for factor in (1.0, 2.0, -1.0, 0.5)]
    with caplog.at_level(logging.WARNING):
        pipe.load_patches([*near, other])
        (line,) = lines(caplog)
        assert line.startswith("6 pairs among 4 patches overlap notably. The nearest: van gogh and van gogh-2 both")
        assert "cosine +1.00" in line and "erasure patch conflicts" in line
        pipe.load_patch(near[0])
        (line,) = lines(caplog)
        assert line.startswith("4 pairs among 5 patches overlap notably. The nearest: van gogh and van gogh-6 both")
        pipe.load_patch(last)
        assert lines(caplog) == []


def test_cosines_are_those_of_the_comparison_in_pairs(pipe, monkeypatch):
    monkeypatch.setattr(overlap_warning, "NOTABLE", 1e-12)
    one = low_rank_patch(pipe, 1, rank=1, components=BOTH)
    mixed = low_rank_patch(pipe, 2, rank=3, alpha=1.0, part="attn")
    patches = {
        "one": one,
        "mixed": mixed,
        "sum": add(low_rank_patch(pipe, 1), low_rank_patch(pipe, 2)),
        "minus": negate(one),
        "dense": dataclasses.replace(mixed, payload=Delta({"unet": mixed.deltas("unet")})),
        "elsewhere": low_rank_patch(pipe, 1, part="resnets"),
    }
    expected = {(row.a, row.b, row.component): row.cosine for row in conflicts(patches)}
    for first in (0, 2, 5):
        names = list(patches)
        loaded, new = ({name: patches[name] for name in part} for part in (names[:first], names[first:]))
        found = {tuple(pair[1:]): pair[0] for pair in warn_of_overlap(new, loaded)}
        pairs = {key: value for key, value in expected.items() if key[1] in new}
        assert found == pytest.approx(pairs, abs=1e-6)
        assert found.keys() == pairs.keys()


def test_a_patch_is_compared_with_a_bounded_number_before_it(pipe, monkeypatch):
    monkeypatch.setattr(overlap_warning, "RECENT", 3)
    one = low_rank_patch(pipe, 1, rank=1)
    patches = {f"{number}": one for number in range(10)}
    pairs = warn_of_overlap(patches, {})
    assert len(pairs) == 0 + 1 + 2 + 7 * 3
    assert {int(b) - int(a) for _, a, b, _ in pairs} == {1, 2, 3}
    assert [pair[1:3] for pair in warn_of_overlap({"new": one}, patches)] == [(f"{n}", "new") for n in (7, 8, 9)]
