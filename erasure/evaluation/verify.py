"""Verify a patch: measure it, attack it, and write the results into a copy of the patch and into a model card."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError
from erasure.evaluation.attacks.case_count import check_case_count
from erasure.evaluation.metrics.metric import format_value
from erasure.evaluation.report.card import CAVEAT, SCHEMA, card, estimate_text, table
from erasure.evaluation.report.name_tables import erased_rows
from erasure.evaluation.text_files import write_text

if TYPE_CHECKING:
    from erasure.evaluation.attacks.report import AttackReport
    from erasure.evaluation.judges.judge import Judge
    from erasure.evaluation.report.html import Shot
    from erasure.evaluation.report.report import Report
    from erasure.patch import Patch
    from erasure.prompts.prompt_set import PromptSet

# One attack each for attackers who write prompts, who supply embeddings, and who have the weights.
ATTACKS = ("unlearndiffatk", "inversion", "rece")
TOLERANCE = 1e-6  # for comparisons with intervals that have no width


@dataclass(frozen=True)
class Verification:
    """The results of a verification, with those of an earlier verification of the same file.

    Args:
        patch: path of the copy, which has the results in its header.
        card: path of the model card.
        results: the results, as in the header of the copy.
        earlier: the results in the header of the original file, or None.
        before: name of a metric -> the base's value with its interval and number of images.
        shots: heading -> columns of images, as on the page.
    """

    patch: Path
    card: Path
    results: dict[str, Any]
    earlier: dict[str, Any] | None
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    shots: Mapping[str, Sequence[Shot]] = field(default_factory=dict, repr=False)

    def changed(self) -> list[str]:
        """List, as sentences, the figures whose earlier value is outside the new interval."""
        changes = []
        for group in ("metrics", "attacks"):
            for name, cell in self.results[group].items():
                old = ((self.earlier or {}).get(group) or {}).get(name)
                value = old.get("value") if isinstance(old, dict) else None
                low, high = cell["low"] - TOLERANCE, cell["high"] + TOLERANCE
                if isinstance(value, int | float) and not low <= value <= high:
                    changes.append(f"{name}: {format_value(name, value)} before, {estimate_text(name, cell)} now")
        return changes

    def unchecked(self) -> list[str]:
        """List the figures of the earlier verification that were not measured again; the copy does not contain them."""
        return [
            name
            for group in ("metrics", "attacks")
            for name in (self.earlier or {}).get(group) or {}
            if name not in self.results[group]
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the verification as plain data."""
        return {
            "patch": str(self.patch),
            "card": str(self.card),
            "results": self.results,
            "earlier": self.earlier,
            "changed": self.changed(),
            "unchecked": self.unchecked(),
        }

    def text(self) -> str:
        """Return the verification as plain text for a terminal."""
        lines = [table(self.results), ""]
        if self.earlier is not None:
            changed = self.changed()
            lines.append(
                "different from the results in the original file:\n  " + "\n  ".join(changed)
                if changed
                else "the results in the original file are within these intervals"
            )
            if self.unchecked():
                lines.append(f"not measured again, therefore not in the copy: {', '.join(self.unchecked())}")
        lines += [
            CAVEAT,
            f"{self.patch}: the patch with these results",
            f"{self.card}: its model card, which explains each figure",
            f"{self.card.parent / 'report.html'}: the images, and links to the pages of the evaluation and the attacks",
        ]
        return "\n".join(lines)


