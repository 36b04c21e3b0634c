"""Draw the images of a prompt set: one PNG file and one record for each row, which later calls reuse."""

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
from erasure.evaluation.text_files import write_text
from erasure.model.loading import call_of, sampling_of
from erasure.prompts.prompt_set import PromptSet
from erasure.prompts.row import Prompt

# Images per batch on a CPU. The number is fixed, because the last bits of a matrix product depend on the batch size. A
# small model is faster with four images; a model that draws 512 pixels keeps all cores busy with one.
CPU_BATCH = 4
SMALL_LATENTS = 32  # side of the latents up to which a model counts as small
RECORDS = "records.jsonl"
RECORD_PARTS = "records.part-*.jsonl"  # one file for each process, until the main process merges them
CHUNK = 1 << 18  # numbers that a checksum widens at once, few enough for a core's cache


@dataclass(frozen=True)
class Record:
    """The prompt and the settings that one image was drawn with.

    Args:
        id: id of the row, and name of the image file.
        prompt: the text.
        seed: seed of the initial noise.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        sha256: SHA-256 digest of the image file.
        labels: labels of the row.
        gates: name -> strength with which each patch acted, as the pipeline's gate log gives it.
    """

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
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> list[Record]:
    """Draw every row of a prompt set into `folder/images/<id>.png`, and record it in `folder/records.jsonl`.

    An image that exists, is intact and has the same settings is not drawn again, so that the same call continues an
    interrupted run. Images are written as soon as they are drawn; none is kept in memory.

    If accelerate or torchrun started several processes, each with this pipeline on its own device
    (`PartialState().device`), each process draws a share into the same folder, and all of them return all records.

    The noise of a row comes from its own seed. On a CPU images are drawn in batches of a fixed size (CPU_BATCH), and
    the last batch is filled up, so that every byte is the same for any batch size, order, interruption and number of
    processes; only another number of threads (OMP_NUM_THREADS) may change a value by 1 of 255. Rows for which a latent
    gate opens may change as much with the other rows of their batch, which decide the size of the patched batch. On an
    accelerator the last batch is filled up as well; images of different batch sizes agree up to rounding.

    Args:
        pipe: the pipeline.
        prompts: the prompt set.
        folder: folder for images and records; shared by all processes.
        steps: sampling steps; None: what suits the checkpoint (`model.loading.sampling_of`).
        guidance: guidance scale of rows that set none; None: what suits the checkpoint.
        batch_size: images per batch on an accelerator.
        progress: show the progress in the main process, as a bar on a terminal and as lines elsewhere.

    Returns:
        One record for each row, in the order of the rows.

    Raises:
        ErasureError: the folder contains images of other settings or cannot be written, an id is not a valid file
            name, the processes have different pipelines, or one of them failed. Images already drawn are kept.
    """
    sampling = sampling_of(pipe, steps, guidance)
    steps, guidance = sampling.steps, sampling.guidance
    if steps < 1 or batch_size < 1:
        raise ErasureError(f"steps={steps}, batch_size={batch_size}: both must be at least 1")
    if not math.isfinite(guidance):
        raise ErasureError(f"guidance={guidance}: must be a finite number, such as 7.5")
    for row in prompts.rows:
        if Path(row.id).name != row.id or row.id.startswith("."):
            raise ErasureError(f"{prompts.name}: the id {row.id!r} cannot be used as a file name")
    drawer = _Drawer(pipe, Path(folder), steps, _batch_sizes(pipe, prompts, guidance, batch_size))
    with process_group(on_cpu(pipe)) as group:
        settings = group.each(lambda: image_settings(pipe, steps, guidance))
        different = {key for other in settings for key in _changed_keys(settings[0], other)}
        if different:
            raise ErasureError(f"the processes have different pipelines: they differ in {', '.join(sorted(different))}")
        done = group.first(lambda: _open_folder(drawer.folder, settings[0], prompts, steps, guidance))
        todo = group.share([(_scale(row, guidance), row) for row in prompts.rows if row.id not in done])
        shares = group.each(lambda: drawer.draw(todo, group, progress))
        done |= {record.id: record for records in shares for record in records}
        group.first(lambda: _merge_records(drawer.folder, done.values()))
    return [done[row.id] for row in prompts.rows]


def active_patches(pipe: Any) -> dict[str, float]:
    """Return the names and strengths of the pipeline's patches, without those of strength 0."""
    loaded = pipe.get_list_patches() if hasattr(pipe, "get_list_patches") else {}
    return {name: entry["strength"] for name, entry in sorted(loaded.items()) if entry["strength"] != 0}


