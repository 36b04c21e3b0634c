"""Lists of names: what a file may hold, spellings of one name, and what cannot be erased and kept at once."""

from __future__ import annotations

import pytest

from erasure.concepts.concept import Concept
from erasure.concepts.name_list import MOST_NAMES, NameList, shipped
from erasure.concepts.word_lists import WordLists
from erasure.errors import ErasureError

FILE = """
erase:
  - cat
  - {name: Van Gogh, aliases: [Vincent], kind: style, anchor: a painting}
keep:
  - tree
  - {name: Monet, kind: style}
  - {file: more.txt}
  - {file: more.csv}
defaults: [artists]
"""


def test_a_file_is_read(tmp_path):
    (tmp_path / "list.yaml").write_text(FILE)
    (tmp_path / "more.txt").write_text("# words\nhouse\n\nred car # not blue\n")
    (tmp_path / "more.csv").write_text("name,kind\nHokusai,style\nlamp,\n")
    names = NameList.read(tmp_path / "list.yaml", WordLists())
    assert names.concepts == (
        Concept("cat"),
        Concept("Van Gogh", aliases=("Vincent",), kind="style", anchor="a painting"),
    )
    assert names.keep == (
        ("object", "tree"),
        ("style", "Monet"),
        ("object", "house"),
        ("object", "red car"),
        ("style", "Hokusai"),
        ("object", "lamp"),
    )
    words = names.words({"object": ("never",)})
    assert words["style"][:2] == ("Monet", "Hokusai") and "Claude Monet" in words["style"]
    assert "watercolor" not in words["style"] and words["object"] == ("tree", "house", "red car", "lamp")
    record = names.to_json()
    assert record["defaults"] == ["artists"] and {"name": "lamp", "kind": "object"} in record["keep"]


def test_without_shipped_lists_the_vocabulary_is_kept():
    vocabulary = {"object": ("dog", "tree"), "style": ("ink",)}
    assert NameList.of({"erase": ["cat"]}).words(vocabulary)["object"] == ("dog", "tree")
    both = NameList.of({"erase": ["cat"], "keep": ["oak"]}).words(vocabulary)
    assert both["object"] == ("oak", "dog", "tree") and both["style"] == ("ink",)
    none = NameList.of({"erase": ["cat"], "keep": ["oak"], "defaults": []}).words(vocabulary)
    assert none["object"] == ("oak",) and not none["style"]
    assert set(shipped()) == {"objects", "identities", "styles", "artists"}


def test_two_spellings_of_one_name_are_one_entry():
    names = NameList.of({"erase": ["Van Gogh", "van  gogh", {"name": "Monet", "aliases": ["monet", "Claude"]}]})
    assert [concept.name for concept in names.concepts] == ["Van Gogh", "Monet"]
    assert names.concepts[1].aliases == ("Claude",) and set(names.merged) == {"monet", "van  gogh"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "nothing to erase"),
        ({"erase": "cat"}, "`erase` must be a list, not str"),
        ({"eraze": ["cat"]}, "did you mean 'erase'"),
        ({"erase": ["cat"], "keep": ["Cat"]}, "'Cat': both to be erased and to be kept"),
        ({"erase": [{"name": "cat", "aliases": ["tabby"]}], "keep": ["tabby"]}, "'tabby' .an alias of 'cat'."),
        ({"erase": list("abcdefg"), "keep": list("gfedcba")}, "'g', 'f', 'e', 'd', 'c' and 2 more: both"),
        ({"erase": ["Cat", {"name": "cat", "anchor": "dog"}]}, "'cat' and 'Cat' are one name in two entries"),
        ({"erase": ["cat", {"name": "dog", "aliases": ["CAT"]}]}, "'CAT' stands in the entries 'cat' and 'dog'"),
        ({"erase": ["cat"], "defaults": ["artist"]}, "unknown shipped list 'artist'.*did you mean 'artists'"),
        ({"erase": ["cat"], "keep": [3]}, "keep: 3 is neither a name"),
        ({"erase": ["cat"], "keep": [{"name": "x", "kind": "thing"}]}, "unknown kind 'thing'"),
        ({"erase": ["cat"], "keep": [{"file": "none.txt"}]}, "none.txt: cannot be read"),
        ({"erase": ["cat"], "keep": [""]}, "a concept's name is empty"),
    ],
)
def test_what_a_list_cannot_be(values, says):
    with pytest.raises(ErasureError, match=says):
        NameList.of(values)


def test_ten_thousand_names_are_refused_and_as_many_kept_are_not():
    many = [f"name {i}" for i in range(10_000)]
    with pytest.raises(ErasureError, match="10,000 names to erase are too many: one solve takes at most 2,000"):
        NameList.of({"erase": many})
    assert len(NameList.of({"erase": many[:MOST_NAMES]}).concepts) == MOST_NAMES
    assert len(NameList.of({"erase": ["cat"], "keep": many}).keep) == 10_000
    with pytest.raises(ErasureError, match="30,000 words to keep are too many"):
        NameList.of({"erase": ["cat"], "keep": [f"{i}" for i in range(30_000)]})


def test_the_kind_of_names_that_no_list_knows():
    names = NameList.of({"erase": ["Xyz Qrs", "cat", {"name": "Abc Def", "kind": "identity"}]}, WordLists())
    assert names.assumed == ("Xyz Qrs",) and [one.kind for one in names.concepts] == ["object", "object", "identity"]
    given = NameList.of({"erase": ["Xyz Qrs", {"name": "Abc", "kind": "style"}]}, WordLists(), kind="identity")
    assert given.assumed == () and [one.kind for one in given.concepts] == ["identity", "style"]


def test_a_csv_without_names_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("word\ncat\n")
    (tmp_path / "list.yaml").write_text("erase: [dog]\nkeep:\n  - {file: a.csv}\n")
    with pytest.raises(ErasureError, match="list.yaml: .*a.csv: column 'name' is missing"):
        NameList.read(tmp_path / "list.yaml")
