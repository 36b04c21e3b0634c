"""The order of a page's parts, what is folded away, and what is painted: pages of evaluations and of attacks."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from erasure.evaluation.attacks.report import AttackReport, Outcome
from erasure.evaluation.generate import Record
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.report.attack_page import attack_page
from erasure.evaluation.report.card import verdict
from erasure.evaluation.report.evaluation_page import page
from erasure.evaluation.report.report import Report

NONE = {"only_base": 0, "only_patched": 0, "p": 1.0}


def pair(only_base: int, only_patched: int, p: float) -> dict[str, float]:
    return {"only_base": only_base, "only_patched": only_patched, "p": p}


def metric(name: str, value: float, n: int = 20) -> Metric:
    return Metric(name, value, n, value - 0.11, value + 0.02, True, f"what {name} counts")


def report(paired=None, labels=None, counts=None, **values) -> Report:
    shares = {"UA": 0.94, "IRA": 0.81, "CRA": 0.72, "quality": 0.63, "H": 0.55, "CLIP_kept": 30.0, **values}
    base = {"UA": 0.03, "IRA": 0.84, "CRA": 0.75, "quality": 0.98, "H": 0.06, "CLIP_kept": 31.0}
    counts = counts or {}
    return Report(
        concept=("cat",),
        domain="object",
        rows={
            "base": [metric(name, value) for name, value in base.items()],
            "patched": [metric(n, v, counts.get(n, 20)) for n, v in shares.items() if v is not None],
        },
        accuracies={row: {"object": {"cat": (2, 20), "dog": (8, 9), "rare": (1, 4)}} for row in ("base", "patched")},
        paired=paired or dict.fromkeys(("target", "object", "quality"), NONE),
        provenance={"patches": {"p": 1.0}, "prompts": {"name": "tiny"}, "key of the settings": 1},
        drawn={"base": {"cat": 20}, "patched": {"none": 12, "dog": 8}},
        paired_labels={"object": labels or {}},
    )


def images(targets: int, kept: int, side: int = 8) -> list:
    drawn = []
    for i in range(targets + kept):
        record = Record(f"r{i}", f"prompt {i}", i, 1, 1.0, "", {"object": "cat"})
        drawn.append((record, i < targets, Image.new("RGB", (side, side)), Image.new("RGB", (side, side), "red")))
    return drawn


class Folds(HTMLParser):
    """Separate the text of a page that is folded away from the text that is not."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.folds: list[bool] = []  # for each open <details>, whether its summary has ended
        self.shown, self.hidden = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "details":
            self.folds.append(False)

    def handle_endtag(self, tag):
        if tag == "details":
            self.folds.pop()
        elif tag == "summary" and self.folds:
            self.folds[-1] = True

    def handle_data(self, data):
        if any(self.folds):
            self.hidden += data
        else:
            self.shown += data


def tiles(text: str) -> list[str]:
    return re.findall(r'<section class="tile">(.*?)</section>', text)


def test_the_verdict_comes_first_then_the_images_then_the_table_then_the_tests():
    text = page(report(), images(6, 6))
    marks = [
        'class="tiles"',
        'class="strips"',
        "absent from 94%",
        "<th>metric",
        "base only",
        "show instead",
        "judge may",
    ]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert text.index("<img") > text.index('class="strips"') and "<table" not in text[: text.index("<th>metric") - 30]


def test_each_tile_has_its_interval_and_the_base():
    gone, kept, good = tiles(page(report(), images(1, 1)))
    assert "<h2>Gone<" in gone and "94%" in gone and "83–96" in gone and "base 3%" in gone and "cat (20)" in gone
    assert "<h2>Kept<" in kept and "81%" in kept and "70–83" in kept and "base 84%" in kept
    assert "still good" in good and "63%" in good and "52–65" in good and "base 98%" in good
    assert "not measured" in tiles(page(report(quality=None), []))[2]
    assert "72%" in tiles(page(report(IRA=None), []))[1]  # without other objects, the other head says what is kept


