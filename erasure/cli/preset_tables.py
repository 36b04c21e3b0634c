"""The presets as tables: method, kind of concept, settings and their source, for each family of checkpoints.

`python -m erasure.cli.preset_tables` prints docs/presets.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from erasure.cli import choices

if TYPE_CHECKING:
    from erasure.model.presets import Preset

HEADS = ("method", "kind", "settings", "source")
DEFAULT_HEADS = ("without `--method`", "kind", "names by one patch", "source")
PAGE = (
    "# Presets\n\n"
    "<!-- Made by `python -m erasure.cli.preset_tables`, with which a test compares it. Edit the YAML files. -->"
    "\n\n"
    "Settings depend on the checkpoint. A preset ([model/presets](../erasure/model/presets)) holds those that suit one "
    'family of checkpoints, each with its source: a paper, an official script, or "derived", with the reason. Glyph\'s '
    "were tuned on glyph.\n\n"
    "A checkpoint takes the preset that names it, or else that of its architecture; a warning says so. One of no known "
    "family is refused unless `iterations` and `learning_rate` are given (`--set`, `--config`), or a preset is named "
    "with `--preset`. Settings of `--config` and `--set` override those of a preset. `erasure plan` and "
    "`erasure erase` print where each setting came from.\n\n"
    "Where no method is named, the preset's first row that holds for any of the concepts names it, unless that method "
    "cannot erase from the network. A checkpoint of no known family takes `esd`.\n\n"
    "Prompts and anchors are those of the published scripts where these have any; `{}` stands for each name of the "
    "concept. `--anchor` overrides an anchor. Methods that are not listed take their own defaults on every checkpoint."
    "\n\n"
    "```bash\nerasure list presets\nerasure list presets sd1\n```\n"
)


def run_presets(args: argparse.Namespace) -> None:
    """Run `erasure list presets`."""
    from erasure.cli.output import facts, say, table
    from erasure.model import presets

    if args.name is None:
        known = [presets.find(name) for name in presets.names()]
        say(
            args,
            {preset.name: preset.about for preset in known},
            table(("preset", "what it is for", "images"), [(own.name, own.about, _sampling(own)) for own in known]),
            "\nThe settings of each method, and their sources: erasure list presets NAME",
        )
        return
    preset = presets.find(args.name)
    rows = preset_rows(preset)
    data = [dict(zip(HEADS, row, strict=True)) for row in rows]
    sampled = facts("Sampling", [("images", _sampling(preset)), ("source", preset.sampling.source)])
    chosen = table(DEFAULT_HEADS, default_rows(preset))
    say(args, data, preset.about, sampled, "", chosen, "", table(HEADS, rows))


def page() -> str:
    """Return the text of docs/presets.md, with a section for each preset."""
    from erasure.model import presets

    parts = [PAGE]
    for preset in map(presets.find, presets.names()):
        named = f" Checkpoints that it names: {', '.join(f'`{name}`' for name in preset.checkpoints)}."
        parts.append(f"## {preset.name}\n{preset.about}.{named if preset.checkpoints else ''}\n")
        sampling = [("images", preset.sampling), ("previews", preset.preview)]
        cells = [(name, str(own.steps), f"{own.guidance:g}", own.scheduler, own.source) for name, own in sampling]
        parts.append(_markdown(("sampling", "steps", "guidance", "scheduler", "source"), cells))
        parts.append(_markdown(DEFAULT_HEADS, default_rows(preset)))
        parts.append(_markdown(HEADS, preset_rows(preset)))
    return "\n".join(parts)


def default_rows(preset: Preset) -> list[tuple[str, str, str, str]]:
    """Return the methods that a preset takes where none is named: method, kinds, number of names, source.

    Of the rows that hold, the first is taken.
    """
    return [
        (entry.method, _kinds(entry.kinds or choices.KINDS), f"{entry.at_least} or more", entry.source)
        for entry in reversed(preset.default)
    ]


def preset_rows(preset: Preset) -> list[tuple[str, str, str, str]]:
    """Return the rows of a preset: method, kinds of concept, settings, and the source that these have in common."""
    from erasure.model import presets

    covered = {method for name in presets.names() for method in presets.find(name).groups}
    rows = []
    for method in sorted(covered.intersection(choices.methods())):
        if method in preset.without:
            rows.append((method, "all", "not for these checkpoints", preset.without[method]))
            continue
        entries = [*_settings(preset, method), *_wording(preset, method)]
        rows += [
            (method, kinds, values, source.removeprefix(f"preset {preset.name}: ")) for kinds, values, source in entries
        ]
    return rows


def _settings(preset: Preset, method: str) -> list[tuple[str, str, str]]:
    """Return kinds, settings and source: settings are together where kinds and source are the same."""
    from erasure import methods
    from erasure.config import shown
    from erasure.model.presets import Family

    kinds_of: dict[tuple[str, str], list[str]] = {}
    for kind in choices.KINDS:
        chosen = methods.choose(method, kind, {}, family=Family(preset, "by its name"))
        for source, values in chosen.by_source().items():
            for name, value in values.items():
                kinds_of.setdefault((f"{name}={shown(value)}", source), []).append(kind)
    together: dict[tuple[str, str], list[str]] = {}
    for (text, source), kinds in kinds_of.items():
        together.setdefault((_kinds(kinds), source), []).append(text)
    return [(kinds, ", ".join(texts), source) for (kinds, source), texts in together.items()]


def _wording(preset: Preset, method: str) -> list[tuple[str, str, str]]:
    """Return kinds, prompts and source, then the concepts that have prompts or anchors of their own."""
    kinds_of: dict[tuple[str, str], list[str]] = {}
    single = []
    for kind in choices.KINDS:
        prompts, _, source = preset.wording(method, kind, "")
        if prompts:
            kinds_of.setdefault((f"prompts: {', '.join(prompts)}", source), []).append(kind)
        names = {name for group in preset.groups.get(method, ()) for name in (*group.names, *group.anchors)}
        for name in sorted(names):
            texts, anchor, origin = preset.wording(method, kind, name)
            if anchor is not None:
                single.append((f"{kind}: {name}", f"prompts: {', '.join(texts)}; anchor: {anchor}", origin))
    return [(_kinds(kinds), text, source) for (text, source), kinds in kinds_of.items()] + single


def _kinds(kinds: Sequence[str]) -> str:
    return "all" if len(kinds) == len(choices.KINDS) else ", ".join(kinds)


def _sampling(preset: Preset) -> str:
    own = preset.sampling
    return f"{own.steps} steps, guidance {own.guidance:g}, scheduler: {own.scheduler}"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