def _scale(row: Prompt, guidance: float) -> float:
    return guidance if row.guidance is None else row.guidance


def on_cpu(pipe: Any) -> bool:
    """Return whether the pipeline computes on the CPU."""
    # Offloaded pipelines are stored on the CPU but run elsewhere; diffusers knows the device.
    device = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", "cpu")
    return str(device).startswith("cpu")


def _batch_sizes(pipe: Any, prompts: PromptSet, guidance: float, batch_size: int) -> dict[float, int]:
    """Return guidance scale -> images per batch, the same for every process and every resumed run."""
    scales = [_scale(row, guidance) for row in prompts.rows]
    if on_cpu(pipe):
        side = getattr(getattr(getattr(pipe, "unet", None), "config", None), "sample_size", None)
        return dict.fromkeys(scales, CPU_BATCH if isinstance(side, int) and side <= SMALL_LATENTS else 1)
    return {scale: min(batch_size, scales.count(scale)) for scale in set(scales)}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise ErasureError(
            f"{folder}: cannot be written: {fault.strerror or fault}. "
            "Images already drawn are kept; repeat the call to continue"
        ) from None


def image_settings(pipe: Any, steps: int, guidance: float) -> dict[str, Any]:
    """Return everything that an image depends on besides its row: weights, patches, scheduler and sampling.

    Args:
        pipe: the pipeline.
        steps: sampling steps.
        guidance: guidance scale.

    Returns:
        Plain data that survives a round trip through JSON.
    """
    import torch

    parts = getattr(pipe, "components", {})
    scheduler = pipe.scheduler
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    settings = {
        **{name: checksum(part) for name, part in sorted(parts.items()) if isinstance(part, torch.nn.Module)},
        "patches": active_patches(pipe),
        "scheduler": {"class": type(scheduler).__name__, **config},
        "steps": steps,
        "guidance": guidance,
        "torch": torch.__version__,
    }
    return json.loads(json.dumps(settings, default=str))


def checksum(module: Any) -> str:
    """Return a checksum of a module's weights, as 16 hexadecimal digits.

    Paths and names do not identify weights reliably. The checksum consists of two sums over the bits of each tensor as
    integers modulo 2**64, one of them weighted by position. It is exact on every device, needs little memory, and only
    the sums leave the device.
    """
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    positions = torch.arange(1, CHUNK + 1)
    for name, value in sorted(getattr(module, "_orig_mod", module).state_dict().items()):
        sums = []
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
        if isinstance(value, torch.Tensor) and not value.is_meta and value.element_size() in integers:
            bits = value.detach().contiguous().view(-1).view(integers[value.element_size()])
            positions = positions.to(bits.device)
            for chunk in bits.split(CHUNK):
                wide = chunk.long()
                sums.append(torch.stack([wide.sum(), (wide * positions[: len(wide)]).sum()]))
        digest.update(f"{name}:{torch.stack(sums).tolist() if sums else ''}".encode())
    return digest.hexdigest()[:16]


