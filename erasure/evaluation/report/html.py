"""Reports of evaluations and attacks as self-contained HTML pages, without scripts or external references."""

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
.prompts th,.prompts td{text-align:left;vertical-align:top;white-space:nowrap;overflow-wrap:normal}
.prompts td:first-child{white-space:normal}
.prompts td:nth-child(2){white-space:normal;min-width:8rem}
.prompts td:last-child{min-width:14rem;white-space:normal;overflow-wrap:anywhere}
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
    """Return the page of an evaluation.

    Args:
        report: the report.
        images: image pairs to show; their order within the target prompts and within the kept prompts is preserved.
    """
    title = f"What is left of {', '.join(report.concept)}"
    targets = [pair for pair in images if pair[1]]
    kept = [pair for pair in images if not pair[1]]
    kinds = gate_kinds(report.active_patches())
    provenance = {"erasure": __version__, **report.provenance}
    parts = [
        page_head(title, report.summary(), charts.STYLE),
        f'<p class="soft">{escape(report.description())}.</p>',
        f'<div class="wide">{table(report)}</div>',
        faults(report),
        *(f'<p class="soft">{escape(note)}.</p>' for note in report.notes),
        *(f'<p class="soft">Missing: {escape(text)}.</p>' for text in report.missing),
        detections(report),
        "<h2>Target prompts: base and patched, same seed</h2>"
        '<p class="soft">The least erased first. Look at the images: the judge may miss what a person sees.</p>'
        + gallery(targets, kinds, report.seen)
        if targets
        else "",
        drawn_labels(report),
        "<h2>Kept prompts: base and patched, same seed</h2>" + gallery(kept, kinds, report.seen) if kept else "",
        gate_log(report.gates),
        costs(report),
        tradeoff(report),
        "<h2>Interference: effect of the erasure on other concepts</h2>" + INTERFERENCE + interference(report),
        *(
            f"<h2>Accuracy for each {escape(head)}</h2>"
            f'<p class="soft">Upper bar: the base; lower bar: the patched model. Numbers: correct images of all images '
            f"of the {escape(head)}.</p>{bars(report, head)}"
            for head in report.accuracies["patched"]
        ),
        f"<h2>Settings and versions</h2><pre>{escape(json.dumps(provenance, indent=1))}</pre></html>",
    ]
    return "\n".join(part for part in parts if part)


def page_head(title: str, summary: str, style: str = "") -> str:
    """Return the beginning of a page: its head with the style, its title, and its first sentence.

    Args:
        title: title of the page.
        summary: the first sentence, without a full stop.
        style: CSS to add to the common style.
    """
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><h1>{escape(title)}</h1><p>{escape(summary)}.</p>"
    )


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
        faults(report),
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


def table(report: Report) -> str:
    """Return the table of all metrics of the base and the patched pipeline, with the paired tests."""
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
            f"kept prompts, {escape(head)}<small>correct" if head != "target" else "target prompts<small>target absent"
        )
        rows.append(
            f"<tr><td>{name} only with the base / only with the patch; McNemar's exact test</small>"
            f"<td>{pair['only_base']:.0f}<td>{pair['only_patched']:.0f}<small>p = {pair['p']:.3g}</small><td></tr>"
        )
    return f'<table class="figures">{"".join(rows)}</table>'


def faults(report: Report | AttackReport) -> str:
    """Return a sentence on the images that could not be judged, or nothing if there are none."""
    if not report.faults:
        return ""
    return (
        f'<p class="soft">{len(report.faults)} images could not be judged and count as failures of the erasure. The '
        f"first: {escape(report.faults[0])}</p>"
    )


