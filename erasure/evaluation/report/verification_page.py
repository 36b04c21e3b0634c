"""The page of a verification: one verdict for the evaluation and the attacks, with links to the page of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from erasure.evaluation.attacks.report import AttackReport
from erasure.evaluation.generate import open_image
from erasure.evaluation.metrics.metric import format_interval, format_value
from erasure.evaluation.report.attack_page import strongest
from erasure.evaluation.report.card import CAVEAT
from erasure.evaluation.report.evaluation_page import MAIN, STRIP
from erasure.evaluation.report.figures import ARROWS
from erasure.evaluation.report.html import Shot, Tile, folded, page_head, strips, tiles
from erasure.evaluation.report.report import Report
from erasure.prompts.row import Prompt

PAGES = {"evaluation": "What is left: all images and figures", "attacks": "What came back: every attack"}


def verification_page(results: Mapping[str, Any], shots: Mapping[str, Sequence[Shot]]) -> str:
    """Return the page of a verification.

    Args:
        results: the results as `verify` writes them into the header.
        shots: heading -> columns of images; the page says nothing of a heading without columns.
    """
    concept = ", ".join(results["concept"])
    links = [f'<a href="{part}/report.html">{title}</a>' for part, title in PAGES.items()]
    links = links if results["attacks"] else links[:1]
    main = {name: cell for name in MAIN if (cell := results["metrics"].get(name))}
    further = {name: cell for name, cell in results["metrics"].items() if name not in main}
    parts = [
        page_head(f"Is {concept} gone, and does it stay gone?"),
        tiles(verdict(results)),
        strips(shots, four=True),
        f'<p>{" · ".join(links)} · <a href="README.md">Model card</a></p>',
        f'<p class="soft">{escape(CAVEAT)}</p>',
        figures(main),
        attack_figures(results["attacks"]),
        folded("Further metrics", figures(further)),
        "</html>",
    ]
    return "\n".join(part for part in parts if part)


def verification_shots(
    report: Report, attacks: AttackReport | None, folder: Path, prompts: Sequence[Prompt]
) -> dict[str, list[Shot]]:
    """Return the images at the top of the page: target prompts, other prompts, and what the strongest attack recovered.

    Args:
        report: the evaluation, whose runs lie in `folder/evaluation`.
        attacks: the attacks, whose images lie in `folder/attacks`, or None.
        folder: the folder of the verification.
        prompts: the rows of the prompt set.
    """
    asked = {row.id: row for row in prompts}
    shots: dict[str, list[Shot]] = {"least": [], "other": []}
    for key, label in report.seen["patched"].items():
        row = asked[key]
        runs = {
            name: open_image(folder / "evaluation" / name / "images" / f"{key}.png") for name in ("base", "patched")
        }
        group = "least" if row.labels.get(report.domain) in report.concept else "other"
        shots[group].append(Shot(runs, row.prompt, f"seen: {label}"))
    concept = ", ".join(report.concept)
    found = {f"Prompts for {concept}, the least erased": shots["least"], "Other prompts": shots["other"]}
    worst = None if attacks is None else strongest(attacks)
    if attacks is not None and worst is not None:
        found[f"Back under attack by {worst.name}"] = [
            Shot({"attacked": image}, attacks.prompts[case], f"at try {number}", frozenset({"attacked"}))
            for case, number in worst.won.items()
            if (image := open_image(folder / "attacks" / worst.name / f"{case}.png")) is not None
        ]
    return {heading: columns[:STRIP] for heading, columns in found.items()}


def verdict(results: Mapping[str, Any]) -> list[Tile]:
    """Return the tiles of the verdict: gone, kept, picture still good, and back under the strongest attack."""
    metrics, attacks = results["metrics"], results["attacks"]
    concept = ", ".join(results["concept"])
    kept = "IRA" if "IRA" in metrics else "CRA"
    counted = {
        "UA": ("Gone", f"target images without {concept}"),
        kept: ("Kept", "kept images recognised"),
        "quality": ("Picture still good", "target images that are well formed"),
    }
    shown = [_tile(title, name, metrics.get(name), what) for name, (title, what) in counted.items()]
    if attacks:
        worst = max(attacks, key=lambda name: attacks[name]["value"])
        rank = f"strongest of {len(attacks)}" if len(attacks) > 1 else "the only attack"
        cell = {**attacks[worst], "base": None}
        shown.append(_tile("Back under attack", "ASR", cell, f"prompts, by {worst}, {rank}"))
    return shown


def _tile(title: str, name: str, cell: Mapping[str, Any] | None, counted: str) -> Tile:
    if cell is None:
        return Tile(title, "", ["not measured"])
    lines = [f"95 %: {format_interval(name, cell['low'], cell['high'], '–')}"]
    lines += [] if cell["base"] is None else [f"base {format_value(name, cell['base'])}"]
    return Tile(title, format_value(name, cell["value"]), [*lines, f"{counted} ({cell['n']})"])


def figures(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the metrics of a header, or nothing without metrics."""
    rows = [
        f"<tr><td>{escape(name)} {ARROWS[cell['higher_is_better']]}<small>{escape(cell['meaning'])}</small>"
        f"<td>{'' if cell['base'] is None else format_value(name, cell['base'])}"
        f"<td><b>{format_value(name, cell['value'])}</b>"
        f"<small>{format_interval(name, cell['low'], cell['high'], ' to ')}</small><td>{cell['n']}</tr>"
        for name, cell in metrics.items()
    ]
    if not rows:
        return ""
    head = "<tr><th>metric<th>base<th>patched<small>95 % interval</small><th>n</tr>"
    return f'<table class="figures">{head}{"".join(rows)}</table>'


def attack_figures(attacks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the attacks of a header, or nothing without attacks."""
    rows = []
    for name, cell in attacks.items():
        control = "" if cell["control"] is None else f"{cell['control']:.0%}"
        rows.append(
            f"<tr><td>{escape(name)}<small>{escape(cell['access'])}</small><td>{cell['before']:.0%}"
            f"<td><b>{cell['value']:.0%}</b><small>{format_interval('ASR', cell['low'], cell['high'], ' to ')}</small>"
            f"<td>{control}</tr>"
        )
    if not rows:
        return ""
    head = "<tr><th>attack<small>access</small><th>before<th>after<small>95 % interval</small><th>control</tr>"
    return f'<table class="figures">{head}{"".join(rows)}</table>'
