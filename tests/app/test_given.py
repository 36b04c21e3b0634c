"""Prompts and judges that visitors give: which are taken, which are refused, and what is never opened."""

from __future__ import annotations

import pickle

import pytest

from erasure.app import given
from erasure.app.given import Given, in_page_words
from erasure.app.models import Models
from erasure.errors import ErasureError
from erasure.prompts.prompt_set import PromptSet
from tests.evaluation.judging import write_clip

ROWS = "prompt,object\na cat,cat\na dog,dog\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(ROWS)
    return path


def test_prompts_are_a_bundled_set_or_a_file_and_may_be_labelled(file):
    assert Given().rows() is None
    assert Given(prompts="objects").rows() == PromptSet.read("objects")
    assert [row.labels for row in Given(file=str(file)).rows().rows] == [{"object": "cat"}, {"object": "dog"}]
    file.write_text("a cat\na cat in the rain\n")
    assert {row.labels["object"] for row in Given(file=str(file), label=" object=cat ").rows().rows} == {"cat"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompts": "objects", "file": "FILE"}, "either the set objects or a file"),
        ({"label": "object=cat"}, "belongs to prompts"),
        ({"file": "FILE", "label": "cat"}, "expected HEAD=VALUE"),
        ({"prompts": "FILE"}, "unknown prompt set"),  # a file of this machine is no bundled set
        ({"prompts": "../prompts/objects"}, "unknown prompt set"),
        ({"prompts": "hub:owner/name"}, "unknown prompt set"),  # nothing is downloaded because a visitor says so
    ],
)
def test_prompts_that_cannot_be_taken_say_why(file, fields, words):
    with pytest.raises(ErasureError, match=words):
        Given(**{key: str(file) if text == "FILE" else text for key, text in fields.items()}).rows()


def test_large_files_are_not_read(file, monkeypatch):
    monkeypatch.setattr(given, "LARGEST", len(ROWS))
    assert len(Given(file=str(file)).rows().rows) == 2
    file.write_text(ROWS + "\n")
    with pytest.raises(ErasureError, match="mine.csv has 0.0 MB, more than"):
        Given(file=str(file)).rows()


class Bomb:
    def __reduce__(self):
        return open, ("bomb-went-off", "w")


@pytest.mark.parametrize("name", ["prompts.pkl", "prompts.csv", "prompts.JSON"])
def test_prompts_are_never_unpickled(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ErasureError) as refused, in_page_words(str(path)):
        Given(file=str(path)).rows()
    assert str(tmp_path) not in str(refused.value) and name in str(refused.value)
    assert not (tmp_path / "bomb-went-off").exists()


def test_judges_are_those_of_the_command_and_on_a_page_for_others_those_that_it_offers(tmp_path):
    offered = f"clip:{write_clip(tmp_path / 'clip')}?labels=cat,dog"
    here, closed = Models(), Models(any_path=False, judges=[offered])
    assert Given().find_judge(closed) is None
    for models in (here, closed):
        assert Given(judge=f" {offered} ").find_judge(models).heads == {"object": ["cat", "dog"]}
        assert Given(judge="glyph").find_judge(models).name == "glyph"
    other = f"{offered},frog"
    assert Given(judge=other).find_judge(here).heads == {"object": ["cat", "dog", "frog"]}
    with pytest.raises(ErasureError, match="only these judges are offered.*erasure app --judge"):
        Given(judge=other).find_judge(closed)
    with pytest.raises(ErasureError, match="unknown judge 'clop'"):
        Given(judge="clop:x").find_judge(here)
    with pytest.raises(ErasureError, match="unknown judge 'clop'"):
        Models(judges=["clop:x"])


def test_messages_name_the_fields_of_the_page_and_no_folder_of_this_machine():
    with pytest.raises(ErasureError) as told, in_page_words("", "/srv/own/sd15"):
        raise ErasureError("/srv/own/sd15: give --prompts (prompts=) and --judge (judge=), add --label object=church")
    assert str(told.value) == "sd15: give “Prompts” and “Judge”, add “Label of every prompt” object=church"
