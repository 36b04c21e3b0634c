"""Choose what an evaluation draws: the labels that a concept stands for, and the prompts that are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError
from erasure.evaluation.metrics.target import Target
from erasure.prompts.prompt_set import PromptSet, order_by_hash, reseed
from erasure.prompts.row import Prompt

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.evaluation.judges.judge import Judge

TARGET_IMAGES = 36  # of the concept: six images an object would leave an interval of half the scale


def find_target(concept: str | list[str] | Concept, rows: PromptSet, judge: Judge) -> Target:
    """The labels of the prompt set that a concept stands for.

    Raises:
        ErasureError: a name that is no label, or names of two domains.
    """
    names = concept_names(concept)
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


def check_labels(rows: PromptSet, judge: Judge) -> None:
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


def concept_names(concept: Any) -> list[str]:
    """List the names of a concept, of one name, or of several."""
    return [concept] if isinstance(concept, str) else list(getattr(concept, "names", concept))


def select_prompts(rows: PromptSet, target: Target, limit: int | None) -> PromptSet:
    """The rows to draw: the target's, repeated with other seeds up to TARGET_IMAGES, and the others spread evenly.

    Deterministic: a row's place depends on its id alone, so that runs over other concepts share the base's images.
    """
    if limit is not None and limit < 6:
        raise ErasureError(f"limit={limit}: at least 6 prompts are needed to measure anything")
    hits = [row for row in rows.rows if row.labels.get(target.domain) in target.labels]
    others = [row for row in rows.rows if row.labels.get(target.domain) not in target.labels]
    want = TARGET_IMAGES if limit is None else min(TARGET_IMAGES, limit // 3)
    copies = -(-want // len(hits))
    repeated = [reseed(row, copy) for copy in range(copies) for row in order_by_hash(hits)][
        : max(want, len(hits) if limit is None else 0)
    ]
    by_label: dict[str, list[Prompt]] = {}
    for row in order_by_hash(others):
        by_label.setdefault(row.labels.get(target.domain, ""), []).append(row)
    turns = [row for turn in range(len(others)) for group in by_label.values() for row in group[turn : turn + 1]]
    kept = turns if limit is None else turns[: limit - len(repeated)]
    return PromptSet(rows.name, [*repeated, *kept])
