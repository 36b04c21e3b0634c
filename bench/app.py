"""Make the pictures of `erasure app` in docs/app.md by clicking through the page: `python bench/app.py`.

Needs Chromium and the extra `app`.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.app.chromium import Browser, Tab  # noqa: E402

HEIGHT, GAP = 560, 12  # pixels of the strip, and between its pictures
PICTURES = "document.querySelectorAll('#pair img').length"


def main() -> None:
    """Start the page, click through it and write the strip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "app.png", help="path of the strip")
    parser.add_argument("--shots", type=Path, help="folder to keep the whole pictures in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "erasure.cli", "app", "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None  # noqa: S101
        try:
            address = server.stdout.readline().split()[1]
            with Browser(Path(folder) / "browser") as browser:
                shots = clicked(browser, address, args.shots or Path(folder))
            strip(shots).save(args.out, optimize=True)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


def clicked(browser: Browser, address: str, folder: Path) -> list[Path]:
    """Return pictures of the page as it opens, with a concept erased, and on a phone after an attack."""
    folder.mkdir(parents=True, exist_ok=True)
    tab = browser.open(address, 1280, 900)
    tab.wait(f"{PICTURES} === 4")
    shots = [shot(tab, folder / "start.png")]
    tab.click("#erase")
    tab.wait(f"{PICTURES} === 8 && document.querySelector('#status').innerText.includes('Done')")
    tab.run("scrollTo(0, 0)")
    shots.append(shot(tab, folder / "erased.png"))
    tab.resize(390, 844)
    shot(tab, folder / "erased-phone.png", whole=True)
    tab.run("[...document.querySelectorAll('button[role=tab]')].find(e => e.innerText === 'Attack').click()")
    tab.click("#try-attack")
    tab.wait("document.querySelectorAll('#attacked .era-live img').length >= 7")
    tab.wait("document.querySelector('#attacked').innerText.includes('seen: cat')")
    tab.run("document.querySelector('#attacked').scrollIntoView({block: 'end'})")
    shots.append(shot(tab, folder / "attack-phone.png"))
    tab.wait("document.querySelector('#attacked iframe')", 600)
    shot(tab, folder / "report-phone.png", whole=True)
    tab.resize(1280, 900)
    shot(tab, folder / "report.png", whole=True)
    return shots


def shot(tab: Tab, path: Path, whole: bool = False) -> Path:
    """Write a picture of the page once everything on it has come to rest."""
    time.sleep(1.5)
    if not whole:
        tab.run("document.activeElement?.blur()")
    return tab.picture(path, whole)


def strip(paths: list[Path]) -> Image.Image:
    """Return pictures side by side, in 256 colours."""
    images = []
    for path in paths:
        with Image.open(path) as file:
            images.append(
                file.convert("RGB").resize((file.width * HEIGHT // file.height, HEIGHT), Image.Resampling.LANCZOS)
            )
    sheet = Image.new("RGB", (sum(image.width + GAP for image in images) - GAP, HEIGHT), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + GAP
    return sheet.quantize(256)


if __name__ == "__main__":
    main()
