"""Spectral DeTuning (Horwitz et al. 2024, arXiv 2402.10208): the base's weights out of several published checkpoints.

Whoever publishes several merged checkpoints of one base, each with a low-rank change, publishes the base. The base that
`erasure attack` is given finds the cases and measures the error; the search sees the exports alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erasure.config import build
from erasure.errors import ErasureError
from erasure.evaluation.attacks.attack import Attempt, Victim
from erasure.evaluation.attacks.relearning import moved
from erasure.evaluation.attacks.report import AttackReport, Outcome
from erasure.evaluation.attacks.run import begin, keep
from erasure.evaluation.report.writer import check_writable, write_attack_report
from erasure.evaluation.text_files import write_lines
from erasure.pipelines.strengths import switched_off

if TYPE_CHECKING:
    from erasure.evaluation.judges.judge import Judge

NAME = "detune"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
Weights = dict[tuple[str, str], Tensor]  # (component, parameter) -> weight
NOISE = 1e-3  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Detuning:
    """Settings.

    Args:
        rank: of the exports' changes; None: what the differences between them tell, layer by layer.
        iterations: of the alternation.
    """

    rank: int | None = None
    iterations: int = 300


def detuning(
    pipe: Any,
    concept: Any,
    exports: Sequence[str | os.PathLike[str]],
    *,
    folder: str | os.PathLike[str],
    prompts: Any = None,
    cases: int = 12,
    settings: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    force: bool = False,
) -> AttackReport:
    """Find the base behind merged exports, and ask it for the concept.

    "Before" is the first export, asked as it is; the control is the mean of the exports, which needs no search.

    Args:
        pipe: the base, without patches: it finds the cases, and is what the error is measured against.
        concept: what the first export has erased.
        exports: diffusers folders, or patch files, which are merged into the base as an export would be.
        folder: for report.json, report.html and the pictures.
        force: take patches of another base where the shapes fit.

    Raises:
        ErasureError: fewer than two exports, exports that are all alike or do not fit the base, patches on `pipe`,
            or whatever `attack` refuses.
    """
    how = build(Detuning, settings or {})
    if len(exports) < 2:
        raise ErasureError(f"{len(exports)} exports: DeTuning needs two or more, better five")
    if pipe.get_list_patches():
        raise ErasureError("DeTuning takes the base without patches; name what was published as exports")
    out = check_writable(folder)
    published = [read(pipe, each, force) for each in exports]
    asking, rows = begin(pipe, concept, prompts, judge, steps, guidance, batch_size)
    before, mean, found, figures = recovered(pipe, published, how)
    cases_found, tried, pictures = asking.cases(rows, concept, cases)
    everyone = {i: Attempt(case.prompt, note="as it is") for i, case in enumerate(cases_found)}
    shown: dict[str, Any] = {}
    for name, weights in (("erased", before), ("mean", mean), (NAME, found)):
        with put(pipe, weights):
            shown[name] = asking.draw(cases_found, everyone)
    hit = {name: asking.shows(images, cases_found, name) for name, images in shown.items()}
    won = {name: {cases_found[i].id: 1 for i in sorted(hit[name] - hit["erased"])} for name in ("mean", NAME)}
    seconds = figures.pop("seconds")
    outcome = Outcome(
        name=NAME,
        access="several published checkpoints",
        source="arXiv 2402.10208",
        settings={**asdict(how), "exports": [Path(each).name for each in exports], **figures},
        n=len(cases_found),
        plain=len(hit["erased"]),
        won=won[NAME],
        rounds=1,
        curve=None,
        control=won["mean"],
        control_curve=None,
        asked={case.id: case.prompt for i, case in enumerate(cases_found) if i not in hit["erased"]},
        costs={"F": 0, "B": 0, "seconds": round(seconds, 1)},  # the search asks no UNet
    )
    keep(out / NAME, cases_found, shown[NAME])
    shared = asking.conditions(cases_found, 0)
    target = asking.target
    report = AttackReport(
        target.labels, target.domain, len(cases_found), tried, outcome.plain, [outcome], shared, asking.faults
    )
    report.prompts.update({case.id: case.prompt for case in cases_found})
    report.notes.append(told(figures, len(exports)))
    first = [shown["erased"][i] for i in range(len(cases_found))]
    write_attack_report(report, out, {"base": pictures, "erased": first})
    write_lines(out / "scores.jsonl", map(json.dumps, asking.said))
    return report


def told(figures: Mapping[str, Any], count: int) -> str:
    """The error in words."""
    return (
        f"Out of {count} exports the base's weights come back with {figures['error']:.2g} of an export's distance from "
        f"the base (their mean: {figures['error_of_mean']:.2g}), over {figures['layers']} layers that differ; "
        f"rank {figures['rank_used']}"
    )


def read(pipe: Any, source: str | os.PathLike[str], force: bool = False) -> Weights:
    """What an export's weights are, where they are not the base's: of a diffusers folder or of a patch on the base.

    Raises:
        ErasureError: neither, or shapes that do not fit.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(pipe, path)
    name = pipe.load_patch(path, force=force)
    try:
        with Victim(pipe, switched_off).folded():
            now = {key: weight.detach().clone() for key, weight in _parameters(pipe).items()}
    finally:
        pipe.delete_patches(name)
    return _changed(pipe, now)


