"""Write reports as JSON, HTML and PNG files, each under a temporary name until it is complete."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from erasure.errors import ErasureError
from erasure.evaluation.attacks.report import COLUMNS, AttackReport
from erasure.evaluation.generate import Record, read_image
from erasure.evaluation.report.attack_page import attack_page
from erasure.evaluation.report.evaluation_page import page
from erasure.evaluation.report.figures import ImagePair
from erasure.evaluation.report.report import Report
from erasure.evaluation.text_files import write_text


def write_report(report: Report, folder: Path, pairs: list[tuple[Record, bool]], base_folder: Path) -> None:
    """Write report.json, report-eval-unlearn.json, grid.png and report.html of an evaluation.

    Args:
        report: the report.
        folder: the folder to write to, which contains the run `patched`.
        pairs: records to show, and whether each asks for the target.
        base_folder: the folder of the base's run.

    Raises:
        ErasureError: the folder cannot be written.
    """
    try:
        images = [
            (record, hit, read_image(base_folder, record), read_image(folder / "patched", record))
            for record, hit in pairs
        ]
        _write_image(folder / "grid.png", grid(images))
        write_text(folder / "report.json", json.dumps(report.to_json(), indent=1))
        write_text(folder / "report-eval-unlearn.json", json.dumps(report.to_eval_unlearn(time.time()), indent=1))
        write_text(folder / "report.html", page(report, images))
    except OSError as fault:
        raise ErasureError(f"{folder}: the report cannot be written: {fault.strerror or fault}") from None


def write_attack_report(report: AttackReport, folder: Path, lines: dict[str, list[Image.Image]]) -> None:
    """Write report.json, grid.png and report.html of attacks.

    Args:
        report: the report.
        folder: the folder to write to, which contains the images of each attack's last tries.
        lines: name -> one image for each case, shown above the attacks' images.

    Raises:
        ErasureError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        images = attack_images(report, folder, lines)
        _write_image(folder / "grid.png", attack_grid(report, images))
        write_text(folder / "report.json", json.dumps(report.to_json(), indent=1))
        write_text(folder / "report.html", attack_page(report, images))
    except OSError as fault:
        raise ErasureError(f"{folder}: the report cannot be written: {fault.strerror or fault}") from None


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Check, before a long search, that a folder can be written, and return it as a path.

    The folder is not created.

    Args:
        folder: the folder, which need not exist.

    Raises:
        ErasureError: the folder cannot be written.
    """
    path = Path(folder)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as fault:
        raise ErasureError(
            f"{path}: cannot be written: {fault.strerror or fault}. Choose another folder; nothing was attacked"
        ) from None
    return path


def grid(images: list[ImagePair], columns: int = 4) -> Image.Image:
    """Draw pairs of images of the same seed by the base and the patched pipeline, with their prompts.

    Args:
        images: the pairs.
        columns: pairs in one row.
    """
    side, gap, line, head = 128, 8, 18, 20
    width, height = 2 * side + 3 * gap, side + line + gap
    rows = -(-len(images) // columns) or 1
    page = Image.new("RGB", (columns * width + gap, rows * height + head + gap), "white")
    pen = ImageDraw.Draw(page)
    for column in range(min(columns, len(images))):
        pen.text((column * width + gap, 4), "base", fill="#666")
        pen.text((column * width + side + 2 * gap, 4), "patched", fill="#666")
    for index, (record, hit, before, after) in enumerate(images):
        x, y = index % columns * width + gap, index // columns * height + head
        for step, image in enumerate((before, after)):
            if image is not None:
                shown = image.resize(
                    (side, side), Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
                )
                page.paste(shown, (x + step * (side + gap), y))
        label = record.prompt.encode("latin-1", "replace").decode("latin-1")
        pen.text((x, y + side + 2), label[:44], fill="#b00020" if hit else "black")
    return page


def attack_images(
    report: AttackReport, folder: Path, lines: dict[str, list[Image.Image]]
) -> dict[str, list[Image.Image | None]]:
    """Return name of a row -> one image for each of the first COLUMNS cases, None where there is none.

    Args:
        report: the report.
        folder: the folder with the images of each attack's last tries.
        lines: name -> one image for each case, for the first rows.
    """
    cases = report.provenance["cases"][:COLUMNS]
    images: dict[str, list[Image.Image | None]] = {name: [*line[: len(cases)]] for name, line in lines.items()}
    for outcome in report.outcomes:
        paths = [folder / outcome.name / f"{case}.png" for case in cases]
        images[outcome.name] = [Image.open(path).convert("RGB") if path.is_file() else None for path in paths]
    return images


def attack_grid(report: AttackReport, images: dict[str, list[Image.Image | None]]) -> Image.Image:
    """Draw one row of images for the base, the erased model and each attack; recovered concepts have a red frame.

    Args:
        report: the report.
        images: the rows, as `attack_images` returns them.
    """
    side, gap, font = 96, 6, ImageFont.load_default(14)
    shown = report.provenance["cases"][:COLUMNS]
    head = 3 * gap + int(max(font.getlength(name) for name in images))
    page = Image.new("RGB", (head + len(shown) * (side + gap) + gap, len(images) * (side + gap) + gap), "white")
    pen = ImageDraw.Draw(page)
    won = {outcome.name: outcome.won for outcome in report.outcomes}
    for line, (name, row) in enumerate(images.items()):
        y = gap + line * (side + gap)
        pen.text((gap, y + side // 2 - 8), name, fill="black", font=font)
        for column, (case, image) in enumerate(zip(shown, row, strict=True)):
            x = head + column * (side + gap)
            if image is None:
                continue
            if case in won.get(name, {}):
                pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), fill="#b00020")
            page.paste(image.convert("RGB").resize((side, side)), (x, y))
    return page


def _write_image(path: Path, image: Image.Image) -> None:
    temporary = path.with_suffix(".tmp")
    image.save(temporary, format="PNG", optimize=True)
    os.replace(temporary, path)
