"""Pages for what was measured: a summary, tables, then notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from erasure.cli.output import table

if TYPE_CHECKING:
    from erasure.evaluation.attacks.report import AttackReport
    from erasure.evaluation.report.report import Report
    from erasure.evaluation.suite import SuiteResult

MOST_NAMES = 20  # rows of names on a page of the command; the report has all


def evaluation(report: Report) -> list[Any]:
    """Lay out an evaluation: every metric of the base and of the patched model, counts of a detector, notes."""
    from erasure.evaluation.metrics.detections import detection_tables
    from erasure.evaluation.report.figures import ARROWS, interval_text, value_text
    from erasure.evaluation.report.name_tables import erased_rows, kept_rows

    rows = []
    for metric in report.rows["patched"]:
        base = report.metric(metric.name, "base")
        before = "" if base is None else value_text(base, base.value)
        name = f"{metric.name} {ARROWS[metric.higher_is_better]}"
        rows.append((name, before, value_text(metric, metric.value), interval_text(metric), metric.n))
    heads = ("metric", "base", "patched", "95 % interval", "n")
    blocks = [report.summary(), "", table(heads, rows, right=heads[1:])]
    kid = report.metric("KID")
    if kid is not None:
        blocks.append(f"KID: {kid.meaning}")
    if len(report.concept) > 1:
        parts = (("name, the least erased first", erased_rows), (f"kept {report.domain}, the most damaged", kept_rows))
        for title, rows_of in parts:
            shown = [
                (row.label, f"{row.before}/{row.n}", f"{row.after}/{row.n}") for row in rows_of(report)[:MOST_NAMES]
            ]
            blocks += ["", table((title, "base", "patched"), shown, ("base", "patched"))] if shown else []
    for title, labels in detection_tables(report.counts).items():
        counts = [(row.label, row.base, row.patched) for row in labels]
        blocks += ["", table((title, "base", "patched"), counts, ("base", "patched")) if counts else f"{title}: none"]
    notes = [f"{len(report.faults)} images count as failures: {report.faults[0]}"] if report.faults else []
    notes += [f"note: {text}" for text in report.notes] + [f"missing: {text}" for text in report.missing]
    return blocks + ([""] if notes else []) + notes


def attacks(report: AttackReport) -> list[Any]:
    """Lay out attacks: how often each of them recovers the concept, next to its control."""
    heads, *rows = report.rows()
    notes = [f"note: {text}" for text in report.caveats()]
    if report.faults:
        notes.append(
            f"{len(report.faults)} images could not be judged and count as showing the concept: {report.faults[0]}"
        )
    return [report.summary(), "", table(heads, rows), *([""] if notes else []), *notes]


def suite(outcome: SuiteResult) -> list[Any]:
    """Lay out what a suite measured, and what it could not."""
    blocks: list[Any] = [f"suite {outcome.suite.name}: {outcome.suite.about} ({outcome.suite.source})"]
    blocks += ["", *evaluation(outcome.report)] if outcome.report is not None else []
    blocks += ["", *attacks(outcome.attacks)] if outcome.attacks is not None else []
    if outcome.suite.differs:
        blocks.append(f"differs from the published protocol: {outcome.suite.differs}")
    return blocks + [f"missing: {text}" for text in outcome.missing]
