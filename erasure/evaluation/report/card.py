"""The model card of a patch, and the tables of what `verify` found, as they stand in the patch's header."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError
from erasure.evaluation.metrics.metric import format_estimate, format_value
from erasure.patch.loaders import as_it_is

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from erasure.patch import Patch

SCHEMA = 1  # of the results in the header
CAVEAT = "These are the prompts and attacks that were tried; others may bring the concept back."
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def estimate_text(name: str, cell: dict[str, Any]) -> str:
    """A figure with its interval."""
    return format_estimate(name, cell["value"], cell["low"], cell["high"])


def table(results: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    lines = ["| what | base | with the patch | images |", "|---|---|---|---|"]
    for name, cell in results["metrics"].items():
        arrow = "↑" if cell["higher_is_better"] else "↓"
        base = "" if cell["base"] is None else format_value(name, cell["base"])
        lines.append(f"| {name} {arrow} | {base} | {estimate_text(name, cell)} | {cell['n']} |")
    if results["attacks"]:
        lines += [
            "",
            "| attack | needs | before | after | as many tries without the search | prompts |",
            "|---|---|---|---|---|---|",
        ]
        for name, cell in results["attacks"].items():
            control = "" if cell["control"] is None else f"{cell['control']:.0%}"
            lines.append(
                f"| {name} | {cell['access']} | {cell['before']:.0%} | {estimate_text('', cell)} | {control} "
                f"| {cell['n']} |"
            )
    return "\n".join(lines)


def card(patch: Patch, file: str, *, repository: str = "", grid: str = "", license: str | None = None) -> str:
    """A model card for the hub: README.md with its metadata.

    Args:
        patch: with what `verify` measured in its results, or without.
        file: name of the patch's file.
        repository: `owner/name` where it will lie.
        grid: name of the before/after picture beside the card, if there is one.
        license: of the patch, as the hub calls it.

    Raises:
        ErasureError: results of another form than `verify` writes.
    """
    from huggingface_hub import ModelCard

    try:
        data, measured = metadata(patch, repository, license), _measured(patch, file)
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise ErasureError(
            f"{file}: the results in its header are not of verify's form ({type(fault).__name__}: {fault})"
        ) from None
    base = _said(patch.base)
    parts = [
        f"# {', '.join(patch.names)}, erased from {base}",
        _made(patch),
        f"![The same prompts and seeds, without the patch and with it]({grid})" if grid else "",
        f"## What was measured\n{measured}",
        f"## How to load it\n{_loading(patch, repository or file, file)}",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(part for part in parts if part) + "\n"))


def metadata(patch: Patch, repository: str = "", license: str | None = None) -> ModelCardData:
    """What the hub reads at the head of a card: base, tags, results."""
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
    found = [(name, name, cell) for name, cell in patch.results["metrics"].items()]
    attacks = patch.results["attacks"].items()
    found += [("attack success rate", f"attack success rate of {name}", cell) for name, cell in attacks]
    for kind, name, cell in found:
        ends = f"95 % interval {cell['low']:.4g} to {cell['high']:.4g}, n = {cell['n']}"
        yield EvalResult(
            task_type="text-to-image",
            dataset_type=prompts,
            dataset_name=prompts,
            metric_type=kind,
            metric_value=round(float(cell["value"]), 4),
            metric_name=f"{name} ({ends})",
        )


def _said(base: str) -> str:
    """The base for readers: of a path, which is one machine's own, the last part."""
    return base if HUB_ID.fullmatch(base) else Path(base).name or "an unnamed base"


def _made(patch: Patch) -> str:
    info = patch.info()
    text = (
        f"A patch by the method `{patch.method}`. {info['parameters']:,} parameters, gate: {info['gate']}. "
        f"What loads the file: {'; '.join(f'{name}: {said}' for name, said in as_it_is(patch).items())}."
    )
    parents = patch.config.get("parents")
    if not isinstance(parents, list) or not all(isinstance(one, dict) for one in parents):
        return text
    named = (
        f"{' + '.join(map(str, one.get('concepts', [])))} ({one.get('method')}) × {one.get('weight')}"
        for one in parents
    )
    text += f"\n\nMade by `{patch.config.get('operation')}` from: {'; '.join(named)}."
    error = patch.config.get("error")
    return f"{text} Relative error: {error:.2%}." if isinstance(error, float) else text


def _measured(patch: Patch, file: str) -> str:
    again = f"```\nerasure verify {file} --model {_said(patch.base)}{_asked(patch.results or {})}\n```"
    if not patch.results:
        return f"Nothing yet. Anyone can measure what it erases and what it keeps:\n\n{again}"
    if patch.results.get("schema") != SCHEMA:
        raise ValueError(f"schema {patch.results.get('schema')!r}, expected {SCHEMA}")
    how = patch.results["how"]
    source = f"Judge: {how['judge']['name']}; prompts: {how['prompts']['name']} ({how['prompts']['used']}); "
    source += f"{how['steps']} steps, guidance {how['guidance']}. Anyone can measure it again:"
    intervals = f"95 % intervals (Wilson for shares, bootstrap for scores). {CAVEAT}"
    meant = [f"{name}: {cell['meaning']}" for name, cell in patch.results["metrics"].items() if cell.get("meaning")]
    said = [f"{'; '.join(meant)}."] if meant else []
    return "\n\n".join([table(dict(patch.results)), *said, intervals, source, again])


def _asked(results: Mapping[str, Any]) -> str:
    """The flags that make `verify` ask the same again; results of earlier versions do not know them."""
    how = results.get("how", {})
    given = how.get("verify")
    if not isinstance(given, Mapping):
        return ""
    judge = how["judge"]["name"]
    flags = [("judge", None if judge == "glyph" else judge), ("prompts", given["prompts"])]
    flags += [("limit", given["limit"]), ("steps", how["steps"]), ("guidance", how["guidance"])]
    attacks = list(results["attacks"])
    flags += [("attack", name) for name in attacks or ["none"]]
    flags += [("cases", given["cases"]), ("budget", given["budget"])] if attacks else []
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in flags if value is not None)


def _loading(patch: Patch, source: str, file: str) -> str:
    text = f"""```python
from erasure import ErasedStableDiffusionPipeline

pipe = ErasedStableDiffusionPipeline.from_pretrained("{_said(patch.base)}")
pipe.load_patch("{source}")
```"""
    if patch.payload.kind != "low-rank":
        return text
    gated = "" if patch.gate["kind"] == "always" else ", which knows no gate: there it acts on every prompt"
    place = f'"{source}", weight_name="{file}"' if source != file else f'"{file}"'
    return f"{text}\n\nOr as a LoRA in diffusers{gated}:\n\n```python\npipe.load_lora_weights({place})\n```"
