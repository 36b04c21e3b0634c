"""Write reports: JSON for programs, an HTML page and a picture for people, each under a temporary name first."""

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
from erasure.evaluation.report.figures import ImagePair
from erasure.evaluation.report.html import attack_page, page
from erasure.evaluation.report.report import Report


def write_report(report: Report, folder: Path, pairs: list[tuple[Record, bool]], base_folder: Path) -> None:
    """Write report.json, report-eval-unlearn.json, grid.png and report.html.

    Args:
        report: what was measured.
        folder: holds the run `patched`.
        pairs: records to show, and whether each is a target.
        base_folder: holds the base's run.

    Raises:
        ErasureError: the folder cannot be written.
    """
    try:
        images = [
            (record, hit, read_image(base_folder, record), read_image(folder / "patched", record))
            for record, hit in pairs
        ]
        _put_image(folder / "grid.png", grid(images))
        _put(folder / "report.json", json.dumps(report.to_json(), indent=1))
        _put(folder / "report-eval-unlearn.json", json.dumps(report.to_eval_unlearn(time.time()), indent=1))
        _put(folder / "report.html", page(report, images))
    except OSError as fault:
        raise ErasureError(f"{folder}: the report cannot be written: {fault.strerror or fault}") from None


def write_attack_report(report: AttackReport, folder: Path, lines: dict[str, list[Image.Image]]) -> None:
    """Write report.json, grid.png and report.html of an attack.

    Args:
        report: what the attacks recovered.
        folder: holds the attacks' last pictures.
        lines: name -> a picture for each case, shown above the attacks'.

    Raises:
        ErasureError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        image = attack_grid(report, folder, lines)
        _put_image(folder / "grid.png", image)
        _put(folder / "report.json", json.dumps(report.to_json(), indent=1))
        _put(folder / "report.html", attack_page(report, image))
    except OSError as fault:
        raise ErasureError(f"{folder}: the report cannot be written: {fault.strerror or fault}") from None


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path; one that cannot be written is known before the search, and none is made yet.

    Raises:
        ErasureError: it cannot be written.
    """
    out = Path(folder)
    try:
        with tempfile.TemporaryFile(dir=next(place for place in (out, *out.absolute().parents) if place.exists())):
            pass
    except OSError as fault:
        raise ErasureError(
            f"{out}: cannot be written: {fault.strerror or fault}. Give another folder; nothing was attacked"
        ) from None
    return out


def grid(images: list[ImagePair], columns: int = 4) -> Image.Image:
    """Pairs of base and patched pictures of the same seed, with their prompts."""
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


def attack_grid(report: AttackReport, folder: Path, lines: dict[str, list[Image.Image]]) -> Image.Image:
    """A line each for the base, the erased model and every attack's last try; what came back has a red frame."""
    side, gap, font = 96, 6, ImageFont.load_default(14)
    shown = report.provenance["cases"][:COLUMNS]
    rows = [*lines, *(one.name for one in report.outcomes)]
    head = 3 * gap + int(max(font.getlength(name) for name in rows))
    page = Image.new("RGB", (head + len(shown) * (side + gap) + gap, len(rows) * (side + gap) + gap), "white")
    pen = ImageDraw.Draw(page)
    won = {one.name: one.won for one in report.outcomes}
    for line, name in enumerate(rows):
        y = gap + line * (side + gap)
        pen.text((gap, y + side // 2 - 8), name, fill="black", font=font)
        for column, case in enumerate(shown):
            x = head + column * (side + gap)
            path = folder / name / f"{case}.png"
            if name in lines:
                image = lines[name][column]
            elif path.is_file():
                image = Image.open(path)
            else:
                continue
            if case in won.get(name, {}):
                pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), fill="#b00020")
            page.paste(image.convert("RGB").resize((side, side)), (x, y))
    return page


def _put(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _put_image(path: Path, image: Image.Image) -> None:
    temporary = path.with_suffix(".tmp")
    image.save(temporary, format="PNG", optimize=True)
    os.replace(temporary, path)
