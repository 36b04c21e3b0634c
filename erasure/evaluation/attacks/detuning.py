"""Spectral DeTuning (Horwitz et al. 2024, arXiv 2402.10208): recover a base's weights from several merged checkpoints.

Whoever publishes several merged checkpoints of one base, each changed by a low-rank update, publishes the base as well.
The base that is passed to the attack is used only to find the cases and to measure the error; the search sees nothing
but the exports.
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
from erasure.evaluation.attacks.attack import Attempt, Case, Victim
from erasure.evaluation.attacks.relearning import updated_weights
from erasure.evaluation.attacks.report import AttackReport, Outcome
from erasure.evaluation.attacks.runner import prepare, save_images
from erasure.evaluation.report.writer import check_writable, write_attack_report
from erasure.evaluation.text_files import write_lines
from erasure.pipelines.strengths import switched_off

if TYPE_CHECKING:
    from erasure.evaluation.judges.judge import Judge

NAME = "detune"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # what a patch may change; only XL has the last
Weights = dict[tuple[str, str], Tensor]  # (component, parameter) -> weight
NOISE = 1e-3  # singular values below this share of the largest one are rounding errors


@dataclass(frozen=True)
class Detuning:
    """The settings of Spectral DeTuning.

    Args:
        rank: rank of the exports' changes; None estimates it for each layer from the differences between exports.
        iterations: number of iterations of the alternating minimisation.
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
    """Recover the base's weights from several merged exports and generate the concept with them.

    In the report, "before" is the first export without an attack, and the control is the mean of the exports, which
    needs no search. `folder` receives report.json, report.html, grid.png, scores.jsonl and the images.

    Args:
        pipe: the base, without patches. It finds the cases, and the error is measured against it.
        concept: the concept that the first export has erased.
        exports: diffusers folders, or patch files, which are merged into the base as an export would be.
        folder: folder for the results.
        prompts: prompt set with labels, or its name or path; default: those of evaluation/defaults.py.
        cases: number of prompts to attack, at least 2.
        settings: settings that override those of `Detuning`.
        judge: judge of the images; default: that of evaluation/defaults.py.
        steps: number of sampling steps; None: what suits the checkpoint.
        guidance: guidance scale of prompts that name none; None: what suits the checkpoint.
        batch_size: number of images per call of the pipeline.
        force: load patches that were made for another base, where the shapes fit.

    Raises:
        ErasureError: fewer than two exports, exports that are all alike or do not fit the base, patches on `pipe`,
            or an input that `attack` rejects.
    """
    config = build(Detuning, settings or {})
    if len(exports) < 2:
        raise ErasureError(f"{len(exports)} exports: DeTuning needs two or more, preferably five; nothing was attacked")
    if pipe.get_list_patches():
        raise ErasureError(
            f"DeTuning takes the base without patches, but this one has {', '.join(pipe.get_list_patches())}; pass the "
            "published checkpoints or patch files as exports; nothing was attacked"
        )
    out = check_writable(folder)
    published = [read_export(pipe, export, force) for export in exports]
    runner, rows = prepare(pipe, concept, prompts, judge, steps, guidance, batch_size)
    first, mean, recovered, figures = recover(pipe, published, config)
    selected, tried, base_images = runner.find_cases(rows, concept, cases)
    attempts = {i: Attempt(case.prompt, note="unchanged") for i, case in enumerate(selected)}
    images: dict[str, Any] = {}
    for name, weights in (("erased", first), ("mean", mean), (NAME, recovered)):
        with with_weights(pipe, weights):
            images[name] = runner.draw(selected, attempts)
    hits = {name: runner.shows(drawn, selected, name) for name, drawn in images.items()}
    outcome = _outcome(selected, hits, config, exports, figures)
    save_images(out / NAME, selected, images[NAME])
    target, provenance = runner.target, runner.provenance(selected, 0)
    report = AttackReport(
        target.labels, target.domain, len(selected), tried, outcome.plain, [outcome], provenance, runner.faults
    )
    report.prompts.update({case.id: case.prompt for case in selected})
    report.notes.append(error_note(figures, len(exports)))
    erased_images = [images["erased"][i] for i in range(len(selected))]
    write_attack_report(report, out, {"base": base_images, "erased": erased_images})
    write_lines(out / "scores.jsonl", map(json.dumps, runner.log))
    return report


