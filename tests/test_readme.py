"""README and docs/: their commands and Python run as a reader would type them; links, figures and length hold.

What the fences of a page mean:

- ```` ```bash ````: commands, run from top to bottom. Only `erasure ...` can be run.
- ```` ```python ````: code, run in order; the blocks of a page share their names.
- ```` ```yaml ```` or ```` ```csv ```` after `<!-- file: NAME -->`: the test writes that file.
- `<!-- not run: REASON -->` before a block: the block is not run (weights, a network, hours), but its commands parse.

All pages share one folder, and a command that stands on several pages runs once. README's commands run as they are. On
the other pages `erasure erase` trains for two updates only (QUICK): what they show is how the command is used.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from erasure.cli.main import main
from erasure.cli.parser import parser
from erasure.formats.single_file import save_single_file
from erasure.patch import Patch
from tests.test_house import STOREYS
from tests.tiny import shrunk_pipeline

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>not run|file): (?P<note>.+?) -->\n)?```(?P<language>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S
)
LANGUAGES = ("bash", "python", "yaml", "csv", "text")
MOST_WORDS, MOST_ROWS = 1500, 14  # of README; the rows are the base and six methods on objects and styles
SLOW = ("docs/attacks.md", "docs/erase.md", "docs/evaluate.md", "docs/list-of-names.md", "docs/own-model.md")
MARKS = {page: pytest.mark.slow for page in (*SLOW, "docs/start.md")}
QUICK = {
    "esd": ["iterations=2", "trajectories=1", "sample_steps=4"],
    "spm": ["iterations=2", "trajectories=1", "sample_steps=4", "refresh=0"],
}


@dataclass(frozen=True)
class Block:
    """A fence of a page, with what the comment before it says."""

    page: Path
    language: str
    body: str
    mark: str
    note: str

    @property
    def runs(self) -> bool:
        """Whether the test runs it."""
        return self.mark != "not run" and self.language in ("bash", "python")

    def commands(self) -> list[str]:
        """The lines of a shell block; a backslash at the end continues a line."""
        return [line for line in self.body.replace("\\\n", " ").splitlines() if line.strip()]


def blocks(page: Path) -> list[Block]:
    return [
        Block(page, match["language"], match["body"], match["mark"] or "", match["note"] or "")
        for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def stripped(text: str) -> str:
    """A page without its code blocks, comments and tables."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    return re.sub(r"^\|.*$", "", text, flags=re.M)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The one folder in which everything runs, with the checkpoint in one file that README names in it."""
    place = tmp_path_factory.mktemp("pages")
    save_single_file(shrunk_pipeline(), place / "sd15.safetensors")
    return place


@pytest.fixture(scope="module")
def done() -> set[str]:
    """The commands that have run."""
    return set()


def run_command(line: str, quick: bool) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "erasure", f"{line}: only `erasure` can be run; mark the block `<!-- not run: REASON -->`"
    if quick and words[1] == "erase":
        method = words[words.index("--method") + 1] if "--method" in words else ""  # a closed form, quick as it is
        method = "speed" if "--list" in words else method
        words += [part for setting in QUICK.get(method, ()) for part in ("--set", setting)]
    try:
        code = main(words[1:])
    except SystemExit as stop:
        code = stop.code
    assert code == 0, line


def run_page(page: Path, done: set[str]) -> dict:
    """Run a page's blocks; returns the names that its Python blocks leave."""
    names: dict = {}
    for block in blocks(page):
        if block.mark == "file":
            Path(block.note).write_text(block.body, encoding="utf-8")
        if not block.runs:
            continue
        if block.language == "python":
            exec(compile(block.body, name(page), "exec", dont_inherit=True), names)
            continue
        for line in block.commands():
            if line not in done:
                run_command(line, quick=page != README)
                done.add(line)
    return names


@pytest.mark.slow
def test_readme_runs(folder, done, monkeypatch):
    monkeypatch.chdir(folder)
    names = run_page(README, done)
    assert names["image"].size == (64, 64) and not names["pipe"].get_list_patches()
    assert (folder / "report" / "report.html").is_file()
    assert Patch.load(folder / "takedown.safetensors").names == ["Van Gogh", "Mickey Mouse"]
    assert len(list((folder / "out" / "images").glob("*.png"))) == 2


@pytest.mark.parametrize("page", [pytest.param(one, marks=MARKS.get(name(one), ()), id=name(one)) for one in PAGES[1:]])
def test_the_page_runs(page, folder, done, monkeypatch):
    monkeypatch.chdir(folder)
    if not (folder / "cat.safetensors").is_file():  # this page alone was asked for
        line = next(line for block in blocks(README) for line in block.commands() if line.startswith("erasure erase"))
        run_command(line, quick=True)
        done.add(line)
    run_page(page, done)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(page))
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.language!r}: one of {', '.join(LANGUAGES)}"
        assert block.mark != "file" or block.language in ("yaml", "csv")


