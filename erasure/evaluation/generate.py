"""Images of a prompt set: one PNG a row, one record a picture, made once and found again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from PIL import Image, UnidentifiedImageError

from erasure.distributed import ProcessGroup, process_group
from erasure.errors import ErasureError
from erasure.evaluation.progress import meter
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt

STEPS = 25
GUIDANCE = 3.0
# How many pictures a CPU draws at once: never more nor fewer, because a matrix product owes its last bits to the size
# of its batch. A small model gains from four; one that draws 512 pixels fills the cores with one.
TOGETHER = 4
SMALL = 32  # side of the latents up to which a model is small
RECORDS = "records.jsonl"
PARTS = "records.part-*.jsonl"  # one a process, until the main one merges them
PIECE = 1 << 18  # numbers that a checksum widens at once: they stay in a core's cache


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

    A picture that is there, whole and of the same settings is not made again: after a kill or a full disk the same
    call goes on. Pictures are written as they come; none is kept in memory.

    Where accelerate or torchrun started several processes, each with this pipeline on its own device
    (`PartialState().device`), each draws a share into the one folder, and all return all records.

    The noise of a row comes from its own seed. On a CPU pictures are drawn in batches of one size (see TOGETHER), the
    last one filled up, so that every byte is the same for any batch size, order, resume and number of processes; only
    another number of threads (OMP_NUM_THREADS) may move a value by 1 of 255. Rows for which a latent gate opens may
    move as much with the rows beside them, which decide the size of the patched batch. On an accelerator the last
    batch is filled up too, and pictures of one batch size meet equal shapes; between batch sizes they agree up to
    rounding.

    Args:
        pipe: the pipeline.
        prompts: the rows.
        folder: for pictures and records; shared by all processes.
        steps: sampling steps.
        guidance: of rows that name none.
        batch_size: pictures at once on an accelerator.
        progress: show how far it is: a bar, or lines where there is no terminal; the main process alone.

    Returns:
        One record a row, in order.

    Raises:
        ErasureError: the folder holds pictures of other settings, or cannot be written; an id is no file name; the
            processes hold different pipelines, or one of them failed. What was drawn is kept.
    """
    if steps < 1 or batch_size < 1:
        raise ErasureError(f"steps={steps}, batch_size={batch_size}: both must be at least 1")
    if not math.isfinite(guidance):
        raise ErasureError(f"guidance={guidance}: must be a finite number, such as {GUIDANCE}")
    for row in prompts.rows:
        if Path(row.id).name != row.id or row.id.startswith("."):
            raise ErasureError(f"{prompts.name}: the id {row.id!r} is no file name")
    artist = _Artist(pipe, Path(folder), steps, _shapes(pipe, prompts, guidance, batch_size))
    with process_group(on_cpu(pipe)) as us:
        settings = us.each(lambda: image_settings(pipe, steps, guidance))
        strange = {key for other in settings for key in _changed(settings[0], other)}
        if strange:
            raise ErasureError(f"the processes hold different pipelines ({', '.join(sorted(strange))} differ)")
        done = us.first(lambda: _open(artist.folder, settings[0], prompts, steps, guidance))
        todo = us.share([(_scale(row, guidance), row) for row in prompts.rows if row.id not in done])
        drawn = us.each(lambda: artist.draw(todo, us, progress))
        done |= {record.id: record for share in drawn for record in share}
        us.first(lambda: _merge(artist.folder, done.values()))
    return [done[row.id] for row in prompts.rows]


def active_patches(pipe: Any) -> dict[str, float]:
    """Names and strengths of the patches that act; a pipeline without patches has none."""
    listed = pipe.get_list_patches() if hasattr(pipe, "get_list_patches") else {}
    return {name: entry["strength"] for name, entry in sorted(listed.items()) if entry["strength"] != 0}


def _scale(row: Prompt, guidance: float) -> float:
    return guidance if row.guidance is None else row.guidance


def on_cpu(pipe: Any) -> bool:
    """Whether the pipeline computes on the CPU."""
    # Offloaded pipelines rest on the CPU and run elsewhere: diffusers knows where.
    device = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", "cpu")
    return str(device).startswith("cpu")


def _shapes(pipe: Any, prompts: PromptSet, guidance: float, batch_size: int) -> dict[float, int]:
    """Guidance scale -> how many pictures a call makes: the same for every share and resume of the prompt set."""
    scales = [_scale(row, guidance) for row in prompts.rows]
    if on_cpu(pipe):
        side = getattr(getattr(getattr(pipe, "unet", None), "config", None), "sample_size", None)
        return dict.fromkeys(scales, TOGETHER if isinstance(side, int) and side <= SMALL else 1)
    return {scale: min(batch_size, scales.count(scale)) for scale in set(scales)}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise ErasureError(
            f"{folder}: cannot be written: {fault.strerror or fault}. "
            "What was drawn is kept, and the same call goes on from there"
        ) from None


def image_settings(pipe: Any, steps: int, guidance: float) -> dict[str, Any]:
    """All that a picture depends on beside its row, as JSON would give it back."""
    import torch

    parts = getattr(pipe, "components", {})
    scheduler = pipe.scheduler
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    found = {
        **{name: checksum(part) for name, part in sorted(parts.items()) if isinstance(part, torch.nn.Module)},
        "patches": active_patches(pipe),
        "scheduler": {"class": type(scheduler).__name__, **config},
        "steps": steps,
        "guidance": guidance,
        "torch": torch.__version__,
    }
    return json.loads(json.dumps(found, default=str))


