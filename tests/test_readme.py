"""README: its Python block and its commands run, in order, as a new user would type them."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    # Fences alternate: every second piece lies inside one, and begins with its language.
    inside = re.split(r"^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE)[1::2]
    return [block.partition("\n")[2] for block in inside if block.partition("\n")[0] == language]


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    words = shlex.split(command, comments=True)
    assert words[0] == "erasure", command
    return subprocess.run(
        [sys.executable, "-m", "erasure.cli.main", *words[1:]], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["image"].size == (64, 64) and (tmp_path / "cat.safetensors").is_file()
    assert not names["pipe"].get_list_patches()


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("erasure ")]
    assert len(lines) >= 6
    for line in lines:
        done = run(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "report" / "report.html").is_file()
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 2


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (README.parent / link).exists(), link


def test_the_support_matrix_is_the_codes_own():
    from erasure.formats import matrix

    assert f"<!-- formats -->\n{matrix()}\n<!-- /formats -->" in README.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_results():
    """`python bench/readme.py` fills them in."""
    made = runpy.run_path(str(README.parent / "bench" / "readme.py"))["filled"]
    text = README.read_text(encoding="utf-8")
    assert made(text) == text
    with pytest.raises(ValueError, match="lacks the block costs"):
        made(text.replace("<!-- costs -->", ""))


@pytest.mark.slow
def test_the_main_job_erases_and_keeps(tmp_path):
    """`make demo` runs this command; a second call finds everything there."""
    import json

    done = run(f"erasure demo --json -o {tmp_path}/demo", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    figures = {metric["name"]: metric for metric in found["metrics"]}
    assert figures["UA"]["value"] >= 0.8 > 0.4 > figures["UA"]["base"]
    assert figures["IRA"]["value"] >= figures["IRA"]["base"] - 0.3
    assert Path(found["report"]).is_file()
    again = json.loads(run(f"erasure demo --json -o {tmp_path}/demo", tmp_path).stdout)
    assert again["metrics"] == found["metrics"]
    assert again["seconds"] < found["seconds"] / 2
