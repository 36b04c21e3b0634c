"""Columns of names: which places are taken, and names that the tokenizer cannot tell apart."""

from __future__ import annotations

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.text_columns import Pair, checked_names, last_place, named_pairs, states_of, states_of_pair
from tests.tiny import LENGTH, tiny_pipeline


@pytest.fixture(scope="module")
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def test_the_last_place_of_a_text(base):
    assert [last_place(base, text) for text in ("", "cat", "a photo of a cat")] == [0, 1, 5]


def test_parts_of_prompts(base):
    cat, van = base.encode(["cat"])[0].double(), base.encode(["van gogh"])[0].double()
    assert torch.equal(states_of(base, ["cat", "van gogh"], "tail"), torch.cat([cat[1:], van[2:]]))
    assert torch.equal(states_of(base, ["cat", "van gogh"], "last"), torch.stack([cat[1], van[2]]))
    assert torch.equal(states_of(base, ["cat"], "all"), cat) and len(cat) == LENGTH
    assert states_of(base, [], "all").shape == (0, cat.shape[1])


@pytest.mark.parametrize(
    ("pair", "places", "start", "other"),
    [
        (Pair("a dog in monet style", "monet", "a dog"), "same", 4, 4),
        (Pair("a dog in monet style", "monet", "a dog"), "ends", 4, 1),
        (Pair("cat", "cat", "a photo of the tree"), "same", 1, 1),
        (Pair("cat", "cat", "a photo of the tree"), "ends", 1, 5),
        (Pair("cat in red style", "cat", ""), "ends", 4, 0),  # "" has no state for the places before
        (Pair("cat by cat", "cat", "by"), "same", 3, 3),  # the last one, behind which both are known
    ],
)
def test_places_of_a_pair(base, pair, places, start, other):
    edit, guide = states_of_pair(base, pair, "tail", places)
    first, second = (base.encode([text])[0].double() for text in (pair.prompt, pair.instead))
    length = LENGTH - max(start, other)
    assert torch.equal(edit, first[start : start + length]) and torch.equal(guide, second[other : other + length])
    edit, guide = states_of_pair(base, pair, "last", places)
    assert torch.equal(edit, first[start][None]) and torch.equal(guide, second[other][None])


def test_two_spellings_of_one_name_are_one(base):
    concepts = Concept.list_of({"name": "van gogh", "aliases": ["Van  Gogh", "VAN GOGH", "monet"]})
    assert [name for _, name in checked_names(base, concepts)] == ["van gogh", "monet"]


@pytest.mark.parametrize(
    ("concepts", "says"),
    [
        ([{"name": "cat", "keep": ["dog", "red  car"]}, {"name": "red car"}], "'red  car' is to be kept.*'red car'"),
        ([{"name": "van gogh", "aliases": ["van  Gogh"], "keep": ["Van   gogh"]}], "'Van   gogh' is to be kept"),
        ([{"name": "van gogh"}, {"name": "van  gogh"}], "'van  gogh' and 'van gogh' are the same tokens"),
        ([{"name": "<|endoftext|>"}], "'<|endoftext|>' has no tokens of its own"),
    ],
)
def test_names_that_the_text_encoder_cannot_tell_apart(base, concepts, says):
    with pytest.raises(ErasureError, match=says.replace("|", r"\|") + ".*Nothing was changed"):
        checked_names(base, Concept.list_of(concepts))


def test_a_text_encoder_in_half_precision_gives_nearly_the_same_patch():
    """It computes in fp32 from the stored numbers."""
    pipe = tiny_pipeline()
    exact = erase(pipe, "cat", "uce", progress=False, **ALONE).payload.change("unet", NAME)
    pipe.text_encoder.to(torch.float16)
    half = erase(pipe, "cat", "uce", progress=False, **ALONE).payload.change("unet", NAME)
    assert pipe.text_encoder.dtype == torch.float16
    assert (half - exact).norm() < 1e-2 * exact.norm()


ALONE = {"guide": "empty", "contexts": False, "keep": "listed"}
NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def test_the_name_is_found_in_each_prompt():
    concept = Concept("van", aliases=("van gogh",), prompts=("a photo of {}", "a painting"), anchor="monet")
    assert [(pair.prompt, pair.name, pair.instead) for pair in named_pairs(concept)] == [
        ("a photo of van", "van", "monet"),
        ("a photo of van gogh", "van gogh", "monet"),
        ("a painting", "a painting", "monet"),
    ]
