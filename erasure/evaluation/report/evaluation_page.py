"""The page of an evaluation: the figures, the images of both runs, and what the erasure did to other concepts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

from erasure.evaluation.metrics.detections import detection_tables
from erasure.evaluation.metrics.gate_activity import gate_kinds
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.report import charts
from erasure.evaluation.report.figures import ARROWS, ImagePair, interval_text, value_text
from erasure.evaluation.report.html import INTERFERENCE, faults, gate_log, page_head, picture
from erasure.evaluation.report.report import Report
from erasure.version import __version__


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
        faults(report.faults),
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
