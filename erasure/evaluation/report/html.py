"""The report as one self-contained HTML page: no script, no outside reference."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from erasure.evaluation.attacks.curves import curves
from erasure.evaluation.attacks.report import COLUMNS, AttackReport
from erasure.evaluation.metrics.detections import detection_tables
from erasure.evaluation.metrics.gate_activity import GateActivity, gate_kinds
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.report import charts
from erasure.evaluation.report.figures import ARROWS, ImagePair, interval_text, value_text
from erasure.evaluation.report.report import Report
from erasure.version import __version__

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
.asked td:first-child{white-space:normal}
.asked td:nth-child(2){white-space:normal;min-width:8rem}
.asked td:last-child{min-width:14rem;white-space:normal;overflow-wrap:anywhere}
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


def page(report: Report, images: list[ImagePair]) -> str:
    """The whole page."""
    title = f"What is left of {', '.join(report.concept)}"
    targets = [shown for shown in images if shown[1]]
    kept = [shown for shown in images if not shown[1]]
    kinds = gate_kinds(report.acting())
    made = {"erasure": __version__, **report.provenance}
    parts = [
        page_head(title, report.summary(), charts.STYLE),
        f'<p class="soft">{escape(report.about())}.</p>',
        f'<div class="wide">{table(report)}</div>',
        faults(report),
        *(f'<p class="soft">{escape(note)}.</p>' for note in report.notes),
        *(f'<p class="soft">Missing: {escape(text)}.</p>' for text in report.missing),
        parts_seen(report),
        "<h2>Prompts of the target: base, patched, same seed</h2>"
        '<p class="soft">The least erased first. Look: a judge may miss what an eye sees.</p>'
        + gallery(targets, kinds, report.seen)
        if targets
        else "",
        "<h2>Prompts to keep: base, patched, same seed</h2>" + gallery(kept, kinds, report.seen) if kept else "",
        gate_log(report.gates),
        costs(report),
        tradeoff(report),
        "<h2>Interference: what erasing it does to the others</h2>" + INTERFERENCE + interference(report),
        *(
            f"<h2>Each {escape(head)}: share drawn right</h2>"
            f'<p class="soft">Above the base, below the patched model; right of how many.</p>{bars(report, head)}'
            for head in report.accuracies["patched"]
        ),
        f"<h2>How this was made</h2><pre>{escape(json.dumps(made, indent=1))}</pre></html>",
    ]
    return "\n".join(part for part in parts if part)


def page_head(title: str, summary: str, style: str = "") -> str:
    """A page's head, with what it adds to the style, its title and first sentence."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><h1>{escape(title)}</h1><p>{escape(summary)}.</p>"
    )


def attack_page(report: AttackReport, grid: Image.Image) -> str:
    """The page of `erasure attack`."""
    shown = min(COLUMNS, report.cases)
    parts = [
        page_head(f"Attacked: {', '.join(report.concept)}", report.summary(), charts.STYLE),
        f'<div class="wide">{shares(report)}</div>',
        f'<p class="soft">Shares of the {report.cases} prompts that show the concept, with 95 % intervals (Wilson): '
        "before, asked as they are; after, the attack's tries too. The control has as many tries without the search, "
        "and is empty where the attack is a control itself. F + B: samples forward and backward through the UNet while "
        "searching. This says what was tried, not that nothing else would work.</p>",
        *(f'<p class="soft">{escape(note)}.</p>' for note in report.caveats()),
        faults(report),
        curves(report.outcomes),
        "<h2>What came back</h2>"
        f'<p class="soft">A column a prompt ({shown} of {report.cases}); the base, the erased model, then the last try '
        "of each attack; in a red frame, what the judge took for the concept.</p>"
        f'<div class="wide">{picture(grid, "a line an attack; what came back has a red frame")}</div>',
        asked(report),
        f"<h2>How this was made</h2><pre>{escape(json.dumps(report.provenance, indent=1))}</pre></html>",
    ]
    return "\n".join(part for part in parts if part)


