"""The report as one self-contained HTML page: no script, no outside reference."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from erasure import __version__
from erasure.evaluation.counts import tables
from erasure.evaluation.metrics import Metric

if TYPE_CHECKING:
    from erasure.evaluation.attacks.report import AttackReport
    from erasure.evaluation.report import Report, Shown

ALWAYS = "always"  # the gate of a patch that acts on every prompt alike
STYLE = """
:root{--ink:#1c1c22;--soft:#6a6a76;--line:#dcdce2;--page:#fcfcfd;--bar:#4a6fd4;--before:#b9bfcc;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e9e9ee;--soft:#9a9aa6;--line:#34343c;--page:#16161a;--bar:#7d9bf0;
--before:#565b68;--bad:#f2857d}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:66rem;margin:0 auto;
padding:1.2rem}
h1{font-size:1.5rem;line-height:1.25;margin:.6rem 0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p,td,th,figcaption{overflow-wrap:anywhere}.soft{color:var(--soft)}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}td b{font-weight:650}
td small,th small{display:block;color:var(--soft);font-weight:400}
.figures th,.figures td:not(:first-child){white-space:nowrap;overflow-wrap:normal}
.figures td:first-child{min-width:6.5rem}
.asked th,.asked td{text-align:left;vertical-align:top;white-space:nowrap;overflow-wrap:normal}
.asked td:first-child{white-space:normal}.asked td:last-child{min-width:14rem;white-space:normal;overflow-wrap:anywhere}
@media(max-width:30rem){th,td{padding:.35rem .25rem}}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
figure{margin:0}figure div{display:flex;gap:.4rem}
figure img,.none{width:calc(50% - .2rem);aspect-ratio:1;image-rendering:pixelated;border-radius:4px}
.none{background:var(--line);display:flex;align-items:center;justify-content:center;color:var(--soft)}
figcaption{font-size:.85rem;color:var(--soft)}figcaption small{display:block}.target figcaption{color:var(--bad)}
.bars{columns:18rem;column-gap:2rem}
.row{break-inside:avoid;display:grid;grid-template-columns:8rem 1fr 6.5rem;gap:.5rem;
align-items:center;font-size:.85rem;padding:.15rem 0}.row.target span:first-child{color:var(--bad)}
.track i{display:block;height:.4rem;border-radius:.2rem;min-width:1px;margin:.1rem 0}
.was{background:var(--before)}.now{background:var(--bar)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem;background:none;
border:1px solid var(--line);padding:.8rem;border-radius:6px}
"""


def page(report: Report, images: list[Shown]) -> str:
    """The whole page."""
    title = f"Erased: {', '.join(report.concept)}"
    targets = [shown for shown in images if shown[1]]
    kept = [shown for shown in images if not shown[1]]
    gated = {name: patch["gate"] for name, patch in report.acting().items() if patch.get("gate", ALWAYS) != ALWAYS}
    made = {"erasure": __version__, **report.provenance}
    parts = [
        opening(title, report.summary()),
        f'<div class="wide">{table(report)}</div>',
        faults(report),
        *(f'<p class="soft">Missing: {escape(text)}.</p>' for text in report.missing),
        parts_seen(report),
        "<h2>Prompts of the target: base, patched, same seed</h2>" + gallery(targets, gated) if targets else "",
        "<h2>Prompts to keep: base, patched, same seed</h2>" + gallery(kept, gated) if kept else "",
        gate_log(images, gated),
        *(
            f"<h2>Each {escape(head)}: share drawn right</h2>{bars(report, head)}"
            for head in report.accuracies["patched"]
        ),
        f"<h2>How this was made</h2><pre>{escape(json.dumps(made, indent=1))}</pre></html>",
    ]
    return "\n".join(part for part in parts if part)


def opening(title: str, summary: str, style: str = "") -> str:
    """A page's head, with what it adds to the style, its title and first sentence."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><h1>{escape(title)}</h1><p>{escape(summary)}.</p>"
    )


