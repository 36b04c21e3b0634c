"""The report of an evaluation as plain data, and its texts: the summary, the table, the JSON forms."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from erasure.evaluation.metrics.detections import DetectionCount, detection_tables
from erasure.evaluation.metrics.gate_activity import GateActivity
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.report.figures import ARROWS, interval_text, value_text
from erasure.version import __version__

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """The results of an evaluation, for the base and the patched pipeline.

    Args:
        concept: the labels that should be erased.
        domain: head of the judge that the labels belong to.
        rows: "base" and "patched" -> metrics.
        accuracies: "base" and "patched" -> head -> label -> (correct images, images).
        paired: head -> kept images that only the base and that only the patched pipeline drew correctly, with the
            p-value of McNemar's test; "target" -> the same for target images without the target; "quality" and
            "quality_kept" -> the same for well-formed target and kept images, if the judge measures quality.
        provenance: settings, versions, hashes and patches.
        faults: images that could not be judged, and why.
        missing: what was requested but could not be measured, and why.
        notes: what readers need to interpret the results, one sentence each.
        seen: "base" and "patched" -> id of an image on the page -> the judge's label.
        counts: images that show each part, if the judge is a detector.
        gates: how strongly gated patches acted.
        drawn: "base" and "patched" -> label -> target images with that label (`drawn_instead`).
        paired_labels: head -> label -> as `paired`, for the prompts that ask for the label.
        outcomes: "base" and "patched" -> name of a share -> id of an image -> whether it counts.
    """

    concept: tuple[str, ...]
    domain: str
    rows: dict[str, list[Metric]]
    accuracies: dict[str, dict[str, dict[str, tuple[int, int]]]]
    paired: dict[str, dict[str, float]]
    provenance: dict[str, Any]
    faults: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    counts: list[DetectionCount] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gates: list[GateActivity] = field(default_factory=list)
    seen: dict[str, dict[str, str]] = field(default_factory=dict)
    drawn: dict[str, dict[str, int]] = field(default_factory=dict)
    paired_labels: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    outcomes: dict[str, dict[str, dict[str, bool]]] = field(default_factory=dict)

    def metric(self, name: str, row: str = "patched") -> Metric | None:
        """Return a metric by its name, or None if it was not measured.

        Args:
            name: name of the metric.
            row: "base" or "patched".
        """
        return next((metric for metric in self.rows[row] if metric.name == name), None)

    def metrics(self) -> list[dict[str, Any]]:
        """Return every metric of the patched pipeline as plain data, with the base's value under `base`."""
        return [
            {**m.to_json(), "base": None if (b := self.metric(m.name, "base")) is None else b.value}
            for m in self.rows["patched"]
        ]

    def summary(self) -> str:
        """Return one sentence on what was erased and what was kept."""
        erased, base_erased = self.metric("UA"), self.metric("UA", "base")
        kept, base_kept = self.metric("IRA"), self.metric("IRA", "base")
        text = f"{', '.join(self.concept)}: "
        text += "no target prompts" if erased is None else f"absent from {erased.value:.0%} of {erased.n} target images"
        text += "" if base_erased is None else f" (base {base_erased.value:.0%})"
        good, base_good = self.metric("quality"), self.metric("quality", "base")
        if good is not None and base_good is not None:
            text += f"; {good.value:.0%} of these are well formed (base {base_good.value:.0%})"
        if kept is not None and base_kept is not None:
            text += f"; other {self.domain}s recognised in {kept.value:.0%} of {kept.n} images"
            text += f" (base {base_kept.value:.0%})"
        return text

    def description(self) -> str:
        """Return one sentence on how the results came about: patches, prompts, judge and sampling."""
        run = self.provenance
        strengths = run.get("patches", {}).values()
        patches = [
            f"{name} ({patch['method'] + ', ' if 'method' in patch else ''}strength {strength:g})"
            for (name, patch), strength in zip(self.active_patches().items(), strengths, strict=True)
        ]
        parts = [f"patches: {', '.join(patches)}" if patches else "no patch is active, so both columns show the base"]
        prompts = run.get("prompts", {})
        parts += [f"prompts: {prompts['name']}" + (f", {prompts['used']} drawn" if "used" in prompts else "")]
        parts += [f"judge: {run['judge']['name']}"] if "judge" in run else []
        parts += [f"{run['steps']} steps, guidance {run['guidance']:g}"] if "steps" in run else []
        return "; ".join(parts)

    def text(self) -> str:
        """Return the summary, the table of metrics and all notes as plain text."""
        width = max((len(metric.name) + 2 for metric in self.rows["patched"]), default=0)
        lines = [self.summary(), f"{'':{width}}{'base':>10}{'patched':>10}{'95 % interval':>20}{'n':>6}"]
        for metric in self.rows["patched"]:
            base = self.metric(metric.name, "base")
            interval = interval_text(metric)
            before = "" if base is None else value_text(base, base.value)
            name = f"{metric.name} {ARROWS[metric.higher_is_better]}"
            lines.append(f"{name:{width}}{before:>10}{value_text(metric, metric.value):>10}{interval:>20}{metric.n:>6}")
        kid = self.metric("KID")
        lines += [f"KID: {kid.meaning}"] if kid is not None else []
        if self.faults:
            lines.append(f"{len(self.faults)} images count as failures: {self.faults[0]}")
        for title, rows in detection_tables(self.counts).items():
            lines += ["", f"{title:56}{'base':>8}{'patched':>10}" if rows else f"{title}: none"]
            lines += [f"{count.label:56}{count.base:>8}{count.patched:>10}" for count in rows]
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"missing: {text}" for text in self.missing]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, in the form of report.schema.json (schema 1) in this folder."""
        return {
            "schema": SCHEMA,
            "erasure": __version__,
            "concept": list(self.concept),
            "domain": self.domain,
            "rows": {row: [metric.to_json() for metric in metrics] for row, metrics in self.rows.items()},
            "accuracies": self.accuracies,
            "paired": self.paired,
            "paired_labels": self.paired_labels,
            "provenance": self.provenance,
            "faults": self.faults,
            "missing": self.missing,
            "counts": [count.to_json() for count in self.counts],
            "notes": self.notes,
            "gates": [activity.to_json() for activity in self.gates],
            "drawn": self.drawn,
            "outcomes": self.outcomes,
        }

    def active_patches(self) -> dict[str, dict[str, Any]]:
        """Return name -> description (strength, method, gate and more) of every patch whose strength was not 0."""
        loaded = self.provenance.get("loaded", {})
        return {name: loaded.get(name, {}) for name in self.provenance.get("patches", {})}

    def to_eval_unlearn(self, timestamp: float) -> dict[str, Any]:
        """Return the report in the form of eval-unlearn 1.1 (a run of several metrics), with shares in [0, 1].

        Args:
            timestamp: time of the run in seconds since 1970, which is part of the run's id as in eval-unlearn.
        """
        methods = [str(patch["method"]) for patch in self.active_patches().values() if "method" in patch]
        results = {
            metric["name"]: {
                "name": metric["name"],
                "value": metric["value"],
                "details": {key: value for key, value in metric.items() if key not in ("name", "value")},
            }
            for metric in self.metrics()
        }
        text = json.dumps({**self.to_json(), "timestamp": timestamp}, sort_keys=True)
        return {
            "run_id": hashlib.sha256(text.encode()).hexdigest()[:8],
            "timestamp": timestamp,
            "technique_name": "+".join(dict.fromkeys(methods)) or "none",
            "erase_concept": ", ".join(self.concept),
            "metric_names": list(results),
            "metric_results": results,
        }
