"""Charts for the reports, drawn by hand as SVG and HTML: no script, no library, light and dark by the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 300  # of a plot, in CSS pixels
LEFT, TOP, RIGHT, BOTTOM = 52, 10, 112, 40  # its margins; names stand in the right one
LINE = 15  # between two names
SIZE = 5.0  # half of a mark
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
    """A mark with its name; x and y are (value, low, high) in [0, 1]."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    look: int  # colour and shape; -1: the base's, a grey cross


def plot(points: Sequence[Point], across: str, up: str, title: str) -> str:
    """Points with their intervals as whiskers, named at the right, each with a line to its name.

    Shape and colour tell the same, so that either is enough.

    Args:
        points: the marks.
        across: what the horizontal axis is.
        up: what the vertical axis is.
        title: what the plot is, for those who hear it.
    """
    least = (_floor(min((p.x[1] for p in points), default=0)), _floor(min((p.y[1] for p in points), default=0)))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * (x - least[0]) / (1 - least[0]), TOP + high * (1 - y) / (1 - least[1])

    parts = [f'<rect class="rule" x="{LEFT}" y="{TOP}" width="{wide}" height="{high}"/>']
    for value in _ticks(least[0]):
        x, _ = place(value, 1)
        parts.append(f'<path class="rule" d="M{x:.1f} {TOP}v{high}"/>' + _text(x, TOP + high + 15, f"{value:.0%}"))
    for value in _ticks(least[1]):
        _, y = place(1, value)
        parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}h{wide}"/>' + _text(LEFT - 5, y + 4, f"{value:.0%}", "end"))
    parts.append(_text(LEFT + wide / 2, HEIGHT - 8, f"{across} →"))
    middle = TOP + high / 2
    parts.append(f'<g transform="rotate(-90 11 {middle})">{_text(11, middle, f"{up} →")}</g>')
    spots = [(point, *place(point.x[0], point.y[0])) for point in points]
    # Names from top to bottom in the order of their marks; of equal height, the rightmost first.
    spots.sort(key=lambda spot: (round(spot[2]), -spot[1]))
    rows = spread_labels([y for _, _, y in spots], LINE, TOP + 4, TOP + high - 4)
    start = WIDTH - RIGHT + 8 + SIZE
    for (_, x, y), row in zip(spots, rows, strict=True):
        parts.append(f'<path class="lead" d="M{x:.1f} {y:.1f}L{start - SIZE:.1f} {row:.1f}"/>')
    for (point, x, y), row in zip(spots, rows, strict=True):
        parts.append(f"<g {_paint(point.look)}>{_whiskers(point, place)}{mark(x, y, point.look)}")
        told = f"{point.name}: {across} {_said(point.x)}, {up} {_said(point.y)}"
        parts.append(f"<title>{escape(told)}</title></g>")
        parts.append(f"<g {_paint(point.look)}>{mark(start, row, point.look, 4)}</g>")
        parts.append(_text(start + 9, row + 4, point.name, "start", ""))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def mark(x: float, y: float, look: int, size: float = SIZE) -> str:
    """A shape around a place: circle, square, triangle up, diamond, triangle down, plus; a cross for the base."""
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
    """Places near `wanted` (ascending), at least `apart` from each other, inside [low, high] where they all fit.

    >>> spread([10, 10, 12, 50], 10, 0, 55)
    [10, 20, 30, 50]
    """
    found: list[float] = []
    for value in wanted:
        found.append(max(value, low, found[-1] + apart if found else low))
    limit = high
    for index in range(len(found) - 1, -1, -1):  # what hangs over the end is pushed back
        found[index] = min(found[index], limit)
        limit = found[index] - apart
    return found


@dataclass(frozen=True)
class Change:
    """Right images before and after, of n."""

    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def points(self) -> float | None:
        """Change of the share, in percentage points; None where there is nothing to compare."""
        (was, of), (right, n) = self.before, self.after
        return 100 * (right / n - was / of) if n and of else None


def matrix(
    rows: Mapping[str, Mapping[str, Change]],
    columns: Mapping[str, Sequence[str]],
    own: Mapping[str, Sequence[str]],
) -> str:
    """A table of changes, coloured by how far the share fell (red) or rose (blue); it scrolls within itself.

    Args:
        rows: name -> column -> change; a cell that is missing or has n = 0 is left blank.
        columns: heading -> names of columns, which may repeat under another heading: cells go by "heading/name".
        own: row -> columns that the row is meant to change; they are framed.
    """
    names = [(head, name) for head, listed in columns.items() for name in listed]
    firsts = {(head, listed[0]) for head, listed in columns.items() if listed and head != next(iter(columns))}
    top = "".join(
        f'<th colspan="{len(listed)}"{_kinds(gap=(head, listed[0]) in firsts)}>{escape(head)}'
        for head, listed in columns.items()
        if listed
    )
    heads = "".join(f"<th{_kinds(gap=key in firsts)}><span>{escape(key[1])}</span>" for key in names)
    lines = [f"<thead><tr><th>{top}</tr><tr><th>erased{heads}</tr></thead>"]
    for row, cells in rows.items():
        line = [f'<th scope="row">{escape(row)}']
        for key in names:
            column = "/".join(key)
            frame = _kinds(own=column in own.get(row, ()), gap=key in firsts)
            line.append(f"<td{frame}{_cell(cells.get(column))}")
        lines.append(f"<tr>{''.join(line)}</tr>")
    return f'<div class="wide" tabindex="0"><table class="matrix">{"".join(lines)}</table></div>'


def _cell(change: Change | None) -> str:
    """The rest of a cell from its style on: change and number of images."""
    points = None if change is None else change.points
    if change is None or points is None:
        return ">"
    whole = round(points)
    # At most 60 %, so that the ink reads on it in light and dark.
    colour, depth = (GAIN if whole > 0 else LOSS), round(0.6 * min(abs(whole), 100))
    fill = f' style="background:color-mix(in srgb,{colour} {depth}%,transparent)"' if whole else ""
    sign = f"{whole:+d}".replace("-", "−") if whole else "0"
    (was, of), (right, n) = change.before, change.after
    return f'{fill} title="{was} of {of}, then {right} of {n}">{sign}<small>{n}</small>'


def _kinds(**kinds: bool) -> str:
    names = " ".join(name for name, wanted in kinds.items() if wanted)
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


def _said(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.0%} ({value[1]:.0%} to {value[2]:.0%})"


def _floor(value: float) -> float:
    """The axis starts at a whole fifth, and never so late that little differences look large."""
    return min(0.6, max(0.0, math.floor(5 * value) / 5))


def _ticks(least: float) -> list[float]:
    step = 0.1 if least >= 0.6 else 0.2
    return [least + step * i for i in range(round((1 - least) / step) + 1)]
