"""When `stop=auto` ends a run, what it goes back to, what it counts and records, and where it is refused."""

from __future__ import annotations

import logging

import pytest
import torch

from erasure.cli.main import main
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.method import GradientMethod
from erasure.methods import find, names
from erasure.patch import Patch
from erasure.training import stopping
from erasure.training.curves import Curves
from erasure.training.run import Run
from erasure.training.stopping import due
from tests.conformance.quick import QUICK, changes, left_at_a_checkpoint, same
from tests.tiny import tiny_pipeline, write_tiny

STOPS = [name for name in names(GradientMethod) if not find(name).NO_STOP]


def run(name: str = "esd", **settings) -> Patch:
    return erase(tiny_pipeline(), "cat", name, progress=False, **{**QUICK[name], "stop": "auto", **settings})


def scripted(monkeypatch, erased=None, drift=None):
    """Let measurements after so many updates find these values, the last ones from then on; 0.0 before the first."""

    def value(script, step):
        return [found for at, found in sorted((script or {}).items()) if at <= step][-1:] or [0.0]

    def measure(self, step):
        self.steps.append(step)
        self.erased.append([0.9, *value(erased, step)])
        self.drift.append([*value(drift, step), 0.0])

    monkeypatch.setattr(Curves, "measure", measure)


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every update."""
    seen, real = [], Run.watch

    def watch(self, step, terms, rate):
        seen.append(rate["learning_rate"])
        real(self, step, terms, rate)

    monkeypatch.setattr(Run, "watch", watch)
    return seen


def test_measurements_come_after_half_as_many_updates_again():
    assert [step for step in range(1, 100) if due(step)] == [1, 2, 3, 4, 6, 8, 12, 18, 26, 39, 58, 87]


def test_a_run_ends_when_the_concept_is_gone_at_every_level_and_improves_no_longer(monkeypatch):
    gone = stopping.GONE
    scripted(monkeypatch, {3: gone, 4: gone + 0.05, 6: gone + 0.1, 8: gone + 0.105})
    patch = run(iterations=20)
    stop = patch.curves["stop"]
    assert patch.curves["steps"] == [1, 2, 3, 4, 6, 8]
    assert stop["why"] == "gone" and stop["gone"] and stop["limit"] == 20 and stop["step"] == 8
    assert same(changes(patch), changes(run(stop="never", iterations=8)))


def test_what_is_not_gone_at_one_level_goes_on_to_the_last_update_and_says_so(monkeypatch, caplog):
    scripted(monkeypatch, {1: stopping.GONE - 0.01})
    with caplog.at_level(logging.INFO, logger="erasure"):
        patch = run(iterations=5)
    assert patch.curves["steps"] == [1, 2, 3, 4, 5]  # the last update is measured in any case
    assert patch.curves["stop"]["why"] == "updates" and not patch.curves["stop"]["gone"]
    (record,) = [entry for entry in caplog.records if "the concept is not gone" in entry.message]
    assert record.levelno == logging.WARNING and "all 5 updates" in record.message and "iterations" in record.message
    assert same(changes(patch), changes(run(stop="never", iterations=5)))


def test_when_the_drift_passes_its_bound_a_run_goes_back_and_on_at_a_lower_rate(monkeypatch, rates):
    scripted(monkeypatch, drift={2: stopping.DRIFT + 0.01, 3: 0.1})
    patch = run(iterations=4)
    rate = QUICK["esd"]["learning_rate"]
    assert rates == pytest.approx([rate, rate, rate * stopping.RATE, rate * stopping.RATE])
    assert patch.curves["stop"]["lowered"] == 1 and patch.curves["stop"]["step"] == 4
    far, first = (changes(p) for p in (run(stop="never", iterations=2), run(stop="never", iterations=1)))
    scripted(monkeypatch, drift={2: stopping.DRIFT + 0.01})
    back = run(iterations=2)
    assert back.curves["stop"]["why"] == "drift" and back.curves["stop"]["step"] == 1
    assert same(changes(back), first) and not same(changes(back), far)


def test_after_going_back_adam_starts_afresh(monkeypatch):
    """A first step of Adam moves every weight by the learning rate; one with earlier moments does not."""
    scripted(monkeypatch, drift={1: stopping.DRIFT + 0.01, 2: 0.1})
    moved = torch.cat([value.abs().flatten() for value in changes(run(iterations=2)).values()])
    rate = QUICK["esd"]["learning_rate"] * stopping.RATE
    assert moved.quantile(0.1) == pytest.approx(rate, rel=0.05) and moved.max() == pytest.approx(rate, rel=0.05)


def test_after_so_many_lower_rates_a_run_ends_where_the_drift_was_within_its_bound(monkeypatch, rates, caplog):
    scripted(monkeypatch, drift={1: stopping.DRIFT + 0.01})
    patch = run(iterations=20)
    assert len(rates) == stopping.LOWERED + 1
    assert all(not value.any() for value in changes(patch).values())  # the base
    assert patch.curves["stop"]["why"] == "drift" and "a lower learning_rate" in caplog.text


def test_what_was_gone_before_the_drift_passed_its_bound_ends_there(monkeypatch, rates):
    scripted(monkeypatch, {1: stopping.GONE, 2: 1.0}, {3: stopping.DRIFT + 0.01})
    patch = run(iterations=20)
    assert len(rates) == 3 and patch.curves["stop"] == {**patch.curves["stop"], "why": "drift", "gone": True, "step": 2}
    assert same(changes(patch), changes(run(stop="never", iterations=2)))


@pytest.mark.parametrize("name", STOPS)
def test_by_its_own_measurements_a_run_erases_and_stays_within_the_bound(name, monkeypatch):
    monkeypatch.setattr(stopping, "GONE", 0.02)
    monkeypatch.setattr(stopping, "GAIN", 10.0)
    monkeypatch.setattr(stopping, "DRIFT", 1e9)
    free = run(name, iterations=40)
    assert free.curves["stop"]["why"] == "gone" and free.curves["stop"]["step"] < 40
    assert min(free.curves["erased"][-1]) >= 0.02 > min(free.curves["erased"][-2] if free.curves["steps"][1:] else [0])
    bound = max(free.curves["drift"][-1]) / 2
    monkeypatch.setattr(stopping, "DRIFT", bound)
    held = run(name, iterations=6)
    assert held.curves["stop"]["drift"] <= bound or held.curves["stop"]["step"] == 0


@pytest.mark.parametrize("name", STOPS)
def test_measurements_are_counted_and_the_plan_is_the_largest_cost(name, monkeypatch):
    monkeypatch.setattr(stopping, "GONE", 9.0)
    monkeypatch.setattr(stopping, "DRIFT", 1e9)
    patch, plain = run(name), run(name, stop="never")
    # States of 8 levels, sampled with guidance: of 4 trajectories of the concept (with a neutral prompt that is not the
    # empty one, one more call), and of one for each word. Four measurements of these, and of the empty prompt.
    kept = len(patch.curves["kept"]) - 1
    sampled = 8 * ((3 if name in ("doco", "eraseflow", "gem", "salun") else 2) * 4 + 2 * kept)
    assert patch.costs["F"] == plain.costs["F"] + sampled + 4 * 8 * (4 + 2 * kept)
    assert patch.costs["B"] == plain.costs["B"]
    forecast = plan(tiny_pipeline(), "cat", name, **{**QUICK[name], "stop": "auto"})
    assert (forecast.F, forecast.B) == (patch.costs["F"], patch.costs["B"])
    assert forecast.at_most and "at most" in forecast.text() and forecast.to_json()["at_most"] is True
    other = plan(tiny_pipeline(), "cat", name, **QUICK[name])
    assert not other.at_most and "at most" not in other.text()
    assert forecast.training_bytes - other.training_bytes == 4 * forecast.weights


@pytest.mark.parametrize("name", STOPS)
def test_a_run_resumes_with_what_its_rule_remembers(name, tmp_path, monkeypatch):
    """After a drift at the first update; at the third it must know its last good state and how often it was lowered."""
    script = {1: stopping.DRIFT + 1, 2: 0.1, 3: stopping.DRIFT + 1, 4: 0.1}
    scripted(monkeypatch, {2: stopping.GONE - 0.1}, script)
    straight = run(name, iterations=5)
    assert straight.curves["stop"]["lowered"] == 2
    out = tmp_path / "p.safetensors"
    left_at_a_checkpoint(monkeypatch, lambda: run(name, iterations=5, out=out))
    resumed = run(name, iterations=5, out=out)
    assert same(changes(resumed), changes(straight)) and Patch.load(out).curves == straight.curves
    assert [resumed.costs[key] for key in "FB"] == [straight.costs[key] for key in "FB"]


def test_it_is_refused_where_it_has_no_meaning():
    with pytest.raises(ErasureError, match="esd: stop=auto has no meaning here: the published script"):
        run("esd", parity=True)
    for name in ("advunlearn", "unguide"):
        with pytest.raises(ErasureError, match=f"{name}: stop=auto has no meaning here.*nothing was changed"):
            run(name)
    with pytest.raises(ErasureError, match="uce: stop has no meaning here: there are no updates to end"):
        run("uce")
    with pytest.raises(ErasureError, match="measure_every=5: stop=auto chooses its own"):
        run("esd", measure_every=5)
    with pytest.raises(ErasureError, match="unknown stop 'sometimes'. Allowed: never, auto"):
        run("esd", stop="sometimes")


def test_the_command_says_why_a_run_ended(tmp_path, capsys):
    model, out = write_tiny(tmp_path / "tiny"), tmp_path / "p.safetensors"
    options = ["--method", "esd", "--stop", "auto", "--kind", "object", "--model", str(model), "--preset", "glyph"]
    options += [word for key, value in QUICK["esd"].items() for word in ("--set", f"{key}={value}")]
    assert main(["plan", "cat", *options]) == 0
    assert "at most" in capsys.readouterr().out
    assert main(["erase", "cat", *options, "-o", str(out)]) == 0
    said = capsys.readouterr().out
    stop = Patch.load(out).curves["stop"]
    assert stop["why"] == "updates" and " ".join(stop["text"].split()) in " ".join(said.split())
