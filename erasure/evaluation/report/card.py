"""The model card of a patch, with tables of the verification results in the patch's header."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError
from erasure.evaluation.attacks.report import budget_note
from erasure.evaluation.metrics.metric import format_estimate, format_value
from erasure.patch.loaders import as_it_is

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from erasure.patch import Patch

SCHEMA = 1  # version of the results in the header
CAVEAT = "These results cover the prompts and attacks that were tried; others may recover the concept."
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def estimate_text(name: str, cell: dict[str, Any]) -> str:
    """Return a result of the header as text, with its interval.

    Args:
        name: name of the metric; empty for an attack success rate.
        cell: the result, with `value`, `low` and `high`.
    """
    return format_estimate(name, cell["value"], cell["low"], cell["high"])


def table(results: dict[str, Any]) -> str:
    """Return the results of the header as Markdown: a table of metrics, and a table of attacks if there are any.

    Args:
        results: the results as `verify` writes them.
    """
    lines = ["| metric | base | with the patch | images |", "|---|---|---|---|"]
    for name, cell in results["metrics"].items():
        arrow = "↑" if cell["higher_is_better"] else "↓"
        base = "" if cell["base"] is None else format_value(name, cell["base"])
        lines.append(f"| {name} {arrow} | {base} | {estimate_text(name, cell)} | {cell['n']} |")
    if results["attacks"]:
        lines += [
            "",
            "| attack | access | before | after | control without the search | prompts |",
            "|---|---|---|---|---|---|",
        ]
        for name, cell in results["attacks"].items():
            control = "" if cell["control"] is None else f"{cell['control']:.0%}"
            lines.append(
                f"| {name} | {cell['access']} | {cell['before']:.0%} | {estimate_text('', cell)} | {control} "
                f"| {cell['n']} |"
            )
        notes = [
            budget_note(name, cell.get("settings", {}), cell.get("adapted", {}))
            for name, cell in results["attacks"].items()
        ]
        lines += [f"\n{note}." for note in notes if note]
    return "\n".join(lines)


def verdict(results: Mapping[str, Any]) -> str:
    """Return the results that a reader needs first as one line of Markdown, each with its interval and the base's.

    Args:
        results: the results as `verify` writes them.
    """
    metrics, attacks = results["metrics"], results["attacks"]
    parts = []
    for title, name in (("gone", "UA"), ("kept", "IRA"), ("picture still good", "quality")):
        if name in metrics:
            cell = metrics[name]
            base = "" if cell["base"] is None else f", base {format_value(name, cell['base'])}"
            parts.append(f"**{title}** {estimate_text(name, cell)}{base}")
    if attacks:
        worst = max(attacks, key=lambda name: attacks[name]["value"])
        parts.append(f"**back under attack** {estimate_text('', attacks[worst])}, by {worst}")
    return "; ".join(parts)


def card(patch: Patch, file: str, *, repository: str = "", grid: str = "", license: str | None = None) -> str:
    """Write the model card of a patch for the hub: the text of README.md with its metadata.

    Args:
        patch: the patch, with or without the results of `verify`.
        file: name of the patch's file.
        repository: the hub repository it will be in, `owner/name`; empty if there is none.
        grid: name of an image next to the card that compares base and patch; empty if there is none.
        license: the patch's license, by its name on the hub.

    Raises:
        ErasureError: the results in the patch do not have the form that `verify` writes.
    """
    from huggingface_hub import ModelCard

    try:
        data, measured = metadata(patch, repository, license), _measured(patch, file)
        first = verdict(patch.results) if patch.results else ""
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise ErasureError(
            f"{file}: the results in its header do not have the form that verify writes "
            f"({type(fault).__name__}: {fault})"
        ) from None
    base = base_name(patch.base)
    parts = [
        f"# {', '.join(patch.names)}, erased from {base}",
        first,
        f"![The same prompts and seeds, without the patch and with it]({grid})" if grid else "",
        _description(patch),
        f"## Results\n{measured}",
        f"## How to load it\n{_loading(patch, repository or file, file)}",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(part for part in parts if part) + "\n"))


def metadata(patch: Patch, repository: str = "", license: str | None = None) -> ModelCardData:
    """Return the metadata that the hub reads from a card: base model, tags and results.

    Args:
        patch: the patch.
        repository: the hub repository, `owner/name`; empty if there is none.
        license: the patch's license, by its name on the hub.
    """
    from huggingface_hub import ModelCardData

    low_rank = patch.payload.kind == "low-rank"
    tags = ["text-to-image", "diffusers", *(["lora"] if low_rank else []), "concept-erasure", patch.method]
    on_hub = bool(HUB_ID.fullmatch(patch.base)) and not Path(patch.base).exists()
    results = list(_results(patch))
    return ModelCardData(
        base_model=patch.base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="erasure-diffusion",
        license=license,
        pipeline_tag="text-to-image",
        tags=tags,
        model_name=(repository or ", ".join(patch.names)) if results else None,
        eval_results=results or None,
    )


def _results(patch: Patch) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    if not patch.results:
        return
    prompts = str(patch.results["how"]["prompts"]["name"])
    results = [(name, name, cell) for name, cell in patch.results["metrics"].items()]
    attacks = patch.results["attacks"].items()
    results += [("attack success rate", f"attack success rate of {name}", cell) for name, cell in attacks]
    for kind, name, cell in results:
        interval = f"95 % interval {cell['low']:.4g} to {cell['high']:.4g}, n = {cell['n']}"
        yield EvalResult(
            task_type="text-to-image",
            dataset_type=prompts,
            dataset_name=prompts,
            metric_type=kind,
            metric_value=round(float(cell["value"]), 4),
            metric_name=f"{name} ({interval})",
        )


def base_name(base: str) -> str:
    """Return the base's hub id or, because a path is specific to one machine, the last part of its path."""
    return base if HUB_ID.fullmatch(base) else Path(base).name or "an unnamed base"


