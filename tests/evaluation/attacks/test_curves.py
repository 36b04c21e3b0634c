"""The plots of attacks: what stands in them, and that they are well-formed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from erasure.evaluation.attacks.curves import by_tries, curve, curves, lines, rounds
from erasure.evaluation.metrics.statistics import wilson
from tests.evaluation.attacks.test_run import outcome


def test_what_was_won_is_kept_and_what_grows_is_asked_anew():
    result = outcome()  # 2 of 10 plain; won at the tries 1 and 3; the control at 2
    assert [round(value, 9) for value, _, _ in lines(result)["attack"]] == [0.3, 0.3, 0.4]
    assert [round(value, 9) for value, _, _ in lines(result)["control"]] == [0.2, 0.3, 0.3]
    assert lines(result)["attack"][0][1:] == wilson(3, 10)
    grown = outcome(curve=[2, 9, 5], settings={"steps": [10, 30, 100]}, control=None)
    assert [value for value, _, _ in lines(grown)["attack"]] == [0.2, 0.9, 0.5] and "control" not in lines(grown)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"tokens": 3}, ("tries", ["1", "2", "3"])),
        ({"steps": [10, 30, 100]}, ("training steps", ["10", "30", "100"])),
        ({"bounds": (0.1, 0.25, 0.5, 1.0)}, ("bound", ["0.1", "0.25", "0.5"])),
    ],
)
def test_the_rounds_have_the_names_of_what_changes(settings, want):
    assert rounds(outcome(settings=settings)) == want


def test_a_plot_is_whole_and_has_its_points():
    drawn = curve(outcome(name="p<4>d"))
    svg = ElementTree.fromstring(drawn).find("svg")
    titles = [title.text for title in svg.iter("title")]
    assert titles == ["attack by tries: 1: 30%, 2: 30%, 3: 40%", "control by tries: 1: 20%, 2: 30%, 3: 30%"]
    width, height = map(float, svg.get("viewBox").split()[2:])
    for text in svg.iter("text"):
        assert 0 <= float(text.get("x")) <= width and 0 <= float(text.get("y")) <= height
    assert "p&lt;4&gt;d" in drawn


def test_one_round_is_no_curve():
    assert curve(outcome(rounds=1)) == "" and curves([outcome(rounds=1)]) == ""
    assert curves([outcome(), outcome(rounds=1)]).count("<svg") == 1


def test_all_attacks_share_one_plot_of_successes_within_k_tries():
    results = [
        outcome(name="slow", won={"a": 6}, rounds=6),
        outcome(name="q<i>ck", won={"a": 1, "b": 2, "c": 2}, rounds=2),
        outcome(name="trained", won={"a": 2}, curve=[9, 9], rounds=2),
        outcome(name="once", rounds=1),
    ]
    drawn = by_tries(results)
    svg = ElementTree.fromstring(drawn).find("svg")
    titles = {title.text.split(":")[0]: title.text for title in svg.iter("title")}
    assert titles == {
        "q<i>ck": "q<i>ck: 1: 30%, 2: 50%",
        "slow": "slow: 1: 20%, 2: 20%, 3: 20%, 4: 20%, 5: 20%, 6: 30%",
        "trained": "trained: 1: 20%, 2: 30%",
    }
    texts = [text.text for text in svg.iter("text")]
    assert {"q<i>ck 50%", "slow 30%", "trained 30%", "6"} <= set(texts)
    width, height = map(float, svg.get("viewBox").split()[2:])
    for text in svg.iter("text"):
        assert 0 <= float(text.get("x")) <= width and 0 <= float(text.get("y")) <= height
    paths = [group.find("{*}path").get("d") for group in svg.iter("g")]
    assert [path.count("L") for path in paths] == [1, 5, 1]  # each line ends with the last try of its attack
    ends = [float(path.split()[-1]) for path in paths]
    assert ends == sorted(ends)  # the most successful is at the top
    assert drawn in curves(results) and by_tries(results[:1]) == by_tries([results[0], results[3]]) == ""
