"""The house: sizes, the direction of imports, no pickles, no machine paths."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import erasure
from erasure import methods

ROOT = Path(erasure.__file__).resolve().parent
FILES = sorted(ROOT.rglob("*.py"))
# Who may import whom (design, section 1): a package may import what stands in its row.
LOW = {"errors", "glyph", "config", "processes", "repository"}
CORE = {*LOW, "concept", "base", "conditions", "diffusion"}
SHARED = {"neighbours", "similarity", "softprompt", "saliency", "images"}  # what methods build on
MAY = {
    "errors": set(),
    "config": {"errors"},
    "processes": {"errors"},
    "repository": {"errors"},
    "hub": {*CORE, "patch", "evaluation"},
    "glyph": {"errors", "evaluation"},  # check.py measures with the evaluator's settings
    "concept": LOW,
    "conditions": {"errors"},
    "checkpoints": {"errors", "config"},
    "outline": {*CORE, "checkpoints"},
    "diffusion": {"errors"},
    "base": {*CORE, "checkpoints", "pipelines"},  # Base.load opens the erased pipeline
    "patch": CORE,
    "similarity": CORE,
    "pipelines": {*CORE, "checkpoints", "patch", "similarity", "trajectories"},
    "prompts": {"errors", "glyph", "evaluation"},
    "evaluation": {*CORE, "patch", "formats", "pipelines", "prompts", "softprompt"},
    "trajectories": CORE,
    "training": {*CORE, "patch", "neighbours"},
    "neighbours": {*CORE, "similarity"},
    "softprompt": CORE,
    "saliency": {*CORE, "patch", "checkpoints"},
    "images": {*CORE, "neighbours"},
    "methods": {*CORE, "patch", "trajectories", "training", *SHARED},
    "formats": {*CORE, "patch", "pipelines", "checkpoints"},
    "plan": {*CORE, "methods", "training"},
    "demo": {*CORE, "patch", "pipelines", "evaluation", "methods"},
    "bench": {*CORE, "patch", "pipelines", "evaluation", "methods", "prompts", "bench_page"},
    "bench_page": {*CORE, "evaluation", "bench"},  # the table; bench itself imports the page as it writes it
    "cli": {*CORE, "arguments", "commands"},
    "commands": {*CORE, *"bench demo evaluation formats hub methods outline patch pipelines plan training".split()},
    "arguments": set(),
}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" if node.module == "erasure" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name and name.startswith("erasure.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = part(path)
    if own == "__init__":
        return
    assert imports(path) <= MAY[own] | {own}


def test_methods_do_not_import_each_other():
    for name in methods.names():
        tree = (ROOT / "methods" / f"{name}.py").read_text()
        assert not re.search(r"erasure\.methods\.", tree)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 80, f"{node.name} is long"


def test_no_method_is_named_by_pipelines_and_evaluation():
    words = re.compile(rf"\b({'|'.join(methods.names())})\b", re.IGNORECASE)
    for path in FILES:
        if part(path) in ("pipelines", "evaluation", "patch"):
            assert not [text for text in spoken(path) if words.search(text)], path


def spoken(path: Path) -> list[str]:
    """Names and strings of a file's code; docstrings may cite the papers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    notes = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    found += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [text for text in found if text not in notes]


def test_pickles_are_read_as_data_only():
    for path in FILES:
        loads = re.findall(r"torch\.load\([^)]*\)", path.read_text(encoding="utf-8"))
        assert all("weights_only=True" in call for call in loads), path
        assert "import pickle" not in path.read_text(encoding="utf-8"), path


def test_every_public_name_is_there_and_documented():
    for name in erasure.__all__:
        assert getattr(erasure, name).__doc__, name
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_help_is_quick_to_import():
    """`erasure --help` must not wait for torch."""
    code = "import sys, erasure.cli as c; c.parser(); sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_shortcuts_lead_into_the_package():
    top = ROOT.parent
    for name in ("pipelines", "evaluation", "prompts", "configs"):
        if (top / name).is_symlink():
            assert (top / name).resolve() == ROOT / name


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("erasure").__getattr__("nothing")
