"""A base for lists: Gram matrices against all states, ends read early, names reduced, and what is not read twice."""

from __future__ import annotations

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.concepts.neighbors import prompt_of
from erasure.concepts.similarity import ends
from erasure.errors import ErasureError
from erasure.methods import configured
from erasure.model import listed_base
from erasure.model.base import Base
from erasure.model.closed_form import Edit
from erasure.model.listed_base import ListedBase, halved, root
from erasure.model.text_columns import states_of
from tests.tiny import KINDS, LENGTH, tiny_pipeline

WORDS = {"object": ("dog", "car", "tree", "church", "red car"), "style": ("monet", "van gogh")}
PROMPTS = [prompt_of(kind, word) for kind, words in WORDS.items() for word in words]


@pytest.fixture(scope="module")
def base() -> Base:
    return Base("tiny", tiny_pipeline())


def listed(base: Base, **options) -> ListedBase:
    return ListedBase.on(base, WORDS, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["tail", "last", "all"])
def test_the_gram_matrix_is_that_of_all_states(kind, part):
    base = Base("tiny", tiny_pipeline(kind=kind))
    states = states_of(base, PROMPTS, part)
    found = listed(base).kept_states(PROMPTS, part, states_of)
    assert found.shape == (states.shape[1], states.shape[1]) and found.dtype == torch.float64
    right = states.T @ states
    assert torch.allclose(found.T @ found, right, rtol=1e-5, atol=1e-6 * float(right.diagonal().max()))


def test_words_that_are_left_out_or_added_are_read_anew(base):
    """The stored Gram matrix is that of all listed words; those of a run differ from it by single words."""
    many = listed(base)
    wanted = [*PROMPTS[1:5], *PROMPTS[6:], "blue"]
    states = states_of(base, wanted, "tail")
    found = many.kept_states(wanted, "tail", states_of)
    assert torch.allclose(found.T @ found, states.T @ states, rtol=1e-4, atol=1e-4)
    (key,) = [key for key in many.stored if key.startswith("gram")]
    whole = states_of(base, PROMPTS, "tail")
    assert torch.allclose(many.stored[key], whole.T @ whole, rtol=1e-4, atol=1e-4)
    few = many.kept_states(PROMPTS[:1], "tail", states_of)  # a short list is not the long one without most of it
    one = states_of(base, PROMPTS[:1], "tail")
    assert torch.allclose(few.T @ few, one.T @ one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_at_the_end_does_not_depend_on_what_is_read_behind_it(kind, monkeypatch):
    base = Base("tiny", tiny_pipeline(kind=kind))
    lengths = []
    read = ListedBase._read
    monkeypatch.setattr(
        ListedBase, "_read", lambda self, texts, length=None: lengths.append(length) or read(self, texts, length)
    )
    texts = ["cat", "a photo of a red car", "van gogh"]
    assert torch.allclose(ends(listed(base), texts), ends(base, texts), atol=1e-6)
    assert lengths == [8]  # with the two special tokens; the padding to LENGTH is not read


def test_a_name_is_reduced_to_a_few_states_with_the_same_solution(base, monkeypatch):
    monkeypatch.setattr(listed_base, "DIRECTIONS", 9)
    concepts = Concept.list_of(["cat", {"name": "blue", "kind": "style"}])
    method = configured("uce", concepts, {"guide": "empty", "contexts": False, "rank": None})
    many = listed(base)
    columns = method.columns(many, concepts)
    plain = method.columns(base_with(base), concepts)
    assert len(columns.edit) < len(plain.edit)
    one, other = Edit(columns), Edit(plain)
    found, right = one.left @ one.right, other.left @ other.right
    assert (found - right).norm() < 0.02 * right.norm()
    names = [key for key in many.stored if key.startswith("name")]
    assert len(names) == 2 and many.stored[names[0]].dtype == torch.float32
    assert len(many.last_blocks) == 2 and len(many.last_blocks[0][0]) == 9


def base_with(base: Base) -> Base:
    """A plain base that keeps the same words."""
    plain = Base(base.name, base.pipe)
    plain.listed = WORDS  # what `words` looks for
    return plain


def test_nothing_is_read_twice(base, monkeypatch):
    concepts = Concept.list_of(["cat", "blue"])
    method = configured("uce", concepts, {"contexts": False})
    first = listed(base)
    before = method.columns(first, concepts)
    again = listed(base, stored=dict(first.stored))
    calls = []
    read = ListedBase._read
    monkeypatch.setattr(
        ListedBase, "_read", lambda self, texts, length=None: calls.extend(texts) or read(self, texts, length)
    )
    after = method.columns(again, concepts)
    assert set(calls) <= {""}  # the empty prompt says how wide the states are
    for name in ("edit", "guide", "keep"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    more = Concept.list_of(["cat", "blue", "night"])
    method.columns(listed(base, stored=dict(first.stored)), more)
    assert "night" in calls and "cat" not in calls and not set(calls) & {"car", "tree"} - {after_anchor(base, more)}


def after_anchor(base: Base, concepts: list[Concept]) -> str:
    from erasure.concepts.neighbors import all_anchored

    return str(all_anchored(listed(base), concepts)[-1].anchor)


def test_half_precision_keeps_the_weights_aside(base):
    encoder = base.pipe.text_encoder
    own = [(param.data_ptr(), param.clone()) for param in encoder.parameters()]
    with pytest.raises(KeyError), halved([encoder]):
        assert all(param.dtype == torch.bfloat16 for param in encoder.parameters())
        raise KeyError
    for param, (place, value) in zip(encoder.parameters(), own, strict=True):
        assert param.data_ptr() == place and torch.equal(param, value)
    exact, rough = (listed(base, half=half).kept_states(PROMPTS, "tail", states_of) for half in (False, True))
    exact, rough = exact.T @ exact, rough.T @ rough
    assert 0 < (exact - rough).norm() < 0.02 * exact.norm()


def test_the_root_of_a_gram_matrix_drops_rounding_below_zero():
    gram = torch.diag(torch.tensor([4.0, 1.0, -1e-12], dtype=torch.float64))
    rows = root(gram)
    assert torch.isfinite(rows).all() and torch.allclose(rows.T @ rows, gram, atol=1e-10)


def test_a_prompt_that_is_too_long_is_refused(base):
    with pytest.raises(ErasureError, match="has more tokens than the text encoder reads"):
        listed(base).encode(["cat " * LENGTH])
    assert "z" * LENGTH not in ListedBase.on(base, {"object": ("z" * LENGTH, "cat")}).prompts()
