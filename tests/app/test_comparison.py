"""Before and after: the same seeds, each visitor's own patches and strengths, and a model that stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from erasure.app import comparison
from erasure.app.comparison import Pictures
from erasure.app.jobs import Job, Stopped
from erasure.app.tasks import Wish
from erasure.errors import ErasureError
from tests.app.doing import erased, pixels, same, weights


def test_erase_and_compare(models, visit, hurried):
    before_weights, pictures = weights(models), Pictures()
    plain = comparison.compare(models, visit, Job(), "a cat", pictures)
    assert len(plain.before) == 2 and plain.after == [] and plain.readings == []
    name = erased(models, visit)
    assert name == "cat (uce)" and list(visit.patches()) == [name]
    full = comparison.compare(models, visit, Job(), " a cat ", pictures)
    assert pixels(full.before) == pixels(plain.before) and pixels(full.after) != pixels(full.before)
    (reading,) = full.readings
    assert (reading.name, reading.gate, reading.strength, reading.acted) == (name, "always", 1.0, 1.0)
    visit.held[name].strength = 0.5
    half = comparison.compare(models, visit, Job(), "a cat", pictures)
    assert pixels(half.after) not in (pixels(full.after), pixels(half.before)) and half.readings[0].acted == 0.5
    visit.held[name].strength = 0.0
    assert pixels(comparison.compare(models, visit, Job(), "a cat", pictures).after) == pixels(plain.before)
    assert same(weights(models), before_weights)


def test_patches_stack_and_visitors_do_not_see_each_others(models, visits, hurried):
    visit, other = visits.of("a"), visits.of("b")
    pictures = Pictures()
    erased(models, visit)
    one = comparison.compare(models, visit, Job(), "a dog", pictures)
    second = erased(models, visit, Wish("dog", "uce"))
    both = comparison.compare(models, visit, Job(), "a dog", pictures)
    assert [reading.name for reading in both.readings] == ["cat (uce)", "dog (uce)"]
    assert pixels(both.after) != pixels(one.after)
    alone = comparison.compare(models, other, Job(), "a dog", pictures)
    assert alone.after == [] and pixels(alone.before) == pixels(both.before)
    # The second patch is the same as without the first.
    erased(models, other, Wish("dog", "uce"))
    payloads = [visit.held[second].patch.payload, other.held["dog (uce)"].patch.payload]
    assert payloads[0].digest == payloads[1].digest


def test_prompts_that_are_empty_or_too_long_are_refused(models, visit):
    for prompt in ("", "   ", "x" * 501):
        with pytest.raises(ErasureError, match="1 to 500 characters"):
            comparison.compare(models, visit, Job(), prompt, Pictures())


def test_a_stopped_drawing_takes_the_patches_off_again(models, visit):
    before = weights(models)
    erased(models, visit)
    job = Job()
    job.stop()
    with pytest.raises(Stopped):
        comparison.compare(models, visit, job, "a cat", Pictures())
    assert same(weights(models), before) and not models.open("glyph").get_list_patches()


def test_images_before_are_shared_and_the_oldest_forgotten():
    pictures = Pictures(most=3)
    pictures.put("m", "p", (0, 1), ["x", "y"])
    assert pictures.get("m", "p", (0, 1)) == ["x", "y"] and pictures.get("m", "p", (0, 2)) is None
    assert pictures.get("other", "p", (0,)) is None and pictures.get("m", "q", (0,)) is None
    pictures.put("m", "q", (0, 1), ["z", "w"])
    assert pictures.get("m", "p", (0,)) is None and pictures.get("m", "p", (1,)) == ["y"]


def test_a_gate_reads_the_prompt(models, visit, hurried):
    name = erased(models, visit)
    held = visit.held[name]
    held.patch = replace(held.patch, gate={"kind": "text", "texts": ["cat"], "power": 2.0})
    held.strength = 0.8
    found = {
        prompt: comparison.compare(models, visit, Job(), prompt, Pictures()).readings[0] for prompt in ("cat", "dog")
    }
    assert found["cat"].gate == found["dog"].gate == "text" and found["cat"].strength == 0.8
    assert found["cat"].acted == pytest.approx(0.8, abs=1e-4) and 0 <= found["dog"].acted < 0.7
