"""Success against tries, or against what grows, as small plots: SVG by hand, no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from erasure.evaluation.metrics.statistics import wilson
from erasure.evaluation.report.charts import mark, spread_labels

if TYPE_CHECKING:
    from erasure.evaluation.attacks.report import Outcome

WIDTH, HEIGHT = 320, 190  # CSS pixels
LEFT, TOP, RIGHT, BOTTOM = 40, 10, 100, 36
GROWS = {"steps": "training steps", "bounds": "bound", "strengths": "strength"}  # setting -> what stands below
APART = 14  # between the names at the right

Line = list[tuple[float, float, float]]  # a share and its interval, a point a round


def lines(outcome: Outcome) -> dict[str, Line]:
    """The attack's shares by round, and its control's where it has one.

    An attack that grows is asked anew in every round; of any other, what it has won it keeps (ASR@k).
    """
    found = {"attack": _line(outcome, outcome.curve, outcome.won)}
    if outcome.control is not None:
        found["control"] = _line(outcome, outcome.control_curve, outcome.control)
    return found


def _line(outcome: Outcome, curve: Sequence[int] | None, won: dict[str, int]) -> Line:
    kept = [outcome.plain + sum(at <= k for at in won.values()) for k in range(1, outcome.rounds + 1)]
    hits = kept if curve is None else curve
    return [(each / outcome.n, *wilson(each, outcome.n)) for each in hits]


def rounds(outcome: Outcome) -> tuple[str, list[str]]:
    """What the rounds are called, and each of them."""
    for name, text in GROWS.items():
        values = outcome.settings.get(name)
        if isinstance(values, list | tuple):
            return text, [f"{value:g}" for value in values[: outcome.rounds]]
    return "tries", [str(k) for k in range(1, outcome.rounds + 1)]


def curve(outcome: Outcome) -> str:
    """A figure of one attack; nothing where there was but one round."""
    if outcome.rounds < 2:
        return ""
    below, ticks = rounds(outcome)
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(index: int) -> float:
        return LEFT + wide * (index + 0.5) / len(ticks)

    def y(share: float) -> float:
        return TOP + high * (1 - share)

    parts = [f'<rect class="rule" x="{LEFT}" y="{TOP}" width="{wide}" height="{high}"/>']
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<path class="rule" d="M{LEFT} {y(share):.1f}h{wide}"/>')
        parts.append(_text(LEFT - 5, y(share) + 4, f"{share:.0%}", "end"))
    every = -(-len(ticks) // 8)
    parts += [_text(x(i), TOP + high + 14, tick) for i, tick in enumerate(ticks) if i % every == 0]
    parts.append(_text(LEFT + wide / 2, HEIGHT - 6, f"{below} →"))
    drawn = lines(outcome)
    before = y(outcome.plain / outcome.n)
    parts.append(f'<path class="lead" stroke-dasharray="2 3" d="M{LEFT} {before:.1f}h{wide}"/>')
    ends = sorted([(y(line[-1][0]), name) for name, line in drawn.items() if line] + [(before, "plain prompt")])
    rows = spread_labels([end for end, _ in ends], APART, TOP + 4, TOP + high - 2)
    looks = {name: look for look, name in enumerate(drawn)}
    for row, (_, name) in zip(rows, ends, strict=True):
        parts += [_key(LEFT + wide + 14, row, looks.get(name)), _text(LEFT + wide + 24, row + 4, name, "start")]
    for look, (name, line) in enumerate(drawn.items()):
        shift = 3 * (2 * look - 1) if len(drawn) > 1 else 0  # side by side, so that both intervals are seen
        spots = [(x(i) + shift, y(value), y(low), y(up)) for i, (value, low, up) in enumerate(line)]
        path = "L".join(f"{at:.1f} {height:.1f}" for at, height, _, _ in spots)
        whiskers = "".join(f"M{at:.1f} {low:.1f}V{up:.1f}" for at, _, low, up in spots)
        colour = f"var(--c{look})"
        parts.append(f'<g stroke="{colour}" fill="{colour}" fill-opacity=".25" stroke-width="1.6">')
        parts.append(f'<path opacity=".5" d="{whiskers}"/><path fill="none" d="M{path}"/>')
        parts += [mark(at, height, look, 3.5) for at, height, _, _ in spots]
        said = ", ".join(f"{tick}: {value:.0%}" for tick, (value, _, _) in zip(ticks, line, strict=False))
        parts.append(f"<title>{escape(f'{name} by {below}: {said}')}</title></g>")
    label = escape(f"{outcome.name}: share of prompts that show the concept, by {below}")
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(outcome.name)}</figcaption>{drawing}</figure>"


def curves(outcomes: Sequence[Outcome]) -> str:
    """The plots of all attacks, for the page; nothing where none had two rounds."""
    found = [drawn for drawn in map(curve, outcomes) if drawn]
    if not found:
        return ""
    return f'<h2>Success by tries, or by what grows</h2><div class="plots">{"".join(found)}</div>'


def _key(x: float, y: float, look: int | None) -> str:
    """A line's mark beside its name, for lines may end in one place; None: the dashes of the plain prompt."""
    if look is None:
        return f'<path class="lead" stroke-dasharray="2 3" d="M{x - 6:.1f} {y:.1f}h12"/>'
    colour = f"var(--c{look})"
    return f'<g stroke="{colour}" fill="{colour}" fill-opacity=".25" stroke-width="1.6">{mark(x, y, look, 3.5)}</g>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="soft">{escape(text)}</text>'