def verify(
    pipe: Any,
    source: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str],
    attacks: Sequence[str] = ATTACKS,
    prompts: str | PromptSet | None = None,
    limit: int | None = None,
    cases: int = 12,
    budget: str = "lite",
    judge: Judge | None = None,
    force: bool = False,
    progress: bool = True,
    **sampling: Any,
) -> Verification:
    """Measure what a patch erases, what it keeps, and what attacks recover; the patch file itself is not changed.

    `folder` receives a copy of the patch with the results in its header, report.html (the verdict), README.md (the
    model card), grid.png, and the reports of the evaluation and the attacks. A second call continues from existing
    results.

    Args:
        pipe: an erased pipeline of the patch's base, without patches; afterwards it has no patches again.
        source: the patch file.
        folder: folder for everything that is written; not the folder of the patch.
        attacks: names of attacks; may be empty.
        prompts: a prompt set with labels, or the name or file of one; None: those of evaluation/defaults.py.
        limit: approximate largest number of prompts; None: no limit.
        cases: number of prompts to attack.
        budget: budget of the attacks, lite or full.
        judge: the judge; default: that of evaluation/defaults.py.
        force: also verify on a base other than the patch's own, if the shapes fit.
        progress: show the progress.
        sampling: `steps`, `guidance` and `batch_size`; None values leave the default.

    Raises:
        ErasureError: the pipeline has patches, the patch is damaged or belongs to another base, the folder cannot be
            written, or `evaluate` or `attack` refuses to run.
    """
    from erasure.evaluation.attacks.attack import find
    from erasure.evaluation.attacks.run import attack
    from erasure.evaluation.defaults import default_prompts, is_glyph
    from erasure.evaluation.evaluate import evaluate
    from erasure.evaluation.report.verification_page import verification_page, verification_shots
    from erasure.patch import Patch
    from erasure.prompts.concept_prompts import concept_prompts

    path, out = Path(source), Path(folder)
    patch = Patch.load(path)
    if pipe.get_list_patches():
        raise ErasureError(
            f"verify needs a pipeline without patches, but {', '.join(pipe.get_list_patches())} is loaded: "
            "call unload_patches() first"
        )
    if out.resolve() == path.resolve().parent:
        raise ErasureError(
            f"{out} contains the patch itself: choose another folder, because the copy has the same name"
        )
    for name in attacks:
        find(name)
    if attacks:
        check_case_count(cases)
    names = list(patch.names)
    own = prompts is None and is_glyph(pipe)  # prompts that the limit already shortens
    rows: Any = concept_prompts(names, limit) if own else default_prompts(pipe, names, judge is not None, prompts)
    shared = {"judge": judge, "progress": progress, **{k: v for k, v in sampling.items() if v is not None}}
    pipe.load_patch(patch, name="verified", force=force)
    try:
        whole = {"whole": True} if own or limit is None else {"limit": limit}
        report = evaluate(pipe, names, folder=out / "evaluation", prompts=rows, **whole, **shared)
        attack_report = None
        if attacks:
            options = {"cases": cases, "budget": budget, "leave_out": tuple(attacks) == ATTACKS, **shared}
            attack_report = attack(pipe, names, list(attacks), folder=out / "attacks", prompts=rows, **options)
    finally:
        pipe.unload_patches()
    results = header_results(report, attack_report)
    results["how"]["verify"] = {"prompts": _prompts_argument(prompts), "limit": limit, "cases": cases, "budget": budget}
    shots = verification_shots(report, attack_report, out, rows.rows)
    written = _write(patch, path.name, results, verification_page(results, shots), out)
    return dataclasses.replace(written, before=_before(report), shots=shots)


def _write(patch: Patch, name: str, results: dict[str, Any], page: str, out: Path) -> Verification:
    """Write the copy of the patch with its results, the page, the model card, and the grid of images."""
    verified = dataclasses.replace(patch, results=results, stored={})
    try:
        shutil.copyfile(out / "evaluation" / "grid.png", out / "grid.tmp")
        os.replace(out / "grid.tmp", out / "grid.png")
        (out / "README.tmp").write_text(card(verified, name, grid="grid.png"), encoding="utf-8")
        os.replace(out / "README.tmp", out / "README.md")
        write_text(out / "report.html", page)
    except OSError as fault:
        raise ErasureError(f"{out}: cannot be written: {fault.strerror or fault}") from None
    copy = verified.save(out / name, dtype=str(patch.stored["dtype"]))
    return Verification(copy, out / "README.md", results, None if patch.results is None else dict(patch.results))


def _before(report: Report) -> dict[str, dict[str, Any]]:
    """Return the base's value of each metric, with its interval and number of images."""
    return {
        metric.name: {"value": metric.value, "low": metric.low, "high": metric.high, "n": metric.n}
        for metric in report.rows["base"]
    }


def _prompts_argument(prompts: str | PromptSet | None) -> str | None:
    """Return the prompts as an argument of the command; of a path, only the name of the file."""
    if prompts is None:
        return None
    if not isinstance(prompts, str):
        return prompts.name
    return Path(prompts).name if Path(prompts).is_file() else prompts


def header_results(report: Report, attack_report: AttackReport | None) -> dict[str, Any]:
    """Return the results for the patch's header: every figure with n, interval and base value, and how it was measured.

    Args:
        report: the evaluation.
        attack_report: the attacks, or None.
    """
    metrics = {
        entry["name"]: {key: entry[key] for key in ("value", "low", "high", "n", "base", "higher_is_better", "meaning")}
        for entry in report.metrics()
    }
    outcomes = {} if attack_report is None else attack_report.to_json()["attacks"]
    several = len(report.concept) > 1
    return {
        "schema": SCHEMA,
        "concept": list(report.concept),
        "metrics": metrics,
        **({"names": {row.label: row.to_json() for row in erased_rows(report)}} if several else {}),
        "attacks": {
            name: {
                **outcome["after"],
                "before": outcome["before"]["value"],
                "control": None if outcome["control_after"] is None else outcome["control_after"]["value"],
                "tries": outcome["rounds"],
                "access": outcome["access"],
                "settings": outcome["settings"],
                "adapted": outcome["adapted"],
            }
            for name, outcome in outcomes.items()
        },
        "how": {key: value for key, value in report.provenance.items() if key not in ("patches", "loaded")},
        "note": CAVEAT,
    }
