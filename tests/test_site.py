"""The documentation site builds with --strict, holds every page and method, and loads nothing from the network."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from erasure import methods

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 240  # of a notebook on a busy machine; each takes about 20 s of CPU


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; the build fails on any warning."""
    folder = tmp_path_factory.mktemp("site") / "built"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_in_the_menu(site):
    menu = (site / "index.html").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    pages += [Path("methods") / f"{name}.html" for name in methods.names()]
    pages += [Path("notebooks") / f"{path.stem}.html" for path in NOTEBOOKS]
    for page in pages:
        assert (site / page).is_file(), page
        assert page.name == "index.html" or f'href="{page.as_posix()}"' in menu, page


@pytest.mark.slow
def test_the_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?(https?:[^\"' >]+)", text)
        assert not loaded, page
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import )[\"']?https?:", styles)


@pytest.mark.slow
def test_methods_have_their_figures_and_the_api_its_docstrings(site):
    results = json.loads((ROOT / "bench" / "results" / "glyph.json").read_text(encoding="utf-8"))
    for name in {row["method"] for row in results["rows"]}:
        assert "<th>H ↑</th>" in (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
    erasing = (site / "api" / "erase.html").read_text(encoding="utf-8")
    assert "Erase concepts and return the patch" in erasing and "ErasureError" in erasing
    assert 'src="data:image/png' in (site / "notebooks" / "erase-and-look.html").read_text(encoding="utf-8")
    assert (site / "source" / "bench" / "results" / "glyph.png").is_file()


@pytest.fixture(scope="module")
def hooks():
    return runpy.run_path(str(ROOT / "bench" / "docs_site.py"))


def test_the_menu_holds_what_is_there(hooks):
    class Config:
        nav = None

    config = hooks["on_config"](Config())
    pages = [page for group in config.nav for listed in group.values() for page in listed]
    assert len(pages) == len(set(pages))
    own = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(pages) == own | set(hooks["generated"]())


def test_links_out_of_the_docs_are_led_to_copies(hooks):
    class Files(list):
        def get_file_from_path(self, path):
            return next((file for file in self if file == path), None)

    class Page:
        class file:
            src_uri = "results.md"

    link = hooks["on_page_markdown"]
    hooks["on_page_markdown"].__globals__["File"] = type("File", (), {"generated": lambda config, path, **_: path})
    files = Files()
    shown = link(
        "![p](../bench/results/glyph.png) [c](../CONTRIBUTING.md#rules) [t](../tests/formats)", Page, None, files
    )
    assert shown == "![p](source/bench/results/glyph.png) [c](contributing.md#rules) t (`tests/formats`)"
    assert files == ["source/bench/results/glyph.png"]
    assert link("[a](attacks.md) [h](#here) [w](https://a.b) [n](notebooks/n.ipynb)", Page, None, files) == (
        "[a](attacks.md) [h](#here) [w](https://a.b) [n](notebooks/n.md)"
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path):
    """What it prints and draws is what the file holds."""
    held = nbformat.read(path, as_version=4)
    ran = nbformat.from_dict(json.loads(json.dumps(held)))
    NotebookClient(ran, timeout=SECONDS, kernel_name="python3").execute()
    for before, now in zip(held.cells, ran.cells, strict=True):
        assert shape(before) == shape(now), now.source


def shape(cell) -> list[tuple[str, str]]:
    """Each output of a cell as its type and text; pixels may differ from machine to machine."""
    outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    found = []
    for output in outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        found.append((output["output_type"], re.sub(r"\d+", "#", text)))
    return found


def test_notebooks_hold_their_outputs():
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 1
        assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


def test_the_method_of_the_notebook_has_60_lines():
    (path,) = (path for path in NOTEBOOKS if "60-lines" in path.name)
    (cell,) = (cell for cell in nbformat.read(path, as_version=4).cells if "class Blend" in cell.source)
    assert cell.cell_type == "code" and len(cell.source.splitlines()) <= 60
