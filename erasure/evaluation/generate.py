"""Images of a prompt set: one PNG a row, one record a picture, made once and found again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from erasure.errors import ErasureError
from erasure.evaluation.promptset import Prompt, PromptSet

STEPS = 25
GUIDANCE = 3.0


@dataclass(frozen=True)
class Record:
    """How one image was made."""

    id: str
    prompt: str
    seed: int
    steps: int
    guidance: float
    sha256: str
    labels: dict[str, str] = field(default_factory=dict)
    gates: dict[str, float] = field(default_factory=dict)


def generate(
    pipe: Any,
    prompts: PromptSet,
    folder: str | os.PathLike[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 16,
    progress: bool = True,
) -> list[Record]:
    """Draw every row of a prompt set into `folder/images/<id>.png`, with `folder/records.jsonl` beside.

    The noise of a row comes from its own seed, so that its picture does not depend on batch size, order or
    resume (beyond the last bits that a matrix product owes to its batch size). A picture that is there, whole
    and of the same settings is not made again.

    Raises:
        ErasureError: the folder holds pictures of other settings, or cannot be written; an id is no file name.
    """
    from tqdm import tqdm

    if steps < 1 or batch_size < 1:
        raise ErasureError(f"steps={steps}, batch_size={batch_size}: both must be at least 1")
    target = Path(folder)
    for row in prompts.rows:
        if Path(row.id).name != row.id or row.id.startswith("."):
            raise ErasureError(f"{prompts.name}: the id {row.id!r} is no file name")
    try:
        settings = _settings(pipe, steps)
        _pin(target, settings)
        done = _whole(target, prompts, steps, guidance)
        todo = [row for row in prompts.rows if row.id not in done]
        # Rows of one call share the guidance scale.
        groups: dict[float, list[Prompt]] = {}
        for row in todo:
            groups.setdefault(guidance if row.guidance is None else row.guidance, []).append(row)
        hidden = None if progress and sys.stderr.isatty() else True
        with tqdm(total=len(todo), desc="drawing", unit="image", disable=hidden, leave=False) as bar:
            for scale, rows in groups.items():
                for start in range(0, len(rows), batch_size):
                    part = rows[start : start + batch_size]
                    for record in _draw(pipe, part, target, steps, scale):
                        done[record.id] = record
                    bar.update(len(part))
    except OSError as fault:
        raise ErasureError(f"{target}: cannot be written: {fault.strerror or fault}") from None
    return [done[row.id] for row in prompts.rows]


def acting(pipe: Any) -> dict[str, float]:
    """Names and strengths of the patches that act; a pipeline without patches has none."""
    listed = pipe.get_list_patches() if hasattr(pipe, "get_list_patches") else {}
    return {name: entry["strength"] for name, entry in sorted(listed.items()) if entry["strength"] != 0}


def _settings(pipe: Any, steps: int) -> dict[str, Any]:
    import torch

    # A sum over the weights tells models and patches apart; paths and names may lie.
    total = hashlib.sha256()
    for part in ("unet", "text_encoder"):
        for name, value in getattr(pipe, part).state_dict().items():
            total.update(
                f"{part}.{name}:{value.double().sum().item():.12e}:{value.double().abs().sum().item():.12e}".encode()
            )
    return {
        "weights": total.hexdigest()[:16],
        "patches": acting(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "steps": steps,
        "torch": torch.__version__,
    }


def _pin(folder: Path, settings: dict[str, Any]) -> None:
    note = folder / "settings.json"
    if note.is_file():
        try:
            found = json.loads(note.read_text())
        except json.JSONDecodeError:
            found = {}
        changed = [key for key in settings if found.get(key) != settings[key]]
        if changed:
            raise ErasureError(
                f"{folder} holds pictures of other settings ({', '.join(changed)} differ); "
                "they were left untouched: use another folder, or delete this one"
            )
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    temporary = note.with_suffix(".tmp")
    temporary.write_text(json.dumps(settings, indent=1))
    os.replace(temporary, note)


def _whole(folder: Path, prompts: PromptSet, steps: int, guidance: float) -> dict[str, Record]:
    """Records of the rows whose pictures are there and whole."""
    found: dict[str, Record] = {}
    path = folder / "records.jsonl"
    if not path.is_file():
        return found
    wanted = {row.id: row for row in prompts.rows}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = Record(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue  # the line that a kill cut off
        row = wanted.get(record.id)
        if row is None:
            continue
        scale = guidance if row.guidance is None else row.guidance
        image = folder / "images" / f"{record.id}.png"
        same = (record.prompt, record.seed, record.steps, record.guidance) == (row.prompt, row.seed, steps, scale)
        if same and image.is_file() and hashlib.sha256(image.read_bytes()).hexdigest() == record.sha256:
            # Labels belong to the prompt set, not to the picture: other sets may share it.
            found[record.id] = replace(record, labels=dict(row.labels))
    return found


def _draw(pipe: Any, rows: list[Prompt], folder: Path, steps: int, guidance: float) -> list[Record]:
    import torch

    draws = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]
    images = pipe(
        prompt=[row.prompt for row in rows], generator=draws, num_inference_steps=steps, guidance_scale=guidance
    ).images
    gates = getattr(pipe, "gate_log", None) or [{} for _ in rows]
    made = []
    for row, image, gate in zip(rows, images, gates, strict=True):
        path = folder / "images" / f"{row.id}.png"
        temporary = path.with_suffix(".tmp")
        image.save(temporary, format="PNG")
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        os.replace(temporary, path)
        made.append(Record(row.id, row.prompt, row.seed, steps, guidance, digest, dict(row.labels), dict(gate)))
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(record)) + "\n" for record in made))
    return made


def read_image(folder: Path, record: Record) -> Image.Image | None:
    """The picture of a record, or None if it is gone or broken."""
    try:
        with Image.open(folder / "images" / f"{record.id}.png") as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