def detections(report: Report) -> str:
    """Return tables of how many images show each part, or nothing if no judge is a detector."""
    tables = []
    for title, counts in detection_tables(report.counts).items():
        rows = "".join(f"<tr><td>{escape(row.label)}<td>{row.base}<td>{row.patched}</tr>" for row in counts)
        tables.append(
            f'<p class="soft">{escape(title)}{"" if counts else ": none"}.</p>'
            + (f'<div class="wide"><table><tr><th>part<th>base<th>patched</tr>{rows}</table></div>' if counts else "")
        )
    return "<h2>Detections: images that show each part</h2>" + "".join(tables) if tables else ""


def gallery(images: list[ImagePair], gated: Mapping[str, str], seen: Mapping[str, Mapping[str, str]]) -> str:
    """Return image pairs with their prompts, the judge's labels, and the strengths of gated patches.

    Args:
        images: the pairs.
        gated: names of the patches with gates.
        seen: "base" and "patched" -> record id -> the judge's label.
    """
    figures = []
    for record, hit, before, after in images:
        pair = "".join(
            picture(image, f"{name}: {record.prompt}") for name, image in (("base", before), ("patched", after))
        )
        kind = ' class="target"' if hit else ""
        strengths = [record.gates[name] for name in gated if name in record.gates]
        note = f"<small>gate: {', '.join(f'{strength:.2f}' for strength in strengths)}</small>" if strengths else ""
        labels = [escape(tops[record.id]) for tops in seen.values() if record.id in tops]
        note = (f"<small>judge: {' → '.join(labels)}</small>" if labels else "") + note
        caption = f"<figcaption>{escape(record.prompt)}{note}</figcaption>"
        figures.append(f"<figure{kind}><div>{pair}</div>{caption}</figure>")
    return f'<div class="grid">{"".join(figures)}</div>'


def gate_log(gates: Sequence[GateActivity], first: str = "patch") -> str:
    """Return a table of how strongly each gated patch acted, or nothing if no patch has a gate.

    Args:
        gates: the activity of gated patches in one run, or in several runs under different names.
        first: heading of the first column.
    """
    if not gates:
        return ""
    rows: dict[tuple[str, str], dict[str, GateActivity]] = {}
    for activity in gates:
        rows.setdefault((activity.patch, activity.gate), {})[activity.prompts] = activity
    lines = [f"<tr><th>{first}<th>acts: target<th>strength<th>acts: kept<th>strength</tr>"]
    for (name, kind), activities in rows.items():
        cells = [f"<td>{escape(name)}<small>{escape(kind)} gate</small>"]
        for prompts in ("target", "kept"):
            if prompts not in activities:
                cells.append("<td><td>")
                continue
            log = activities[prompts]
            strength = f"{log.mean:.2f}<small>{log.least:.2f} to {log.most:.2f}</small>"
            cells.append(f"<td>{log.acts} of {log.n}<td>{strength}")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<h2>Gate log</h2><div class="wide"><table class="figures">{"".join(lines)}</table></div>'
        '<p class="soft">Number of prompts on which the patch acted, its mean strength, and the range. The file '
        "patched/records.jsonl of the run contains the strength for each prompt.</p>"
    )


def costs(report: Report) -> str:
    """Return a table of what the active patches cost to train, or nothing if their headers do not contain it."""
    lines = []
    for name, patch in report.active_patches().items():
        spent, size = patch.get("costs") or {}, patch.get("bytes")
        cells = [f"{spent[key]:,.0f}" if key in spent else "" for key in ("F", "B", "seconds")]
        cells.append(f"{size / 1000:,.0f}" if size else "")
        if any(cells):
            lines.append(f"<tr><td>{escape(name)}" + "".join(f"<td>{cell}" for cell in cells) + "</tr>")
    if not lines:
        return ""
    return (
        '<h2>Cost of the erasure</h2><div class="wide"><table class="figures"><tr><th>patch<th>F<th>B<th>seconds<th>KB'
        f'</tr>{"".join(lines)}</table></div><p class="soft">F, B: samples forward and backward through the UNet; KB: '
        "size of the patch file.</p>"
    )