def _description(patch: Patch) -> str:
    info = patch.info()
    content = "texts and settings that act while drawing, and no parameters"
    if info["features"] is not None:
        content = f"{info['parameters']:,} numbers that act while drawing, and no weight changed"
    elif info["guard"] is None:
        content = f"{info['parameters']:,} parameters"
    text = (
        f"A patch made by the method `{patch.method}`, with {content}; gate: {info['gate']}. "
        f"Programs that load the file: {'; '.join(f'{name}: {answer}' for name, answer in as_it_is(patch).items())}."
    )
    parents = patch.config.get("parents")
    if not isinstance(parents, list) or not all(isinstance(parent, dict) for parent in parents):
        return text
    sources = (
        f"{' + '.join(map(str, parent.get('concepts', [])))} ({parent.get('method')}) × {parent.get('weight')}"
        for parent in parents
    )
    text += f"\n\nMade by `{patch.config.get('operation')}` from: {'; '.join(sources)}."
    error = patch.config.get("error")
    return f"{text} Relative error: {error:.2%}." if isinstance(error, float) else text


def _measured(patch: Patch, file: str) -> str:
    command = f"```\n{repeat_command(patch, file)}\n```"
    if not patch.results:
        return f"Not measured yet. This command measures what the patch erases and what it keeps:\n\n{command}"
    if patch.results.get("schema") != SCHEMA:
        raise ValueError(f"schema {patch.results.get('schema')!r}, expected {SCHEMA}")
    how = patch.results["how"]
    source = f"Judge: {how['judge']['name']}; prompts: {how['prompts']['name']} ({how['prompts']['used']}); "
    source += f"{how['steps']} steps, guidance {how['guidance']}. This command repeats the measurement:"
    intervals = f"95 % intervals (Wilson for shares, bootstrap for scores). {CAVEAT}"
    meanings = [f"{name}: {cell['meaning']}" for name, cell in patch.results["metrics"].items() if cell.get("meaning")]
    legend = [f"{'; '.join(meanings)}."] if meanings else []
    return "\n\n".join([table(dict(patch.results)), *legend, intervals, source, command])


def repeat_command(patch: Patch, file: str) -> str:
    """Return the command that measures a patch, with the options of its last measurement if it has results.

    Args:
        patch: the patch.
        file: name of the patch's file.
    """
    return f"erasure verify {file} --model {base_name(patch.base)}{_verify_flags(patch.results or {})}"


def _verify_flags(results: Mapping[str, Any]) -> str:
    """Return the flags that repeat a verification; results of earlier versions do not contain them."""
    how = results.get("how", {})
    settings = how.get("verify")
    if not isinstance(settings, Mapping):
        return ""
    judge = how["judge"]["name"]
    flags = [("judge", None if judge == "glyph" else judge), ("prompts", settings["prompts"])]
    flags += [("limit", settings["limit"]), ("steps", how["steps"]), ("guidance", how["guidance"])]
    attacks = list(results["attacks"])
    flags += [("attack", name) for name in attacks or ["none"]]
    flags += [("cases", settings["cases"]), ("budget", settings["budget"])] if attacks else []
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in flags if value is not None)


def _loading(patch: Patch, source: str, file: str) -> str:
    text = f"""```python
from erasure import ErasedStableDiffusionPipeline

pipe = ErasedStableDiffusionPipeline.from_pretrained("{base_name(patch.base)}")
pipe.load_patch("{source}")
```"""
    if patch.payload.kind != "low-rank":
        return text
    gated = "" if patch.gate["kind"] == "always" else ", which ignores the gate, so that it acts on every prompt"
    arguments = f'"{source}", weight_name="{file}"' if source != file else f'"{file}"'
    return f"{text}\n\nOr as a LoRA in diffusers{gated}:\n\n```python\npipe.load_lora_weights({arguments})\n```"
