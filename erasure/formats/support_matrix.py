"""Tables of the formats: what can be read and written, which programs load it, and what a patch can be exported to."""

from __future__ import annotations

from typing import Any

from erasure.errors import ErasureError
from erasure.formats import loaders
from erasure.formats.import_export import gate_notes
from erasure.formats.registry import FORMATS
from erasure.formats.requirements import need_low_rank
from erasure.patch import RUNTIME, Delta, Guard, LowRank, Patch


def rows() -> list[dict[str, Any]]:
    """Return the support matrix, one row per format.

    Returns:
        Tables with `format`, `about`, `holds`, `reads`, `writes`, `needs_base` (whether writing needs the base) and
        `loaders` (the programs that load it).
    """
    return [
        {
            "format": name,
            "about": entry.about,
            "holds": entry.holds,
            "reads": True,
            "writes": not entry.only_read,
            "needs_base": entry.rewrite is not None,
            "loaders": loaders.takes(name),
        }
        for name, entry in FORMATS.items()
    ]


def matrix() -> str:
    """Return the support matrix as a Markdown table."""
    heads = ["`--format`", "what", "reads", "writes", *loaders.LOADS]
    lines = [heads, ["---"] * len(heads)]
    for row in rows():
        marks = ["yes" if row[key] else "" for key in ("reads", "writes")]
        marks += ["yes" if name in row["loaders"] else "" for name in loaders.LOADS]
        lines.append([f"`{row['format']}`", row["about"], *marks])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def exports(patch: Patch) -> dict[str, str]:
    """Return for each format that can be written whether it can hold a patch, and what it leaves out.

    Args:
        patch: the patch.

    Returns:
        Name of the format -> a text that starts with "yes", "with --rank R" or "no".
    """
    verdicts = {}
    for name, entry in FORMATS.items():
        if entry.only_read:
            continue
        if patch.payload.kind in RUNTIME:
            what = "a guard changes" if isinstance(patch.payload, Guard) else "features change"
            verdicts[name] = f"no: {what} no weight"
            continue
        if entry.check is need_low_rank and isinstance(patch.payload, Delta):
            verdicts[name] = "with --rank R, approximated at that rank"
            continue
        try:
            entry.check(patch)
        except ErasureError as fault:
            verdicts[name] = f"no: {fault}"
            continue
        notes = [*gate_notes(patch, name), *loaders.notes(name, patch.weights)]
        if entry.rewrite is not None:
            notes.insert(0, "with --model, the base")
        if name == "diff" and isinstance(patch.payload, LowRank):
            notes.insert(0, "multiplied out")
        verdicts[name] = "; ".join(["yes", *notes])
    return verdicts