def _outcome(
    cases: Sequence[Case],
    hits: Mapping[str, set[int]],
    config: Detuning,
    exports: Sequence[str | os.PathLike[str]],
    figures: Mapping[str, Any],
) -> Outcome:
    won = {name: {cases[i].id: 1 for i in sorted(hits[name] - hits["erased"])} for name in ("mean", NAME)}
    measured = {key: value for key, value in figures.items() if key != "seconds"}
    return Outcome(
        name=NAME,
        access="several published checkpoints",
        source="arXiv 2402.10208",
        settings={**asdict(config), "exports": [Path(export).name for export in exports], **measured},
        n=len(cases),
        plain=len(hits["erased"]),
        won=won[NAME],
        rounds=1,
        curve=None,
        control=won["mean"],
        control_curve=None,
        asked={case.id: case.prompt for i, case in enumerate(cases) if i not in hits["erased"]},
        costs={"F": 0, "B": 0, "seconds": round(figures["seconds"], 1)},  # the search runs no UNet
    )


def error_note(figures: Mapping[str, Any], count: int) -> str:
    """Return a sentence about the error of the recovered weights, for the report.

    Args:
        figures: as `recover` returns them.
        count: number of exports.
    """
    return (
        f"From {count} exports the base's weights are recovered with {figures['error']:.2g} of an export's distance "
        f"from the base (the mean of the exports: {figures['error_of_mean']:.2g}), over {figures['layers']} layers "
        f"that differ between exports and base; rank {figures['rank_used']}"
    )


