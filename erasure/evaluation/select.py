"""Choose what an evaluation draws: the labels that a concept stands for, and the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError
from erasure.evaluation.metrics.target import Target
from erasure.prompts.prompt_set import PromptSet, order_by_hash, reseed
from erasure.prompts.row import Prompt

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.evaluation.judges.judge import Judge

TARGET_IMAGES = 36  # images of the target; with six, the interval would cover half of the scale
MIN_LIMIT = 6


def find_target(concept: str | list[str] | Concept, rows: PromptSet, judge: Judge) -> Target:
    """Return the labels of the prompt set that a concept stands for.

    Args:
        concept: a concept, or one or several names that the judge knows.
        rows: the prompt set.
        judge: the judge.

    Raises:
        ErasureError: the names belong to several heads of the judge, the prompt set has no labels for the head, or
            none of its rows asks for the concept.
    """
    names = concept_names(concept)
    domains: dict[str, list[str]] = {}
    for name in names:
        head, labels = judge.find(name)
        domains.setdefault(head, []).extend(labels)
    if len(domains) != 1:
        raise ErasureError(
            f"{', '.join(names)}: an evaluation covers one domain at a time, not {' and '.join(domains) or 'none'}; "
            "name one of them as the concept"
        )
    domain, labels = next(iter(domains.items()))
    values = rows.label_values(domain)
    if not values:
        columns = dict.fromkeys(label for row in rows.rows for label in row.labels)
        raise ErasureError(
            f"prompt set {rows.name!r} has no column {domain!r} with the {domain} that each prompt asks for. "
            f"{judge.name} judges {', '.join(judge.heads)}; the columns of labels are "
            f"{', '.join(columns) or 'none'}. If every prompt asks for the same {domain}, add "
            f"--label {domain}={labels[0]}"
        )
    if not set(labels) & set(values):
        raise ErasureError(
            f"prompt set {rows.name!r} has no prompt for {', '.join(labels)}; its {domain}s are {', '.join(values)}"
        )
    others = [head for head in judge.heads if head != domain and rows.label_values(head)]
    anchor = getattr(concept, "anchor", None) or ""
    return Target(domain, tuple(dict.fromkeys(labels)), others[0] if others else None, anchor)


def with_anchors(target: Target, concept: Any, loaded: Mapping[str, Mapping[str, Any]], judge: Judge) -> Target:
    """Return the target with the labels of its anchors, which the concept or the headers of active patches name.

    An anchor that is no label of the target's domain, such as "a painting", is left out.

    Args:
        target: what should be erased.
        concept: the concept as the user gave it.
        loaded: name -> description of each loaded patch, as `get_list_patches` returns it.
        judge: the judge.
    """
    named: dict[str, str] = {}
    for patch in loaded.values():
        named |= patch.get("anchors", {}) if patch["strength"] else {}
    if getattr(concept, "anchor", None):
        named |= dict.fromkeys(concept_names(concept), concept.anchor)
    anchors: dict[str, tuple[str, ...]] = {}
    for name, anchor in named.items():
        try:
            (head, labels), (place, instead) = judge.find(name), judge.find(anchor)
        except ErasureError:
            continue
        if head == place == target.domain:
            anchors |= {label: tuple(instead) for label in labels if label in target.labels}
    return replace(target, anchors=anchors)


def check_labels(rows: PromptSet, judge: Judge) -> None:
    """Check that the judge knows every label of the prompts; no image of an unknown label could count as correct.

    Args:
        rows: the prompt set.
        judge: the judge.

    Raises:
        ErasureError: the judge does not know some labels; the message names them.
    """
    for head, known in judge.heads.items():
        unknown_labels = [label for label in rows.label_values(head) if label not in known]
        if unknown_labels:
            shown = ", ".join(unknown_labels[:8]) + (" ..." if len(unknown_labels) > 8 else "")
            raise ErasureError(
                f"prompt set {rows.name!r} asks for {shown}, but {judge.name} has no such {head}: rename the judge's "
                "labels to match the prompts, or leave these rows out with --where"
            )


def concept_names(concept: Any) -> list[str]:
    """Return the names of a concept that is given as a `Concept`, as one name, or as a list of names."""
    return [concept] if isinstance(concept, str) else list(getattr(concept, "names", concept))


def select_prompts(rows: PromptSet, target: Target, limit: int | None) -> PromptSet:
    """Choose the prompts to draw: the target's, repeated with other seeds up to TARGET_IMAGES, and a spread of others.

    The choice is deterministic and depends on the ids of the rows alone, so that runs over other concepts share the
    base's images.

    Args:
        rows: the prompt set.
        target: what should be erased.
        limit: largest number of prompts, of which at most a third ask for the target; None: no limit.

    Raises:
        ErasureError: the limit is below MIN_LIMIT.
    """
    if limit is not None and limit < MIN_LIMIT:
        raise ErasureError(f"limit={limit}: an evaluation needs at least {MIN_LIMIT} prompts")
    target_rows = [row for row in rows.rows if row.labels.get(target.domain) in target.labels]
    others = [row for row in rows.rows if row.labels.get(target.domain) not in target.labels]
    count = TARGET_IMAGES if limit is None else min(TARGET_IMAGES, limit // 3)
    copies = -(-count // len(target_rows))
    repeated = [reseed(row, copy) for copy in range(copies) for row in order_by_hash(target_rows)][
        : max(count, len(target_rows) if limit is None else 0)
    ]
    by_label: dict[str, list[Prompt]] = {}
    for row in order_by_hash(others):
        by_label.setdefault(row.labels.get(target.domain, ""), []).append(row)
    alternating = [row for turn in range(len(others)) for group in by_label.values() for row in group[turn : turn + 1]]
    kept = alternating if limit is None else alternating[: limit - len(repeated)]
    return PromptSet(rows.name, [*repeated, *kept])
