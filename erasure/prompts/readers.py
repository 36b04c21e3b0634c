"""Read prompt sets from files: our own CSV format, and the formats of published work, recognised by their headers.

Besides our own columns (id, prompt, seed, guidance, labels), these are understood:

- The lists of I2P (2211.05105), ESD, UCE, MACE, RECE, UnlearnDiffAtk and COCO: columns under any of NAMES, in any
  order and case. A pandas index column gives the ids if no other column does. Every other column becomes a label,
  except IGNORED, which describe how somebody else's image was drawn.
- RECE's and Ring-A-Bell's prompt pairs: the sensitive prompt is drawn, and the normal one becomes the label
  `normal prompt`.
- HUB (2410.05664): one prompt per line without a header, where the NUL characters of attack prompts are left out;
  translations, where each language becomes a row with the label `language`; nouns, which become "a photo of NOUN" with
  the label `object`; JSON lists of prompts and nouns.
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

# Our column -> the names it has elsewhere. If a row has several prompts, the first of these columns is drawn.
NAMES = {
    "id": ("case_number", "case_num", "id"),
    "prompt": ("prompt", "sensitive prompt", "adversarial_prompt", "text"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance"),
}
INDEX = re.compile(r"(unnamed: [\d.]+|index)?", re.IGNORECASE)
IGNORED = ("sd_image_width", "sd_image_height", "sd_model", "lexica_url")
LANGUAGES = ("Original", "Spanish", "French", "German", "Italian", "Portuguese")
NOUN_PROMPT = "a photo of {noun}"
LFS = "version https://git-lfs"
MAX_NUL = 1000  # a text file has at most one NUL in so many characters
SEEDS = range(-(2**63), 2**64)  # the seeds that torch accepts


@dataclass(frozen=True)
class PromptTable:
    """The columns and rows of a file, before they are mapped to prompts.

    Args:
        path: the file.
        columns: names of the columns.
        rows: for each row, its location for error messages (`file.csv, row 3`) and its cells by column.
    """

    path: Path
    columns: list[str]
    rows: list[tuple[str, dict[str, str]]]


def read(path: Path) -> list[Prompt]:
    """Read the rows of a prompt file in any of the formats above.

    A row without a seed takes its position in the file, counted from 0, as its seed; a row without an id takes the
    position as its id. Repeated ids get the suffixes `_1`, `_2`, and so on (in our own format they are an error).

    Args:
        path: a .csv, .json or .txt file.

    Raises:
        ErasureError: the file is empty or cannot be read, it has no column of prompts, or a cell is invalid; the
            message names its row and column.
    """
    text = _read_text(path)
    if not text.strip():
        raise ErasureError(
            f"{path} is empty: expected a header with a column of prompts and rows below it, or one prompt per line"
        )
    suffix = path.suffix.lower()
    if suffix == ".json":
        table = _read_json(path, text)
    elif suffix == ".txt" or not _has_header(text):
        table = _read_lines(path, text)
    else:
        table = _read_csv(path, text)
        if _is_ours(table.columns):
            return _read_ours(table)
    table = _expand_languages(_expand_nouns(table))
    columns = _map_columns(table)
    prompts = [_to_prompt(location, cells, columns, i) for i, (location, cells) in enumerate(table.rows)]
    return _make_ids_unique(prompts)


def reserved() -> set[str]:
    """Return the names that a label cannot have in the published form, because the reader interprets them itself."""
    return {name for ours in ("id", "seed", "guidance") for name in NAMES[ours]}


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise ErasureError(f"{path}: cannot be read: {fault.strerror or fault}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line, column = _position(data, fault.start, b"\n")
        byte = data[fault.start] if fault.start < len(data) else 0
        raise ErasureError(
            f"{path}, line {line}, byte {column}: 0x{byte:02x} is not valid UTF-8; save the file as UTF-8"
        ) from None
    if text.startswith(LFS):
        raise ErasureError(
            f"{path} is only Git LFS's pointer to the file: fetch the file itself with `git lfs pull` in its repository"
        )
    # HUB's attack prompts, decoded from searched tokens, hold single NUL characters, which CLIP's published tokenizer
    # drops. A file with many of them is not text, or is text in UTF-16.
    if text.count("\0") * MAX_NUL > len(text):
        line, column = _position(text, text.index("\0"), "\n")
        raise ErasureError(f"{path}, line {line}, character {column}: a NUL byte; this is not a text file in UTF-8")
    return text.replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")


def _position(data: Any, offset: int, newline: Any) -> tuple[int, int]:
    """Return the line and the position in that line of an offset, both counted from 1."""
    return data.count(newline, 0, offset) + 1, offset - data.rfind(newline, 0, offset)


def _known_columns() -> set[str]:
    names = {name for names in NAMES.values() for name in names}
    return names | {name.casefold() for name in LANGUAGES} | {"noun"}


def _has_header(text: str) -> bool:
    """Return whether the first line names columns rather than being a prompt itself.

    Several single words count as a header even if none of them is known, so that a file without a column of prompts
    is an error rather than a list of prompts. A column name that is also an ordinary word counts only among single
    words.
    """
    first = next(line for line in text.split("\n") if line.strip())
    with _field_size_limit(len(first)):
        cells = [cell.strip().casefold() for cell in next(csv.reader([first]))]
    if set(cells) & {name for name in _known_columns() if "_" in name or "prompt" in name}:
        return True
    single_words = all(re.fullmatch(r"\w*", cell) for cell in cells)
    return single_words and (len(cells) > 1 or bool(set(cells) & _known_columns()))


@contextmanager
def _field_size_limit(size: int) -> Iterator[None]:
    """Let csv read cells of this size: it refuses more than 131,072 characters, and the setting is process-wide."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, size))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_records(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return the number and the cells of each record; the header is row 1, and empty lines count but are left out."""
    reader, records, number = csv.reader(io.StringIO(text, newline=""), strict=True), [], 0
    with _field_size_limit(len(text)):
        try:
            for number, cells in enumerate(reader, 1):
                if cells:
                    records.append((number, cells))
        except csv.Error as fault:
            raise ErasureError(f"{path}, row {number + 1}, up to line {reader.line_num}: {fault}") from None
    return records