def test_a_tile_is_painted_only_if_the_difference_is_significant_after_holm():
    def looks(**p_values):
        shown = {"target": (0, 9), "object": (7, 0), "quality": (8, 0)}
        text = page(report({key: pair(*shown[key], p) for key, p in p_values.items()}), images(1, 1))
        found = [re.search(r'<strong(?: class="(\w+)")?>', tile)[1] for tile in tiles(text)]
        rows = dict(re.findall(r'<tr><td>(UA|IRA|quality) .*?<td><b(?: class="(\w+)")?>', text))
        assert [rows[name] or None for name in ("UA", "IRA", "quality")] == found  # the table agrees
        return found

    assert looks(target=0.001, object=0.002, quality=0.003) == ["better", "worse", "worse"]
    assert looks(target=0.001, object=0.03, quality=0.04) == ["better", None, None]  # 2 x 0.03 is too much
    assert looks(target=0.06, object=0.5, quality=1.0) == [None, None, None]


def test_secondary_metrics_small_cells_and_the_settings_are_folded():
    folds = Folds(page(report(leak=0.2, counts={"leak": 4, "UA": 5}), images(1, 1)))
    for text in ("what CLIP_kept counts", "what leak counts", "rare", "key of the settings"):
        assert text in folds.hidden and text not in folds.shown, text
    for text in ("what UA counts", "what IRA counts", "what quality counts", "dog", "8/9", "Further metrics"):
        assert text in folds.shown and text not in folds.hidden, text
    assert "1 labels with fewer than 5 images" in folds.shown


def test_the_table_of_paired_tests_stands_alone_with_corrected_p_values():
    text = page(report({"target": pair(1, 17, 0.01), "quality": pair(3, 2, 0.4)}), images(1, 1))
    metrics, tests = (
        re.findall(r"<table.*?</table>", text)[0],
        re.search(r"<table[^>]*><tr><th>result.*?</table>", text),
    )
    assert "only" not in metrics and "cat gone<td>1<td>17<td>0.01<td>" in tests[0]
    assert '<b class="better">0.02</b>' in tests[0] and "<td>3<td>2<td>0.4<td><b>0.4</b>" in tests[0]
    assert "base only" not in page(report({"other": NONE}), [])
    assert '<td>&lt; 0.001<td><b class="better">&lt; 0.001</b>' in page(report({"target": pair(0, 40, 1e-12)}), [])


def test_what_is_drawn_instead_stands_with_none_and_the_anchor():
    text = page(report(anchor=0.4), [])
    drawn = text[text.index("show instead") : text.index("<h2>Interference")]
    assert "Also, what anchor counts: 40% of 20." in drawn
    rows = re.findall(r"<span>(\w+)</span>.*?(\d+/\d+ → \d+/\d+)<", drawn)
    assert rows == [("none", "0/20 → 12/20"), ("dog", "0/20 → 8/20"), ("cat", "20/20 → 0/20")]
    assert "Also" not in page(report(), [])


def test_a_label_is_painted_only_if_its_change_is_significant():
    def looks(p: float, n: int = 9, target: float = 1.0) -> dict[str, str]:
        entry = report(labels={"cat": pair(19, 0, target), "dog": pair(6, 0, p), "rare": pair(4, 0, 0.0)})
        entry.accuracies["patched"]["object"] |= {"cat": (1, 20), "dog": (2, n)}
        text = page(entry, [])
        return dict(re.findall(r"<span>(\w+)</span><span class=.track.>.*?<span class=.(\w+).>\d+/", text))

    assert looks(0.02)["dog"] == "worse" and looks(0.03)["dog"] == "soft"  # two labels have five images or more
    assert looks(0.02, target=0.02)["cat"] == "better"  # the target should fall
    assert looks(0.02)["cat"] == looks(0.02)["rare"] == "soft" and looks(0.0001, n=4)["dog"] == "soft"


def test_the_strip_shows_four_of_each_in_order_as_small_images():
    text = page(report(), images(6, 6, side=600))
    strip = text[text.index('class="strips"') : text.index("absent from")]
    assert re.findall(r"<figcaption[^>]*>(prompt \d+)<", strip) == [f"prompt {i}" for i in (0, 1, 2, 3, 6, 7, 8, 9)]
    assert re.findall(r'alt="(\w+): prompt 0"', strip) == ["base", "patched"]
    assert len(strip) < len(text) / 4
    assert "Prompts for cat" in strip and "Other prompts" in strip and strip.count("<i>base</i>") == 2
    assert "Other prompts" not in page(report(), images(2, 0))


