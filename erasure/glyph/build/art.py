"""Download the icon sets with npm and rasterise the vocabulary's icons: `python -m erasure.glyph.build.art`.

Each art set becomes one sheet, `art/<set>.png`, with RGBA cells of 128 px: objects first, then distractors, each
cropped to its drawing and centred. Training needs nothing else.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from PIL import Image

from erasure.glyph import ART, vocabulary

COLUMNS = 16  # cells per row of a sheet


def icon_names() -> list[str]:
    """Return the icon names of a sheet in the order of its cells."""
    words = vocabulary()
    return [entry["icon"] for entry in words["objects"].values()] + list(words["distractors"])


def fetch(package: str, version: str, folder: Path) -> dict:
    """Download one icon set with npm and return the content of its `icons.json`.

    Args:
        package: name of the npm package.
        version: version of the package.
        folder: folder for the downloaded archive.

    Raises:
        SystemExit: npm is not installed, or the package has no icons.json.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(
            "glyph's icons come from npm packages: install Node.js with npm, or keep the existing art/*.png"
        )
    packed = subprocess.run(
        [npm, "pack", f"{package}@{version}", "--json", "--silent"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    archive = folder / json.loads(packed.stdout)[0]["filename"].replace("@", "").replace("/", "-")
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise SystemExit(f"{package}@{version} contains no icons.json")
        return json.load(member)


def svg(icons: dict, name: str) -> str:
    """Return an icon as an SVG document; aliases are resolved, and `currentColor` becomes black."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"].replace("currentColor", "#000000")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def rasterise(document: str, cell: int) -> Image.Image:
    """Rasterise an SVG document, crop it to its opaque part and centre it in a square cell of `cell` pixels."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=document, width=2 * cell, height=2 * cell))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (cell, cell), (0, 0, 0, 0))
    square.paste(image, ((cell - image.width) // 2, (cell - image.height) // 2))
    return square


@cache
def load(art: str) -> dict[str, Image.Image]:
    """Return the rasterised icons of one art set by name, from its sheet in the repository."""
    cell = vocabulary()["cell"]
    with Image.open(ART / f"{art}.png") as file:
        sheet = file.convert("RGBA")
    cells = {}
    for index, name in enumerate(icon_names()):
        x, y = index % COLUMNS * cell, index // COLUMNS * cell
        cells[name] = sheet.crop((x, y, x + cell, y + cell))
    return cells


def main() -> None:
    """Write the sheet of every art set, and the attribution file."""
    cell, names = vocabulary()["cell"], icon_names()
    rows = -(-len(names) // COLUMNS)
    ART.mkdir(exist_ok=True)
    lines = [
        "# Attribution of the art",
        "",
        "The icons here, and the images that glyph was trained on, derive from:",
        "",
    ]
    for art, source in vocabulary()["art"].items():
        with tempfile.TemporaryDirectory() as folder:
            icons = fetch(source["package"], source["version"], Path(folder))
        sheet = Image.new("RGBA", (COLUMNS * cell, rows * cell), (0, 0, 0, 0))
        for index, name in enumerate(names):
            image = rasterise(svg(icons, name), cell)
            sheet.paste(image, (index % COLUMNS * cell, index // COLUMNS * cell))
        sheet.quantize(256, method=Image.Quantize.FASTOCTREE).save(ART / f"{art}.png", optimize=True)
        lines.append(
            f"- **{source['title']}** by {source['author']}, {source['license']}: "
            f"`{source['package']}` {source['version']}"
        )
        print(f"{art}: {len(names)} icons")
    lines += ["", "The styles pixel art and blueprint are image filters of this project, applied to Noto Emoji."]
    (ART / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