def _changed_keys(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    keys = {**first, **second}
    return [key for key in keys if key not in first or key not in second or first[key] != second[key]]


def _open_folder(
    folder: Path, settings: dict[str, Any], prompts: PromptSet, steps: int, guidance: float
) -> dict[str, Record]:
    with _writing(folder):
        _check_settings(folder, settings)
        return _finished_records(folder, prompts, steps, guidance)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with images of other settings; store the settings in a new folder."""
    path = folder / "settings.json"
    if path.is_file():
        try:
            stored = json.loads(path.read_text())
        except json.JSONDecodeError:
            stored = {}
        changed = _changed_keys(settings, stored)
        if changed:
            raise ErasureError(
                f"{folder} contains images of other settings ({', '.join(changed)} differ); "
                "they were left untouched: use another folder, or delete this one"
            )
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=1))


def _read_records(folder: Path) -> Iterator[Record]:
    """Yield all records, including those of processes that were killed; the newest file comes last."""
    parts = sorted(folder.glob(RECORD_PARTS), key=lambda path: path.stat().st_mtime)
    for path in [folder / RECORDS, *parts]:
        if not path.is_file():
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield Record(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue  # a line cut off when the process was killed


def _finished_records(folder: Path, prompts: PromptSet, steps: int, guidance: float) -> dict[str, Record]:
    """Return the records of the rows whose images exist, are intact and have the same settings."""
    finished: dict[str, Record] = {}
    rows = {row.id: row for row in prompts.rows}
    for record in _read_records(folder):
        row = rows.get(record.id)
        if row is None:
            continue
        expected = (row.prompt, row.seed, steps, _scale(row, guidance))
        same = (record.prompt, record.seed, record.steps, record.guidance) == expected
        image = folder / "images" / f"{record.id}.png"
        if same and image.is_file() and hashlib.sha256(image.read_bytes()).hexdigest() == record.sha256:
            # Labels belong to the prompt set, not to the image, which other sets may share.
            finished[record.id] = replace(record, labels=dict(row.labels))
    return finished


def _merge_records(folder: Path, done: Iterable[Record]) -> None:
    """Merge the records of all processes into one file, together with those of other prompt sets."""
    with _writing(folder):
        parts = list(folder.glob(RECORD_PARTS))
        if not parts:
            return
        records = {record.id: record for record in [*_read_records(folder), *done]}
        write_text(folder / RECORDS, "".join(json.dumps(asdict(record)) + "\n" for record in records.values()))
        for part in parts:
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Drawer:
    """Draws rows into a folder, in batches of fixed sizes.

    Args:
        pipe: the pipeline.
        folder: the folder of the run.
        steps: sampling steps.
        sizes: guidance scale -> images per batch.
    """

    pipe: Any
    folder: Path
    steps: int
    sizes: dict[float, int]

    def draw(self, todo: Sequence[tuple[float, Prompt]], group: ProcessGroup, progress: bool) -> list[Record]:
        """Draw the rows of this process, and record every image as soon as it is drawn.

        Args:
            todo: guidance scale and row of each image.
            group: the processes of the run.
            progress: show the progress.

        Returns:
            One record for each row.
        """
        if not todo:
            return []
        # The rows of one pipeline call must share their guidance scale.
        groups: dict[float, list[Prompt]] = {}
        for scale, row in todo:
            groups.setdefault(scale, []).append(row)
        noun = f"drawing {self.folder.name}" + (f", process 1 of {group.count}" if group.count > 1 else "")
        part = self.folder / RECORD_PARTS.replace("*", f"{group.index}-{uuid.uuid4().hex[:8]}")
        records: list[Record] = []
        with meter(len(todo), noun, progress and group.main) as advance, _writing(self.folder), part.open("x") as file:
            for scale, rows in groups.items():
                size = self.sizes[scale]
                for start in range(0, len(rows), size):
                    batch = rows[start : start + size]
                    records += self._draw_batch(batch, scale, file)
                    advance(len(batch))
        return records

    def _draw_batch(self, rows: list[Prompt], scale: float, file: TextIO) -> list[Record]:
        import torch

        # The batch is filled up with its last row, so that every call has the same shape.
        full = [*rows, *rows[-1:] * (self.sizes[scale] - len(rows))]
        images = self.pipe(
            prompt=[row.prompt for row in full],
            generator=[torch.Generator("cpu").manual_seed(row.seed) for row in full],
            num_inference_steps=self.steps,
            **call_of(self.pipe, len(full), scale),
        ).images
        gates = getattr(self.pipe, "gate_log", None) or [{} for _ in full]
        new_record = partial(Record, steps=self.steps, guidance=scale)
        records = []
        for row, image, gate in list(zip(full, images, gates, strict=True))[: len(rows)]:
            digest = _save_image(image, self.folder / "images" / f"{row.id}.png")
            labels, strengths = dict(row.labels), dict(gate)
            records.append(new_record(row.id, row.prompt, row.seed, sha256=digest, labels=labels, gates=strengths))
            file.write(json.dumps(asdict(records[-1])) + "\n")
            file.flush()
        return records


def _save_image(image: Image.Image, path: Path) -> str:
    """Write an image under a temporary name, rename it, and return its SHA-256 digest."""
    temporary = path.with_suffix(".tmp")
    try:
        image.save(temporary, format="PNG")
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # frees its space on a full disk
        raise
    return digest


def read_image(folder: Path, record: Record) -> Image.Image | None:
    """Return the image of a record in RGB, or None if the file is missing or broken.

    Args:
        folder: the folder of the run.
        record: the record.
    """
    return open_image(folder / "images" / f"{record.id}.png")


def open_image(path: Path) -> Image.Image | None:
    """Return the image in a file in RGB, or None if the file is missing or broken."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
