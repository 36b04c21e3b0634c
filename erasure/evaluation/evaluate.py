"""`evaluate`: draw the prompts with the patches and without, judge, measure, report."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.distributed import process_group
from erasure.evaluation.generate import GUIDANCE, STEPS, Record, active_patches, generate, on_cpu
from erasure.evaluation.judges.registry import find_judge
from erasure.evaluation.metrics.accuracy import accuracy_by_label
from erasure.evaluation.metrics.detections import count_detections
from erasure.evaluation.metrics.gate_activity import gate_activity, gate_kinds
from erasure.evaluation.metrics.image_distances import ImageDistances
from erasure.evaluation.metrics.measure import measure
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.metrics.target import JudgedImage, Target
from erasure.evaluation.report.caveats import caveats, judge_misses, member_metrics, renamed_labels
from erasure.evaluation.report.report import Report
from erasure.evaluation.report.writer import write_report
from erasure.evaluation.score import judge_run, paired_accuracy, paired_erasure
from erasure.evaluation.select import check_labels, concept_names, find_target, select_prompts
from erasure.model import presets
from erasure.model.loading import name_of
from erasure.pipelines.strengths import switched_off
from erasure.prompts.prompt_set import PromptSet, order_by_hash

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.evaluation.judges.judge import Judge

SHOWN = 12  # pairs of each kind in the report


def evaluate(
    pipe: Any,
    concept: str | list[str] | Concept,
    *,
    folder: str | os.PathLike[str],
    prompts: str | PromptSet = "glyph-objects",
    base_folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    whole: bool = False,
    within: bool = False,
    judge: Judge | None = None,
    features: str | Judge | None = None,
    lpips: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Report:
    """Measure what the loaded patches erase and what they keep.

    The base row comes from the same pipeline with every patch at strength 0, from the same seeds; the strengths
    are put back afterwards. Writes report.json, report.html, grid.png and both runs' images into `folder`; a
    second call makes only what is missing.

    Args:
        pipe: a pipeline with patches loaded (without any, base and patched row agree).
        concept: what should be gone: labels of the prompt set, or names that the judge knows them by.
        folder: for everything that is written.
        prompts: a prompt set with labels, by name, file or value.
        base_folder: where the base's images lie or go; shared by runs over the same model.
        limit: at most this many prompts, a third of them the target's, the others spread over all labels.
        whole: draw the prompt set as it is: nothing is repeated or left out.
        within: measure from the weights too, without a judge (inside.py).
        judge: default: glyph's.
        features: whose features KID and FD are taken over, a judge or its name (`inception`: KID and FID as they are
            published); default: the judge's own. They must lie on the machine; nothing is fetched.
        lpips: also measure LPIPS to the base's pictures of the same seed, with this backbone (`alex`, `vgg`, `squeeze`,
            or BACKBONE:FILE).
        reference: a folder of pictures; KID and FD of the kept images to them, too.

    Raises:
        ErasureError: a concept that the prompt set has no label for, prompts for labels that the judge lacks, a bad
            prompt set, an unwritable folder.
    """
    target_folder = Path(folder)
    rows = prompts if isinstance(prompts, PromptSet) else PromptSet.read(prompts)
    if judge is None:
        judge = find_judge("glyph")
    target = find_target(concept, rows, judge)
    beside = ImageDistances.load(judge, features, lpips, reference)
    chosen = rows if whole else select_prompts(rows, target, limit)
    check_labels(chosen, judge)
    options: dict[str, Any] = {
        "steps": STEPS if steps is None else steps,
        "guidance": GUIDANCE if guidance is None else guidance,
        "batch_size": batch_size,
        "progress": progress,
    }
    base_at = Path(base_folder) if base_folder else target_folder / "base"
    patched = generate(pipe, chosen, target_folder / "patched", **options)
    with switched_off(pipe):
        base = generate(pipe, chosen, base_at, **options)
    records = {"base": base, "patched": patched}
    details = _details(pipe, rows, chosen, options)

    def told() -> Report:
        more = _within(pipe, concept, target, chosen, details, options) if within else {}
        notes = [*renamed_labels(concept_names(concept), target), *caveats(rows, chosen, target)]
        return _judged(beside, target, records, base_at, target_folder, details, more, notes)

    # Of several processes that have drawn, one judges and writes.
    with process_group(on_cpu(pipe)) as us:
        return us.first(told)


def _details(pipe: Any, rows: PromptSet, chosen: PromptSet, options: dict[str, Any]) -> dict[str, Any]:
    """What was asked of which model, for the report."""
    return {
        "prompts": {"name": rows.name, "sha256": rows.sha256, "used": len(chosen.rows)},
        "patches": active_patches(pipe),
        "loaded": getattr(pipe, "get_list_patches", dict)(),
        "scheduler": type(pipe.scheduler).__name__,
        "steps": options["steps"],
        "guidance": options["guidance"],
    }


def _within(
    pipe: Any, concept: Any, target: Target, chosen: PromptSet, details: dict[str, Any], options: dict[str, Any]
) -> dict[str, list[Metric]]:
    """The metrics of inside.py, a row each for the base and the patches."""
    from erasure.concepts.concept import Concept
    from erasure.evaluation.metrics.white_box import measure_white_box

    one = concept
    if not isinstance(concept, str | Concept):
        words = presets.vocabulary(name_of(pipe))
        one = Concept.of(concept[0], words) if len(concept) == 1 else Concept(concept[0], aliases=tuple(concept[1:]))
    kept = [
        row.prompt for row in order_by_hash(list(chosen.rows)) if row.labels.get(target.domain) not in target.labels
    ]
    sampling = {name: options[name] for name in ("steps", "guidance", "batch_size")}
    found = measure_white_box(pipe, one, kept, **sampling)
    details["inside"] = {"costs": found.costs.to_json(), "folded": list(found.folded)}
    base, patched = found.rows()
    return {"base": base, "patched": patched}


def _judged(
    beside: ImageDistances,
    target: Target,
    records: dict[str, list[Record]],
    base_at: Path,
    folder: Path,
    details: dict[str, Any],
    more: dict[str, list[Metric]],
    notes: list[str],
) -> Report:
    """Judge both runs, measure them and write the report."""
    faults: list[str] = []
    judge = beside.judge
    places = {"base": base_at, "patched": folder / "patched"}
    runs = {name: judge_run(judge, places[name], rows, target, faults) for name, rows in records.items()}
    others = beside.metrics(runs, places, target)
    report = Report(
        concept=target.labels,
        domain=target.domain,
        rows={
            name: [
                *measure(run, target, runs["base"], beside.feature_source),
                *member_metrics(judge, run, target),
                *others[name],
                *more.get(name, []),
            ]
            for name, run in runs.items()
        },
        accuracies={name: {head: accuracy_by_label(run, head) for head in judge.heads} for name, run in runs.items()},
        paired={head: paired_accuracy(runs, target, head) for head in judge.heads}
        | {"target": paired_erasure(runs, target)},
        provenance={
            **details,
            "judge": {"name": judge.name, **judge.versions()},
            "distances": beside.provenance,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
        faults=faults,
        missing=beside.missing,
        counts=count_detections(judge, runs, target),
        notes=notes,
        gates=gate_activity(
            records["patched"], target, gate_kinds({n: details["loaded"].get(n, {}) for n in details["patches"]})
        ),
    )
    report.notes.extend(judge_misses(judge, report.metric("UA", "base")))
    shown = _show(runs["patched"], target)
    for name in ("base", "patched"):
        tops = {j.record.id: "not judged" if j.verdict is None else j.top_label(target.domain) for j in runs[name]}
        report.seen[name] = {record.id: tops[record.id] for record, _ in shown}
    write_report(report, folder, shown, base_at)
    return report


def _show(judged: list[JudgedImage], target: Target) -> list[tuple[Record, bool]]:
    """Records to show, and whether each is a target: the target's least erased first, for those are what counts."""

    def left(j: JudgedImage) -> float:
        return 1.0 if j.verdict is None else max(j.verdict[target.domain].get(label, 0.0) for label in target.labels)

    hits = sorted((j for j in judged if target.matches(j.record)), key=left, reverse=True)
    kept = [j for j in judged if not target.matches(j.record)]
    return [*((j.record, True) for j in hits[:SHOWN]), *((j.record, False) for j in kept[:SHOWN])]