def attacks(p_wins: int = 9, **more) -> AttackReport:
    cases = [f"c{i}" for i in range(10)]
    asked = {case: f"last {case}" for case in cases[1:]}  # c0 is shown without an attack
    fields = ("text", "", {}, 10, 1)
    costs = {"F": 7, "B": 8, "seconds": 0.0}
    won = {case: 1 for case in cases[1 : 1 + p_wins]}
    outcomes = [
        Outcome("strong", *fields, won, 2, None, {}, None, asked, costs),
        Outcome("weak", *fields, {}, 2, None, {}, None, asked, costs),
        Outcome("random", *fields, {"c5": 1}, 2, None, None, None, asked, costs),
    ]
    prompts = {case: f"prompt of {case}" for case in cases}
    provenance = {"cases": cases, "key of the settings": 1}
    return AttackReport(("cat",), "object", 10, 12, 1, outcomes, provenance, prompts=prompts, **more)


def pictures() -> dict[str, list[Image.Image | None]]:
    image = Image.new("RGB", (8, 8))
    rows: dict = {name: [image] * 10 for name in ("base", "erased")}
    return rows | {name: [None, *[image] * 9] for name in ("strong", "weak", "random")}


def test_the_page_of_attacks_has_the_same_order():
    text = attack_page(attacks(), pictures())
    marks = [
        'class="tiles"',
        'class="strips"',
        "strongest of 3 attacks tried",
        "<th>attack<",
        "recovered by",
        "rate by",
    ]
    places = [text.index(mark) for mark in [*marks, "Recovered images", "Tries and costs"]]
    assert places == sorted(places)
    folds = Folds(text)
    for hidden in ("7 + 8", "last c3", "key of the settings"):
        assert hidden in folds.hidden and hidden not in folds.shown, hidden
    before, after, control = tiles(text)
    assert "10%" in before and "95 %: 2–40" in before and "base 10 of 10" in before
    assert "100%" in after and "72–100" in after and "strong, the strongest of 3; 2 tries" in after
    assert "10%" in control and "2 tries without the search" in control


@pytest.mark.parametrize(("wins", "painted"), [(9, True), (7, True), (6, False), (0, False)])
def test_an_attack_is_painted_only_if_it_beats_its_control_significantly(wins, painted):
    """Seven wins of one attack alone: p = 1/64, and twice that with two attacks; six: p = 1/32."""
    text = attack_page(attacks(wins), pictures())
    assert ('<strong class="worse">' in tiles(text)[1]) == painted
    assert ('<td><b class="worse">' in text) == painted and text.count('class="better"') == 0
    if wins == 6:
        assert (
            "<td>strong<td>6<td>0<td>0.031<td><b>0.062</b>" in text and "random<td>" not in text.split("by<")[1][:500]
        )


def test_the_strip_of_attacks_shows_what_came_back_first_in_a_frame():
    text = attack_page(attacks(2), pictures())
    strip = text[text.index('class="strips"') : text.index("the erased model shows")]
    captions = re.findall(r"<figcaption[^>]*>prompt of (c\d)<", strip)
    assert captions == ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"]
    framed = re.findall(r'class="shot hit"><img alt="(\w+): prompt of (c\d)"', strip)
    assert framed == [("erased", "c0"), ("strong", "c1"), ("strong", "c2")]
    tags = re.findall(r'alt="(\w+): prompt of (c\d)"[^>]*><i>', strip)  # each name once, where its row begins
    assert tags == [("base", "c0"), ("erased", "c0"), ("strong", "c1")]
    assert 'alt="strong: prompt of c0"' not in strip and "missing" not in text  # there was nothing to attack
    gallery = text[text.index("Recovered images") : text.index("Tries and costs")]
    assert gallery.count("<img") == 27 and gallery.count("hit") == 3 and gallery.count("<small>at try 1<") == 3


def test_the_card_begins_with_the_same_figures_and_the_strongest_attack():
    def cell(value: float, base: float | None = 0.03) -> dict[str, float | None]:
        return {"value": value, "low": value - 0.1, "high": value + 0.05, "base": base}

    metrics = {"UA": cell(0.94), "CRA": cell(0.5), "quality": cell(0.63, None), "IRA": cell(0.81, 0.84)}
    attacks = {name: cell(value) for name, value in (("rece", 0.7), ("inversion", 0.9), ("random", 0.2))}
    text = verdict({"metrics": metrics, "attacks": attacks})
    assert text == (
        "**gone** 94% [84, 99], base 3%; **kept** 81% [71, 86], base 84%; **picture still good** 63% [53, 68]; "
        "**back under attack** 90% [80, 95], by inversion"
    )
    assert verdict({"metrics": {"UA": cell(0.94)}, "attacks": {}}) == "**gone** 94% [84, 99], base 3%"
