"""Soft prompts: positions of the vectors, gradients through the encoder, and the search with its published quirks."""

from __future__ import annotations

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.soft_prompt import encode, search, slots, spread, start
from tests.tiny import LENGTH, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize(
    ("place", "count", "at"),
    [("prefix", 2, [1, 2]), ("suffix", 2, [4, 5]), ("replace", 2, [1, 2]), ("add", 9, [1, 2, 3])],
)
def test_places(pipe, place, count, at):
    prompt = slots(pipe.tokenizer, "the starry cat", place, count)
    assert prompt.at.tolist() == at and prompt.ids.shape == (1, LENGTH) and prompt.add == (place == "add")
    words = pipe.tokenizer("the starry cat").input_ids[1:-1]
    row = prompt.ids[0].tolist()
    others = [token for i, token in enumerate(row[1:6], 1) if i not in at]
    assert others[:3] == {"add": others[:3], "replace": [pipe.tokenizer.eos_token_id] * 3}.get(place, words)[:3]


def test_words_of_several_tokens_are_kept_whole(pipe):
    """The published code counts words instead of tokens, and would overwrite the second token of a word."""
    words = pipe.tokenizer("zebra").input_ids[1:-1]
    assert len(words) > 1
    assert slots(pipe.tokenizer, "zebra", "prefix", 1).ids[0, 2 : 2 + len(words)].tolist() == words


@pytest.mark.parametrize(
    ("place", "row", "at"),
    [
        ("prefix", ["S", "E", "z", "b", "r", "a"], [1]),
        ("suffix", ["S", "z", "E", "b", "r", "a"], [2]),
        ("replace", ["S", "E", "b", "b", "r", "a"], [1]),
        ("add", ["S", "z", "b", "b", "r", "a"], [1]),
    ],
)
def test_the_published_count_of_words(place, row, at):
    """One word of five tokens, z e b r a, is assumed to be one token: the vector replaces "e", the rest moves up."""

    class Letters:
        model_max_length, eos_token_id, pad_token_id = LENGTH, 69, 69

        def __call__(self, text, verbose):
            return type("Tokens", (), {"input_ids": [83, *map(ord, text), 69]})

    prompt = slots(Letters(), "zebra", place, 1, by_words=True)
    assert [chr(token) for token in prompt.ids[0].tolist()] == row + ["E"] * (LENGTH - len(row))
    assert prompt.at.tolist() == at


def test_words_of_one_token_make_both_counts_equal(pipe):
    for place in ("prefix", "suffix", "replace", "add"):
        one, two = (slots(pipe.tokenizer, "red cat", place, 2, by_words=by_words) for by_words in (True, False))
        assert torch.equal(one.ids, two.ids) and torch.equal(one.at, two.at)


def test_a_tokens_own_embedding_changes_nothing(pipe):
    encoder = pipe.text_encoder
    ids = pipe.tokenizer("red cat", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    red = encoder.get_input_embeddings().weight[ids[0, 1]][None]
    states = encode(encoder, slots(pipe.tokenizer, "cat", "prefix", 1), red)
    assert torch.allclose(states, encoder(ids)[0], atol=1e-6)
    zeros = torch.zeros(2, red.shape[1])
    assert torch.allclose(
        encode(encoder, slots(pipe.tokenizer, "red cat", "add", 1), zeros), encoder(ids)[0], atol=1e-6
    )
    assert not encoder.get_input_embeddings()._forward_hooks


def test_gradients_reach_the_vectors(pipe):
    where = slots(pipe.tokenizer, "cat", "prefix", 2)
    vectors = start(pipe.text_encoder, where, torch.Generator().manual_seed(0)).requires_grad_(True)
    encode(pipe.text_encoder, where, vectors)[:, 3].pow(3).sum().backward()
    assert vectors.grad.shape == (2, vectors.shape[1]) and vectors.grad.any()
    assert float(vectors.detach().std()) == pytest.approx(spread(pipe.text_encoder), rel=0.4)


def test_added_vectors_start_at_zero_or_as_published_at_random_tokens(pipe):
    where, table = slots(pipe.tokenizer, "red cat", "add", 1), pipe.text_encoder.get_input_embeddings().weight
    assert not start(pipe.text_encoder, where, torch.Generator().manual_seed(0)).any()
    vectors = start(pipe.text_encoder, where, torch.Generator().manual_seed(0), zeros=False)
    assert len(vectors) == 2 and all((table == vector).all(1).any() for vector in vectors)


def quadratic(vectors: torch.Tensor, step: int) -> torch.Tensor:
    return ((vectors - 1) ** 2).sum()


def test_the_search_descends_and_is_adam():
    vectors = torch.zeros(1, 3)
    final = search(quadratic, vectors, 5, 0.1)
    twin = vectors.clone().requires_grad_(True)
    adam = torch.optim.Adam([twin], lr=0.1)
    for step in range(5):
        adam.zero_grad()
        quadratic(twin, step).backward()
        adam.step()
    assert torch.allclose(final, twin.detach()) and quadratic(final, 0) < quadratic(vectors, 0)
    assert not vectors.any()


def test_the_published_search_accumulates_gradients_and_is_one_step_behind():
    vectors, sign = torch.zeros(1, 2), [1.0, -1.0, -1.0]

    def zigzag(v: torch.Tensor, step: int) -> torch.Tensor:
        return v.sum() * sign[step]

    once = search(zigzag, vectors, 1, 0.1, accumulate=True, stale=True)
    assert torch.equal(once, vectors)  # a search of one step changes nothing
    assert torch.allclose(search(zigzag, vectors, 2, 0.1, stale=True), search(zigzag, vectors, 1, 0.1))
    # Sums of gradients are 1, 0, -1: the second step still goes down.
    added, clean = (search(zigzag, vectors, 2, 0.1, accumulate=value) for value in (True, False))
    assert added.mean() < clean.mean()


def test_the_published_sign_never_turns():
    """fast_at takes the sign in place, and later gradients far below 1 cannot flip the accumulated sign."""

    def turning(v: torch.Tensor, step: int) -> torch.Tensor:
        return v.sum() * (0.01 if step == 0 else -0.01)

    vectors = torch.zeros(1, 2)
    published = search(turning, vectors, 9, 0.1, sign=True, accumulate=True)
    assert torch.allclose(published, torch.full((1, 2), -0.9), atol=1e-4)
    assert (search(turning, vectors, 9, 0.1, sign=True) > 0).all()
    # The sign drops the size: gradients of 1 and of 0.01 make equal steps.
    mixed = search(lambda v, step: (v * torch.tensor([1.0, 0.01])).sum() * (1 + step), vectors, 3, 0.1, sign=True)
    assert torch.equal(mixed[0, 0], mixed[0, 1])


@pytest.mark.parametrize(
    ("text", "place", "count", "message"),
    [
        ("cat", "before", 1, "prefix"),
        ("cat", "prefix", 0, "at least 1"),
        ("cat", "prefix", LENGTH, "there is room for"),
        ("", "add", 1, "no tokens"),
    ],
)
def test_impossible_slots(pipe, text, place, count, message):
    with pytest.raises(ErasureError, match=message):
        slots(pipe.tokenizer, text, place, count)
