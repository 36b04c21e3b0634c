"""A list of names: one solve for all, the forecast, changes of the list from the cache, and bad input."""

from __future__ import annotations

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.concepts.name_list import NameList
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.method import ClosedFormMethod
from erasure.model.base import Base
from erasure.model.listed_base import ListedBase
from erasure.patch import Patch, read_header
from erasure.takedown import lists
from erasure.takedown.lists import closed_forms, erase_list, hard, plan_list, prepared
from tests.tiny import tiny_pipeline

KEEP = ["dog", "car", "tree", {"name": "monet", "kind": "style"}, "red car"]
LIST = {"erase": ["cat", {"name": "van gogh", "kind": "style", "anchor": "painting"}], "keep": KEEP, "defaults": []}
CLOSED = ["dp", "rece", "speed", "uce"]


@pytest.fixture(scope="module")
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def change(patch: Patch, layer: int = 0) -> torch.Tensor:
    return patch.payload.change("unet", patch.payload.names("unet")[layer]).double()


def more(*names) -> dict:
    return {**LIST, "erase": [*LIST["erase"], *names]}


@pytest.mark.parametrize("method", CLOSED)
def test_a_list_is_the_joint_erasure_of_its_names(base, tmp_path, method):
    """The same as erasing the concepts by name, with the same words kept, but for rounding and small directions."""
    found = erase_list(base, LIST, method, cache=tmp_path)
    names = NameList.of(LIST)
    plain = Base(base.name, base.pipe)
    plain.listed, plain.asked = names.words({}), names.keep
    right = erase(plain, list(names.concepts), method, progress=False)
    wrong = erase(plain, list(names.concepts)[:1], method, progress=False)
    assert found.names == ["cat", "van gogh"] and found.method == method
    error = (change(found) - change(right)).norm() / change(right).norm()
    assert error < 0.05 < (change(wrong) - change(right)).norm() / change(right).norm()


def test_all_closed_forms_take_lists():
    assert set(closed_forms()) >= set(CLOSED)


def test_a_changed_list_is_solved_from_the_cache_exactly(base, tmp_path, monkeypatch):
    """Adding a name and removing it again gives the first patch to the last bit, and reads the new name alone."""
    first = erase_list(base, LIST, "uce", cache=tmp_path)
    read: list[str] = []
    original = ListedBase._read
    monkeypatch.setattr(
        ListedBase, "_read", lambda self, texts, length=None: read.extend(texts) or original(self, texts, length)
    )
    longer = erase_list(base, more("blue"), "uce", cache=tmp_path)
    assert "blue" in read and not {"cat", "van gogh style", "car", "red car"} & set(read)
    alone = erase_list(base, more("blue"), "uce", cache=tmp_path / "other")
    assert torch.allclose(change(longer), change(alone), atol=1e-6)
    read.clear()
    again = erase_list(base, LIST, "uce", cache=tmp_path)
    assert set(read) <= {""}
    for layer in range(4):
        assert torch.equal(change(again, layer), change(first, layer))
    assert not torch.allclose(change(longer), change(first), atol=1e-3 * float(change(first).abs().max()))


def test_the_header_holds_the_list_and_the_error_of_its_format(base, tmp_path):
    file = tmp_path / "p.safetensors"
    erase_list(base, LIST, out=file, cache=tmp_path)
    patch = Patch.load(file)
    assert [concept["anchor"] for concept in patch.concepts] == [None, "painting"]
    assert patch.kept["defaults"] == [] and {"name": "monet", "kind": "style"} in patch.kept["keep"]
    again = NameList.of({"erase": list(patch.concepts), **patch.kept})
    assert again.keep == NameList.of(LIST).keep and again.concepts == NameList.of(LIST).concepts
    assert patch.stored["dtype"] == "fp16"
    assert 0 < float(read_header(file)["erasure.dtype_error"]) < 1e-3
    whole = erase_list(base, LIST, cache=tmp_path)
    assert (change(patch) - change(whole)).norm() < 1e-3 * change(whole).norm()


