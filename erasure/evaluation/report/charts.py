"""Charts for reports as plain SVG and HTML, without scripts or libraries; colours follow the style of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from erasure.evaluation.metrics.statistics import ALPHA, holm

WIDTH, HEIGHT = 360, 300  # size of a plot in CSS pixels
LEFT, TOP, RIGHT, BOTTOM = 52, 10, 112, 40  # margins; the right one contains the names
LINE = 15  # distance between two names
SIZE = 5.0  # half the width of a mark
STYLE = """
:root{--c0:#0065a3;--c1:#b34a00;--c2:#00795a;--c3:#9c3f78;--c4:#5b4fb3;--c5:#7a6400}
@media(prefers-color-scheme:dark){:root{--c0:#5cb3ea;--c1:#f08a4b;--c2:#3ec99b;--c3:#e593c4;--c4:#a79df5;--c5:#d9bf3f}}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1.2rem}
svg{width:100%;max-width:30rem;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--ink)}
svg .soft{fill:var(--soft)}svg .rule{stroke:var(--line);fill:none}svg .lead{stroke:var(--soft);opacity:.6;fill:none}
.base{color:var(--soft)}
.matrix{width:auto;border-collapse:separate;border-spacing:1px;font-size:.75rem;font-variant-numeric:tabular-nums}
.matrix th,.matrix td{padding:.15rem;border:0;text-align:center;white-space:nowrap;overflow-wrap:normal}
.matrix td{min-width:2.2rem;line-height:1.15}.matrix td small{font-size:.62rem;color:inherit;opacity:.7}
.matrix th:first-child{position:sticky;left:0;background:var(--page);text-align:left;padding-right:.5rem;
font-weight:400;white-space:normal;width:6.5rem;min-width:6.5rem;z-index:1}
.matrix thead th{vertical-align:bottom;font-weight:400}
.matrix thead th[colspan]{text-align:left;font-weight:600}.matrix thead th span{writing-mode:vertical-rl;
transform:rotate(180deg)}
.matrix .own{outline:2px solid var(--ink);outline-offset:-2px}.matrix .gap{border-left:.5rem solid var(--page)}
"""
GAIN = "var(--bar)"
LOSS = "var(--bad)"


@dataclass(frozen=True)
class Point:
    """One mark of a plot.

    Args:
        name: text at the right edge of the plot.
        x: value, lower and upper end of the interval, in [0, 1].
        y: the same for the vertical axis.
        look: number of the colour and shape; -1 is the grey cross of the base.
    """

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    look: int


def plot(points: Sequence[Point], across: str, up: str, title: str) -> str:
    """Draw points with their intervals as whiskers, each with a line to its name at the right edge.

    Colour and shape both identify a point, so that either is enough.

    Args:
        points: the points.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        title: title of the plot for screen readers.

    Returns:
        An SVG element.
    """
    starts = (
        _axis_start(min((p.x[1] for p in points), default=0)),
        _axis_start(min((p.y[1] for p in points), default=0)),
    )
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * (x - starts[0]) / (1 - starts[0]), TOP + high * (1 - y) / (1 - starts[1])

    parts = [f'<rect class="rule" x="{LEFT}" y="{TOP}" width="{wide}" height="{high}"/>']
    for value in _ticks(starts[0]):
        x, _ = place(value, 1)
        parts.append(f'<path class="rule" d="M{x:.1f} {TOP}v{high}"/>' + _text(x, TOP + high + 15, f"{value:.0%}"))
    for value in _ticks(starts[1]):
        _, y = place(1, value)
        parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}h{wide}"/>' + _text(LEFT - 5, y + 4, f"{value:.0%}", "end"))
    parts.append(_text(LEFT + wide / 2, HEIGHT - 8, f"{across} →"))
    middle = TOP + high / 2
    parts.append(f'<g transform="rotate(-90 11 {middle})">{_text(11, middle, f"{up} →")}</g>')
    spots = [(point, *place(point.x[0], point.y[0])) for point in points]
    # Names are ordered from top to bottom like their marks, and from right to left at equal height.
    spots.sort(key=lambda spot: (round(spot[2]), -spot[1]))
    rows = spread_labels([y for _, _, y in spots], LINE, TOP + 4, TOP + high - 4)
    start = WIDTH - RIGHT + 8 + SIZE
    for (_, x, y), row in zip(spots, rows, strict=True):
        parts.append(f'<path class="lead" d="M{x:.1f} {y:.1f}L{start - SIZE:.1f} {row:.1f}"/>')
    for (point, x, y), row in zip(spots, rows, strict=True):
        parts.append(f"<g {_paint(point.look)}>{_whiskers(point, place)}{mark(x, y, point.look)}")
        tooltip = f"{point.name}: {across} {_with_interval(point.x)}, {up} {_with_interval(point.y)}"
        parts.append(f"<title>{escape(tooltip)}</title></g>")
        parts.append(f"<g {_paint(point.look)}>{mark(start, row, point.look, 4)}</g>")
        parts.append(_text(start + 9, row + 4, point.name, "start", ""))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def mark(x: float, y: float, look: int, size: float = SIZE) -> str:
    """Draw a mark as an SVG path.

    Args:
        x: horizontal position of its centre.
        y: vertical position of its centre.
        look: number of the shape (circle, square, triangle, diamond, inverted triangle, plus); -1 is a cross.
        size: half the width.
    """
    s, t = size, size * 0.7
    if look < 0:
        return f'<path d="M{x - t:.1f} {y - t:.1f}l{2 * t:.1f} {2 * t:.1f}m0 {-2 * t:.1f}l{-2 * t:.1f} {2 * t:.1f}"/>'
    shapes = (
        f"M{x - s:.1f} {y:.1f}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",
        f"M{x - s:.1f} {y - s:.1f}h{2 * s}v{2 * s}h{-2 * s}z",
        f"M{x:.1f} {y - s:.1f}l{s} {2 * s}h{-2 * s}z",
        f"M{x:.1f} {y - 1.3 * s:.1f}l{1.3 * s:.1f} {1.3 * s:.1f}l{-1.3 * s:.1f} {1.3 * s:.1f}"
        f"l{-1.3 * s:.1f} {-1.3 * s:.1f}z",
        f"M{x:.1f} {y + s:.1f}l{s} {-2 * s}h{-2 * s}z",
        f"M{x - s:.1f} {y:.1f}h{2 * s}m{-s} {-s}v{2 * s}",
    )
    return f'<path d="{shapes[look % len(shapes)]}"/>'


def spread_labels(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Return positions close to the wanted ones but far enough apart for labels, inside [low, high] if they fit.

    Args:
        wanted: wanted positions in ascending order.
        apart: smallest distance between two positions.
        low: lower end of the range.
        high: upper end of the range.

    >>> spread_labels([10, 10, 12, 50], 10, 0, 55)
    [10, 20, 30, 50]
    """
    positions: list[float] = []
    for value in wanted:
        positions.append(max(value, low, positions[-1] + apart if positions else low))
    limit = high
    for index in range(len(positions) - 1, -1, -1):  # positions beyond the end are pushed back
        positions[index] = min(positions[index], limit)
        limit = positions[index] - apart
    return positions


@dataclass(frozen=True)
class Change:
    """The number of correct images before and after erasing.

    Args:
        before: correct images and all images of the base.
        after: correct images and all images of the patched pipeline.
        p: p-value of McNemar's exact test of the two over the same prompts; None if it was not recorded.
    """

    before: tuple[int, int]
    after: tuple[int, int]
    p: float | None = None

    @property
    def points(self) -> float | None:
        """Return the change of the share in percentage points, or None if one of the two has no images."""
        (correct_before, n_before), (correct, n) = self.before, self.after
        return 100 * (correct / n - correct_before / n_before) if n and n_before else None


def matrix(
    rows: Mapping[str, Mapping[str, Change]],
    columns: Mapping[str, Sequence[str]],
    own: Mapping[str, Sequence[str]],
) -> str:
    """Draw a scrollable table of changes; significant ones are coloured by how far the share fell (red) or rose (blue).

    The p-values of all changes of a row are corrected together (Holm 1979).

    Args:
        rows: name of the row -> "heading/name" of the column -> change; cells without images are blank.
        columns: heading -> names of its columns, which may occur under several headings.
        own: name of the row -> columns that the row is meant to change; they are framed.

    Returns:
        An HTML element.
    """
    names = [(head, name) for head, listed in columns.items() for name in listed]
    firsts = {(head, listed[0]) for head, listed in columns.items() if listed and head != next(iter(columns))}
    top = "".join(
        f'<th colspan="{len(listed)}"{_class_attribute(gap=(head, listed[0]) in firsts)}>{escape(head)}'
        for head, listed in columns.items()
        if listed
    )
    heads = "".join(f"<th{_class_attribute(gap=key in firsts)}><span>{escape(key[1])}</span>" for key in names)
    lines = [f"<thead><tr><th>{top}</tr><tr><th>erased{heads}</tr></thead>"]
    for row, cells in rows.items():
        line = [f'<th scope="row">{escape(row)}']
        painted = significant(cells)
        for key in names:
            column = "/".join(key)
            frame = _class_attribute(own=column in own.get(row, ()), gap=key in firsts)
            line.append(f"<td{frame}{_cell(cells.get(column), column in painted)}")
        lines.append(f"<tr>{''.join(line)}</tr>")
    return f'<div class="wide" tabindex="0"><table class="matrix">{"".join(lines)}</table></div>'


def significant(changes: Mapping[str, Change]) -> set[str]:
    """Return the names of the changes that are significant after Holm's correction for all that have a p-value."""
    tested = {name: change.p for name, change in changes.items() if change.p is not None}
    corrected = holm(list(tested.values()))
    return {name for name, p in zip(tested, corrected, strict=True) if p < ALPHA}


def _cell(change: Change | None, painted: bool) -> str:
    """Return a cell from its style attribute on: the change and the number of images."""
    points = None if change is None else change.points
    if change is None or points is None:
        return ">"
    whole = round(points)
    # At most 60 %, so that the text is readable on it in light and dark mode.
    colour, depth = (GAIN if whole > 0 else LOSS), round(0.6 * min(abs(whole), 100))
    fill = f' style="background:color-mix(in srgb,{colour} {depth}%,transparent)"' if painted and whole else ""
    sign = f"{whole:+d}".replace("-", "−") if whole else "0"
    (correct_before, n_before), (correct, n) = change.before, change.after
    return f'{fill} title="{correct_before} of {n_before}, then {correct} of {n}">{sign}<small>{n}</small>'


def _class_attribute(**classes: bool) -> str:
    names = " ".join(name for name, wanted in classes.items() if wanted)
    return f' class="{names}"' if names else ""


def _whiskers(point: Point, place: Callable[[float, float], tuple[float, float]]) -> str:
    (x, left, right), (y, low, high) = point.x, point.y
    (x0, at), (x1, _), (over, y0), (_, y1) = place(left, y), place(right, y), place(x, low), place(x, high)
    return f'<path opacity=".55" d="M{x0:.1f} {at:.1f}H{x1:.1f}M{over:.1f} {y0:.1f}V{y1:.1f}"/>'


def _paint(look: int) -> str:
    colour = "var(--soft)" if look < 0 else f"var(--c{look % 6})"
    return f'stroke="{colour}" fill="{colour}" fill-opacity=".25" stroke-width="1.6"'


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "soft") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _with_interval(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.0%} ({value[1]:.0%} to {value[2]:.0%})"


def _axis_start(value: float) -> float:
    """Return where an axis starts: a multiple of 0.2, at most 0.6, so that small changes do not look large."""
    return min(0.6, max(0.0, math.floor(5 * value) / 5))


def _ticks(start: float) -> list[float]:
    step = 0.1 if start >= 0.6 else 0.2
    return [start + step * i for i in range(round((1 - start) / step) + 1)]