def read_export(pipe: Any, source: str | os.PathLike[str], force: bool = False) -> Weights:
    """Read those weights of an export that differ from the base's.

    Args:
        pipe: the base; a patch is loaded into it for a moment and removed again.
        source: a diffusers folder or a patch file.
        force: load a patch that was made for another base, where the shapes fit.

    Raises:
        ErasureError: the source is neither, or its shapes do not fit the base.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(pipe, path)
    name = pipe.load_patch(path, force=force)
    try:
        with Victim(pipe, switched_off).folded():
            weights = {key: weight.detach().clone() for key, weight in _parameters(pipe).items()}
    finally:
        pipe.delete_patches(name)
    return _changed(pipe, weights)


def _from_folder(pipe: Any, path: Path) -> Weights:
    weights: Weights = {}
    for component, module in _modules(pipe):
        try:
            exported = type(module).from_pretrained(path, subfolder=component, torch_dtype=module.dtype)
        except (OSError, ValueError) as fault:
            reason = str(fault).splitlines()[0]
            raise ErasureError(
                f"{path}: {component} cannot be read as part of a diffusers folder: {reason}; nothing was attacked"
            ) from None
        weights |= {(component, name): weight.detach() for name, weight in exported.named_parameters()}
    return _changed(pipe, weights)


def _parameters(pipe: Any) -> dict[tuple[str, str], Tensor]:
    return {
        (component, name): weight for component, module in _modules(pipe) for name, weight in module.named_parameters()
    }


def _modules(pipe: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(pipe, name)) for name in COMPONENTS if getattr(pipe, name, None) is not None]


def _changed(pipe: Any, exported: Weights) -> Weights:
    base = _parameters(pipe)
    for key, weight in base.items():
        if key not in exported or exported[key].shape != weight.shape:
            shape = list(exported[key].shape) if key in exported else "missing"
            raise ErasureError(
                f"{'.'.join(key)} has shape {list(weight.shape)} in the base but is {shape} in the export; "
                "nothing was attacked"
            )
    return {
        key: exported[key].to(weight.device)
        for key, weight in base.items()
        if not torch.equal(exported[key].to(weight), weight)
    }


def recover(
    pipe: Any, published: Sequence[Weights], config: Detuning
) -> tuple[Weights, Weights, Weights, dict[str, Any]]:
    """Recover the base's weights in the layers that the exports change, and measure the error.

    Args:
        pipe: the base, against which the error is measured.
        published: the changed weights of each export.
        config: the settings of the search.

    Returns:
        The first export's weights, the mean of the exports, the recovered weights, and figures: `error`, the distance
        of the recovered weights from the base, over the root mean square distance of an export; `error_of_mean`, the
        same for the mean of the exports; `log10_mse`, the published measure; `layers`, the number of tensors;
        `rank_used`, the rank or its range over the layers; and `seconds`.

    Raises:
        ErasureError: the exports do not differ from each other in any matrix.
    """
    base = _parameters(pipe)
    first: Weights = {}
    mean: Weights = {}
    recovered: Weights = {}
    ranks = []
    squares = {"error": 0.0, "error_of_mean": 0.0, "export": 0.0}
    size, started = 0, time.perf_counter()
    for key in sorted({key for export in published for key in export}):
        weight = base[key].detach()
        stack = torch.stack([export.get(key, weight).double() for export in published])
        first[key], mean[key] = stack[0], stack.mean(0)
        if not (stack - stack[0]).any():  # equal in all exports: nothing separates their change from the base
            recovered[key] = stack[0]
        elif weight.dim() < 2:
            recovered[key] = mean[key]
        else:
            matrices = stack.flatten(2)
            rank = config.rank or estimate_rank(matrices)
            ranks.append(rank)
            recovered[key] = detune(list(matrices), rank, config.iterations).view(weight.shape)
        squares["error"] += float((recovered[key] - weight).square().sum())
        squares["error_of_mean"] += float((mean[key] - weight).square().sum())
        squares["export"] += float((stack - weight).square().sum()) / len(published)
        size += weight.numel()
    if not ranks:
        raise ErasureError(
            "the exports have the same weights, or do not differ in any matrix, so the base cannot be recovered; "
            "nothing was attacked"
        )
    errors = {name: (squares[name] / squares["export"]) ** 0.5 for name in ("error", "error_of_mean")}
    log10_mse = float(torch.tensor(max(squares["error"] / size, 1e-300)).log10())
    rank_used = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else str(ranks[0])
    figures = {**errors, "log10_mse": log10_mse, "layers": len(first), "rank_used": rank_used}
    return first, mean, recovered, {**figures, "seconds": time.perf_counter() - started}


def estimate_rank(stack: Tensor) -> int:
    """Estimate the rank of the changes in exports [n, out, in] as half the rank of the exports' differences.

    The difference of two exports contains the changes of both, so its rank is at most the sum of theirs.
    """
    values = torch.linalg.svdvals(stack[1:] - stack[:-1])
    rank = (values > NOISE * values.max()).sum(-1).max()
    return max(1, -(-int(rank) // 2))


def with_weights(pipe: Any, weights: Weights) -> Any:
    """Return a context in which the pipeline has these weights; the previous ones are restored at its end."""
    parameters = _parameters(pipe)
    current = [parameters[key] for key in weights]
    originals = [parameter.detach().clone() for parameter in current]
    change = [weight.to(original) - original for weight, original in zip(weights.values(), originals, strict=True)]
    return updated_weights(current, lambda: change)


def detune(published: Sequence[Tensor], rank: int, iterations: int = 300) -> Tensor:
    """Recover the base weight of one layer by Spectral DeTuning (Horwitz et al. 2024, arXiv 2402.10208, algorithm 1).

    Each published weight is W_i = W* + M_i with rank(M_i) <= rank. Starting from the mean of the W_i, the steps
    M_i = SVD_r(W_i - W*) and W* = mean(W_i - M_i) alternate. The rank r grows to its full value over the first half
    of the iterations.

    Args:
        published: n weights [out, in] of the same layer.
        rank: rank of the changes, at least 1.
        iterations: number of iterations.

    Returns:
        The recovered weight W* [out, in], in float64.

    Raises:
        ErasureError: fewer than two weights, different shapes, or a rank below 1.
    """
    if len(published) < 2 or len({tuple(weight.shape) for weight in published}) != 1:
        raise ErasureError(f"{len(published)} weights: DeTuning needs two or more, all of the same shape")
    if rank < 1:
        raise ErasureError(f"rank={rank}: must be at least 1")
    stack = torch.stack([weight.double() for weight in published])
    base = stack.mean(0)
    for step in range(iterations):
        allowed = min(rank, 1 + step * 2 * rank // iterations)
        u, s, v = torch.linalg.svd(stack - base, full_matrices=False)
        low_rank = (u[..., :allowed] * s[:, None, :allowed]) @ v[:, :allowed]
        base = (stack - low_rank).mean(0)
    return base