def subcommands(command: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    choices = [action.choices for action in command._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(choices[0]) if choices else {}


def options(command: argparse.ArgumentParser, deep: bool = False) -> set[str]:
    """The options of a command; deep: of its subcommands too."""
    known = {text for action in command._actions for text in action.option_strings}
    return known.union(*(options(one, deep) for one in subcommands(command).values())) if deep else known


def find_command(words: list[str]) -> argparse.ArgumentParser:
    """The parser of the command that words name; words after it are its arguments."""
    command = parser()
    for word in words:
        below = subcommands(command)
        if not below or word.startswith("-"):
            break
        assert word in below, f"{' '.join(words)}: no command {word!r}"
        command = below[word]
    return command


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_exists(page):
    """Blocks that are not run parse as a whole; of commands in the text the name and the options exist."""
    for block in blocks(page):
        for line in block.commands() if block.language == "bash" else []:
            words = shlex.split(line, comments=True)
            start = next((i for i, word in enumerate(words) if word in ("erasure", "erasure.cli")), None)
            if start is not None:
                parser().parse_args(words[start + 1 :])
    everything = options(parser(), deep=True)
    for code in re.findall(r"`([^`\n]+)`", stripped(page.read_text(encoding="utf-8"))):
        words = code.split()
        if words[0] == "erasure" and "COMMAND" not in words:
            here = options(find_command(words[1:])) if len(words) > 1 else everything
            assert not [word for word in words if word.startswith("--") and word not in here], code
        elif words[0].startswith("--"):
            assert words[0] in everything, code


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_page_is_listed():
    """README links docs/index.md, which links every page."""
    assert "(docs/index.md)" in README.read_text(encoding="utf-8")
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name in ("index.md", *re.findall(r"\]\(([^)#]+)", text)), f"docs/index.md does not link {page.name}"


def test_readme_is_short():
    """Words as `wc -w README.md` counts them, those of the table and of code included; and one table."""
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert [table.count("\n") - 2 <= MOST_ROWS for table in tables] == [True]


def test_the_tables_are_those_of_the_results():
    """`python bench/readme.py` fills them in."""
    module = runpy.run_path(str(ROOT / "bench" / "readme.py"))
    for page in module["pages"]():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert module["filled"](page, text) == text, page
    with pytest.raises(ValueError, match="docs/results.md lacks the block costs"):
        module["filled"]("docs/results.md", text.replace("<!-- costs -->", ""))


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "results.md"], ids=name)
def test_figures_in_the_text_stand_in_a_table(page):
    """A figure with its interval, "19 % [10, 35]", is one of the tables' of docs/results.md."""
    tables = "\n".join(re.findall(r"^\|.*$", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), flags=re.M))
    figures = re.findall(r"(\d+) % (\[\d+, \d+\])", stripped(page.read_text(encoding="utf-8")))
    assert figures
    for share, interval in figures:
        assert f"| {share}% {interval} |" in tables, f"{share} % {interval}"


@pytest.mark.slow
def test_the_main_job_erases_and_keeps(tmp_path):
    """`make demo` runs this command; a second call finds everything there."""

    def demo() -> dict:
        command = [sys.executable, "-m", "erasure.cli", "demo", "--json", "-o", f"{tmp_path}/demo"]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    first = demo()
    figures = {metric["name"]: metric for metric in first["metrics"]}
    assert figures["UA"]["value"] >= 0.8 > 0.4 > figures["UA"]["base"]
    assert figures["IRA"]["value"] >= figures["IRA"]["base"] - 0.3
    assert Path(first["report"]).is_file()
    again = demo()
    assert again["metrics"] == first["metrics"]
    assert again["seconds"] < first["seconds"] / 2


def test_contributing_lists_the_storeys():
    """CONTRIBUTING shows the order of tests/test_house.py, from the top."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^```text\n(.*?)^```", text, flags=re.M | re.S)
    rows = [tuple(re.split(r" {2,}", line)[0].split(", ")) for line in listed.splitlines()]
    assert rows[::-1] == [tuple(rooms) for rooms in STOREYS]


def test_new_names_exist():
    """What docs/upgrading.md sends its reader to is there."""
    text = (ROOT / "docs" / "upgrading.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(?P<before>[^`|]+)`.*? \| (?P<now>[^|]+) \|$", text, flags=re.M)
    assert len(rows) > 70
    for before, now in rows:
        first = ""
        for new in re.findall(r"`([^`]+)`", now):
            first = first or new.rpartition(".")[0]
            path = f"{first}{new}" if new.startswith(".") else new
            if path.startswith("erasure."):  # a class
                module, _, attribute = path.rpartition(".")
                assert hasattr(importlib.import_module(module), attribute), path
            else:
                assert importlib.util.find_spec(f"erasure.{path}") is not None, path
        assert first or now, before
