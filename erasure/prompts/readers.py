"""Prompt sets from files: our CSV, and what published work ships, told apart by the header.

Understood beside our own columns (id, prompt, seed, guidance, labels):

- I2P (2211.05105), ESD, UCE, MACE, RECE, UnlearnDiffAtk and COCO lists: one header of NAMES, in any order and
  case; an index column of pandas gives the id where nothing else does. Every other column stays as a label,
  except LEFT_OUT, which says how somebody else's picture was drawn.
- RECE's and Ring-A-Bell's pairs: the sensitive prompt is drawn, the normal one is the label `normal prompt`.
- HUB (2410.05664): one prompt a line without a header; translations, one row a language with the label
  `language`; nouns, asked for as "a photo of NOUN" with the label `object`; JSON lists of prompts and nouns.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError
from erasure.prompts.row import FIXED, REQUIRED, Prompt

# Our column, and what others call it. Where a file has several prompts in a row, the first of these is drawn.
NAMES = {
    "id": ("case_number", "case_num", "id"),
    "prompt": ("prompt", "sensitive prompt", "adversarial_prompt", "text"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance"),
}
INDEX = re.compile(r"(unnamed: [\d.]+|index)?", re.IGNORECASE)
LEFT_OUT = ("sd_image_width", "sd_image_height", "sd_model", "lexica_url")
LANGUAGES = ("Original", "Spanish", "French", "German", "Italian", "Portuguese")
PINPOINT = "a photo of {noun}"
SEEDS = range(-(2**63), 2**64)  # what torch takes


@dataclass(frozen=True)
class Table:
    """A file's columns and rows, each row with the words that say where it stands."""

    path: Path
    columns: list[str]
    rows: list[tuple[str, dict[str, str]]]


def read(path: Path) -> list[Prompt]:
    """The rows of a prompt file, whatever its form.

    A row without a seed gets its place in the file, from 0, as its seed; a row without an id, its place as its id.
    An id that stands again gets `_1`, `_2`, ... (not in our own form, where that is an error).

    Raises:
        ErasureError: an unreadable or empty file, no column of prompts, or a bad cell; with its row and column.
    """
    text = _text(path)
    if not text.strip():
        raise ErasureError(f"{path} is empty: a header with a column of prompts is needed, or one prompt a line")
    suffix = path.suffix.lower()
    if suffix == ".json":
        table = _json(path, text)
    elif suffix == ".txt" or not _has_header(text):
        table = _lines(path, text)
    else:
        table = _csv(path, text)
        if _is_ours(table.columns):
            return _ours(table)
    table = _multilingual(_pinpoint(table))
    found = _mapping(table)
    return _apart([_prompt(at, cells, found, place) for place, (at, cells) in enumerate(table.rows)])