def shares(report: AttackReport) -> str:
    """A row an attack. The shares stand first: on a phone they are what is seen without scrolling."""
    head = "<tr><th>attack<small>needs</small><th>before<th>after<th>control<th>tries<th>F + B</tr>"
    rows = []
    for name, needs, *cells, tries, costs in report.rows()[1:]:
        split = [cell.rstrip("]").partition(" [") for cell in cells]
        shown = [f"<td>{value}<small>{low_high.replace(', ', ' to ')}</small>" for value, _, low_high in split]
        shown[1] = shown[1].replace("<td>", "<td><b>").replace("<small>", "</b><small>")
        rows.append(
            f"<tr><td>{escape(name)}<small>{escape(needs)}</small>{''.join(shown)}<td>{tries}<td>{escape(costs)}</tr>"
        )
    return f'<table class="figures">{head}{"".join(rows)}</table>'


def asked(report: AttackReport) -> str:
    """What each attack asked last for each case; nothing where no case was left to attack."""
    rows = [
        f"<tr><td>{escape(one.name)}<td>{escape(report.prompts.get(case, case))}"
        f"<td>{one.won.get(case, 'withstood')}<td>{escape(text)}</tr>"
        for one in report.outcomes
        for case, text in one.asked.items()
    ]
    if not rows:
        return ""
    head = "<tr><th>attack<th>in place of<th>won at try<th>asked</tr>"
    return f'<h2>What was asked last</h2><div class="wide"><table class="asked">{head}{"".join(rows)}</table></div>'


def table(report: Report) -> str:
    """Base and patched row of every metric."""
    rows = ["<tr><th>metric<th>base<th>patched<small>95 % interval</small><th>n</tr>"]

    def cell(metric: Metric | None) -> str:
        return "" if metric is None else value_text(metric, metric.value)

    for metric in report.rows["patched"]:
        base = report.metric(metric.name, "base")
        rows.append(
            f"<tr><td>{escape(metric.name)} {ARROWS[metric.higher_is_better]}<small>{escape(metric.meaning)}</small>"
            f"<td>{cell(base)}<td><b>{cell(metric)}</b>"
            f"<small>{interval_text(metric)}</small><td>{metric.n}</tr>"
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
    for title, counts in detection_tables(report.counts).items():
        rows = "".join(f"<tr><td>{escape(one.label)}<td>{one.base}<td>{one.patched}</tr>" for one in counts)
        found.append(
            f'<p class="soft">{escape(title)}{"" if counts else ": none"}.</p>'
            + (f'<div class="wide"><table><tr><th>part<th>base<th>patched</tr>{rows}</table></div>' if counts else "")
        )
    return "<h2>What the detector sees</h2>" + "".join(found) if found else ""


def gallery(images: list[ImagePair], gated: Mapping[str, str], seen: Mapping[str, Mapping[str, str]]) -> str:
    """Pairs of pictures; below, what the judge sees in them and how strongly the gated patches acted."""
    figures = []
    for record, hit, before, after in images:
        pair = "".join(
            picture(image, f"{name}: {record.prompt}") for name, image in (("base", before), ("patched", after))
        )
        kind = ' class="target"' if hit else ""
        acted = [record.gates[name] for name in gated if name in record.gates]
        note = f"<small>gate: {', '.join(f'{strength:.2f}' for strength in acted)}</small>" if acted else ""
        told = [escape(tops[record.id]) for tops in seen.values() if record.id in tops]
        note = (f"<small>judge: {' → '.join(told)}</small>" if told else "") + note
        caption = f"<figcaption>{escape(record.prompt)}{note}</figcaption>"
        figures.append(f"<figure{kind}><div>{pair}</div>{caption}</figure>")
    return f'<div class="grid">{"".join(figures)}</div>'


def gate_log(gates: Sequence[GateActivity], first: str = "patch") -> str:
    """How strongly each gated patch acted; nothing where no patch has a gate.

    Args:
        gates: of one run, or of several with names of their own.
        first: what the first column holds.
    """
    if not gates:
        return ""
    rows: dict[tuple[str, str], dict[str, GateActivity]] = {}
    for one in gates:
        rows.setdefault((one.patch, one.gate), {})[one.prompts] = one
    lines = [f"<tr><th>{first}<th>acts: target<th>strength<th>acts: kept<th>strength</tr>"]
    for (name, kind), found in rows.items():
        cells = [f"<td>{escape(name)}<small>{escape(kind)} gate</small>"]
        for prompts in ("target", "kept"):
            if prompts not in found:
                cells.append("<td><td>")
                continue
            log = found[prompts]
            strength = f"{log.mean:.2f}<small>{log.least:.2f} to {log.most:.2f}</small>"
            cells.append(f"<td>{log.acts} of {log.n}<td>{strength}")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<h2>Gate log</h2><div class="wide"><table class="figures">{"".join(lines)}</table></div>'
        '<p class="soft">On how many prompts the patch acted, its mean strength and the range. Each prompt\'s strength '
        "stands in the run's patched/records.jsonl.</p>"
    )


