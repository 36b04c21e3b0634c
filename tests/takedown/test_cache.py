"""The cache of a list: what it is named after, that it is written whole, and what a damaged one does."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.listed_base import ListedBase
from erasure.patch.safetensors_io import read_layout
from erasure.takedown import cache
from erasure.takedown.cache import cache_file, default_cache, read_cache, stored
from erasure.takedown.lists import erase_list
from tests.tiny import tiny_pipeline

LIST = {"erase": ["cat"], "keep": ["dog", "car", "tree"], "defaults": []}


@pytest.fixture(scope="module")
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def listed(base: Base, *words: str) -> ListedBase:
    return ListedBase.on(base, {"object": words})


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("ERASURE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache() == tmp_path / "x" / "erasure"


def test_a_file_is_named_after_the_encoder_and_the_kept_words(base, tmp_path):
    own = cache_file(listed(base, "dog", "car"), tmp_path)
    assert own == cache_file(listed(base, "car", "dog"), tmp_path) and own.parent == tmp_path
    assert own != cache_file(listed(base, "dog"), tmp_path)
    assert own != cache_file(listed(Base("other", tiny_pipeline(seed=1)), "dog", "car"), tmp_path)
    moved = Base("tiny", tiny_pipeline())
    moved.pipe.unet.conv_in.weight.data += 1  # only the text encoder counts
    assert own == cache_file(listed(moved, "dog", "car"), tmp_path)
    next(moved.pipe.text_encoder.parameters()).data[0, 0] += 1e-3
    assert own != cache_file(listed(moved, "dog", "car"), tmp_path)


def test_results_are_stored_and_read(base, tmp_path):
    one = listed(base, "dog")
    with stored(one, tmp_path) as path:
        one.stored["gram x"] = torch.eye(2, dtype=torch.float64)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert read_layout(path).entries["gram x"].dtype == torch.float64
    two = listed(base, "dog")
    with stored(two, tmp_path):
        assert torch.equal(two.stored["gram x"], torch.eye(2).double())
    before = path.stat().st_mtime_ns
    with stored(listed(base, "dog"), tmp_path):
        pass
    assert path.stat().st_mtime_ns == before  # nothing new, nothing written


def test_what_was_read_before_a_failure_is_kept(base, tmp_path):
    one = listed(base, "dog")
    with pytest.raises(KeyError), stored(one, tmp_path) as path:
        one.stored["a"] = torch.ones(1)
        raise KeyError
    assert set(read_cache(path)) == {"a"}


@pytest.mark.parametrize("harm", ["cut", "bit", "text"])
def test_a_damaged_file_is_noticed_and_made_again(base, tmp_path, caplog, harm):
    first = erase_list(base, LIST, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    spoiled = {
        "cut": whole[:-7],
        "bit": whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:],
        "text": b"not a file of tensors",
    }[harm]
    path.write_bytes(spoiled)
    again = erase_list(base, LIST, cache=tmp_path)
    assert "is damaged" in caplog.text and "made again" in caplog.text
    for name in first.payload.names("unet"):
        assert torch.equal(first.payload.change("unet", name), again.payload.change("unet", name))
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_only_costs_time(base, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    patch = erase_list(base, LIST, cache=tmp_path / "file")
    assert patch.names == ["cat"] and "are not stored" in caplog.text


def test_a_large_file_keeps_what_the_run_used(base, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MOST_ENTRIES", 2)
    one = listed(base, "dog")
    with stored(one, tmp_path) as path:
        one.stored |= {name: torch.ones(1) for name in "abc"}
        one.used |= {"b"}
    assert set(read_cache(path)) == {"b"}


def test_nothing_is_stored_of_a_list_that_is_refused(base, tmp_path):
    with pytest.raises(ErasureError):
        erase_list(base, {**LIST, "keep": ["cat"]}, cache=tmp_path)
    assert not list(tmp_path.iterdir())
