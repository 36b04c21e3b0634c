"""The page of an attack report: success rates, curves, the images of the last tries, and their prompts."""

from __future__ import annotations

import json
from html import escape

from PIL import Image

from erasure.evaluation.attacks.curves import curves
from erasure.evaluation.attacks.report import COLUMNS, AttackReport
from erasure.evaluation.report import charts
from erasure.evaluation.report.html import faults, page_head, picture


def attack_page(report: AttackReport, grid: Image.Image) -> str:
    """Return the page of an attack report.

    Args:
        report: the report.
        grid: the images of the base, the erased model and each attack.
    """
    shown = min(COLUMNS, report.cases)
    parts = [
        page_head(f"Attacks on the erasure of {', '.join(report.concept)}", report.summary(), charts.STYLE),
        f'<div class="wide">{shares(report)}</div>',
        f'<p class="soft">Shares of the {report.cases} prompts for which the concept is shown, with 95 % intervals '
        "(Wilson). Before: the unchanged prompts; after: the unchanged prompts or any try of the attack. The control "
        "has equally many tries without the search, and is empty for attacks that are controls themselves. F + B: "
        "samples forward and backward through the UNet during the search. Other attacks may still succeed.</p>",
        *(f'<p class="soft">{escape(note)}.</p>' for note in report.caveats()),
        faults(report.faults),
        curves(report.outcomes),
        "<h2>Recovered images</h2>"
        f'<p class="soft">One column for each of {shown} prompts (of {report.cases}); one row for the base, the erased '
        "model, and the last try of each attack. Images that the judge recognised as the concept have a red frame.</p>"
        f'<div class="wide">{picture(grid, "one row for each attack; recovered concepts have a red frame")}</div>',
        last_prompts(report),
        f"<h2>Settings and versions</h2><pre>{escape(json.dumps(report.provenance, indent=1))}</pre></html>",
    ]
    return "\n".join(part for part in parts if part)


def shares(report: AttackReport) -> str:
    """Return a table with one row for each attack.

    The shares come first, so that they are visible on a phone without scrolling.
    """
    head = "<tr><th>attack<small>access</small><th>before<th>after<th>control<th>tries<th>F + B</tr>"
    rows = []
    for name, access, *cells, tries, costs in report.rows()[1:]:
        split = [cell.rstrip("]").partition(" [") for cell in cells]
        shown = [f"<td>{value}<small>{low_high.replace(', ', ' to ')}</small>" for value, _, low_high in split]
        shown[1] = shown[1].replace("<td>", "<td><b>").replace("<small>", "</b><small>")
        rows.append(
            f"<tr><td>{escape(name)}<small>{escape(access)}</small>{''.join(shown)}<td>{tries}<td>{escape(costs)}</tr>"
        )
    return f'<table class="figures">{head}{"".join(rows)}</table>'


def last_prompts(report: AttackReport) -> str:
    """Return a table of the last prompt of each attack for each case, or nothing if there was no case to attack."""
    rows = [
        f"<tr><td>{escape(outcome.name)}<td>{escape(report.prompts.get(case, case))}"
        f"<td>{outcome.won.get(case, 'not recovered')}<td>{escape(text)}</tr>"
        for outcome in report.outcomes
        for case, text in outcome.asked.items()
    ]
    if not rows:
        return ""
    head = "<tr><th>attack<th>original prompt<th>recovered at try<th>last prompt</tr>"
    return f'<h2>Last prompts</h2><div class="wide"><table class="prompts">{head}{"".join(rows)}</table></div>'
