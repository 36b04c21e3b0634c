"""`erasure list`: every kind in one form, the old names beside it; pages wrap, and are plain where that is wanted."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from erasure.cli.main import main
from erasure.cli.settings import rows
from erasure.config import setting

KINDS = ("methods", "attacks", "judges", "models", "suites", "prompts")


def run(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(params=["80", None], ids=["80-columns", "no-columns"])
def columns(request, monkeypatch):
    """What COLUMNS says, and the width that follows: without a terminal and a word from anybody, 100."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if request.param:
        monkeypatch.setenv("COLUMNS", request.param)
    return int(request.param or 100)


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        *(["list", kind] for kind in KINDS),
        ["attack", "--list"],
        ["patch", "formats"],
        ["list", "methods", "esd"],
        ["list", "attacks", "ring-a-bell"],
        ["list", "judges", "clip"],
        ["list", "suites", "mace-objects"],
        ["list", "prompts", "glyph-styles"],
        ["list", "models", "sd1"],
    ],
    ids=" ".join,
)
def test_nothing_is_cut_and_no_line_is_too_long(capsys, columns, arguments):
    text = run(capsys, *arguments)
    assert [line for line in text.splitlines() if len(line) > columns] == []
    assert "…" not in text and "\x1b" not in text and not any(line.endswith(" ") for line in text.splitlines())


def test_every_kind_is_listed_and_the_old_names_do_the_same(capsys):
    overview = run(capsys, "list")
    for kind in KINDS:
        data = json.loads(run(capsys, "list", kind, "--json"))
        text = run(capsys, "list", kind)
        assert kind in overview and data and all(name in text for name in data)
        old = ["attack", "--list"] if kind == "attacks" else [kind]
        if kind != "judges":
            assert run(capsys, *old) == text
            assert json.loads(run(capsys, *old, "--json")) == data
    assert json.loads(run(capsys, "methods", "--json"))["esd"].startswith("ESD: Erased Stable Diffusion")
    assert json.loads(run(capsys, "prompts", "--json"))["glyph-objects"] == 240
    assert "detune" in json.loads(run(capsys, "list", "attacks", "--json"))


@pytest.mark.parametrize("kind", ["methods", "attacks", "judges"])
def test_summaries_are_whole_sentences(capsys, kind):
    text = run(capsys, "list", kind)
    for name, summary in json.loads(run(capsys, "list", kind, "--json")).items():
        assert summary.endswith((".", "?")), f"{name}: {summary}"
        assert summary.split()[-1] in text


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["list", "method"], "did you mean 'methods'"),
        (["list", "methods", "esdd"], "did you mean 'esd'"),
        (["list", "attacks", "p5d"], "did you mean 'p4d'"),
        (["list", "judges", "nudnet"], "did you mean 'nudenet'"),
        (["list", "suites", "glyph-quik"], "did you mean 'glyph-quick'"),
        (["completion", "bsh"], "did you mean 'bash'"),
    ],
)
def test_a_wrong_name_exits_with_2(capsys, arguments, hint):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("erasure: error: unknown ") and hint in err


def test_a_method_shows_each_setting_with_default_range_and_meaning(capsys):
    text = flat(run(capsys, "methods", "esd"))
    data = json.loads(run(capsys, "methods", "esd", "--json"))
    assert text.startswith("ESD: Erased Stable Diffusion") and "Deviations from the official scripts" in text
    assert "kind style: iterations=200" in text and "parity=true: iterations=200, batch_size=1" in text
    assert "parity=true, kind object: variant=u" in text
    assert "Defaults that are not the published values" in text and "published 5e-5 with bf16 weights" in text
    for name, entry in data.items():
        value = entry["default"]
        default = str(value).lower() if value is None or isinstance(value, bool) else f"{value}".removesuffix(".0")
        assert entry["about"] and entry["type"] and f" {name} {default} " in text
    assert data["iterations"]["default"] == 75 and data["iterations"]["allowed"] == "whole number, at least 1"


def test_an_attack_shows_what_both_budgets_set(capsys):
    data = json.loads(run(capsys, "list", "attacks", "ring-a-bell", "--json"))
    text = run(capsys, "list", "attacks", "ring-a-bell")
    assert data["generations"]["default"] > data["generations"]["lite"]
    row = next(line for line in text.splitlines() if line.startswith("generations"))
    assert row.split()[1:3] == [str(data["generations"]["default"]), str(data["generations"]["lite"])]
    assert "iterations" in run(capsys, "list", "attacks", "detune")


def test_a_judge_shows_its_options(capsys):
    data = json.loads(run(capsys, "list", "judges", "clip", "--json"))
    assert {"source", "labels", "template"} <= data.keys()
    assert "source required text" in flat(run(capsys, "list", "judges", "clip"))


@dataclass
class Settings:
    """Settings of a method that is made up here.

    Args:
        steps: how many updates,
            on two lines.
        kind: one of two.
        bounds: tried in turn.
        rate: of Adam.
    """

    steps: int = setting(3, at_least=1)
    kind: Literal["a", "b"] = "a"
    bounds: tuple[float, ...] = (0.1, 2.0)
    rate: float | None = setting(None, above=0, below=1)


def test_declared_ranges_and_choices_are_shown():
    settings = {row.name: (row.shown, row.allowed, row.about) for row in rows(Settings)}
    assert settings == {
        "steps": ("3", "whole number, at least 1", "how many updates, on two lines."),
        "kind": ("a", "one of a, b", "one of two."),
        "bounds": ("[0.1, 2]", "list", "tried in turn."),
        "rate": ("none", "number or none, above 0 and below 1", "of Adam."),
    }


def on_terminal(*arguments: str, **environment: str) -> str:
    """What a command prints to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    env |= {"COLUMNS": "80", "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "erasure.cli", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 4096):
            chunks.append(chunk)
    except OSError:  # Linux says so when the other end is closed
        pass
    process.wait()
    os.close(ours)
    return b"".join(chunks).decode()


def test_colours_are_for_terminals_and_NO_COLOR_switches_them_off():
    bright, plain = (on_terminal("list", **extra) for extra in ({}, {"NO_COLOR": "1"}))
    assert "\x1b[1m" in bright and "suites" in bright
    assert "\x1b" not in plain and "suites" in plain
    fault = on_terminal("list", "suite")
    assert "\x1b[1;31merasure: error: \x1b[0m" in fault and "did you mean 'suites'" in fault
