"""Small plots of the attack success rate against tries, or against the setting that grows: plain SVG, no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from erasure.evaluation.metrics.statistics import wilson
from erasure.evaluation.report.charts import mark, spread_labels

if TYPE_CHECKING:
    from erasure.evaluation.attacks.report import Outcome

WIDTH, HEIGHT = 320, 190  # size of a plot in CSS pixels
LEFT, TOP, RIGHT, BOTTOM = 40, 10, 100, 36  # its margins; the right one holds the names of the lines
ALL_WIDTH, ALL_HEIGHT, ALL_RIGHT = 400, 280, 150  # of the plot that compares all attacks
LOOKS = 6  # colours and shapes of lines; after these, lines are dashed
AXIS_TITLES = {"steps": "training steps", "bounds": "bound", "strengths": "strength"}  # by the setting that grows
NAME_DISTANCE = 14  # smallest vertical distance between the names of two lines

Line = list[tuple[float, float, float]]  # for each round a success rate and the ends of its interval


def lines(outcome: Outcome) -> dict[str, Line]:
    """Return the success rates of the attack after each round, and those of its control and on the base if there are.

    If every case is attempted in every round (`outcome.curve`), a point is the success rate of that round. For any
    other attack it is the success rate within the first k tries, ASR@k, which cannot fall.
    """
    drawn = {"attack": _line(outcome, outcome.curve, outcome.won)}
    if outcome.control is not None:
        drawn["control"] = _line(outcome, outcome.control_curve, outcome.control)
    if outcome.base is not None:
        drawn["base"] = _line(outcome, None, outcome.base)
    return drawn


def _line(outcome: Outcome, curve: Sequence[int] | None, won: dict[str, int]) -> Line:
    cumulative = [outcome.plain + sum(number <= k for number in won.values()) for k in range(1, outcome.rounds + 1)]
    hits = cumulative if curve is None else curve
    return [(count / outcome.n, *wilson(count, outcome.n)) for count in hits]


def rounds(outcome: Outcome) -> tuple[str, list[str]]:
    """Return the title of the horizontal axis and the label of each round."""
    for name, title in AXIS_TITLES.items():
        values = outcome.settings.get(name)
        if isinstance(values, list | tuple):
            return title, [f"{value:g}" for value in values[: outcome.rounds]]
    return "tries", [str(k) for k in range(1, outcome.rounds + 1)]


def curve(outcome: Outcome) -> str:
    """Return the plot of one attack as an HTML figure, or an empty string if it had fewer than two rounds."""
    if outcome.rounds < 2:
        return ""
    title, ticks = rounds(outcome)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(index: int) -> float:
        return LEFT + width * (index + 0.5) / len(ticks)

    def y(share: float) -> float:
        return TOP + height * (1 - share)

    parts = [f'<rect class="rule" x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>']
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<path class="rule" d="M{LEFT} {y(share):.1f}h{width}"/>')
        parts.append(_text(LEFT - 5, y(share) + 4, f"{share:.0%}", "end"))
    every = -(-len(ticks) // 8)  # label at most eight rounds
    parts += [_text(x(i), TOP + height + 14, tick) for i, tick in enumerate(ticks) if i % every == 0]
    parts.append(_text(LEFT + width / 2, HEIGHT - 6, f"{title} →"))
    drawn = lines(outcome)
    before = y(outcome.plain / outcome.n)
    parts.append(f'<path class="lead" stroke-dasharray="2 3" d="M{LEFT} {before:.1f}h{width}"/>')
    ends = sorted([(y(line[-1][0]), name) for name, line in drawn.items() if line] + [(before, "plain prompt")])
    rows = spread_labels([end for end, _ in ends], NAME_DISTANCE, TOP + 4, TOP + height - 2)
    looks = {name: look for look, name in enumerate(drawn)}
    for row, (_, name) in zip(rows, ends, strict=True):
        parts += [_key(LEFT + width + 14, row, looks.get(name)), _text(LEFT + width + 24, row + 4, name, "start")]
    for look, (name, line) in enumerate(drawn.items()):
        shift = 3 * (2 * look + 1 - len(drawn))  # keeps the intervals of a round from overlapping
        points = [(x(i) + shift, y(value), y(low), y(up)) for i, (value, low, up) in enumerate(line)]
        path = "L".join(f"{across:.1f} {down:.1f}" for across, down, _, _ in points)
        whiskers = "".join(f"M{across:.1f} {low:.1f}V{up:.1f}" for across, _, low, up in points)
        colour = f"var(--c{look})"
        parts.append(f'<g stroke="{colour}" fill="{colour}" fill-opacity=".25" stroke-width="1.6">')
        parts.append(f'<path opacity=".5" d="{whiskers}"/><path fill="none" d="M{path}"/>')
        parts += [mark(across, down, look, 3.5) for across, down, _, _ in points]
        values = ", ".join(f"{tick}: {value:.0%}" for tick, (value, _, _) in zip(ticks, line, strict=False))
        parts.append(f"<title>{escape(f'{name} by {title}: {values}')}</title></g>")
    label = escape(f"{outcome.name}: share of prompts for which the concept is shown, by {title}")
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(outcome.name)}</figcaption>{drawing}</figure>"


def by_tries(outcomes: Sequence[Outcome]) -> str:
    """Return one plot of ASR@k, the share of prompts recovered within k tries, with a line for every attack.

    It compares attacks of unequal budgets: lines that still rise at their last try have not been given enough tries.
    Returns an empty string if fewer than two attacks had two rounds.
    """
    drawn = [outcome for outcome in outcomes if outcome.rounds > 1]
    if len(drawn) < 2:
        return ""
    most = max(outcome.rounds for outcome in drawn)
    width, height = ALL_WIDTH - LEFT - ALL_RIGHT, ALL_HEIGHT - TOP - BOTTOM

    def place(tries: int, share: float) -> tuple[float, float]:
        return LEFT + width * (tries - 0.5) / most, TOP + height * (1 - share)

    parts = [f'<rect class="rule" x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        down = place(1, share)[1]
        parts.append(
            f'<path class="rule" d="M{LEFT} {down:.1f}h{width}"/>' + _text(LEFT - 5, down + 4, f"{share:.0%}", "end")
        )
    every = -(-most // 10)
    parts += [_text(place(k, 0)[0], TOP + height + 14, str(k)) for k in range(1, most + 1, every)]
    parts.append(_text(LEFT + width / 2, ALL_HEIGHT - 6, "tries k →"))
    shares = [[value for value, _, _ in _line(outcome, None, outcome.won)] for outcome in drawn]
    order = sorted(range(len(drawn)), key=lambda i: -shares[i][-1])
    rows = spread_labels([place(1, shares[i][-1])[1] for i in order], NAME_DISTANCE, TOP + 4, TOP + height - 2)
    start = LEFT + width + 14
    for look, (i, row) in enumerate(zip(order, rows, strict=True)):
        points = [place(k + 1, share) for k, share in enumerate(shares[i])]
        path = "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
        across, down = points[-1]
        dashes = ' stroke-dasharray="5 3"' if look >= LOOKS else ""
        values = ", ".join(f"{k + 1}: {share:.0%}" for k, share in enumerate(shares[i]))
        parts.append(f'<path class="lead" d="M{across:.1f} {down:.1f}L{start - 6:.1f} {row:.1f}"/>')
        parts.append(f'<g stroke="var(--c{look % LOOKS})" fill="var(--c{look % LOOKS})" stroke-width="1.6">')
        parts.append(f'<path fill="none"{dashes} d="M{path}"/>{mark(across, down, look % LOOKS, 3.5)}')
        parts.append(f"{mark(start, row, look % LOOKS, 3.5)}<title>{escape(f'{drawn[i].name}: {values}')}</title></g>")
        parts.append(_text(start + 10, row + 4, f"{drawn[i].name} {shares[i][-1]:.0%}", "start"))
    label = "share of prompts recovered within k tries, for every attack"
    drawing = f'<svg viewBox="0 0 {ALL_WIDTH} {ALL_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>All attacks: prompts recovered within k tries (ASR@k)</figcaption>{drawing}</figure>"


def curves(outcomes: Sequence[Outcome]) -> str:
    """Return the plots of all attacks with a heading, or an empty string if no attack had two rounds."""
    figures = [figure for figure in map(curve, outcomes) if figure]
    if not figures:
        return ""
    plots = "".join(figures)
    return f'<h2>Attack success rate by tries or steps</h2>{by_tries(outcomes)}<div class="plots">{plots}</div>'


def _key(x: float, y: float, look: int | None) -> str:
    """Return the mark that stands before a line's name, or the dashes of the plain prompt for `look` None."""
    if look is None:
        return f'<path class="lead" stroke-dasharray="2 3" d="M{x - 6:.1f} {y:.1f}h12"/>'
    colour = f"var(--c{look})"
    return f'<g stroke="{colour}" fill="{colour}" fill-opacity=".25" stroke-width="1.6">{mark(x, y, look, 3.5)}</g>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="soft">{escape(text)}</text>'
