"""Shell completion: bash completes commands, options, names and files; zsh and fish get a script that is whole."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from erasure.cli.main import main


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Complete the last of the words as bash would, in a folder with one patch."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("completion")
    (folder / "cat.safetensors").write_text("")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["completion", "bash"]) == 0
    (folder / "script").write_text(out.getvalue())

    def run(*words: str) -> list[str]:
        ask = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_erasure; printf "%s\n" "${COMPREPLY[@]}"'
        code = f"source ./script; {ask}"
        command = ["bash", "--norc", "-c", code, "bash", "erasure", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.split()

    return run


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["era"], ["erase"]),
        (["erase", "--me"], ["--method"]),
        (["erase", "cat", "--method", "es"], ["esd"]),
        (["erase", "cat", "--method", "esd", "--pre"], ["--preset", "--precision", "--preview-every"]),
        (["attack", "--attack", "ring"], ["ring-a-bell-direct", "ring-a-bell"]),
        (["patch", "ex"], ["export"]),
        (["patch", "export", "cat.safetensors", "--format", "ko"], ["kohya"]),
        (["patch", "info", "ca"], ["cat.safetensors"]),
        (["list", "m"], ["methods", "models"]),
        (["methods", "un"], ["unguide"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bash_completes(complete, words, completions):
    assert complete(*words) == completions


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_and_parses(capsys, tmp_path, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("erase", "conflicts", "gradient-checkpointing", "advunlearn", "ring-a-bell"))
    assert main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script.removesuffix("\n")}
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(script)
        assert subprocess.run([shell, "-n", tmp_path / "script"]).returncode == 0