def reserved() -> set[str]:
    """Names that a label cannot have in the published form, because the reader takes them for something else."""
    return {name for ours in ("id", "seed", "guidance") for name in NAMES[ours]}


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise ErasureError(f"{path}: cannot be read: {fault.strerror or fault}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line, place = _line(data, fault.start, b"\n")
        bad = data[fault.start] if fault.start < len(data) else 0
        raise ErasureError(
            f"{path}, line {line}, byte {place}: 0x{bad:02x} is no UTF-8; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line, place = _line(text, text.index("\0"), "\n")
        raise ErasureError(f"{path}, line {line}, character {place}: a NUL byte; this is no text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line(data: Any, at: int, end: Any) -> tuple[int, int]:
    """The line of an offset, and the place in that line, both from 1."""
    return data.count(end, 0, at) + 1, at - data.rfind(end, 0, at)


def _known() -> set[str]:
    names = {name for names in NAMES.values() for name in names}
    return names | {name.casefold() for name in LANGUAGES} | {"noun"}


def _has_header(text: str) -> bool:
    """Whether the first line names columns, or is a prompt already.

    Single words, several of them, are a header even where none is known, so that a file without a column of
    prompts is an error and not a list of prompts. A name that is an ordinary word as well counts only among
    single words.
    """
    first = next(line for line in text.split("\n") if line.strip())
    with _cells_up_to(len(first)):
        cells = [cell.strip().casefold() for cell in next(csv.reader([first]))]
    if set(cells) & {name for name in _known() if "_" in name or "prompt" in name}:
        return True
    single = all(re.fullmatch(r"\w*", cell) for cell in cells)
    return single and (len(cells) > 1 or bool(set(cells) & _known()))


@contextmanager
def _cells_up_to(size: int) -> Iterator[None]:
    """csv refuses cells over 131,072 characters unless told otherwise; the setting is the process's."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, size))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _records(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Cells with the number of their row, the header being row 1. Empty lines count and are left out."""
    lines, found, number = csv.reader(io.StringIO(text, newline=""), strict=True), [], 0
    with _cells_up_to(len(text)):
        try:
            for number, cells in enumerate(lines, 1):
                if cells:
                    found.append((number, cells))
        except csv.Error as fault:
            raise ErasureError(f"{path}, row {number + 1}, up to line {lines.line_num}: {fault}") from None
    return found


def _csv(path: Path, text: str) -> Table:
    (_, header), *records = _records(path, text)
    columns = [column.strip() for column in header]
    twice = [column for i, column in enumerate(columns) if column in columns[:i]]
    if twice:
        raise ErasureError(f"{path}, row 1: the column {twice[0]!r} stands twice")
    rows = []
    for number, cells in records:
        if len(cells) != len(columns):
            where = f", column {columns[len(cells)]!r}: missing" if len(cells) < len(columns) else ""
            raise ErasureError(
                f"{path}, row {number}{where}: {len(cells)} cells, and the header has {len(columns)}; "
                "a comma inside a cell needs quotes around the cell"
            )
        rows.append((f"{path}, row {number}", dict(zip(columns, cells, strict=True))))
    return Table(path, columns, rows)


def _lines(path: Path, text: str) -> Table:
    """One prompt a line; in a CSV it may stand in quotes and then hold newlines."""
    found: list[tuple[int, str]] = []
    if path.suffix.lower() != ".txt":
        try:
            records = _records(path, text)
        except ErasureError:  # a quote inside a prompt: these are plain lines
            records = []
        if all(len(cells) == 1 for _, cells in records):
            found = [(number, cells[0]) for number, cells in records]
    found = found or list(enumerate(text.split("\n"), 1))
    rows = [(f"{path}, row {number}", {"prompt": line.strip()}) for number, line in found if line.strip()]
    return Table(path, ["prompt"], rows)


def _json(path: Path, text: str) -> Table:
    """A list of objects; lists in them become text with commas."""
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as fault:
        raise ErasureError(f"{path}: no JSON: {fault}") from None
    if not isinstance(entries, list) or not entries:
        raise ErasureError(f"{path}: a list of objects with a key for the prompt is needed")
    rows = []
    for number, entry in enumerate(entries, 1):
        at = f"{path}, row {number}"
        if not isinstance(entry, dict):
            raise ErasureError(f"{at}: is no object but {json.dumps(entry)[:40]}")
        rows.append((at, {key.strip(): _flat(at, key, value) for key, value in entry.items()}))
    columns = list(dict.fromkeys(key for _, cells in rows for key in cells))
    return Table(path, columns, [(at, dict.fromkeys(columns, "") | cells) for at, cells in rows])


def _flat(at: str, key: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    if isinstance(value, (dict, list)):
        raise ErasureError(f"{at}, column {key!r}: text, a number or a list of texts is needed")
    return "" if value is None else str(value)


def _pinpoint(table: Table) -> Table:
    if "noun" not in table.columns or {name.casefold() for name in table.columns} & set(NAMES["prompt"]):
        return table
    rows = []
    for at, cells in table.rows:
        noun, rest = _filled(at, "noun", cells), {key: value for key, value in cells.items() if key != "noun"}
        rows.append((at, {"prompt": PINPOINT.format(noun=noun), "object": noun, **rest}))
    return Table(table.path, ["prompt", "object", *(name for name in table.columns if name != "noun")], rows)


def _multilingual(table: Table) -> Table:
    languages = [name for name in table.columns if name in LANGUAGES]
    if "Original" not in languages or len(languages) < 2:
        return table
    rest = [name for name in table.columns if name not in languages and not INDEX.fullmatch(name)]
    index = next((name for name in table.columns if INDEX.fullmatch(name)), None)
    rows = []
    for place, (at, cells) in enumerate(table.rows):
        for language in languages:
            number = cells[index] if index is not None else place
            row = {"id": f"{number}-{language}", "prompt": _filled(at, language, cells), "language": language}
            rows.append((at, {**row, **{name: cells[name] for name in rest}}))
    return Table(table.path, ["id", "prompt", "language", *rest], rows)


def _mapping(table: Table) -> dict[str, str]:
    """Our columns and the file's."""
    folded = {column.casefold(): column for column in table.columns}
    found = {}
    for ours, names in NAMES.items():
        there = [folded[name] for name in names if name in folded]
        if len(there) > 1 and ours != "prompt":
            raise ErasureError(
                f"{table.path}, row 1: the columns {' and '.join(map(repr, there))} both give the {ours}; keep one"
            )
        if there:
            found[ours] = there[0]
    if "prompt" not in found:
        raise ErasureError(
            f"{table.path}, row 1: no column of prompts; it has {', '.join(map(repr, table.columns))}. Understood: "
            f"{', '.join(map(repr, NAMES['prompt']))}. For one prompt a line without a header, name the file .txt"
        )
    index = [column for column in table.columns if INDEX.fullmatch(column)]
    if "id" not in found and index:
        found["id"] = index[0]
    return found


def _prompt(at: str, cells: dict[str, str], found: dict[str, str], place: int) -> Prompt:
    taken = {*found.values(), *LEFT_OUT}
    labels = {key: value for key, value in cells.items() if value and key not in taken and not INDEX.fullmatch(key)}
    text = _filled(at, found["prompt"], cells)
    name = str(place)
    if "id" in found and not (INDEX.fullmatch(found["id"]) and not cells[found["id"]].strip()):
        name = _filled(at, found["id"], cells).strip()
    seed = place
    if "seed" in found and cells[found["seed"]].strip():
        seed = _seed(at, found["seed"], cells)
    return Prompt(name, text, seed, _guidance(at, found.get("guidance"), cells), labels)


def _is_ours(columns: list[str]) -> bool:
    """Id, prompt and seed under these names; or no seed under any name, which is an error of ours."""
    foreign = {column.casefold() for column in columns} & set(NAMES["seed"])
    return {"id", "prompt"} <= set(columns) and ("seed" in columns or not foreign)


def _ours(table: Table) -> list[Prompt]:
    for column in REQUIRED:
        if column not in table.columns:
            raise ErasureError(f"{table.path}: column {column!r} is missing; it has {', '.join(table.columns)}")
    rows = []
    for at, cells in table.rows:
        _filled(at, "id", cells)
        labels = {key: value for key, value in cells.items() if key not in FIXED and value}
        guidance = _guidance(at, "guidance" if "guidance" in cells else None, cells)
        rows.append(Prompt(cells["id"], cells["prompt"], _seed(at, "seed", cells), guidance, labels))
    return rows


def _filled(at: str, column: str, cells: dict[str, str]) -> str:
    if not cells[column].strip():
        raise ErasureError(f"{at}, column {column!r}: empty")
    return cells[column]


def _seed(at: str, column: str, cells: dict[str, str]) -> int:
    """A whole number; pandas writes 7.0 where a column has gaps."""
    text = cells[column].strip()
    if not re.fullmatch(r"[+-]?[0-9]{1,20}(\.0*)?", text):
        raise ErasureError(f"{at}, column {column!r}: {cells[column]!r} is no whole number")
    if (value := int(text.split(".")[0])) not in SEEDS:
        raise ErasureError(f"{at}, column {column!r}: {text} is outside {SEEDS.start} to {SEEDS.stop - 1}")
    return value


def _guidance(at: str, column: str | None, cells: dict[str, str]) -> float | None:
    if column is None or not cells[column]:
        return None
    try:
        value = float(cells[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ErasureError(f"{at}, column {column!r}: {cells[column]!r} is no number")
    return value


def _apart(rows: Iterable[Prompt]) -> list[Prompt]:
    """Ids made to differ: lists that repeat a prompt with other seeds repeat the number as well."""
    listed = list(rows)
    taken, times, found = {row.id for row in listed}, {}, []  # type: ignore[var-annotated]
    for row in listed:
        if row.id not in times:
            times[row.id] = 0
            found.append(row)
            continue
        name = row.id
        while name in taken:
            times[row.id] += 1
            name = f"{row.id}_{times[row.id]}"
        taken.add(name)
        found.append(replace(row, id=name))
    return found