def _read_csv(path: Path, text: str) -> PromptTable:
    (_, header), *records = _csv_records(path, text)
    columns = [column.strip() for column in header]
    repeated = [column for i, column in enumerate(columns) if column in columns[:i]]
    if repeated:
        raise ErasureError(f"{path}, row 1: the column {repeated[0]!r} occurs twice")
    rows = []
    for number, cells in records:
        if len(cells) != len(columns):
            missing = f", column {columns[len(cells)]!r}: missing" if len(cells) < len(columns) else ""
            raise ErasureError(
                f"{path}, row {number}{missing}: {len(cells)} cells, but the header has {len(columns)}; "
                "put quotes around cells that contain a comma"
            )
        rows.append((f"{path}, row {number}", dict(zip(columns, cells, strict=True))))
    return PromptTable(path, columns, rows)


def _read_lines(path: Path, text: str) -> PromptTable:
    """Read one prompt per line; in a CSV file a prompt may be quoted, and then contain line breaks."""
    lines: list[tuple[int, str]] = []
    if path.suffix.lower() != ".txt":
        try:
            records = _csv_records(path, text)
        except ErasureError:  # a quotation mark inside a prompt: these are plain lines
            records = []
        if all(len(cells) == 1 for _, cells in records):
            lines = [(number, cells[0]) for number, cells in records]
    lines = lines or list(enumerate(text.split("\n"), 1))
    rows = [(f"{path}, row {number}", {"prompt": line.strip()}) for number, line in lines if line.strip()]
    return PromptTable(path, ["prompt"], rows)


def _read_json(path: Path, text: str) -> PromptTable:
    """Read a list of objects; lists inside them become comma-separated text."""
    try:
        entries = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as fault:
        raise ErasureError(f"{path}: not valid JSON: {fault}") from None
    if not isinstance(entries, list) or not entries:
        raise ErasureError(f"{path}: expected a list of objects, each with a key for its prompt")
    rows = []
    for number, entry in enumerate(entries, 1):
        location = f"{path}, row {number}"
        if not isinstance(entry, dict):
            raise ErasureError(f"{location}: expected an object, not {json.dumps(entry)[:40]}")
        rows.append((location, {key.strip(): _to_text(location, key, value) for key, value in entry.items()}))
    columns = list(dict.fromkeys(key for _, cells in rows for key in cells))
    return PromptTable(path, columns, [(location, dict.fromkeys(columns, "") | cells) for location, cells in rows])


def _to_text(location: str, key: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, (dict, list)):
        raise ErasureError(f"{location}, column {key!r}: expected text, a number or a list of texts")
    return "" if value is None else str(value)


def _expand_nouns(table: PromptTable) -> PromptTable:
    """Turn HUB's lists of nouns into prompts; return any other table unchanged."""
    if "noun" not in table.columns or {name.casefold() for name in table.columns} & set(NAMES["prompt"]):
        return table
    rows = []
    for location, cells in table.rows:
        noun = _required(location, "noun", cells)
        other = {key: value for key, value in cells.items() if key != "noun"}
        rows.append((location, {"prompt": NOUN_PROMPT.format(noun=noun), "object": noun, **other}))
    return PromptTable(table.path, ["prompt", "object", *(name for name in table.columns if name != "noun")], rows)