def costs(report: Report) -> str:
    """What it took to make the patches that act, as their headers say; nothing where none says it."""
    lines = []
    for name, patch in report.acting().items():
        spent, size = patch.get("costs") or {}, patch.get("bytes")
        cells = [f"{spent[key]:,.0f}" if key in spent else "" for key in ("F", "B", "seconds")]
        cells.append(f"{size / 1000:,.0f}" if size else "")
        if any(cells):
            lines.append(f"<tr><td>{escape(name)}" + "".join(f"<td>{cell}" for cell in cells) + "</tr>")
    if not lines:
        return ""
    return (
        '<h2>What it cost to make</h2><div class="wide"><table class="figures"><tr><th>patch<th>F<th>B<th>seconds<th>KB'
        f'</tr>{"".join(lines)}</table></div><p class="soft">F, B: samples forward and backward through the UNet; KB: '
        "the file.</p>"
    )


def tradeoff(report: Report) -> str:
    """Erased against kept: the patched pipeline and the base; nothing where one of the two was not measured."""
    names = {str(patch.get("method", "patched")) for patch in report.acting().values()} or {"patched"}
    points = []
    for row, look, name in (("patched", 0, " + ".join(sorted(names))), ("base", -1, "base")):
        kept, erased = report.metric("IRA", row), report.metric("UA", row)
        if kept is None or erased is None:
            return ""
        points.append(
            charts.Point(name, (kept.value, kept.low, kept.high), (erased.value, erased.low, erased.high), look)
        )
    drawn = charts.plot(points, "kept (IRA)", "erased (UA)", "erased against kept")
    return f'<h2>Erased against kept</h2><div class="plots"><div>{drawn}</div></div>'


INTERFERENCE = (
    '<p class="soft">A line: the concept erased. A column: what the prompts ask for. In a cell: by how many points '
    "the share drawn right changed against the base, red for a loss, blue for a gain; below, the number of images "
    "(a cell of one image says 0 or 100). Framed: what the line is meant to erase. Blank: not asked for.</p>"
)


def interference(report: Report) -> str:
    """One line of the matrix: concept erased x label measured; `erasure bench` has a line a concept."""
    columns = {head: list(labels) for head, labels in report.accuracies["patched"].items() if labels}
    cells = {
        f"{head}/{label}": charts.Change(report.accuracies["base"][head].get(label, (0, 0)), after)
        for head, labels in report.accuracies["patched"].items()
        for label, after in labels.items()
    }
    name = ", ".join(report.concept)
    return charts.matrix({name: cells}, columns, {name: [f"{report.domain}/{one}" for one in report.concept]})


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
