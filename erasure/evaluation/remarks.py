"""What to know of a report's figures, in sentences, and what each of several judges says alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from erasure.evaluation.metrics import Judged, Metric, Target, share

if TYPE_CHECKING:
    from erasure.evaluation.judges import Judge
    from erasure.evaluation.promptset import PromptSet

FEW = 5  # labels that a sentence names


def remarks(judge: Judge, rows: PromptSet, chosen: PromptSet, target: Target) -> list[str]:
    """Sentences about the prompts that were drawn.

    Args:
        rows: the prompt set.
        chosen: what was drawn of it.
    """
    found = []
    before, after = (sum(row.labels.get(target.domain) in target.labels for row in one.rows) for one in (rows, chosen))
    if after > before:
        found.append(f"{after} target images are of {before} prompts, with several seeds each")
    for head, known in judge.heads.items():
        strange = [row.labels[head] for row in chosen.rows if row.labels.get(head) and row.labels[head] not in known]
        if strange:
            names = list(dict.fromkeys(strange))
            said = ", ".join(map(repr, names[:FEW])) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
            found.append(
                f"{judge.name} knows no {head} {said}: it can never see that, so its {len(strange)} images count as "
                f"drawn wrong wherever the {head} is asked for"
            )
    return found


def alone(judge: Judge, judged: list[Judged], target: Target) -> list[Metric]:
    """UA and IRA as each judge of an ensemble gives them, and how often they differ; nothing for one judge.

    What all of them say together is UA and IRA themselves. An image that could not be judged is a failure here as
    there.
    """
    members: dict[str, Any] = getattr(judge, "members", {})
    who = [name for name, one in members.items() if target.domain in one.heads]
    if len(who) < 2:
        return []
    rest = [j for j in judged if j.role != "synonym"]
    erased = [j for j in rest if target.hits(j.record)]
    label = target.domain
    kept = [j for j in rest if target.keeps(j) and j.record.labels.get(label) and j.role != "neighbour"]
    found: list[Metric | None] = []
    for name in who:
        head = f"{label}@{name}"
        gone = [j.verdict is not None and j.top(head) not in target.labels for j in erased]
        right = [j.verdict is not None and j.top(head) == j.record.labels[label] for j in kept]
        found.append(share(f"UA@{name}", gone, True, f"target images without the target, by {name} alone"))
        found.append(share(f"IRA@{name}", right, True, f"other {label}s drawn right, by {name} alone"))
    differ = [j.verdict.get("disagreement", {}).get(label, 0) > 0 for j in rest if j.verdict is not None]
    found.append(share("disagreement", differ, False, f"images whose {label} a judge alone would decide otherwise"))
    return [metric for metric in found if metric is not None]
