"""Charts: positions of marks, labels, and blank cells."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from erasure.evaluation.report.charts import HEIGHT, WIDTH, Change, Point, matrix, plot, spread_labels


def ends(value):
    return value, value - 0.1, min(1.0, value + 0.1)


def marks(svg):
    """Return name -> centre of its mark, from the line that leads to the name."""
    tree = ElementTree.fromstring(svg)
    starts = [
        tuple(float(v) for v in re.match(r"M([\d.]+) ([\d.]+)", path.get("d")).groups())
        for path in tree.iter("path")
        if path.get("class") == "lead"
    ]
    names = [title.text.split(":")[0] for title in tree.iter("title")]
    return dict(zip(names, starts, strict=True))


def test_a_plot_puts_the_better_point_up_and_right_and_names_every_point():
    points = [Point("good", ends(0.9), ends(0.9), 0), Point("<poor>", ends(0.5), ends(0.2), 1)]
    svg = plot(points, "kept", "erased", "objects")
    places = marks(svg)
    assert places["good"][0] > places["<poor>"][0] and places["good"][1] < places["<poor>"][1]
    texts = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert {"good", "<poor>", "kept →", "erased →", "100%"} <= set(texts)
    assert "kept 90% (80% to 100%)" in svg


@pytest.mark.parametrize("value", [0.0, 0.03, 0.5, 0.95, 1.0])
def test_every_mark_and_name_is_inside_the_plot(value):
    points = [Point(f"m{i}", (value, max(0, value - 0.05), 1.0), (value, value, value), i) for i in range(8)]
    tree = ElementTree.fromstring(plot(points, "kept", "erased", "same place"))
    for text in tree.iter("text"):
        assert 0 <= float(text.get("x")) <= WIDTH and 0 <= float(text.get("y")) <= HEIGHT
    rows = sorted(float(t.get("y")) for t in tree.iter("text") if t.text.startswith("m"))
    assert len(rows) == 8 and min(b - a for a, b in zip(rows, rows[1:], strict=False)) > 14
    for x, y in marks(ElementTree.tostring(tree)).values():
        assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


def test_methods_differ_in_shape_and_in_colour():
    points = [Point(f"m{i}", ends(0.5), ends(0.5), i) for i in range(6)]
    svg = plot(points, "kept", "erased", "x")
    assert len(set(re.findall(r'stroke="(var\(--c\d\))', svg))) == 6
    outlines = {re.sub(r"M[\d.]+ [\d.]+", "", d) for d in re.findall(r'<path d="([^"]+)"/><title>', svg)}
    assert len(outlines) == 6


def test_labels_are_spread():
    assert spread_labels([], 10, 0, 50) == []
    assert spread_labels([1, 30], 10, 5, 50) == [5, 30]
    assert spread_labels([48, 49, 50], 10, 0, 50) == [30, 40, 50]


def test_a_matrix_has_percentage_points_and_blanks():
    rows = {
        "cat": {
            "object/cat": Change((4, 4), (1, 4), 0.001),
            "object/dog": Change((1, 2), (2, 2), 0.02),
            "object/cow": Change((0, 0), (0, 0)),
            "style/ink": Change((3, 3), (3, 3)),
        }
    }
    page = matrix(rows, {"object": ["cat", "dog", "cow"], "style": ["ink"]}, {"cat": ["object/cat"]})
    cells = re.findall(r"<td([^>]*)>([^<]*)(?:<small>(\d+))?", page)
    assert [(text, n) for _, text, n in cells] == [("−75", "4"), ("+50", "2"), ("", ""), ("0", "3")]
    assert "own" in cells[0][0] and "--bad" in cells[0][0] and "--bar" in cells[1][0]
    assert "own" not in cells[1][0] and "color-mix" not in cells[3][0] and "4 of 4, then 1 of 4" in cells[0][0]


def test_a_matrix_paints_only_what_is_significant():
    def painted(**p_values):
        cells = {f"object/{label}": Change((9, 9), (1, 9), p) for label, p in p_values.items()}
        page = matrix({"cat": cells}, {"object": list(p_values)}, {})
        return [label for label, cell in zip(p_values, re.findall(r"<td([^>]*)>", page), strict=True) if "mix" in cell]

    assert painted(a=0.04) == ["a"] and painted(a=0.06) == [] and painted(a=None) == []
    # Holm: of two tests the smaller p-value is doubled, and a test that is not significant stops the others.
    assert painted(a=0.02, b=0.04) == ["a", "b"] and painted(a=0.03, b=0.04) == []
    assert painted(a=0.04, b=None) == ["a"]  # a label without a test does not count