def test_a_patch_is_no_larger_than_it_may_be(base, tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "LEAST_RANK", 3)
    names = [f"{word} {other}" for word in ("red", "blue") for other in ("cat", "night")]
    values = {**LIST, "erase": names}
    assert max(erase_list(base, values, cache=tmp_path).payload.ranks) == 4  # one for each name at least
    assert max(erase_list(base, LIST, cache=tmp_path).payload.ranks) == 3
    forecast = plan_list(base, values, cache=tmp_path)
    assert forecast.rank == 4 and 0.5 < forecast.held_share < 1
    monkeypatch.setattr(lists, "LEAST_RANK", 112)
    assert max(erase_list(base, LIST, cache=tmp_path).payload.ranks) == 16


def test_the_forecast_has_a_row_for_each_name(base, tmp_path):
    values = {**LIST, "erase": [{"name": "cat", "aliases": ["blue cat"]}, {"name": "red", "kind": "style"}]}
    forecast = plan_list(base, values, "uce", cache=tmp_path)
    assert sorted(row.name for row in forecast.rows) == ["blue cat", "cat", "red"]
    assert {row.concept for row in forecast.rows} == {"cat", "red"}
    left = [row.left for row in forecast.rows]
    assert left == sorted(left, reverse=True) and all(0 < value < 1 for value in left)
    assert all(0 < row.outside < 1 and len(row.nearest) == 2 for row in forecast.rows)
    assert forecast.kept == 5 and forecast.width == 32 and 0 < forecast.free < 32 and 0 < forecast.moved < 1
    easier = plan_list(base, values, "uce", cache=tmp_path, keep_weight=0.01)
    harder = plan_list(base, values, "uce", cache=tmp_path, keep_weight=1000.0)
    gentle, own, stiff = (sum(row.left for row in one.rows) for one in (easier, forecast, harder))
    assert gentle < own < stiff
    assert easier.moved > forecast.moved > harder.moved


def test_the_forecast_says_how_much_of_a_change_is_reached(base, tmp_path):
    """Against the weights that erasing gives, layer by layer, over all states of the name."""
    patch = erase_list(base, LIST, cache=tmp_path, guide="empty")
    (row,) = [row for row in plan_list(base, LIST, cache=tmp_path, guide="empty").rows if row.name == "cat"]
    names = patch.payload.names("unet")
    states, empty = base.encode(["cat"])[0, 1:].double(), base.encode([""])[0, 1:].double()
    missed, wanted = 0.0, 0.0
    for name in names:
        weight = base.unet.get_parameter(name).detach().double()
        after = weight + patch.payload.change("unet", name).double()
        missed += float((states @ after.T - empty @ weight.T).square().sum())
        wanted += float((states @ weight.T - empty @ weight.T).square().sum())
    assert row.left == pytest.approx((missed / wanted) ** 0.5, rel=0.1)


def test_what_makes_a_name_hard():
    assert hard(0.2, (("dog", 0.5),)) == ""
    assert hard(0.8, (("dog", 0.5),)) == "80% of the change is not reached"
    assert hard(0.8, (("dog", 0.95),)) == "80% of the change is not reached; nearly the kept 'dog'"
    assert hard(0.2, ()) == ""


def test_a_short_list_is_edited_in_contexts_and_a_long_one_alone(base, tmp_path, monkeypatch):
    assert erase_list(base, LIST, cache=tmp_path).config["contexts"] is True
    monkeypatch.setattr(lists, "MANY", 1)
    assert erase_list(base, LIST, cache=tmp_path).config["contexts"] is False
    assert erase_list(base, LIST, cache=tmp_path, contexts=True).config["contexts"] is True


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"erase": ["van gogh"], "keep": ["van gogh!"]}, None),
        ({"erase": [{"name": "cat", "aliases": ["van gogh"]}], "keep": ["van  gogh"]}, "alias of 'cat'"),
        ({"erase": ["cat", "  "]}, "a concept's name is empty"),
    ],
)
def test_names_that_are_kept_too(base, tmp_path, values, says):
    if says is None:
        assert erase_list(base, {**values, "defaults": []}, cache=tmp_path, guide="empty").names == ["van gogh"]
        return
    with pytest.raises(ErasureError, match=says):
        erase_list(base, values, cache=tmp_path)


