"""The page of an evaluation: the verdict, images of both runs, the figures, and what happened to other concepts.

The first screen answers three questions: is the target gone, is the rest kept, and are the images still good? What
only some readers need (further metrics, figures from few images, settings) is folded away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from erasure.evaluation.metrics.detections import detection_tables
from erasure.evaluation.metrics.gate_activity import gate_kinds
from erasure.evaluation.metrics.metric import Metric, format_interval, format_value
from erasure.evaluation.report import charts
from erasure.evaluation.report.figures import ARROWS, ImagePair, interval_text, value_text
from erasure.evaluation.report.html import (
    FEW,
    PairedTest,
    Shot,
    Tile,
    faults,
    folded,
    gate_log,
    looks,
    page_head,
    paired_table,
    picture,
    strips,
    tiles,
)
from erasure.evaluation.report.name_tables import name_tables
from erasure.evaluation.report.report import Report
from erasure.version import __version__

STRIP = 4  # image pairs of the target, and of other prompts, in the strip
MAIN = ("UA", "quality", "anchor", "leak", "IRA", "CRA", "neighbours", "H")  # metrics that are not folded away


def page(report: Report, images: list[ImagePair]) -> str:
    """Return the page of an evaluation.

    Args:
        report: the report.
        images: image pairs to show; their order within the target prompts and within the kept prompts is preserved.
    """
    targets = [pair for pair in images if pair[1]]
    kept = [pair for pair in images if not pair[1]]
    kinds = gate_kinds(report.active_patches())
    provenance = {"erasure": __version__, **report.provenance}
    tests = paired_tests(report)
    painted = looks(tests)
    main, further = split_metrics(report.rows["patched"])
    concept = ", ".join(report.concept)
    parts = [
        page_head(f"What is left of {concept}"),
        tiles(verdict(report, painted)),
        strips(
            {
                f"Prompts for {concept}, the least erased": [_shot(pair, report.seen) for pair in targets[:STRIP]],
                "Other prompts": [_shot(pair, report.seen) for pair in kept[:STRIP]],
            },
            four=True,
        ),
        f"<p>{escape(report.summary())}.</p>",
        f'<p class="soft">{escape(report.description())}.</p>',
        table(report, main, painted),
        folded(f"Further metrics, and those of fewer than {FEW} images", table(report, further, painted)),
        faults(report.faults),
        *(f'<p class="soft">{escape(note)}.</p>' for note in report.notes),
        *(f'<p class="soft">Missing: {escape(text)}.</p>' for text in report.missing),
        "<h2>Base against patch on the same seeds</h2>" + paired_table(tests, "base", "patch", "result")
        if tests
        else "",
        name_tables(report),
        drawn_labels(report),
        "<h2>Target prompts: base and patched, same seed</h2>"
        '<p class="soft">The least erased first. Look at the images: the judge may miss what a person sees.</p>'
        + gallery(targets, kinds, report.seen)
        if targets
        else "",
        "<h2>Kept prompts: base and patched, same seed</h2>" + gallery(kept, kinds, report.seen) if kept else "",
        detections(report),
        interference(report),
        tradeoff(report),
        folded("Gate log", gate_log(report.gates)),
        costs(report),
        folded("Settings and versions", f"<pre>{escape(json.dumps(provenance, indent=1))}</pre>"),
        "</html>",
    ]
    return "\n".join(part for part in parts if part)


def paired_tests(report: Report) -> list[PairedTest]:
    """Return the tests of the base against the patch over all images: gone, still good, and kept for each head."""
    names = {
        "target": f"{', '.join(report.concept)} gone",
        "quality": "target image still good",
        report.domain: f"{report.domain} kept",
        **{head: f"{head} kept" for head in report.accuracies["patched"]},
        "quality_kept": "kept image still good",
    }
    return [PairedTest.of(key, name, report.paired[key]) for key, name in names.items() if key in report.paired]


def verdict(report: Report, painted: Mapping[str, str]) -> list[Tile]:
    """Return the three tiles of the verdict: is the target gone, is the rest kept, are the images still good?

    Args:
        report: the report.
        painted: key of a paired test -> how its figure is painted, as `looks` returns it.
    """
    concept = ", ".join(report.concept)
    kept = "IRA" if report.metric("IRA") is not None else "CRA"
    other = next((head for head in report.accuracies["patched"] if head != report.domain), "")
    head = report.domain if kept == "IRA" else other
    counted = f"images of other {head}s recognised" if kept == "IRA" else f"kept images with the right {head}"
    good = "target images that are well formed"
    return [
        _tile(report, "Gone", "UA", f"target images without {concept}", painted.get("target", "")),
        _tile(report, "Kept", kept, counted, painted.get(head, "")),
        _tile(report, "Picture still good", "quality", good, painted.get("quality", "")),
    ]


def _tile(report: Report, title: str, name: str, counted: str, look: str) -> Tile:
    metric, base = report.metric(name), report.metric(name, "base")
    if metric is None:
        return Tile(title, "", ["not measured"])
    interval = f"95 %: {format_interval(name, metric.low, metric.high, '–')}"
    before = "base not measured" if base is None else f"base {format_value(name, base.value)}"
    return Tile(title, format_value(name, metric.value), [interval, before, f"{counted} ({metric.n})"], look)


def split_metrics(metrics: Sequence[Metric]) -> tuple[list[Metric], list[Metric]]:
    """Split metrics into those that the table shows first, in the order of MAIN, and those that are folded away."""
    main = [metric for metric in metrics if metric.name in MAIN and metric.n >= FEW]
    main.sort(key=lambda metric: MAIN.index(metric.name))
    return main, [metric for metric in metrics if metric not in main]


def table(report: Report, metrics: Sequence[Metric], painted: Mapping[str, str]) -> str:
    """Return a table of metrics of the base and the patched pipeline, or nothing without metrics.

    Args:
        report: the report.
        metrics: metrics of the patched pipeline.
        painted: key of a paired test -> how its figure is painted, as `looks` returns it.
    """
    if not metrics:
        return ""
    tested = {"UA": "target", "quality": "quality", "IRA": report.domain, "quality_kept": "quality_kept"}
    rows = ["<tr><th>metric<th>base<th>patched<small>95 % interval</small><th>n</tr>"]
    for metric in metrics:
        base = report.metric(metric.name, "base")
        look = painted.get(tested.get(metric.name, ""), "")
        kind = f' class="{look}"' if look else ""
        rows.append(
            f"<tr><td>{escape(metric.name)} {ARROWS[metric.higher_is_better]}<small>{escape(metric.meaning)}</small>"
            f"<td>{'' if base is None else value_text(base, base.value)}"
            f"<td><b{kind}>{value_text(metric, metric.value)}</b><small>{interval_text(metric)}</small>"
            f"<td>{metric.n}</tr>"
        )
    return f'<table class="figures">{"".join(rows)}</table>'


def detections(report: Report) -> str:
    """Return tables of how many images show each part, or nothing if no judge is a detector."""
    tables = []
    for title, counts in detection_tables(report.counts).items():
        rows = "".join(f"<tr><td>{escape(row.label)}<td>{row.base}<td>{row.patched}</tr>" for row in counts)
        tables.append(
            f'<p class="soft">{escape(title)}{"" if counts else ": none"}.</p>'
            + (f"<table><tr><th>part<th>base<th>patched</tr>{rows}</table>" if counts else "")
        )
    return "<h2>Detections: images that show each part</h2>" + "".join(tables) if tables else ""


def _shot(pair: ImagePair, seen: Mapping[str, Mapping[str, str]]) -> Shot:
    record, _, before, after = pair
    label = seen.get("patched", {}).get(record.id)
    return Shot({"base": before, "patched": after}, record.prompt, f"seen: {label}" if label else "")


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
        '<h2>Cost of the erasure</h2><table class="figures"><tr><th>patch<th>F<th>B<th>seconds<th>KB'
        f'</tr>{"".join(lines)}</table><p class="soft">F, B: samples forward and backward through the UNet; KB: '
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
    anchor = report.metric("anchor")
    expected = "" if anchor is None else f" Also, {anchor.meaning}: {format_value('', anchor.value)} of {anchor.n}."
    return (
        "<h2>What target prompts show instead</h2>"
        '<p class="soft">The judge\'s labels for target images. Upper bar: the base; lower bar: the patched model. '
        f'"none": none of the judge\'s other labels.{escape(expected)}</p><div class="bars">{"".join(rows)}</div>'
    )


def label_changes(report: Report, head: str) -> dict[str, charts.Change]:
    """Return label -> correct images before and after; only labels with FEW images or more have a p-value."""
    pairs = report.paired_labels.get(head, {})
    return {
        label: charts.Change(
            report.accuracies["base"][head].get(label, (0, 1)),
            after,
            pairs[label]["p"] if label in pairs and after[1] >= FEW else None,
        )
        for label, after in report.accuracies["patched"][head].items()
    }


def interference(report: Report) -> str:
    """Return the accuracy for each label of every head, or nothing if no prompt has a label."""
    heads = "".join(bars(report, head) for head in report.accuracies["patched"])
    if not heads:
        return ""
    return (
        "<h2>Interference: correct images for each label</h2>"
        '<p class="soft">Upper bar: the base; lower bar: the patched model. Numbers: correct images of all images of '
        "the label, in colour only where the change is significant (McNemar's exact test over the same seeds, Holm's "
        f"correction for the labels with at least {FEW} images).</p>{heads}"
    )


def bars(report: Report, head: str) -> str:
    """Return two bars for each label, with the accuracy of the base above that of the patched pipeline.

    Labels with fewer than FEW images are folded away.

    Args:
        report: the report.
        head: head of the judge.
    """
    changes = label_changes(report, head)
    painted = charts.significant(changes)
    rows: dict[bool, list[str]] = {True: [], False: []}
    for label, change in changes.items():
        is_target = head == report.domain and label in report.concept
        rose = (change.points or 0) > 0
        look = ("better" if rose != is_target else "worse") if label in painted else ""  # the target should fall
        rows[change.after[1] >= FEW].append(_bar_row(label, is_target, change.before, change.after, look))
    many, few = (f'<div class="bars">{"".join(rows[key])}</div>' if rows[key] else "" for key in (True, False))
    return many + folded(f"{head}: {len(rows[False])} labels with fewer than {FEW} images", few)


def _bar_row(label: str, is_target: bool, before: tuple[int, int], after: tuple[int, int], look: str = "") -> str:
    """Return the two bars of one label, for counts out of all images before and after erasing."""
    (base_count, base_n), (count, n) = before, after
    return (
        f'<div class="{"row target" if is_target else "row"}"><span>{escape(label)}</span><span class="track">'
        f'<i class="was" style="width:{100 * base_count / base_n:.0f}%"></i>'
        f'<i class="now" style="width:{100 * count / n:.0f}%"></i></span>'
        f'<span class="{look or "soft"}">{base_count}/{base_n} → {count}/{n}</span></div>'
    )
