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
from erasure.evaluation.attacks import attack as attacks

ROOT = Path(erasure.__file__).resolve().parent
FILES = sorted(ROOT.rglob("*.py"))
# The storeys of the house, the lowest first (docs: CONTRIBUTING.md): a file imports from its own storey and below.
STOREYS = (
    ("version", "errors"),
    ("config", "dtypes", "distributed", "hub_files"),
    ("concepts",),
    ("model",),
    ("patch",),
    ("pipelines",),
    ("training",),
    ("method", "guard_method"),
    ("methods",),
    ("erasing", "forecast"),
    ("takedown",),
    ("prompts",),
    ("evaluation",),
    ("formats",),
    ("comfyui",),
    ("benchmark",),
    ("app",),
    ("cli",),
    ("glyph",),
    ("__init__", "__main__"),
)


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def storey(name: str) -> int:
    top = name.split(".")[1] if "." in name else "__init__"
    return next(level for level, rooms in enumerate(STOREYS) if top in rooms)


def imports(path: Path) -> set[str]:
    """Every file of the package that a file imports: at its head, inside functions, or for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES} - {module(path)}


def test_every_room_stands_in_a_storey():
    rooms = {name.split(".")[1] for name in MODULES if "." in name}
    named = [room for rooms in STOREYS for room in rooms]
    assert rooms <= set(named) and len(named) == len(set(named))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_imported_from_above(name):
    assert not [other for other in imports(MODULES[name]) if storey(other) > storey(name)]


def test_no_circle_of_files():
    graph = {name: imports(path) for name, path in MODULES.items()}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in state:
            state[name] = 1
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            state[name] = 2

    for name in sorted(graph):
        visit(name, ())


def test_nothing_imports_through_the_links():
    links = re.compile(r"^\s*(?:from|import) (?:pipelines|evaluation|prompts|configs)\b", re.MULTILINE)
    assert not [path for path in FILES if links.search(path.read_text(encoding="utf-8"))]


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
    """RECE is an attack too, which evaluation may name."""
    words = re.compile(rf"\b({'|'.join(set(methods.names()) - set(attacks.names()))})\b", re.IGNORECASE)
    for path in FILES:
        if module(path).split(".")[1:2] in (["pipelines"], ["evaluation"], ["patch"]):
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


# First words of phrases where a docstring of a function needs a verb: it says what the function does, "Return ...".
NO_VERBS = set(
    "a all an and any as at both by each every for from how if in is it its none of on one only our that the their "
    "this those to what when where whether which who with".split()
)


def public(tree: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    """Return the public functions and classes of a module or class, with the methods of these classes."""
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    nodes = [node for node in nodes if not node.name.startswith("_")]
    return nodes + [inner for node in nodes if isinstance(node, ast.ClassDef) for inner in public(node)]


def docstring_faults(node: ast.FunctionDef | ast.ClassDef, least: int = 5) -> list[str]:
    """Return what is wrong with a docstring: too short, no whole sentence, or no verb where a function needs one."""
    summary = (ast.get_docstring(node) or "").split("\n\n")[0]
    words = summary.split()
    faults = [] if len(words) >= least else [f"has {len(words)} words"]
    if not summary.endswith((".", ":", "?")):
        faults.append("does not end like a sentence")
    first = words[0].rstrip(",").lower() if words else ""
    if isinstance(node, ast.FunctionDef) and (first in NO_VERBS or re.search(r"[^s]s$|\W", first)):
        faults.append(f"begins with {first!r}, not with a verb such as Return")
    return faults


@pytest.mark.parametrize("part", sorted({path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES}))
def test_public_docstrings_are_sentences(part):
    """The commands' own functions may say no more than which command they run."""
    files = [path for path in FILES if path.relative_to(ROOT).with_suffix("").parts[0] == part]
    nodes = [(path, node) for path in files for node in public(ast.parse(path.read_text(encoding="utf-8")))]
    least = 3 if part == "cli" else 5
    assert not [f"{path}: {node.name} {fault}" for path, node in nodes for fault in docstring_faults(node, least)]


@pytest.mark.parametrize(
    "docstring",
    ["Whether it is the base.", "Returns the names of all patches.", "Return a name.", "Return all the names"],
)
def test_docstrings_that_are_no_sentences_are_noticed(docstring):
    (node,) = ast.parse(f'def f():\n    """{docstring}"""').body
    assert docstring_faults(node)


def test_help_is_quick_to_import():
    """`erasure --help` must not wait for torch."""
    code = "import sys, erasure.cli.parser as c; c.parser(); sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_shortcuts_lead_into_the_package():
    top = ROOT.parent
    for name in ("pipelines", "evaluation", "prompts", "configs"):
        if (top / name).is_symlink():
            assert (top / name).resolve() == ROOT / name


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("erasure").__getattr__("nothing")
