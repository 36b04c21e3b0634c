"""`evaluate`: draw the prompts with the patches and without, judge, measure, report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError
from erasure.evaluation.beside import Beside, write_lines
from erasure.evaluation.counts import count
from erasure.evaluation.gates import acted, gated
from erasure.evaluation.generate import GUIDANCE, STEPS, Record, acting, generate, on_cpu, read_image
from erasure.evaluation.intervals import mcnemar
from erasure.evaluation.judges import verdicts
from erasure.evaluation.metrics import ASIDE, Judged, Metric, Target, accuracies, measure
from erasure.evaluation.promptset import Prompt, PromptSet, again, mixed
from erasure.evaluation.remarks import alone, missed, remarks, renamed
from erasure.evaluation.report import Report
from erasure.processes import crew

if TYPE_CHECKING:
    from PIL import Image

    from erasure.concept import Concept
    from erasure.evaluation.judges import Judge

TARGET_IMAGES = 36  # of the concept: six images an object would leave an interval of half the scale
BATCH = 16  # pictures judged at once
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
        from erasure.evaluation.judges.glyph import GlyphJudge

        judge = GlyphJudge()
    target = find_target(concept, rows, judge)
    beside = Beside.find(judge, features, lpips, reference)
    chosen = rows if whole else select(rows, target, limit)
    fit(chosen, judge)
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
        notes = [*renamed(_names(concept), target), *remarks(rows, chosen, target)]
        return _judged(beside, target, records, base_at, target_folder, details, more, notes)

    # Of several processes that have drawn, one judges and writes.
    with crew(on_cpu(pipe)) as us:
        return us.first(told)


def _details(pipe: Any, rows: PromptSet, chosen: PromptSet, options: dict[str, Any]) -> dict[str, Any]:
    """What was asked of which model, for the report."""
    return {
        "prompts": {"name": rows.name, "sha256": rows.sha256, "used": len(chosen.rows)},
        "patches": acting(pipe),
        "loaded": getattr(pipe, "get_list_patches", dict)(),
        "scheduler": type(pipe.scheduler).__name__,
        "steps": options["steps"],
        "guidance": options["guidance"],
    }


def _within(
    pipe: Any, concept: Any, target: Target, chosen: PromptSet, details: dict[str, Any], options: dict[str, Any]
) -> dict[str, list[Metric]]:
    """The metrics of inside.py, a row each for the base and the patches."""
    from erasure.concept import Concept
    from erasure.evaluation.inside import inside

    one = concept
    if not isinstance(concept, str | Concept):
        one = Concept.of(concept[0]) if len(concept) == 1 else Concept(concept[0], aliases=tuple(concept[1:]))
    kept = [row.prompt for row in mixed(list(chosen.rows)) if row.labels.get(target.domain) not in target.labels]
    sampling = {name: options[name] for name in ("steps", "guidance", "batch_size")}
    found = inside(pipe, one, kept, **sampling)
    details["inside"] = {"costs": found.costs.to_json(), "folded": list(found.folded)}
    base, patched = found.rows()
    return {"base": base, "patched": patched}


def _judged(
    beside: Beside,
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
                *measure(run, target, runs["base"], beside.of),
                *alone(judge, run, target),
                *others[name],
                *more.get(name, []),
            ]
            for name, run in runs.items()
        },
        accuracies={name: {head: accuracies(run, head) for head in judge.heads} for name, run in runs.items()},
        paired={head: paired(runs, target, head) for head in judge.heads} | {"target": gone(runs, target)},
        provenance={
            **details,
            "judge": {"name": judge.name, **judge.versions()},
            "distances": beside.facts,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
        faults=faults,
        missing=beside.missing,
        counts=count(judge, runs, target),
        notes=notes,
        gates=acted(records["patched"], target, gated({n: details["loaded"].get(n, {}) for n in details["patches"]})),
    )
    report.notes.extend(missed(judge, report.metric("UA", "base")))
    shown = _show(runs["patched"], target)
    for name in ("base", "patched"):
        tops = {j.record.id: "not judged" if j.verdict is None else j.top(target.domain) for j in runs[name]}
        report.seen[name] = {record.id: tops[record.id] for record, _ in shown}
    report.write(folder, shown, base_at)
    return report


def find_target(concept: str | list[str] | Concept, rows: PromptSet, judge: Judge) -> Target:
    """The labels of the prompt set that a concept stands for.

    Raises:
        ErasureError: a name that is no label, or names of two domains.
    """
    names = _names(concept)
    domains: dict[str, list[str]] = {}
    for name in names:
        head, labels = judge.find(name)
        domains.setdefault(head, []).extend(labels)
    if len(domains) != 1:
        raise ErasureError(
            f"{', '.join(names)}: one domain at a time, not {' and '.join(domains) or 'none'}; "
            "name one of them as the concept"
        )
    domain, labels = next(iter(domains.items()))
    there = rows.label_values(domain)
    if not there:
        columns = dict.fromkeys(label for row in rows.rows for label in row.labels)
        raise ErasureError(
            f"prompt set {rows.name!r} has no column {domain!r} that says which {domain} a prompt asks for, as "
            f"{judge.name} judges {', '.join(judge.heads)}; its other columns: {', '.join(columns) or 'none'}. Where "
            f"all of it asks for one: --label {domain}={labels[0]}"
        )
    if not set(labels) & set(there):
        raise ErasureError(
            f"prompt set {rows.name!r} never names {', '.join(labels)}; its {domain}s: {', '.join(there)}"
        )
    others = [head for head in judge.heads if head != domain and rows.label_values(head)]
    anchor = getattr(concept, "anchor", None) or ""
    return Target(domain, tuple(dict.fromkeys(labels)), others[0] if others else None, anchor)


def fit(rows: PromptSet, judge: Judge) -> None:
    """Refuses prompts for labels that the judge lacks, for no picture of them could ever be right.

    Raises:
        ErasureError: naming the labels.
    """
    for head, known in judge.heads.items():
        strange = [label for label in rows.label_values(head) if label not in known]
        if strange:
            shown = ", ".join(strange[:8]) + (" ..." if len(strange) > 8 else "")
            raise ErasureError(
                f"prompt set {rows.name!r} asks for {shown}, and {judge.name} knows no such {head}: give the judge's "
                "labels the prompts' names, or leave these rows out (--where)"
            )


def _names(concept: Any) -> list[str]:
    return [concept] if isinstance(concept, str) else list(getattr(concept, "names", concept))


def select(rows: PromptSet, target: Target, limit: int | None) -> PromptSet:
    """The rows to draw: the target's, repeated with other seeds up to TARGET_IMAGES, and the others spread evenly.

    Deterministic: a row's place depends on its id alone, so that runs over other concepts share the base's images.
    """
    if limit is not None and limit < 6:
        raise ErasureError(f"limit={limit}: at least 6 prompts are needed to measure anything")
    hits = [row for row in rows.rows if row.labels.get(target.domain) in target.labels]
    others = [row for row in rows.rows if row.labels.get(target.domain) not in target.labels]
    want = TARGET_IMAGES if limit is None else min(TARGET_IMAGES, limit // 3)
    copies = -(-want // len(hits))
    repeated = [again(row, copy) for copy in range(copies) for row in mixed(hits)][
        : max(want, len(hits) if limit is None else 0)
    ]
    by_label: dict[str, list[Prompt]] = {}
    for row in mixed(others):
        by_label.setdefault(row.labels.get(target.domain, ""), []).append(row)
    turns = [row for turn in range(len(others)) for group in by_label.values() for row in group[turn : turn + 1]]
    kept = turns if limit is None else turns[: limit - len(repeated)]
    return PromptSet(rows.name, [*repeated, *kept])


@contextmanager
def switched_off(pipe: Any) -> Iterator[None]:
    """The pipeline with every patch at strength 0; the strengths are put back whatever happens."""
    if not hasattr(pipe, "get_list_patches") or not pipe.get_list_patches():
        yield
        return
    before = {name: entry["strength"] for name, entry in pipe.get_list_patches().items()}
    pipe.set_patches({})
    try:
        yield
    finally:
        pipe.set_patches(before)


def judge_run(judge: Judge, folder: Path, records: list[Record], target: Target, faults: list[str]) -> list[Judged]:
    """What the judge says of every picture; a picture it cannot read or judge is kept as a failure.

    All that it said goes to `folder/scores.jsonl`, a line a picture. Only one batch of pictures is in memory.
    """
    found: list[Judged] = []
    for start in range(0, len(records), BATCH):
        part = [(record, read_image(folder, record)) for record in records[start : start + BATCH]]
        for record, image in part:
            if image is None:
                faults.append(f"{record.id}: the image is missing or broken")
        there = [(record, image) for record, image in part if image is not None]
        judged = {one.record.id: one for one in _batch(judge, there, target, faults)}
        found += [judged.get(record.id) or Judged(record, None, None) for record, _ in part]
    lines = (json.dumps({"id": j.record.id, "verdict": j.verdict, "clip": j.clip}) for j in found)
    write_lines(folder / "scores.jsonl", lines)
    return found


def _batch(judge: Judge, part: list[tuple[Record, Image.Image]], target: Target, faults: list[str]) -> list[Judged]:
    """Judge pictures together; where that fails, one by one, to know which it is."""
    if not part:
        return []
    images = [image for _, image in part]
    # With the prompt of every picture, and the concept's name and its stand-in where the prompt asks for it.
    asked = [(i, text) for i, (record, _) in enumerate(part) for text in _texts(record, target)]
    try:
        said, features = verdicts(judge, images), judge.features(images)
        scores = judge.clip_scores([images[i] for i, _ in asked], [text for _, text in asked])
    except Exception as fault:
        if len(part) > 1:
            return [one for each in part for one in _batch(judge, [each], target, faults)]
        faults.append(f"{part[0][0].id}: {judge.name} failed: {type(fault).__name__}: {fault}")
        return [Judged(part[0][0], None, None)]
    by_row: dict[int, list[float | None]] = {}
    for (i, _), score in zip(asked, scores, strict=True):
        by_row.setdefault(i, []).append(score)
    found = []
    for i, (record, _) in enumerate(part):
        clip, *others = by_row[i]
        told = [score for score in others if score is not None] if None not in others else []
        pair = (told[0], told[1]) if told else None
        found.append(Judged(record, said[i], clip, features[i], pair, tuple(told[2:])))  # type: ignore[arg-type]
    return found


def _texts(record: Record, target: Target) -> list[str]:
    """The prompt; of the concept also its name, its stand-in, and what else the row names."""
    return [record.prompt, *((*target.texts(record), *target.nouns(record)) if target.hits(record) else ())]


def paired(runs: dict[str, list[Judged]], target: Target, head: str) -> dict[str, float]:
    """Kept prompts that one of the two rows draws right and the other does not; exact McNemar."""
    before = {
        j.record.id: j.right(head) for j in runs["base"] if not target.hits(j.record) and j.record.labels.get(head)
    }
    return _apart(before, {j.record.id: j.right(head) for j in runs["patched"] if j.record.id in before})


def gone(runs: dict[str, list[Judged]], target: Target) -> dict[str, float]:
    """Target prompts on which only one of the two rows is without the target; exact McNemar.

    As in UA, an image that could not be judged shows it.
    """

    def without(name: str) -> dict[str, bool]:
        rows = [j for j in runs[name] if target.hits(j.record) and j.role not in ASIDE]
        return {j.record.id: not target.seen(j) for j in rows}

    return _apart(without("base"), without("patched"))


def _apart(before: dict[str, bool], after: dict[str, bool]) -> dict[str, float]:
    lost = sum(before[key] and not after[key] for key in after)
    won = sum(after[key] and not before[key] for key in after)
    return {"only_base": lost, "only_patched": won, "p": mcnemar(lost, won)}


def _show(judged: list[Judged], target: Target) -> list[tuple[Record, bool]]:
    """Records to show, and whether each is a target: the target's least erased first, for those are what counts."""

    def left(j: Judged) -> float:
        return 1.0 if j.verdict is None else max(j.verdict[target.domain].get(label, 0.0) for label in target.labels)

    hits = sorted((j for j in judged if target.hits(j.record)), key=left, reverse=True)
    kept = [j for j in judged if not target.hits(j.record)]
    return [*((j.record, True) for j in hits[:SHOWN]), *((j.record, False) for j in kept[:SHOWN])]
