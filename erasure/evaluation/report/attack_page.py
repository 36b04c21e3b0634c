"""The page of an attack report: the verdict, the recovered images, success rates, paired tests, curves and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from erasure.evaluation.attacks.curves import curves
from erasure.evaluation.attacks.report import COLUMNS, AttackReport, Outcome
from erasure.evaluation.metrics.statistics import wilson
from erasure.evaluation.report.html import (
    PairedTest,
    Shot,
    Tile,
    faults,
    folded,
    looks,
    page_head,
    paired_table,
    strips,
    tiles,
)

STRIP = 8  # cases in the strip at the top
Images = Mapping[str, Sequence[Image.Image | None]]  # name of a row -> one image for each of the first COLUMNS cases


def attack_page(report: AttackReport, images: Images) -> str:
    """Return the page of an attack report.

    Args:
        report: the report.
        images: the images of the base, the erased model and each attack; names that are no attacks come first.
    """
    tests = paired_tests(report)
    painted = looks(tests)
    concept = ", ".join(report.concept)
    parts = [
        page_head(f"Attacks on the erasure of {concept}"),
        tiles(verdict(report, painted)),
        strips({f"Prompts for {concept}; red frame: it is back": first_shots(report, images)}),
        f"<p>{escape(report.summary())}.</p>",
        shares(report, painted),
        f'<p class="soft">Shares of the {report.cases} prompts for which the concept is shown, with 95 % intervals '
        "(Wilson). Before: the unchanged prompts; after: the unchanged prompts or any try of the attack. The control "
        "has equally many tries without the search, and is empty for attacks that are controls themselves. Other "
        "attacks may still succeed.</p>",
        *(f'<p class="soft">{escape(note)}.</p>' for note in report.caveats()),
        faults(report.faults),
        "<h2>Each attack against its control, on the same prompts</h2>"
        + paired_table(tests, "attack", "control", "recovered by")
        if tests
        else "",
        curves(report.outcomes),
        gallery(report, images),
        folded("Tries and costs of the search", costs(report)),
        folded("Last prompts", last_prompts(report)),
        folded("Settings and versions", f"<pre>{escape(json.dumps(report.provenance, indent=1))}</pre>"),
        "</html>",
    ]
    return "\n".join(part for part in parts if part)


def paired_tests(report: AttackReport) -> list[PairedTest]:
    """Return the tests of each attack against its control, if it has one; the attack is the first of the two."""
    tests = []
    for outcome in report.outcomes:
        pair = outcome.to_json().get("paired")
        if pair is not None:
            name = outcome.name
            tests.append(PairedTest(name, name, pair["only_attack"], pair["only_control"], pair["p"]))
    return tests


def strongest(report: AttackReport) -> Outcome | None:
    """Return the attack that recovers the concept for most prompts, or None without attacks."""
    return max(report.outcomes, key=lambda outcome: len(outcome.won), default=None)


def verdict(report: AttackReport, painted: Mapping[str, str]) -> list[Tile]:
    """Return the three tiles of the verdict: shown without an attack, with the strongest attack, with its control."""
    base = f"base {report.cases} of {report.cases}"  # the cases are prompts for which the base shows the concept
    low, high = wilson(report.plain, report.cases)
    plain = {"value": report.plain / report.cases, "low": low, "high": high}
    shown = [_tile("No attack", plain, [base, f"unchanged prompts that show it ({report.cases})"])]
    worst = strongest(report)
    if worst is None:
        return shown
    tries = f"{worst.rounds} tries" if worst.rounds != 1 else "1 try"
    rank = f"the strongest of {len(report.outcomes)}" if len(report.outcomes) > 1 else "the only attack"
    after, control = worst.share(), worst.share(control=True)
    shown.append(_tile("Attacked", after, [base, f"{worst.name}, {rank}; {tries}"], painted.get(worst.name, "")))
    shown.append(_tile("Control", control, [base, f"{tries} without the search" if control else "has no control"]))
    return shown


def _tile(title: str, share: Mapping[str, float] | None, lines: list[str], look: str = "") -> Tile:
    if share is None:
        return Tile(title, "", lines[1:])
    interval = f"95 %: {100 * share['low']:.0f}–{100 * share['high']:.0f}"
    return Tile(title, f"{share['value']:.0%}", [interval, *lines], look)


def first_shots(report: AttackReport, images: Images) -> list[Shot]:
    """Return columns of cases, those that show the concept first: the base, the erased model, the strongest attack.

    An attack makes no try for a case that the erased model shows for the unchanged prompt.
    """
    worst = strongest(report)
    attacks = {outcome.name for outcome in report.outcomes}
    shots = []
    for index, case in enumerate(report.provenance["cases"][:COLUMNS]):
        column = {name: row[index] for name, row in images.items() if name not in attacks}
        hits = set()
        if worst is not None and case not in worst.asked:
            hits.add("erased")
        elif worst is not None:
            column[worst.name] = images[worst.name][index]
            hits |= {worst.name} if case in worst.won else set()
        shots.append(Shot(column, report.prompts.get(case, case), hits=frozenset(hits)))
    shots.sort(key=lambda shot: (not shot.hits, "erased" not in shot.hits))
    return shots[:STRIP]


def gallery(report: AttackReport, images: Images) -> str:
    """Return the last try of every attack for each of the first cases."""
    shown = min(COLUMNS, report.cases)
    groups = {}
    for outcome in report.outcomes:
        row = images.get(outcome.name, ())
        cases = report.provenance["cases"][: len(row)]
        groups[outcome.name] = [
            Shot(
                {"": image},
                "",
                f"at try {outcome.won[case]}" if case in outcome.won else "not recovered",
                frozenset({""} if case in outcome.won else ()),
            )
            for case, image in zip(cases, row, strict=True)
            if image is not None
        ]
    return (
        "<h2>Recovered images</h2>"
        f'<p class="soft">The last try of each attack for {shown} prompts (of {report.cases}). Images that the judge '
        f"recognised as the concept have a red frame.</p>{strips(groups)}"
    )


def shares(report: AttackReport, painted: Mapping[str, str]) -> str:
    """Return a table with one row for each attack: the shares before, after, and with the control.

    Args:
        report: the report.
        painted: name of an attack -> how its share is painted, as `looks` returns it.
    """
    head = "<tr><th>attack<small>access</small><th>before<th>after<th>control</tr>"
    rows = []
    for name, access, *cells, _, _ in report.rows()[1:]:
        split = [cell.rstrip("]").partition(" [") for cell in cells]
        shown = [f"<td>{value}<small>{low_high.replace(', ', ' to ')}</small>" for value, _, low_high in split]
        look = f' class="{painted[name]}"' if painted.get(name) else ""
        shown[1] = shown[1].replace("<td>", f"<td><b{look}>").replace("<small>", "</b><small>")
        rows.append(f"<tr><td>{escape(name)}<small>{escape(access)}</small>{''.join(shown)}</tr>")
    return f'<table class="figures">{head}{"".join(rows)}</table>'


def costs(report: AttackReport) -> str:
    """Return a table of the tries and the UNet samples of each attack, or nothing without attacks."""
    rows = [
        f"<tr><td>{escape(name)}<td>{tries}<td>{escape(spent)}</tr>" for name, *_, tries, spent in report.rows()[1:]
    ]
    if not rows:
        return ""
    head = "<tr><th>attack<th>tries<th>F + B</tr>"
    note = "F + B: samples forward and backward through the UNet during the search."
    return f'<table class="figures">{head}{"".join(rows)}</table><p class="soft">{note}</p>'


def last_prompts(report: AttackReport) -> str:
    """Return a table of the last prompt of each attack for each case, or nothing if there was no case to attack."""
    rows = [
        f"<tr><td>{escape(outcome.name)}<td data-of='original'>{escape(report.prompts.get(case, case))}"
        f"<td data-of='recovered at try'>{outcome.won.get(case, 'not recovered')}<td data-of='last'>{escape(text)}</tr>"
        for outcome in report.outcomes
        for case, text in outcome.asked.items()
    ]
    if not rows:
        return ""
    head = "<thead><tr><th>attack<th>original prompt<th>recovered at try<th>last prompt</tr></thead>"
    return f'<table class="prompts stack">{head}<tbody>{"".join(rows)}</tbody></table>'
