"""Hooks of mkdocs for the documentation site: `mkdocs build --strict`. mkdocs.yml names this file.

Generated while the site is built, so that nothing has to be kept in step: a page for each method, the pages of the API,
the notebooks with their outputs, and copies of the files outside docs/ that pages link to. The site loads nothing from
the network.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from erasure import methods
from erasure.benchmark.table import Table
from erasure.cli.method_pages import method_list, method_page

ROOT = Path(__file__).resolve().parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "bench" / "results"
TABLES = {"one concept": "glyph", "closed forms": "many", "several concepts, the round before": "together"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
TEXTS = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "readme.md"}
API = {
    "Erase": ["erasure.erasing", "erasure.concepts.concept", "erasure.model.base", "erasure.forecast"],
    "Patches": ["erasure.patch.patch", "erasure.patch.payload", "erasure.patch.ops.arithmetic"],
    "Pipelines": ["erasure.pipelines.classes", "erasure.pipelines.mixin", "erasure.pipelines.loaded"],
    "Evaluate": ["erasure.evaluation.evaluate", "erasure.evaluation.verify", "erasure.evaluation.certificate"],
    "Check": ["erasure.evaluation.certificate_check", "erasure.evaluation.report.report"],
    "Attack": ["erasure.evaluation.attacks.run", "erasure.evaluation.attacks.attack"],
    "Extend": ["erasure.method", "erasure.evaluation.judges.judge", "erasure.evaluation.metrics.scorers"],
    "Files": ["erasure.formats.import_export", "erasure.formats.hub"],
}
# Title of a group -> its pages, in order. What is missing is left out; what is not named comes under "More".
NAV: dict[str, list[str]] = {
    "Start": ["index.md", "start.md", "notebooks/erase-and-look.md", "app.md"],
    "Erase": ["which-method.md", "erase.md", "own-model.md", "list-of-names.md", "closed-forms.md", "presets.md"],
    "Methods": ["methods/index.md"],
    "Use": ["patches.md", "guards.md", "features.md", "formats.md", "comfyui.md", "models.md"],
    "Measure": ["evaluate.md", "attacks.md", "results.md"],
    "Extend": ["contributing.md", "extend.md", "notebooks/a-method-in-60-lines.md", "patch-format.md"],
    "API": [],
    "More": ["upgrading.md", "changelog.md", "readme.md"],
}


def tables() -> dict[str, Table]:
    """Return what was measured -> its table of results."""
    return {
        title: Table.from_json(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
        for title, name in TABLES.items()
    }


def generated() -> dict[str, str]:
    """Return path below docs/ -> Markdown of every page that has no file there."""
    measured = tables()
    pages = {f"methods/{name}.md": method_page(name, measured) for name in methods.names()}
    pages["methods/index.md"] = method_list(measured)
    for title, modules in API.items():
        pages[f"api/{title.lower()}.md"] = f"# {title}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"
    for name, page in TEXTS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        pages[page] = LINK.sub(_from_root, text)
    for notebook in sorted((DOCS / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{notebook.stem}.md"] = rendered(notebook)
    return pages


def _from_root(match: re.Match[str]) -> str:
    """Rewrite a link of a page at the top of the repository as one of a page in docs/."""
    mark, text, target = match.groups()
    if re.match(r"\w+:|#", target):
        return match[0]
    return f"{mark}[{text}]({target.removeprefix('docs/') if target.startswith('docs/') else f'../{target}'})"


def rendered(notebook: Path) -> str:
    """Return a notebook with its outputs as Markdown; images are part of the page."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
                parts.append(f'<img alt="what the cell above shows" src="data:image/png;base64,{picture}">')
            elif text := "".join(output.get("text", data.get("text/plain", []))).strip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def on_config(config: Any) -> Any:
    """Order the pages that there are."""
    own = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    here = own | set(generated())
    named = {page for pages in NAV.values() for page in pages}
    nav = {title: [page for page in pages if page in here] for title, pages in NAV.items()}
    nav["Methods"] += [f"methods/{name}.md" for name in methods.names()]
    nav["API"] = [f"api/{title.lower()}.md" for title in API]
    listed = named | set(nav["Methods"]) | set(nav["API"])
    nav["More"] = sorted(here - listed) + nav["More"]
    config.nav = [{title: pages} for title, pages in nav.items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to copies of these files in the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, sign, heading = target.partition("#")
        if path.endswith(".ipynb"):  # its page, in which the outputs are seen
            return f"{mark}[{text}]({path.removesuffix('.ipynb')}.md)"
        place = posixpath.normpath(posixpath.join("docs", folder, path)) if path else ""
        if re.match(r"\w+:", target) or not path or place.startswith("docs/"):
            return match[0]
        if place in TEXTS:
            return f"{mark}[{text}]({posixpath.relpath(TEXTS[place], folder or '.')}{sign}{heading})"
        source = ROOT / place
        if not source.is_file() or source.suffix == ".md":  # a folder, or a page that is not part of the site
            return f"{mark}{text}" if mark else f"{text} (`{place}`)"
        copy = f"source/{place}"
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(source)))
        return f"{mark}[{text}]({posixpath.relpath(copy, folder or '.')})"

    return LINK.sub(replaced, markdown)
