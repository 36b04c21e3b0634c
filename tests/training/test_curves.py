"""How much is erased and kept in the course of a run, against the formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import around
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.method import GradientMethod
from erasure.methods import find, names
from erasure.methods.esd import ESD
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.training.callbacks import PLOT, Previews, plot
from erasure.training.curves import Curves
from erasure.training.run import Run
from tests.conformance.quick import QUICK, changes, left_at_a_checkpoint, same
from tests.tiny import tiny_pipeline


@pytest.fixture
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def started(base: Base, name: str, **settings) -> tuple[GradientMethod, Curves]:
    method, concepts = find(name)(**{**QUICK[name], **settings}), [Concept("cat", anchor="dog")]
    state = method.prepare(base, concepts, Run(seed=3, progress=False))
    return state, Curves.start(method, base, concepts, state, every=2, seed=3)


@pytest.mark.parametrize("name", [name for name in names(GradientMethod) if name != "mace"])  # it has no curves
def test_the_base_has_erased_and_moved_nothing_and_a_trained_model_something(base, name):
    state, curves = started(base, name)
    curves.measure(0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in state.adapter.parameters().values():
            param.add_(0.2 * torch.randn(param.shape, generator=draw))
    curves.measure(2)
    assert curves.steps == [0, 2]
    assert torch.allclose(torch.tensor(curves.erased[0]), torch.zeros(8), atol=1e-4)
    assert torch.allclose(torch.tensor(curves.drift[0]), torch.zeros(8), atol=1e-3)
    assert min(map(abs, curves.erased[1])) > 1e-3 and min(curves.drift[1]) > 1e-2
    state.adapter.remove()


@pytest.mark.parametrize(("name", "eta"), [("esd", 1.5), ("unguide", 2.0), ("salun", None)])
def test_the_measures_are_the_formulas_and_1_is_the_target(base, monkeypatch, name, eta):
    state, curves = started(base, name, **({} if eta is None else {"negative_guidance": eta}))
    kept, neutral = around(base, [Concept("cat")])[:4], "dog" if name != "esd" else "dog"
    real = Base.predict

    def moved(self, x, t, conditions):
        """Three quarters of the way to the target for the concept; for any other prompt, along the empty prompt."""
        out = real(self, x, t, conditions)
        cat, other, empty = (self.encode([text]).expand(len(x), -1, -1) for text in ("cat", neutral, ""))
        e_c, e_n, e_0 = (self.unet(x, t, states).sample for states in (cat, other, empty))
        if torch.equal(conditions.states[0], cat[0]):
            return out + 0.75 * (e_n - (eta or 0.0) * (e_c - e_n) - e_c)
        return out + 0.5 * (real(self, x, t, self.conditions([kept[0]] * len(x))) - e_0)

    monkeypatch.setattr(Base, "predict", moved)
    curves.measure(2)
    assert torch.allclose(torch.tensor(curves.erased[0]), torch.full((8,), 0.75), atol=1e-3)
    monkeypatch.setattr(Base, "predict", real)
    x, t = curves.kept.x, curves.kept.t
    with torch.no_grad():
        texts = [kept[int(i)] for i in curves.kept.pair]
        e_k, e_0 = (base.unet(x, t, base.encode(prompts)).sample for prompts in (texts, [""] * len(x)))
        step = base.unet(x, t, base.encode([kept[0]] * len(x))).sample - e_0
    for level, value in zip(sorted(set(t.tolist()), reverse=True), curves.drift[0], strict=True):
        chosen = t == level
        expected = 0.5 * step[chosen].square().sum().sqrt() / (e_k - e_0)[chosen].square().sum().sqrt()
        assert value == pytest.approx(float(expected), rel=1e-3)
    state.adapter.remove()


def test_erase_from_is_measured_against_its_own_target(base, monkeypatch):
    state, curves = started(base, "esd", erase_from="car", negative_guidance=1.5)
    assert set(curves.prompts) == {"car"}
    with torch.no_grad():
        x, t = curves.pool.x, curves.pool.t
        e_f, e_c, e_n = (base.unet(x, t, base.encode([text] * len(x))).sample for text in ("car", "cat", "dog"))
    target = e_f - 2.5 * (e_c - e_n)
    monkeypatch.setattr(curves, "_predict", lambda pool, texts: target if pool is curves.pool else pool.concept)
    curves.measure(1)
    assert torch.allclose(torch.tensor(curves.erased[0]), torch.ones(8), atol=1e-3)
    state.adapter.remove()


def test_the_states_are_held_out(base):
    state, curves = started(base, "esd", sample_steps=8)
    assert len(set(curves.pool.t.tolist())) == 8  # every noise level
    seen = state.pool.x.flatten(1)
    assert torch.cdist(curves.pool.x.flatten(1), seen).min() > 1e-2
    state.adapter.remove()


@pytest.mark.parametrize("name", ["esd", "advunlearn", "salun"])
def test_measuring_changes_neither_the_patch_nor_its_costs_and_is_resumed(name, tmp_path, monkeypatch):
    plain = erase(tiny_pipeline(), "cat", name, progress=False, **QUICK[name])
    straight = erase(tiny_pipeline(), "cat", name, progress=False, **QUICK[name], measure_every=1)
    assert plain.curves is None and straight.curves["steps"] == [1, 2, 3, 4]
    assert same(changes(plain), changes(straight))
    assert (plain.costs["F"], plain.costs["B"]) == (straight.costs["F"], straight.costs["B"])
    out = tmp_path / "p.safetensors"

    def again() -> None:
        erase(tiny_pipeline(), "cat", name, out=out, progress=False, **QUICK[name], measure_every=1)

    left_at_a_checkpoint(monkeypatch, again)
    again()
    read = Patch.load(out)
    assert read.curves == straight.curves and set(read.curves["kept"]) > {""}
    assert read.scale(2.0).curves is None


def test_a_preview_has_the_curves_below(base, tmp_path):
    state, curves = started(base, "esd")
    previews = Previews(base, [Concept("cat")], tmp_path, 1)
    sizes = []
    for step in (1, 2):
        with Image.open(previews.draw(step, curves)) as sheet:
            sizes.append(sheet.size)
        curves.steps, curves.erased, curves.drift = [1, 2], [[0.2, 0.5], [0.9, 1.0]], [[0.1, 0.0], [0.3, 0.2]]
    assert sizes[1] == (sizes[0][0], sizes[0][1] + PLOT)
    strip, scale = plot(curves, 300), PLOT - 4
    for colour, value in (((0, 0, 255), 0.9), ((255, 0, 0), 0.3)):  # the least erased level, the largest drift
        height = [y for y in range(PLOT) if strip.getpixel((298, y)) == colour]
        assert height and sum(height) / len(height) == pytest.approx(PLOT - 2 - value * scale, abs=2)
    state.adapter.remove()


def test_without_a_word_to_keep_nothing_is_measured(base, monkeypatch):
    monkeypatch.setattr("erasure.training.curves.around", lambda base, concepts: [])
    with pytest.raises(ErasureError, match="no word to measure"):
        started(base, "esd")
    assert dataclasses.replace(ESD(), measure_every=0).measure_every == 0
    with pytest.raises(ErasureError, match="measure_every"):
        ESD(measure_every=-1)