def _from_folder(pipe: Any, path: Path) -> Weights:
    found: Weights = {}
    for component, module in _modules(pipe):
        try:
            theirs = type(module).from_pretrained(path, subfolder=component, torch_dtype=module.dtype)
        except (OSError, ValueError) as fault:
            said = str(fault).splitlines()[0]
            raise ErasureError(f"{path}: {component} cannot be read as a diffusers folder's: {said}") from None
        found |= {(component, name): weight.detach() for name, weight in theirs.named_parameters()}
    return _changed(pipe, found)


def _parameters(pipe: Any) -> dict[tuple[str, str], Tensor]:
    return {
        (component, name): weight for component, module in _modules(pipe) for name, weight in module.named_parameters()
    }


def _modules(pipe: Any) -> list[tuple[str, Any]]:
    """The components that a patch may have changed: XL has two text encoders."""
    return [(name, getattr(pipe, name)) for name in COMPONENTS if getattr(pipe, name, None) is not None]


def _changed(pipe: Any, theirs: Weights) -> Weights:
    ours = _parameters(pipe)
    for key, weight in ours.items():
        if key not in theirs or theirs[key].shape != weight.shape:
            raise ErasureError(f"{'.'.join(key)}: the export's does not fit the base's {list(weight.shape)}")
    return {
        key: theirs[key].to(weight.device)
        for key, weight in ours.items()
        if not torch.equal(theirs[key].to(weight), weight)
    }


def recovered(
    pipe: Any, published: Sequence[Weights], how: Detuning
) -> tuple[Weights, Weights, Weights, dict[str, Any]]:
    """Of the layers in which the exports differ: the first export's, their mean, what DeTuning finds, and figures.

    Figures: `error`, distance of what was found from the base over an export's (its root mean square over the exports);
    `error_of_mean` likewise; `log10_mse` as published; `layers`; `rank_used`, the least and the largest; `seconds`.
    """
    ours = _parameters(pipe)
    first: Weights = {}
    mean: Weights = {}
    found: Weights = {}
    ranks = []
    squares = {"error": 0.0, "error_of_mean": 0.0, "export": 0.0}
    size, begun = 0, time.perf_counter()
    for key in sorted({key for one in published for key in one}):
        base = ours[key].detach()
        stack = torch.stack([one.get(key, base).double() for one in published])
        first[key], mean[key] = stack[0], stack.mean(0)
        if not (stack - stack[0]).any():  # all the same there: nothing tells their change from the base
            found[key] = stack[0]
        elif base.dim() < 2:
            found[key] = mean[key]
        else:
            flat = stack.flatten(2)
            rank = how.rank or estimated(flat)
            ranks.append(rank)
            found[key] = detune(list(flat), rank, how.iterations).view(base.shape)
        squares["error"] += float((found[key] - base).square().sum())
        squares["error_of_mean"] += float((mean[key] - base).square().sum())
        squares["export"] += float((stack - base).square().sum()) / len(published)
        size += base.numel()
    if not ranks:
        raise ErasureError("the exports have the same weights, or differ in no matrix: there is nothing to compare")
    figures = {name: (squares[name] / squares["export"]) ** 0.5 for name in ("error", "error_of_mean")}
    log = torch.tensor(max(squares["error"] / size, 1e-300)).log10()
    spread = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else str(ranks[0])
    rest = {"log10_mse": float(log), "layers": len(first), "rank_used": spread, "seconds": time.perf_counter() - begun}
    return first, mean, found, {**figures, **rest}


def estimated(stack: Tensor) -> int:
    """The rank of the changes in exports [n, out, in]: half that of their differences, whose changes add up."""
    values = torch.linalg.svdvals(stack[1:] - stack[:-1])
    whole = (values > NOISE * values.max()).sum(-1).max()
    return max(1, -(-int(whole) // 2))


def put(pipe: Any, weights: Weights) -> Any:
    """A context in which the pipeline has these weights."""
    ours = _parameters(pipe)
    places = [ours[key] for key in weights]
    kept = [place.detach().clone() for place in places]
    change = [weight.to(place) - place for weight, place in zip(weights.values(), kept, strict=True)]
    return moved(places, lambda: change)


def detune(published: Sequence[Tensor], rank: int, iterations: int = 300) -> Tensor:
    """Spectral DeTuning (Horwitz et al. 2024, arXiv 2402.10208): the base weight behind n published ones.

    Each is W_i = W* + M_i with rank(M_i) <= rank. In turn M_i = SVD_r(W_i - W*), W* = mean(W_i - M_i), from the mean,
    with the rank growing to its full value over the first half (alg. 1).

    Args:
        published: n weights [out, in] of the same layer.
        rank: of the changes.

    Raises:
        ErasureError: fewer than two, shapes that differ, or a rank below 1.
    """
    if len(published) < 2 or len({tuple(one.shape) for one in published}) != 1:
        raise ErasureError(f"{len(published)} weights: DeTuning needs two or more of one shape")
    if rank < 1:
        raise ErasureError(f"rank={rank}: at least 1 is needed")
    stack = torch.stack([one.double() for one in published])
    base = stack.mean(0)
    for step in range(iterations):
        allowed = min(rank, 1 + step * 2 * rank // iterations)
        u, s, v = torch.linalg.svd(stack - base, full_matrices=False)
        low = (u[..., :allowed] * s[:, None, :allowed]) @ v[:, :allowed]
        base = (stack - low).mean(0)
    return base
