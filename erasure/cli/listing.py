"""Commands that show what there is: methods, models, suites, prompts."""

from __future__ import annotations

import argparse
from typing import Any

from erasure.cli.inputs import say

SAID = {"about": "glyph's prompts about the concept: its own, other words for it, its neighbours, others"}


def run_methods(given: argparse.Namespace) -> None:
    """`erasure methods`."""
    import dataclasses
    import inspect

    from erasure import methods

    if given.name:
        cls = methods.find(given.name)
        fields = {f.name: {"default": f.default, "type": str(f.type)} for f in dataclasses.fields(cls)}
        say(given, fields, f"{inspect.getdoc(inspect.getmodule(cls))}\n\n{inspect.getdoc(cls)}")
        return
    rows = {
        name: (inspect.getdoc(inspect.getmodule(methods.find(name))) or "").split("\n")[0] for name in methods.names()
    }
    say(given, rows, "\n".join(rows.values()))


def run_models(given: argparse.Namespace) -> None:
    """`erasure models`."""
    from erasure.model import presets
    from erasure.model.loading import quiet
    from erasure.model.targets import TARGETS

    if given.name:
        from erasure.model.meta import counts, outline

        quiet()
        base = outline(given.name)
        found = {"about": base.about, "variants": counts(base)}
        lines = [f"{given.name}: {base.about}", f"{'variant':14}{'modules':>8}{'weights':>16}{'rank-1 term':>13}"]
        lines += [
            f"{name:14}{row['modules']:8}{row['weights']:16,}{row['rank_1']:13,}  {TARGETS[name][0]}"
            for name, row in counts(base).items()
        ]
        say(given, found, "\n".join(lines))
        return
    also = "also: a hub id (owner/name), a diffusers folder, a .safetensors file (Stable Diffusion 1, 2, XL)"
    models = {name: preset.about for name, preset in presets.bundled().items()}
    say(given, models, "\n".join([*(f"{name}: {text}" for name, text in models.items()), also]))


def run_suites(given: argparse.Namespace) -> None:
    """`erasure suites`."""
    from erasure.evaluation.suite import Suite, names

    if given.name:
        suite = Suite.read(given.name)
        parts = {
            name: part.prompts or f"{part.template} ({', '.join(f'{len(v)} {k}' for k, v in part.fill.items())})"
            for name, part in suite.parts.items()
        }
        lines = [suite.about, f"source: {suite.source}", f"made for: {suite.base}", f"judge: {suite.judge}"]
        lines += [f"part {name}: {SAID.get(text, text)}" for name, text in parts.items()]
        lines += [f"then attacked: {', '.join(suite.attacks)}, {suite.cases} cases"] if suite.attacks else []
        lines += [f"differs: {suite.differs}"] if suite.differs else []
        found: dict[str, Any] = {
            "about": suite.about,
            "source": suite.source,
            "base": suite.base,
            "judge": suite.judge,
            "parts": parts,
            "attacks": list(suite.attacks),
            "cases": suite.cases if suite.attacks else None,
        }
        say(given, found, "\n".join(lines))
        return
    rows = {name: Suite.read(name).about for name in names()}
    say(given, rows, "\n".join(f"{name:16}{text}" for name, text in rows.items()))


def run_prompts(given: argparse.Namespace) -> None:
    """`erasure prompts`."""
    from erasure.prompts.prompt_set import PromptSet, names

    if given.name:
        rows = PromptSet.read(given.name).rows
        found = [{"id": row.id, "prompt": row.prompt, "seed": row.seed, **row.labels} for row in rows]
        say(given, found, "\n".join(f"{row.id}  {row.prompt}" for row in rows))
        return
    sizes = {name: len(PromptSet.read(name).rows) for name in names()}
    say(given, sizes, "\n".join(f"{name}: {count} prompts" for name, count in sizes.items()))
