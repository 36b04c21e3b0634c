"""Prompts with each token hidden, and projectors onto the span of states."""

from __future__ import annotations

import pytest
import torch

from erasure.model.base import Base
from erasure.model.conditioning import text_encoders, token_ids
from erasure.pipelines.guards.masked_prompts import ends, projector, unregularised_projector, without_each
from tests.tiny import LENGTH, tiny_pipeline


def test_a_hidden_token_could_be_any_other():
    pipe = tiny_pipeline()
    cat, dog = (without_each(pipe, f"a red {word} at night", 0) for word in ("cat", "dog"))
    assert cat.states.shape == (6, 32) and cat.tokens[0] == 5
    same = [torch.allclose(one, other, atol=1e-5) for one, other in zip(cat.states, dog.states, strict=True)]
    assert same == [False, False, False, True, False, False]  # the whole prompt, a, red, cat, at, night
    assert torch.allclose(cat.states[0], Base("", pipe).encode(["a red cat at night"])[0, 6].double(), atol=1e-6)


def test_by_id_the_hidden_token_is_the_one_of_id_0():
    pipe = tiny_pipeline()
    found = without_each(pipe, "red cat", 0, by_id=True)
    ids = token_ids(pipe.tokenizer, ["red cat"])
    for row, place in ((1, 1), (2, 2)):
        changed = ids.clone()
        changed[0, place] = 0
        with torch.no_grad():
            wanted = pipe.text_encoder(changed).last_hidden_state[0, 3].double()
        assert torch.allclose(found.states[row], wanted, atol=1e-5)
    assert not torch.allclose(found.states, without_each(pipe, "red cat", 0).states, atol=1e-3)


def test_each_encoder_of_xl_has_its_own_width_and_only_the_second_a_pooled_text():
    pipe = tiny_pipeline(kind="sdxl")
    first, second = (without_each(pipe, "a cat", number) for number in (0, 1))
    whole = Base("", pipe).conditions(["a cat"])
    assert torch.allclose(torch.cat([first.states[0], second.states[0]]), whole.states[0, 3].double(), atol=1e-5)
    assert first.pooled is None and torch.allclose(second.pooled[0], whole.pooled[0].double(), atol=1e-5)
    assert ends(pipe, ["cat", "red car"], 1).tokens == [1, 2] and len(text_encoders(pipe)) == 2


def test_a_prompt_that_is_too_long_is_truncated_as_pipelines_do():
    found = without_each(tiny_pipeline(), "a red cat in the blue night of van gogh by the tree", 0)
    assert found.tokens[0] == LENGTH - 2 and len(found.states) == LENGTH - 1


@pytest.mark.parametrize("make", [projector, unregularised_projector])
def test_a_projector_keeps_its_vectors_and_removes_what_is_orthogonal(make):
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 7, generator=draw, dtype=torch.double)
    found = make(vectors)
    assert torch.allclose(vectors @ found, vectors, atol=1e-4) and torch.allclose(found @ found, found, atol=1e-4)
    others = torch.linalg.qr(vectors.T, mode="complete")[0][:, 3:].T
    assert (others @ found).abs().max() < 1e-4


def test_directions_of_rounding_are_left_out():
    vector = torch.tensor([[1.0, 2.0, 0.0, 0.0]], dtype=torch.double)
    nearly = torch.cat([vector, vector + torch.tensor([[0.0, 0.0, 1e-5, 0.0]])])
    assert torch.trace(projector(nearly)) == pytest.approx(1.0, abs=1e-6)
    apart = torch.cat([vector, vector + torch.tensor([[0.0, 0.0, 0.1, 0.0]])])
    assert torch.trace(projector(apart)) == pytest.approx(2.0, abs=1e-6)
