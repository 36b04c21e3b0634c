"""`verify`: measure a patch, attack it, and write what was found into a copy of it and into a model card."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError
from erasure.evaluation.metrics.metric import format_value
from erasure.evaluation.report.card import CAVEAT, SCHEMA, card, estimate_text, table

if TYPE_CHECKING:
    from erasure.evaluation.attacks.report import AttackReport
    from erasure.evaluation.judges.judge import Judge
    from erasure.evaluation.report.report import Report
    from erasure.patch import Patch
    from erasure.prompts.prompt_set import PromptSet

# One attack each of those who write prompts, hold embeddings, hold weights.
ATTACKS = ("unlearndiffatk", "inversion", "rece")
CLOSE = 1e-6  # of equal values, intervals have no width


@dataclass(frozen=True)
class Verification:
    """What was found, and what an earlier verification of the same file had found.

    Args:
        patch: the copy with the results in its header.
        card: the model card.
        results: as they stand in the header.
        earlier: those of the file that was given, or None.
    """

    patch: Path
    card: Path
    results: dict[str, Any]
    earlier: dict[str, Any] | None

    def changed(self) -> list[str]:
        """Figures of which the earlier value lies outside the new interval; empty without earlier ones."""
        found = []
        for group in ("metrics", "attacks"):
            for name, cell in self.results[group].items():
                old = ((self.earlier or {}).get(group) or {}).get(name)
                was = old.get("value") if isinstance(old, dict) else None
                if isinstance(was, int | float) and not cell["low"] - CLOSE <= was <= cell["high"] + CLOSE:
                    found.append(f"{name}: {format_value(name, was)} before, now {estimate_text(name, cell)}")
        return found

    def unchecked(self) -> list[str]:
        """Figures of the earlier verification that this one did not measure: the copy does not hold them."""
        return [
            name
            for group in ("metrics", "attacks")
            for name in (self.earlier or {}).get(group) or {}
            if name not in self.results[group]
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "patch": str(self.patch),
            "card": str(self.card),
            "results": self.results,
            "earlier": self.earlier,
            "changed": self.changed(),
            "unchecked": self.unchecked(),
        }

    def text(self) -> str:
        """For people."""
        lines = [table(self.results), ""]
        if self.earlier is not None:
            changed = self.changed()
            lines.append(
                "differs from the file's own results:\n  " + "\n  ".join(changed)
                if changed
                else "the file's own results lie within these intervals"
            )
            if self.unchecked():
                lines.append(f"not measured again, and so not in the copy: {', '.join(self.unchecked())}")
        ran = ("evaluation", *(["attacks"] if self.results["attacks"] else []))  # other pages are an earlier run's
        pages = [str(self.card.parent / part / "report.html") for part in ran]
        lines += [
            CAVEAT,
            f"{self.patch}: the patch with these results",
            f"{self.card}: its model card, with what each figure means",
            f"{', '.join(pages)}: the pictures",
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
    """Measure what a patch erases, keeps, and gives back under attack; nothing is written into the file itself.

    `folder` gets the copy of the patch with the results in its header, README.md (the model card), grid.png, and the
    reports of both runs. A second call goes on from what is there.

    Args:
        pipe: an erased pipeline of the patch's base, without patches; it has none again at the end.
        source: the patch file.
        attacks: names of attacks; may be empty.
        prompts: a prompt set with labels; None: glyph's prompts about the concepts.
        limit: at most about this many prompts.
        cases: prompts to attack.
        budget: lite or full.
        judge: default: glyph's.
        force: verify on another base than the patch's, where the shapes fit.
        sampling: steps, guidance, batch_size.

    Raises:
        ErasureError: a pipeline with patches, a damaged patch, a wrong base, an unwritable folder, and all that
            `evaluate` and `attack` refuse.
    """
    from erasure.evaluation.attacks.attack import check_case_count, find
    from erasure.evaluation.attacks.run import attack
    from erasure.evaluation.evaluate import evaluate
    from erasure.patch import Patch
    from erasure.prompts.concept_prompts import concept_prompts

    path, out = Path(source), Path(folder)
    patch = Patch.load(path)
    if pipe.get_list_patches():
        raise ErasureError(
            f"{', '.join(pipe.get_list_patches())}: loaded already; verify takes a pipeline without patches"
        )
    if out.resolve() == path.resolve().parent:
        raise ErasureError(f"{out} holds the patch itself: give another folder, its copy gets the same name")
    for name in attacks:
        find(name)
    if attacks:
        check_case_count(cases)
    names = list(patch.names)
    rows: Any = concept_prompts(names, limit) if prompts is None else prompts
    shared = {"judge": judge, "progress": progress, **{k: v for k, v in sampling.items() if v is not None}}
    pipe.load_patch(patch, name="verified", force=force)
    try:
        whole = {"whole": True} if prompts is None or limit is None else {"limit": limit}
        measured = evaluate(pipe, names, folder=out / "evaluation", prompts=rows, **whole, **shared)
        attacked = None
        if attacks:
            options = {"cases": cases, "budget": budget, **shared}
            attacked = attack(pipe, names, list(attacks), folder=out / "attacks", prompts=rows, **options)
    finally:
        pipe.unload_patches()
    results = header_results(measured, attacked)
    results["how"]["verify"] = {"prompts": _said(prompts), "limit": limit, "cases": cases, "budget": budget}
    return _write(patch, path.name, results, out)


def _write(patch: Patch, name: str, results: dict[str, Any], out: Path) -> Verification:
    """The copy with its results, the card and the picture."""
    made = dataclasses.replace(patch, results=results, stored={})
    try:
        shutil.copyfile(out / "evaluation" / "grid.png", out / "grid.tmp")
        os.replace(out / "grid.tmp", out / "grid.png")
        (out / "README.tmp").write_text(card(made, name, grid="grid.png"), encoding="utf-8")
        os.replace(out / "README.tmp", out / "README.md")
    except OSError as fault:
        raise ErasureError(f"{out}: cannot be written: {fault.strerror or fault}") from None
    copy = made.save(out / name, dtype=str(patch.stored["dtype"]))
    return Verification(copy, out / "README.md", results, None if patch.results is None else dict(patch.results))


def _said(prompts: str | PromptSet | None) -> str | None:
    """Prompts as a command names them: of a path, which is one machine's own, the file; None: the default ones."""
    if prompts is None:
        return None
    if not isinstance(prompts, str):
        return prompts.name
    return Path(prompts).name if Path(prompts).is_file() else prompts


def header_results(measured: Report, attacked: AttackReport | None) -> dict[str, Any]:
    """What goes into the header: every figure with n, interval and the base's value, and how it came about."""
    metrics = {
        entry["name"]: {key: entry[key] for key in ("value", "low", "high", "n", "base", "higher_is_better", "meaning")}
        for entry in measured.metrics()
    }
    found = {} if attacked is None else attacked.to_json()["attacks"]
    return {
        "schema": SCHEMA,
        "concept": list(measured.concept),
        "metrics": metrics,
        "attacks": {
            name: {
                **one["after"],
                "before": one["before"]["value"],
                "control": None if one["control_after"] is None else one["control_after"]["value"],
                "tries": one["rounds"],
                "access": one["access"],
                "settings": one["settings"],
            }
            for name, one in found.items()
        },
        "how": {key: measured.provenance[key] for key in measured.provenance if key not in ("patches", "loaded")},
        "note": CAVEAT,
    }
