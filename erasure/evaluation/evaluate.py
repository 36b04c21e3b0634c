"""Measure what the patches on a pipeline erase and what they keep: draw, judge, compute metrics, write the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.distributed import process_group
from erasure.evaluation.defaults import prompts_and_judge
from erasure.evaluation.generate import Record, active_patches, generate, on_cpu
from erasure.evaluation.metrics.accuracy import accuracy_by_label
from erasure.evaluation.metrics.detections import count_detections
from erasure.evaluation.metrics.gate_activity import gate_activity, gate_kinds
from erasure.evaluation.metrics.image_distances import ImageDistances
from erasure.evaluation.metrics.measure import measure, outcomes
from erasure.evaluation.metrics.metric import Metric
from erasure.evaluation.metrics.quality import drawn_instead
from erasure.evaluation.metrics.target import JudgedImage, Target
from erasure.evaluation.report.caveats import caveats, judge_misses, member_metrics, renamed_labels
from erasure.evaluation.report.report import Report
from erasure.evaluation.report.writer import write_report
from erasure.evaluation.score import judge_run, paired_accuracy, paired_erasure, paired_labels, paired_quality
from erasure.evaluation.select import check_labels, concept_names, find_target, select_prompts, with_anchors
from erasure.model.loading import sampling_of, words_of
from erasure.pipelines.strengths import switched_off
from erasure.prompts.prompt_set import PromptSet, order_by_hash

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.evaluation.judges.judge import Judge
    from erasure.evaluation.metrics.scorers import Scorer

SHOWN = 12  # image pairs of each kind on the report's page


def evaluate(
    pipe: Any,
    concept: str | list[str] | Concept,
    *,
    folder: str | os.PathLike[str],
    prompts: str | PromptSet | None = None,
    base_folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    whole: bool = False,
    within: bool = False,
    judge: Judge | None = None,
    features: str | Judge | None = None,
    lpips: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    scorer: str | Scorer | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    progress: bool = True,
    notes: Sequence[str] = (),
) -> Report:
    """Measure what the patches on a pipeline erase and what they keep.

    The base is the same pipeline with every patch at strength 0, drawn from the same seeds; the strengths are restored
    afterwards. The report (report.json, report.html, grid.png) and the images of both runs are written to `folder`. A
    second call draws only what is missing.

    Args:
        pipe: a pipeline with patches; without any, base and patched results are equal.
        concept: what should be erased: labels of the prompt set, or names that the judge knows.
        folder: folder for everything that is written.
        prompts: a prompt set with labels, or the name or file of one; default: see defaults.py.
        base_folder: folder of the base's images, which runs over the same model can share; default: `folder`/base.
        limit: largest number of prompts, a third of them for the target, the others spread over all labels; None: no
            limit.
        whole: draw the prompt set unchanged, without repeating or leaving out any row.
        within: add white-box metrics, computed from the weights without a judge (white_box.py).
        judge: the judge; default: see defaults.py.
        features: a judge, or the name of one, whose features KID and FD compare (`inception` for KID and FID as
            published); default: the judge's own. Its weights must be on this machine; nothing is downloaded.
        lpips: add LPIPS to the base's image of the same seed, with this backbone (`alex`, `vgg`, `squeeze`, or
            BACKBONE:FILE).
        reference: add KID and FD of the kept images to the images in this folder.
        scorer: add the scores of a network that rates images, such as `aesthetic:FILE` (scorers.py).
        steps: sampling steps; default: what suits the checkpoint.
        guidance: guidance scale of rows that set none; default: what suits the checkpoint.
        batch_size: images per batch on an accelerator.
        progress: show the progress.
        notes: sentences to add to the notes of the report.

    Returns:
        The report.

    Raises:
        ErasureError: the prompt set is invalid or has no label for the concept, it asks for labels that the judge
            lacks, the folder cannot be written, or prompts and judge are not given on a checkpoint that has none.
    """
    report_folder = Path(folder)
    rows, judge = prompts_and_judge(pipe, concept, prompts, judge)
    loaded: dict[str, dict[str, Any]] = getattr(pipe, "get_list_patches", dict)()
    target = with_anchors(find_target(concept, rows, judge), concept, loaded, judge)
    distances = ImageDistances.load(judge, features, lpips, reference, scorer)
    chosen = rows if whole else select_prompts(rows, target, limit)
    check_labels(chosen, judge)
    own = sampling_of(pipe, steps, guidance)
    options: dict[str, Any] = {"steps": own.steps, "guidance": own.guidance}
    options |= {"batch_size": batch_size, "progress": progress}
    base_path = Path(base_folder) if base_folder else report_folder / "base"
    folders = {"base": base_path, "patched": report_folder / "patched"}
    records = _draw(pipe, chosen, folders, options)
    provenance = _provenance(pipe, rows, chosen, options)

    def judge_and_report() -> Report:
        extra = _white_box_metrics(pipe, concept, target, chosen, provenance, options) if within else {}
        remarks = [*notes, *renamed_labels(concept_names(concept), target), *caveats(chosen, target)]
        return _report(distances, target, records, folders, report_folder, provenance, extra, remarks)

    # Several processes may have drawn the images; the first one judges them and writes the report.
    with process_group(on_cpu(pipe)) as group:
        return group.first(judge_and_report)


def _draw(pipe: Any, prompts: PromptSet, folders: dict[str, Path], options: dict[str, Any]) -> dict[str, list[Record]]:
    """Draw the prompts with the patches, then with every patch at strength 0."""
    patched = generate(pipe, prompts, folders["patched"], **options)
    with switched_off(pipe):
        base = generate(pipe, prompts, folders["base"], **options)
    return {"base": base, "patched": patched}


def _provenance(pipe: Any, rows: PromptSet, chosen: PromptSet, options: dict[str, Any]) -> dict[str, Any]:
    """Return the prompts, patches and sampling settings of a run, for its report."""
    return {
        "prompts": {"name": rows.name, "sha256": rows.sha256, "used": len(chosen.rows)},
        "patches": active_patches(pipe),
        "loaded": getattr(pipe, "get_list_patches", dict)(),
        "scheduler": type(pipe.scheduler).__name__,
        "steps": options["steps"],
        "guidance": options["guidance"],
    }


def _white_box_metrics(
    pipe: Any, concept: Any, target: Target, chosen: PromptSet, provenance: dict[str, Any], options: dict[str, Any]
) -> dict[str, list[Metric]]:
    """Return the white-box metrics of the base and the patched pipeline, and add their cost to the provenance."""
    from erasure.concepts.concept import Concept
    from erasure.evaluation.metrics.white_box import measure_white_box

    single = concept
    if not isinstance(concept, str | Concept):
        single = (
            Concept.of(concept[0], words_of(pipe))
            if len(concept) == 1
            else Concept(concept[0], aliases=tuple(concept[1:]))
        )
    others = order_by_hash([row for row in chosen.rows if row.labels.get(target.domain) not in target.labels])
    sampling = {name: options[name] for name in ("steps", "guidance", "batch_size")}
    white_box = measure_white_box(pipe, single, [row.prompt for row in others], **sampling)
    provenance["inside"] = {"costs": white_box.costs.to_json(), "folded": list(white_box.folded)}
    base, patched = white_box.rows()
    return {"base": base, "patched": patched}


def _report(
    distances: ImageDistances,
    target: Target,
    records: dict[str, list[Record]],
    folders: dict[str, Path],
    report_folder: Path,
    provenance: dict[str, Any],
    extra: dict[str, list[Metric]],
    notes: list[str],
) -> Report:
    """Judge both runs, compute their metrics, and write the report."""
    faults: list[str] = []
    judge = distances.judge
    runs = {name: judge_run(judge, folders[name], rows, target, faults) for name, rows in records.items()}
    image_metrics = distances.metrics(runs, folders, target)
    gates = gate_kinds({name: provenance["loaded"].get(name, {}) for name in provenance["patches"]})
    report = Report(
        concept=target.labels,
        domain=target.domain,
        rows={
            name: [
                *measure(run, target, runs["base"], distances.feature_source),
                *member_metrics(judge, run, target),
                *image_metrics[name],
                *extra.get(name, []),
            ]
            for name, run in runs.items()
        },
        accuracies={name: {head: accuracy_by_label(run, head) for head in judge.heads} for name, run in runs.items()},
        paired={head: paired_accuracy(runs, target, head) for head in judge.heads}
        | {"target": paired_erasure(runs, target)}
        | paired_quality(runs, target),
        paired_labels={head: paired_labels(runs, head) for head in judge.heads},
        provenance={
            **provenance,
            "judge": {"name": judge.name, **judge.versions()},
            "distances": distances.provenance,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
        faults=faults,
        missing=distances.missing,
        counts=count_detections(judge, runs, target),
        notes=notes,
        gates=gate_activity(records["patched"], target, gates),
        drawn=drawn_instead(runs, target),
        outcomes={name: outcomes(run, target) for name, run in runs.items()},
    )
    report.notes.extend(judge_misses(judge, report.metric("UA", "base")))
    shown = _shown_records(runs["patched"], target)
    for name, run in runs.items():
        tops = {i.record.id: "not judged" if i.verdict is None else i.top_label(target.domain) for i in run}
        report.seen[name] = {record.id: tops[record.id] for record, _ in shown}
    write_report(report, report_folder, shown, folders["base"])
    return report


def _shown_records(images: list[JudgedImage], target: Target) -> list[tuple[Record, bool]]:
    """Return the records to show, and whether each asks for the target; the least erased target images come first."""

    def remaining(image: JudgedImage) -> float:
        if image.verdict is None:
            return 1.0
        return max(image.verdict[target.domain].get(label, 0.0) for label in target.labels)

    hits = sorted((image for image in images if target.matches(image.record)), key=remaining, reverse=True)
    kept = [image for image in images if not target.matches(image.record)]
    return [*((image.record, True) for image in hits[:SHOWN]), *((image.record, False) for image in kept[:SHOWN])]
