"""The page of `erasure patch info`: what a patch is, what it erases and from what, what it took and where it loads."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from erasure.cli.output import facts

if TYPE_CHECKING:
    from erasure.patch import Patch

SHORT = 60  # characters of a value of the gate; longer ones are encoded arrays
DETAILS = {"aliases": "also called", "anchor": "shows instead", "keep": "preserves"}  # of a concept, in words
KINDS = {
    "low-rank": "LoRA factors",
    "delta": "differences of whole weights",
    "features": "features of a sparse autoencoder, switched off while drawing; no weight changes",
    "guard": "texts and settings that act while drawing; no weight changes",
}
COSTS = {"F": "forwards", "B": "backwards"}


def blocks(file: str, patch: Patch, loads: Mapping[str, str], exports: Mapping[str, str]) -> list[Any]:
    """Lay out a patch, section by section.

    Args:
        file: its path, as the user gave it.
        patch: the patch.
        loads: program -> what it makes of the file.
        exports: format -> what export makes of the patch.
    """
    return [
        f"{file}: {patch.method} patch that erases {', '.join(map(repr, patch.names))}",
        facts("What", _what(patch)),
        facts("Erased", [row for concept in patch.concepts for row in _concept(concept)]),
        facts("Base", _base(patch)),
        facts("Gate", _gate(patch.gate)),
        facts("Settings", [(key, plain(value)) for key, value in patch.config.items()] or [("none", "")]),
        facts("Costs", [(COSTS.get(key, key), plain(value)) for key, value in patch.costs.items()] or [("none", "")]),
        facts("Results", _results(patch.results)),
        facts("Where it loads", loads.items()),
        facts("Exports", exports.items()),
    ]


def _what(patch: Patch) -> list[tuple[str, object]]:
    info = patch.info()
    rank = f", rank {'/'.join(map(str, info['rank']))}" if info["rank"] else ""
    loss = f" (relative rounding error {info['dtype_error']:.2g})" if info["dtype_error"] else ""
    return [
        ("kind", f"{info['kind']}{rank} ({KINDS[info['kind']]})"),
        *_acts(info),
        ("size", f"{info['bytes']:,} bytes"),
        ("tensors", f"{info['tensors']:,} with {info['parameters']:,} numbers in {info['dtype']}{loss}"),
        ("method", patch.method),
        ("seed", patch.seed),
        ("made with", ", ".join(f"{name} {version}" for name, version in patch.versions.items()) or "not recorded"),
    ]


def _changes(info: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} weight tensors of {part}" for part, count in info["components"].items())


def _acts(info: Mapping[str, Any]) -> list[tuple[str, object]]:
    if info["guard"] is not None:
        return _guard(info["guard"])
    return [("changes", _changes(info))] if info["features"] is None else _features(info["features"])


def _features(features: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return where features act, what they are, and how good the autoencoder that they are of is."""
    told = [(key.replace("_", " "), plain(value)) for key, value in features["about"].items()]
    times = f"{len(features['timesteps'])} timesteps"
    return [("acts on", f"the output of {features['component']}.{features['block']}, at {times}"), *told]


def _guard(guard: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return what a guard changes while drawing, and with which texts and settings."""
    settings = [(key.replace("_", " "), plain(value)) for key, value in guard["settings"].items()]
    scale = [("scale", plain(guard["scale"]))] if guard["scale"] != 1 else []
    return [("acts on", guard["form"]), ("keeps out", plain(guard["texts"])), *settings, *scale]


def _concept(concept: Mapping[str, Any]) -> list[tuple[str, object]]:
    kind = concept.get("kind")
    details = [f"{word} {plain(concept[key])}" for key, word in DETAILS.items() if concept.get(key)]
    return [(str(concept.get("name", "?")), "; ".join([*([f"kind {kind}"] if kind else []), *details]))]


def _base(patch: Patch) -> list[tuple[str, object]]:
    prints = [(f"fingerprint of {part}", value) for part, value in patch.base_fingerprint.items()]
    return [("model", patch.base or "not recorded"), *prints]


def _gate(gate: Mapping[str, Any]) -> list[tuple[str, object]]:
    acts = {
        "always": "acts on every prompt",
        "text": "acts as strongly as the prompt's text resembles the concept's",
        "latent": "decides during the first steps whether the image is about the concept",
    }
    kind = str(gate["kind"])
    values = [(key, plain(value)) for key, value in gate.items() if key != "kind"]
    return [(kind, acts.get(kind, "")), *((key, value) for key, value in values if len(value) <= SHORT)]


def _results(results: Mapping[str, Any] | None) -> list[tuple[str, object]]:
    if not results:
        return [("none", "`erasure verify` measures a patch and adds its results")]
    rows: list[tuple[str, object]] = []
    for group, entry in results.items():
        if group in ("metrics", "attacks") and isinstance(entry, Mapping):
            rows += [(name, _cell(group, name, cell)) for name, cell in entry.items()]
        elif not isinstance(entry, Mapping | list):
            rows.append((group, plain(entry)))
    return rows


def _cell(group: str, name: str, cell: Any) -> str:
    """Return a figure with its interval and what it is compared with."""
    from erasure.evaluation.metrics.metric import format_value
    from erasure.evaluation.report.card import estimate_text

    if not isinstance(cell, Mapping) or not {"value", "low", "high"} <= cell.keys():
        return plain(cell)
    before = cell.get("base" if group == "metrics" else "before")
    measured = estimate_text(name if group == "metrics" else "", cell)  # type: ignore[arg-type]
    if before is None:
        return measured
    if group == "metrics":
        return f"{measured}; base {format_value(name, before)}"
    return f"success rate {measured}; without the attack {before:.0%}"


def plain(value: Any) -> str:
    """Return a JSON value in words: no quotes, no brackets, true as yes."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return textwrap.shorten(str(value), 500, placeholder=" ...")
