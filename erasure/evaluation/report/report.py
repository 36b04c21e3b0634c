"""The report: numbers as JSON, the before/after grid as PNG, and both in one HTML page."""

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
    """What a run measured, the base row beside the patched one.

    Args:
        concept: the labels that should be gone.
        domain: the head that judges them.
        rows: "base" and "patched" -> metrics.
        accuracies: "base" and "patched" -> head -> label -> (right, n).
        paired: head -> images that only the base, only the patched pipeline drew right, and McNemar's p-value,
            over the kept prompts; "target": that only one of them drew without the target, over the target's.
        provenance: settings, versions, hashes, patches.
        faults: images that could not be judged, and why.
        missing: what was asked for and could not be measured, and why.
        notes: what to know of these figures, in sentences.
        seen: "base" and "patched" -> id of a picture on the page -> what the judge sees there.
        counts: pictures with each part that a detector names.
        gates: how strongly gated patches acted.
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

    def metric(self, name: str, row: str = "patched") -> Metric | None:
        """A metric by name, None where it was not measured."""
        return next((metric for metric in self.rows[row] if metric.name == name), None)

    def metrics(self) -> list[dict[str, Any]]:
        """Every metric with the base's value beside it."""
        return [
            {**m.to_json(), "base": None if (b := self.metric(m.name, "base")) is None else b.value}
            for m in self.rows["patched"]
        ]

    def summary(self) -> str:
        """One sentence: what is gone, never without what is kept."""
        gone, without = self.metric("UA"), self.metric("UA", "base")
        kept, base = self.metric("IRA"), self.metric("IRA", "base")
        text = f"{', '.join(self.concept)}: "
        text += "no target prompt" if gone is None else f"not seen in {gone.value:.0%} of {gone.n} target images"
        text += "" if without is None else f" (base {without.value:.0%})"
        if kept is not None and base is not None:
            text += f"; other {self.domain}s drawn right in {kept.value:.0%} of {kept.n} images (base {base.value:.0%})"
        return text

    def about(self) -> str:
        """One sentence: which patches, asked what, drawn how, judged by whom."""
        made = self.provenance
        acting = [
            f"{name} ({', '.join([str(patch['method'])] * ('method' in patch) + [f'strength {strength:g}'])})"
            for (name, patch), strength in zip(self.acting().items(), made.get("patches", {}).values(), strict=True)
        ]
        found = [f"patches: {', '.join(acting)}" if acting else "no patch acts: both columns are the base's"]
        prompts = made.get("prompts", {})
        found += [f"prompts: {prompts['name']}" + (f", {prompts['used']} drawn" if "used" in prompts else "")]
        found += [f"judge: {made['judge']['name']}"] if "judge" in made else []
        found += [f"{made['steps']} steps, guidance {made['guidance']:g}"] if "steps" in made else []
        return "; ".join(found)

    def text(self) -> str:
        """The table as plain text."""
        wide = max((len(metric.name) + 2 for metric in self.rows["patched"]), default=0)
        lines = [self.summary(), f"{'':{wide}}{'base':>10}{'patched':>10}{'95 % interval':>20}{'n':>6}"]
        for metric in self.rows["patched"]:
            base = self.metric(metric.name, "base")
            interval = interval_text(metric)
            before = "" if base is None else value_text(base, base.value)
            name = f"{metric.name} {ARROWS[metric.higher_is_better]}"
            lines.append(f"{name:{wide}}{before:>10}{value_text(metric, metric.value):>10}{interval:>20}{metric.n:>6}")
        kid = self.metric("KID")
        lines += [f"KID: {kid.meaning}"] if kid is not None else []
        if self.faults:
            lines.append(f"{len(self.faults)} images count as failures: {self.faults[0]}")
        for title, rows in detection_tables(self.counts).items():
            lines += ["", f"{title:56}{'base':>8}{'patched':>10}" if rows else f"{title}: none"]
            lines += [f"{one.label:56}{one.base:>8}{one.patched:>10}" for one in rows]
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"missing: {text}" for text in self.missing]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, schema 1: `report.schema.json` beside this file."""
        return {
            "schema": SCHEMA,
            "erasure": __version__,
            "concept": list(self.concept),
            "domain": self.domain,
            "rows": {row: [metric.to_json() for metric in metrics] for row, metrics in self.rows.items()},
            "accuracies": self.accuracies,
            "paired": self.paired,
            "provenance": self.provenance,
            "faults": self.faults,
            "missing": self.missing,
            "counts": [one.to_json() for one in self.counts],
            "notes": self.notes,
            "gates": [one.to_json() for one in self.gates],
        }

    def acting(self) -> dict[str, dict[str, Any]]:
        """Name -> what is known of each patch that acted: strength, method, gate and more."""
        loaded = self.provenance.get("loaded", {})
        return {name: loaded.get(name, {}) for name in self.provenance.get("patches", {})}

    def to_eval_unlearn(self, timestamp: float) -> dict[str, Any]:
        """The report in the form of eval-unlearn 1.1 (a run of several metrics), shares in [0, 1].

        Args:
            timestamp: seconds since 1970; enters the run's id, as there.
        """
        methods = [str(patch["method"]) for patch in self.acting().values() if "method" in patch]
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