def _expand_languages(table: PromptTable) -> PromptTable:
    """Turn HUB's translations into one row per language; return any other table unchanged."""
    languages = [name for name in table.columns if name in LANGUAGES]
    if "Original" not in languages or len(languages) < 2:
        return table
    other = [name for name in table.columns if name not in languages and not INDEX.fullmatch(name)]
    index = next((name for name in table.columns if INDEX.fullmatch(name)), None)
    rows = []
    for position, (location, cells) in enumerate(table.rows):
        for language in languages:
            number = cells[index] if index is not None else position
            prompt = _required(location, language, cells)
            row = {"id": f"{number}-{language}", "prompt": prompt, "language": language}
            rows.append((location, {**row, **{name: cells[name] for name in other}}))
    return PromptTable(table.path, ["id", "prompt", "language", *other], rows)


def _map_columns(table: PromptTable) -> dict[str, str]:
    """Return our column -> the file's column, for those that the file has."""
    folded = {column.casefold(): column for column in table.columns}
    mapping = {}
    for ours, names in NAMES.items():
        candidates = [folded[name] for name in names if name in folded]
        if len(candidates) > 1 and ours != "prompt":
            raise ErasureError(
                f"{table.path}, row 1: the columns {' and '.join(map(repr, candidates))} both give the {ours}; "
                "keep only one of them"
            )
        if candidates:
            mapping[ours] = candidates[0]
    if "prompt" not in mapping:
        raise ErasureError(
            f"{table.path}, row 1: there is no column of prompts among {', '.join(map(repr, table.columns))}. Allowed "
            f"names: {', '.join(map(repr, NAMES['prompt']))}. If the file has one prompt per line and no header, "
            "name the file .txt"
        )
    index = [column for column in table.columns if INDEX.fullmatch(column)]
    if "id" not in mapping and index:
        mapping["id"] = index[0]
    return mapping


def _to_prompt(location: str, cells: dict[str, str], columns: dict[str, str], position: int) -> Prompt:
    used = {*columns.values(), *IGNORED}
    labels = {key: value for key, value in cells.items() if value and key not in used and not INDEX.fullmatch(key)}
    text = _required(location, columns["prompt"], cells)
    name = str(position)
    if "id" in columns and not (INDEX.fullmatch(columns["id"]) and not cells[columns["id"]].strip()):
        name = _required(location, columns["id"], cells).strip()
    seed = position
    if "seed" in columns and cells[columns["seed"]].strip():
        seed = _parse_seed(location, columns["seed"], cells)
    return Prompt(name, text, seed, _parse_guidance(location, columns.get("guidance"), cells), labels)


def _is_ours(columns: list[str]) -> bool:
    """Return whether the columns are of our own format: id, prompt and seed, or no seed column under any name.

    In the second case the missing seed is an error in a file of our format.
    """
    foreign = {column.casefold() for column in columns} & set(NAMES["seed"])
    return {"id", "prompt"} <= set(columns) and ("seed" in columns or not foreign)


def _read_ours(table: PromptTable) -> list[Prompt]:
    for column in REQUIRED:
        if column not in table.columns:
            raise ErasureError(
                f"{table.path}: the column {column!r} is missing; the file has {', '.join(table.columns)}"
            )
    rows = []
    for location, cells in table.rows:
        _required(location, "id", cells)
        labels = {key: value for key, value in cells.items() if key not in FIXED and value}
        guidance = _parse_guidance(location, "guidance" if "guidance" in cells else None, cells)
        rows.append(Prompt(cells["id"], cells["prompt"], _parse_seed(location, "seed", cells), guidance, labels))
    return rows


def _required(location: str, column: str, cells: dict[str, str]) -> str:
    if not cells[column].strip():
        raise ErasureError(f"{location}, column {column!r}: the cell is empty")
    return cells[column]


def _parse_seed(location: str, column: str, cells: dict[str, str]) -> int:
    """Parse an integer; pandas writes 7.0 in columns with gaps."""
    text = cells[column].strip()
    if not re.fullmatch(r"[+-]?[0-9]{1,20}(\.0*)?", text):
        raise ErasureError(f"{location}, column {column!r}: {cells[column]!r} is not an integer")
    if (value := int(text.split(".")[0])) not in SEEDS:
        raise ErasureError(
            f"{location}, column {column!r}: {text} is outside the range {SEEDS.start} to {SEEDS.stop - 1}"
        )
    return value


def _parse_guidance(location: str, column: str | None, cells: dict[str, str]) -> float | None:
    if column is None or not cells[column]:
        return None
    try:
        value = float(cells[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ErasureError(f"{location}, column {column!r}: {cells[column]!r} is not a number")
    return value


def _make_ids_unique(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Rename repeated ids: lists that repeat a prompt with other seeds often repeat its number as well."""
    listed = list(prompts)
    taken, copies, unique = {row.id for row in listed}, {}, []  # type: ignore[var-annotated]
    for row in listed:
        if row.id not in copies:
            copies[row.id] = 0
            unique.append(row)
            continue
        name = row.id
        while name in taken:
            copies[row.id] += 1
            name = f"{row.id}_{copies[row.id]}"
        taken.add(name)
        unique.append(replace(row, id=name))
    return unique