def test_equal_tokens_and_names_without_tokens_are_refused(base, monkeypatch, tmp_path):
    """A tokenizer that reads "gato" as "cat", and nothing in "<|endoftext|>"."""
    tokens = {"gato": ("cat",), "cat": ("cat",), "dog": ("dog",)}
    for module in ("erasure.takedown.lists", "erasure.model.text_columns"):
        monkeypatch.setattr(f"{module}.own_tokens", lambda base, text: (tokens.get(text, ()),))
    with pytest.raises(
        ErasureError, match="the text encoder reads 'gato' like 'cat'.*same tokens.*Nothing was changed"
    ):
        erase_list(base, {"erase": ["cat"], "keep": ["gato"], "defaults": []}, cache=tmp_path)
    with pytest.raises(ErasureError, match="'gato' and 'cat' are the same tokens.*two concepts"):
        erase_list(base, {"erase": ["cat", "gato"], "defaults": []}, cache=tmp_path)
    with pytest.raises(ErasureError, match="'nothing' has no tokens of its own"):
        erase_list(base, {"erase": ["cat", "nothing"], "defaults": []}, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_that_depend_on_what_is_kept_are_named(base, tmp_path, monkeypatch):
    """Every state of "cat" is kept under another word: nothing outside of the kept space is left of it."""
    original = ListedBase.kept_states

    def with_cat(self, prompts, part, read):
        rows = original(self, prompts, part, read)
        return torch.cat([rows, self.encode(["cat"])[0].double()])

    monkeypatch.setattr(ListedBase, "kept_states", with_cat)
    values = {**LIST, "erase": ["blue", "cat"], "keep": ["dog"]}
    with pytest.raises(
        ErasureError, match="nothing can be edited for 'cat': .*directions are free.*Nothing was changed"
    ):
        erase_list(base, values, "dp", cache=tmp_path, guide="empty", contexts=False, kept_share=1.0, rank=None)


def test_a_text_encoder_in_half_precision_is_computed_in_full(tmp_path):
    half = Base("tiny", tiny_pipeline())
    half.pipe.text_encoder.half()
    rounded = Base("tiny", tiny_pipeline())
    rounded.pipe.text_encoder.half().float()
    one, other = (erase_list(base, LIST, cache=tmp_path / str(i)) for i, base in enumerate((half, rounded)))
    assert torch.equal(change(one), change(other)) and half.pipe.text_encoder.dtype == torch.float16
    forecasts = [plan_list(base, LIST, cache=tmp_path / f"p{i}") for i, base in enumerate((half, rounded))]
    assert forecasts[0].rows == forecasts[1].rows


def test_a_name_that_stands_twice_is_erased_once_and_said(base, tmp_path, caplog):
    patch = erase_list(base, {**LIST, "erase": ["van gogh", "Van  Gogh"]}, cache=tmp_path)
    assert patch.names == ["van gogh"] and "'Van  Gogh' stands twice in the list" in caplog.text


def test_only_closed_forms_solve_lists(base, tmp_path):
    with pytest.raises(ErasureError, match="esd does not solve for a whole list.*dp, rece, speed, uce"):
        erase_list(base, LIST, "esd", cache=tmp_path)


def test_more_names_than_a_run_that_trains_may_have(base, tmp_path):
    words = [
        f"{one} {two}"
        for one in "a an the of in by at photo painting style".split()
        for two in "cat dog car tree church van monet red blue starry night gogh".split()
    ]
    assert len(words) == 120
    patch = erase_list(base, {"erase": words, "defaults": []}, "uce", cache=tmp_path, guide="empty")
    assert len(patch.names) == 120
    with pytest.raises(ErasureError, match="120 concepts are too many"):
        Concept.list_of(words)


def test_methods_that_may_depend_on_the_span_read_the_kept_words_in_full(base, monkeypatch):
    monkeypatch.setattr(lists, "half_is_fast", lambda: True)
    halves = {method: prepared(base, LIST, method)[0].half for method in CLOSED}
    assert halves == {"dp": False, "rece": True, "speed": True, "uce": True}
    assert all(issubclass(lists.find(method), ClosedFormMethod) for method in CLOSED)