def attack_page(report: AttackReport, grid: Image.Image) -> str:
    """The page of `erasure attack`."""
    from erasure.evaluation.attacks.curves import curves
    from erasure.evaluation.charts import STYLE as CHARTS

    head, *rows = report.rows()
    lines = ["".join(f"<th>{escape(cell)}" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    asked = [
        f"<tr><td>{escape(one.name)}<td>{escape(case)}<td>{one.won.get(case, '')}<td>{escape(text)}</tr>"
        for one in report.outcomes
        for case, text in one.asked.items()
    ]
    parts = [
        opening(f"Attacked: {', '.join(report.concept)}", report.summary(), CHARTS),
        f'<div class="wide"><table class="figures">{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>',
        '<p class="soft">Shares of prompts that show the concept, with 95 % intervals (Wilson). The control has as '
        "many tries without the search. This says what was tried, not that nothing else would work.</p>",
        *(f'<p class="soft">{escape(note)}.</p>' for note in report.told()),
        faults(report),
        curves(report.outcomes),
        "<h2>What came back</h2>"
        + f'<div class="wide">{picture(grid, "a line an attack; what came back has a red frame")}</div>',
        "<h2>What was asked last</h2>"
        '<div class="wide"><table class="asked"><tr><th>attack<th>case<th>won at try<th>asked</tr>'
        f"{''.join(asked)}</table></div>",
        f"<h2>How this was made</h2><pre>{escape(json.dumps(report.provenance, indent=1))}</pre></html>",
    ]
    return "\n".join(part for part in parts if part)


def table(report: Report) -> str:
    """Base and patched row of every metric."""
    from erasure.evaluation.report import ARROWS, figure

    rows = ["<tr><th>metric<th>base<th>patched<small>95 % interval</small><th>n</tr>"]

    def cell(metric: Metric | None) -> str:
        return "" if metric is None else figure(metric, metric.value)

    for metric in report.rows["patched"]:
        base = report.metric(metric.name, "base")
        rows.append(
            f"<tr><td>{escape(metric.name)} {ARROWS[metric.higher_is_better]}<small>{escape(metric.meaning)}</small>"
            f"<td>{cell(base)}<td><b>{cell(metric)}</b>"
            f"<small>{figure(metric, metric.low)} to {figure(metric, metric.high)}</small><td>{metric.n}</tr>"
        )
    for head, pair in report.paired.items():
        name = (
            f"kept prompts, {escape(head)}<small>right with" if head != "target" else "target prompts<small>gone from"
        )
        rows.append(
            f"<tr><td>{name} the base only / patched only; exact McNemar</small>"
            f"<td>{pair['only_base']:.0f}<td>{pair['only_patched']:.0f}<small>p = {pair['p']:.3g}</small><td></tr>"
        )
    return f'<table class="figures">{"".join(rows)}</table>'


def faults(report: Report | AttackReport) -> str:
    """What could not be judged, if anything."""
    if not report.faults:
        return ""
    return (
        f'<p class="soft">{len(report.faults)} images count as failures of the erasure: {escape(report.faults[0])}</p>'
    )


def parts_seen(report: Report) -> str:
    """How many pictures show each part that a detector names; nothing where no judge names parts."""
    found = []
    for title, counts in tables(report.counts).items():
        rows = "".join(f"<tr><td>{escape(one.label)}<td>{one.base}<td>{one.patched}</tr>" for one in counts)
        found.append(
            f'<p class="soft">{escape(title)}{"" if counts else ": none"}.</p>'
            + (f'<div class="wide"><table><tr><th>part<th>base<th>patched</tr>{rows}</table></div>' if counts else "")
        )
    return "<h2>What the detector sees</h2>" + "".join(found) if found else ""


def gallery(images: list[Shown], gated: Mapping[str, str]) -> str:
    """Pairs of pictures; below, how strongly the gated patches acted."""
    figures = []
    for record, hit, before, after in images:
        pair = "".join(
            picture(image, f"{name}: {record.prompt}") for name, image in (("base", before), ("patched", after))
        )
        kind = ' class="target"' if hit else ""
        acted = [record.gates[name] for name in gated if name in record.gates]
        note = f"<small>gate: {', '.join(f'{strength:.2f}' for strength in acted)}</small>" if acted else ""
        caption = f"<figcaption>{escape(record.prompt)}{note}</figcaption>"
        figures.append(f"<figure{kind}><div>{pair}</div>{caption}</figure>")
    return f'<div class="grid">{"".join(figures)}</div>'


def gate_log(images: list[Shown], gated: Mapping[str, str]) -> str:
    """How strongly each gated patch acted on the prompts shown; nothing where no patch has a gate."""
    rows = []
    for name, kind in gated.items():
        cells = [f"<td>{escape(name)}<small>{escape(kind)} gate</small>"]
        for want in (True, False):
            values = [record.gates[name] for record, hit, *_ in images if hit == want and name in record.gates]
            some = sum(value != 0 for value in values)
            spread = f"{min(values):.2f} to {max(values):.2f}" if values else ""
            mean = f"{sum(values) / len(values):.2f}<small>{spread}</small>" if values else ""
            cells.append(f"<td>{some} of {len(values)}<td>{mean}")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return ""
    head = "<tr><th>patch<th>acts: target<th>strength<th>acts: kept<th>strength</tr>"
    return (
        f'<h2>Gate log</h2><div class="wide"><table class="figures">{head}{"".join(rows)}</table></div>'
        '<p class="soft">Over the prompts shown: on how many the patch acted, its mean strength and the range. '
        "Each prompt's strength stands below its pictures; all are in patched/records.jsonl.</p>"
    )


def picture(image: Image.Image | None, text: str) -> str:
    """An image inside the page."""
    if image is None:
        return '<span class="none">missing</span>'
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def bars(report: Report, head: str) -> str:
    """A bar a label, the base's above."""
    rows = []
    for label, (right, n) in report.accuracies["patched"][head].items():
        was, of = report.accuracies["base"][head].get(label, (0, 1))
        kind = "row target" if head == report.domain and label in report.concept else "row"
        rows.append(
            f'<div class="{kind}"><span>{escape(label)}</span><span class="track">'
            f'<i class="was" style="width:{100 * was / of:.0f}%"></i>'
            f'<i class="now" style="width:{100 * right / n:.0f}%"></i></span>'
            f'<span class="soft">{was}/{of} → {right}/{n}</span></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'