def tradeoff(report: Report) -> str:
    """Return a plot of UA against IRA for the base and the patched pipeline, or nothing if one was not measured."""
    names = {str(patch.get("method", "patched")) for patch in report.active_patches().values()} or {"patched"}
    points = []
    for row, look, name in (("patched", 0, " + ".join(sorted(names))), ("base", -1, "base")):
        kept, erased = report.metric("IRA", row), report.metric("UA", row)
        if kept is None or erased is None:
            return ""
        points.append(
            charts.Point(name, (kept.value, kept.low, kept.high), (erased.value, erased.low, erased.high), look)
        )
    plot = charts.plot(points, "kept (IRA)", "erased (UA)", "erased against kept")
    return f'<h2>Erased against kept</h2><div class="plots"><div>{plot}</div></div>'


INTERFERENCE = (
    '<p class="soft">Rows: the erased concept. Columns: what the prompts ask for. Cells: change of the share of '
    "correct images from the base in percentage points, red for a loss and blue for a gain; below it, the number of "
    "images (with one image, the change is 0 or 100). Framed: what the row is meant to erase. Blank: no prompt asks "
    "for it.</p>"
)


def interference(report: Report) -> str:
    """Return the interference matrix with a single row: the change of every label's accuracy by this erasure."""
    columns = {head: list(labels) for head, labels in report.accuracies["patched"].items() if labels}
    cells = {
        f"{head}/{label}": charts.Change(report.accuracies["base"][head].get(label, (0, 0)), after)
        for head, labels in report.accuracies["patched"].items()
        for label, after in labels.items()
    }
    name = ", ".join(report.concept)
    return charts.matrix({name: cells}, columns, {name: [f"{report.domain}/{label}" for label in report.concept]})


def picture(image: Image.Image | None, text: str) -> str:
    """Return an image that is embedded in the page, or the word "missing" if there is none.

    Args:
        image: the image, or None.
        text: alternative text.
    """
    if image is None:
        return '<span class="none">missing</span>'
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def drawn_labels(report: Report) -> str:
    """Return two bars for each label of target images, with the base's share above that of the patched pipeline."""
    base, patched = report.drawn.get("base", {}), report.drawn.get("patched", {})
    base_n, n = sum(base.values()), sum(patched.values())
    if not n or not base_n:
        return ""
    rows = [
        _bar_row(label, label in report.concept, (base.get(label, 0), base_n), (patched.get(label, 0), n))
        for label in dict.fromkeys([*patched, *base])
    ]
    return (
        "<h2>What target prompts show instead</h2>"
        '<p class="soft">The judge\'s labels for target images. Upper bar: the base; lower bar: the patched model. '
        f'"none": none of the judge\'s other labels.</p><div class="bars">{"".join(rows)}</div>'
    )


def bars(report: Report, head: str) -> str:
    """Return two bars for each label, with the accuracy of the base above that of the patched pipeline.

    Args:
        report: the report.
        head: head of the judge.
    """
    rows = [
        _bar_row(
            label,
            head == report.domain and label in report.concept,
            report.accuracies["base"][head].get(label, (0, 1)),
            after,
        )
        for label, after in report.accuracies["patched"][head].items()
    ]
    return f'<div class="bars">{"".join(rows)}</div>'


def _bar_row(label: str, is_target: bool, before: tuple[int, int], after: tuple[int, int]) -> str:
    """Return the two bars of one label, for counts out of all images before and after erasing."""
    (base_count, base_n), (count, n) = before, after
    return (
        f'<div class="{"row target" if is_target else "row"}"><span>{escape(label)}</span><span class="track">'
        f'<i class="was" style="width:{100 * base_count / base_n:.0f}%"></i>'
        f'<i class="now" style="width:{100 * count / n:.0f}%"></i></span>'
        f'<span class="soft">{base_count}/{base_n} → {count}/{n}</span></div>'
    )
