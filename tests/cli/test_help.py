"""The help pages: quick, in groups, with the choices and defaults that the code has, and no line cut or too long."""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from typing import get_args

import pytest

from erasure.cli import choices
from erasure.cli.main import main
from erasure.cli.parser import parser

HEAVY = {"torch", "diffusers", "transformers", "numpy", "rich", "shtab", "yaml"}


def tree(top: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Every parser, the top one first."""
    children = [
        child for action in top._actions if isinstance(action, argparse._SubParsersAction)
        for child in action.choices.values()
    ]  # fmt: skip
    return [top, *(one for child in children for one in tree(child))]


def words(page: argparse.ArgumentParser) -> list[str]:
    return page.prog.split()[1:]


PAGES = tree(parser())


@pytest.fixture(params=PAGES, ids=lambda page: "-".join(words(page)) or "top")
def page(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return request.param


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_takes_less_than_a_moment():
    code = (
        "import sys; from erasure.cli.main import main\n"
        "try: main(['--help'])\n"
        f"finally: print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    assert min(seconds) < 0.4  # 0.07 where nothing else runs; torch alone takes a second


def test_no_line_of_a_help_page_is_too_long(capsys, page):
    text = help_of(capsys, *words(page))
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "%(" not in text and "%%" not in text


def test_every_argument_stands_in_a_named_group_and_says_what_it_does(page):
    assert {group.title for group in page._action_groups if group._group_actions} & {
        "positional arguments",
        "options",
    } == set()
    for action in page._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert sorted(action.choices) == sorted(name for names in action.sections.values() for name in names)
            continue
        assert action.help and action.help[0].isupper() and not action.help.endswith("."), action
        assert action.nargs == 0 or isinstance(action.metavar, str), f"{page.prog} {action.dest}: no metavar"


def test_every_default_is_shown(page):
    for action in page._actions:
        if action.default in (None, argparse.SUPPRESS) or action.default == [] or action.nargs == 0:
            continue
        assert "(default: " in action.help, f"{page.prog} {action.dest}"
        if action.default != ["all"]:
            assert f"(default: {action.default}" in action.help


def test_the_help_of_erase_shows_its_groups_choices_and_defaults(capsys):
    text = help_of(capsys, "erase")
    groups = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert groups == ["concept", "method and settings", "model", "computing", "output", "general", "examples"]
    flat = " ".join(text.split())
    assert f"Method of erasing: {', '.join(choices.methods())} (default: what the preset of the model's family" in flat
    assert "-o, --out FILE Patch file to write (default: patch.safetensors)" in flat
    assert "--seed N Random seed (default: 0)" in flat
    assert "--kind KIND Kind of concept: object, style, identity, content (default: " in flat
    assert text.startswith("usage: erasure erase [options] [CONCEPT ...]\n")


def test_the_help_uses_the_words_of_the_field(capsys):
    flat = {name: " ".join(help_of(capsys, name).split()) for name in ("plan", "evaluate", "attack")}
    assert "Number of distributed processes to plan for" in flat["plan"]
    assert "Feature extractor for KID and FD, for example inception (default: the judge's)" in flat["evaluate"]
    assert "Try to recover the erased concept and report the attack success rate" in flat["attack"]
    assert (
        "how often the concept is recovered, next to a control: equally many tries without a search" in flat["attack"]
    )


def test_the_names_that_are_shown_are_those_of_the_library():
    from erasure import methods
    from erasure.concepts.concept import KINDS
    from erasure.dtypes import DTYPES
    from erasure.evaluation.attacks import attack, detuning
    from erasure.evaluation.judges import registry
    from erasure.evaluation.metrics.lpips import BACKBONES
    from erasure.evaluation.suite import names as suites
    from erasure.formats import FORMATS, METHODS
    from erasure.model import presets, quantising
    from erasure.model.single_file import kinds
    from erasure.prompts.prompt_set import names as prompt_sets
    from erasure.training.callbacks import available
    from erasure.training.stopping import Stop

    assert set(choices.methods()) <= set(methods.names())
    assert choices.KINDS == tuple(KINDS) and choices.DTYPES == tuple(DTYPES)
    assert choices.ATTACKS == (*attack.names(), detuning.NAME)
    assert choices.JUDGES == tuple(sorted(registry.KINDS)) and choices.BACKBONES == tuple(sorted(BACKBONES))
    assert choices.suites() == tuple(suites()) and choices.prompt_sets() == tuple(prompt_sets())
    assert choices.READ == tuple(FORMATS) and choices.CODES == tuple(METHODS)
    assert choices.WRITTEN == tuple(name for name, form in FORMATS.items() if not form.only_read)
    assert choices.models() == tuple(presets.bundled()) and choices.checkpoint_kinds() == tuple(kinds())
    assert choices.TRACKERS == tuple(available()) and choices.QUANTISED == tuple(quantising.KINDS)
    assert choices.STOPS == get_args(Stop)


def test_wrong_use_shows_the_usage_and_an_error_in_json_too(capsys):
    for arguments, message in (
        (["verify", "--json"], "the following arguments are required: FILE"),
        (["erase", "cat", "--seed", "x", "--json"], "argument --seed: invalid int value: 'x'"),
        (["erase", "cat", "--json", "--foo"], "unrecognized arguments: --foo"),
        (["nonsense", "--json"], "invalid choice: 'nonsense'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and message in json.loads(out)["error"]
        assert err.startswith("usage: erasure ") and f"\nerasure: error: {json.loads(out)['error']}" in err
        assert "Traceback" not in err


def test_general_options_may_stand_before_an_action(capsys):
    assert main(["patch", "--json", "formats"]) == 0
    assert json.loads(capsys.readouterr().out)