def checksum(module: Any) -> str:
    """16 hexadecimal digits that tell a module's weights from others; paths and names may lie.

    Two sums over the bits of each tensor as whole numbers modulo 2**64, one of them weighted by place: exact on every
    device, in pieces that need little memory, and nothing but the sums leaves the device.
    """
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    places = torch.arange(1, PIECE + 1)
    for name, value in sorted(getattr(module, "_orig_mod", module).state_dict().items()):
        sums = []
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
        if isinstance(value, torch.Tensor) and not value.is_meta and value.element_size() in whole:
            bits = value.detach().contiguous().view(-1).view(whole[value.element_size()])
            places = places.to(bits.device)
            for piece in bits.split(PIECE):
                wide = piece.long()
                sums.append(torch.stack([wide.sum(), (wide * places[: len(wide)]).sum()]))
        digest.update(f"{name}:{torch.stack(sums).tolist() if sums else ''}".encode())
    return digest.hexdigest()[:16]


def _changed(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if key not in one or key not in other or one[key] != other[key]]


def _open(folder: Path, settings: dict[str, Any], prompts: PromptSet, steps: int, guidance: float) -> dict[str, Record]:
    with _writing(folder):
        _pin(folder, settings)
        return _whole(folder, prompts, steps, guidance)


def _pin(folder: Path, settings: dict[str, Any]) -> None:
    note = folder / "settings.json"
    if note.is_file():
        try:
            found = json.loads(note.read_text())
        except json.JSONDecodeError:
            found = {}
        changed = _changed(settings, found)
        if changed:
            raise ErasureError(
                f"{folder} holds pictures of other settings ({', '.join(changed)} differ); "
                "they were left untouched: use another folder, or delete this one"
            )
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _write(note, json.dumps(settings, indent=1))


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _recorded(folder: Path) -> Iterator[Record]:
    """What the records say, also those of processes that were killed; the newest file comes last."""
    parts = sorted(folder.glob(PARTS), key=lambda path: path.stat().st_mtime)
    for path in [folder / RECORDS, *parts]:
        if not path.is_file():
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield Record(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue  # the line that a kill cut off


def _whole(folder: Path, prompts: PromptSet, steps: int, guidance: float) -> dict[str, Record]:
    """Records of the rows whose pictures are there and whole."""
    found: dict[str, Record] = {}
    wanted = {row.id: row for row in prompts.rows}
    for record in _recorded(folder):
        row = wanted.get(record.id)
        if row is None:
            continue
        asked = (row.prompt, row.seed, steps, _scale(row, guidance))
        same = (record.prompt, record.seed, record.steps, record.guidance) == asked
        image = folder / "images" / f"{record.id}.png"
        if same and image.is_file() and hashlib.sha256(image.read_bytes()).hexdigest() == record.sha256:
            # Labels belong to the prompt set, not to the picture: other sets may share it.
            found[record.id] = replace(record, labels=dict(row.labels))
    return found


def _merge(folder: Path, done: Iterable[Record]) -> None:
    """One file of records from those of all processes; it also keeps those of other prompt sets."""
    with _writing(folder):
        parts = list(folder.glob(PARTS))
        if not parts:
            return
        records = {record.id: record for record in [*_recorded(folder), *done]}
        _write(folder / RECORDS, "".join(json.dumps(asdict(record)) + "\n" for record in records.values()))
        for part in parts:
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Artist:
    """Draws rows into a folder, in batches of fixed sizes."""

    pipe: Any
    folder: Path
    steps: int
    sizes: dict[float, int]

    def draw(self, todo: Sequence[tuple[float, Prompt]], us: ProcessGroup, progress: bool) -> list[Record]:
        """Draw this process's rows, each with its guidance scale; a record follows each picture at once."""
        if not todo:
            return []
        # Rows of one call share the guidance scale.
        groups: dict[float, list[Prompt]] = {}
        for scale, row in todo:
            groups.setdefault(scale, []).append(row)
        noun = f"drawing {self.folder.name}" + (f", process 1 of {us.count}" if us.count > 1 else "")
        part = self.folder / PARTS.replace("*", f"{us.index}-{uuid.uuid4().hex[:8]}")
        made: list[Record] = []
        with meter(len(todo), noun, progress and us.main) as tell, _writing(self.folder), part.open("x") as file:
            for scale, rows in groups.items():
                size = self.sizes[scale]
                for start in range(0, len(rows), size):
                    few = rows[start : start + size]
                    made += self._batch(few, scale, file)
                    tell(len(few))
        return made

    def _batch(self, rows: list[Prompt], scale: float, file: TextIO) -> list[Record]:
        import torch

        # Filled up with its last row: every call has the same shape.
        full = [*rows, *rows[-1:] * (self.sizes[scale] - len(rows))]
        images = self.pipe(
            prompt=[row.prompt for row in full],
            generator=[torch.Generator("cpu").manual_seed(row.seed) for row in full],
            num_inference_steps=self.steps,
            guidance_scale=scale,
        ).images
        gates = getattr(self.pipe, "gate_log", None) or [{} for _ in full]
        record = partial(Record, steps=self.steps, guidance=scale)
        made = []
        for row, image, gate in list(zip(full, images, gates, strict=True))[: len(rows)]:
            digest = _save(image, self.folder / "images" / f"{row.id}.png")
            made.append(record(row.id, row.prompt, row.seed, sha256=digest, labels=dict(row.labels), gates=dict(gate)))
            file.write(json.dumps(asdict(made[-1])) + "\n")
            file.flush()
        return made


def _save(image: Image.Image, path: Path) -> str:
    """Write a picture under a temporary name, then rename it; returns its sha256."""
    temporary = path.with_suffix(".tmp")
    try:
        image.save(temporary, format="PNG")
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk, room for others
        raise
    return digest


def read_image(folder: Path, record: Record) -> Image.Image | None:
    """The picture of a record, or None if it is gone or broken."""
    try:
        with Image.open(folder / "images" / f"{record.id}.png") as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
