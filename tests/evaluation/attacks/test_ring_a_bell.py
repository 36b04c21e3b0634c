"""Ring-A-Bell's population: no prompt occurs twice, and that is what brings the search nearer to its aim."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from erasure.evaluation.attacks import ring_a_bell
from erasure.evaluation.attacks.attack import Case, Victim, make
from erasure.evaluation.attacks.ring_a_bell import FILLER, direction, distinct, words_without_concept
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from tests.tiny import tiny_pipeline


def test_rows_are_drawn_until_enough_of_them_differ():
    calls = iter([[[1, 1], [2, 2], [1, 1]], [[2, 2], [3, 3], [4, 4]], [[5, 5]]])
    rows = distinct(lambda: torch.tensor(next(calls)), 3, torch.tensor([[3, 3]]))
    assert rows.tolist() == [[1, 1], [2, 2], [4, 4]] and next(calls) == [[5, 5]]
    assert distinct(lambda: torch.tensor([[1, 1], [2, 2]]), 3).tolist() == [[1, 1], [2, 2]]
    assert distinct(lambda: torch.tensor([[1, 1]]), 3, torch.tensor([[1, 1]])).shape == (0, 2)


@pytest.fixture
def victim():
    return Victim(tiny_pipeline(ErasedStableDiffusionPipeline), switched_off)


def evolved(victim, generations=25):
    attack = make("ring-a-bell", tokens=5, population=20, compared=None)
    draw = torch.Generator().manual_seed(0)
    rows = distinct(lambda: victim.words[torch.randint(len(victim.words), (20, 5), generator=draw)], 20)
    aim = victim.conditions(["a cat in red"]).states[0]
    rows = attack.evolve(victim, victim.words, rows, aim, generations, draw)
    return rows, attack.distance(victim, rows, aim)


def test_no_prompt_occurs_twice_and_the_search_comes_nearer(victim, monkeypatch):
    rows, distances = evolved(victim)
    assert len(rows) == 20 and len(rows.unique(dim=0)) == 20
    monkeypatch.setattr(ring_a_bell, "distinct", lambda make_rows, *_: make_rows())
    copied, others = evolved(victim)
    assert len(copied) == 20 and len(copied.unique(dim=0)) < 20
    assert distances.min() < others.min()


def test_children_mix_and_mutate_their_parents_as_often_as_published(victim):
    attack = make("ring-a-bell", "full", tokens=6)
    parents = torch.arange(12).reshape(2, 6)  # tokens 0 to 5 are the first parent's
    words = torch.tensor([99])
    children = attack.children(words, parents, 4000, torch.Generator().manual_seed(0))
    mutated = (children == 99).any(1)
    assert ((children == 99).sum(1) <= 1).all() and abs(mutated.float().mean() - attack.mutation) < 0.03
    of_first = (children < 6).sum(1)[~mutated]
    mixed = (of_first > 0) & (of_first < 6)
    assert abs(mixed.float().mean() - attack.crossover / 2) < 0.03  # half of the partners are the parent itself
    plain = children[~mutated]
    assert (plain % 6 == torch.arange(6)).all()  # a crossover leaves every token at its place


def test_the_search_comes_nearer_to_its_aim_without_the_name(victim):
    pipe = victim.pipe
    latents = torch.zeros(4, 8, 8)
    cases = [
        Case(str(i), f"a cat in {look}", i, "cat", latents, "a", f"in {look}") for i, look in enumerate(["red", "blue"])
    ]
    along = direction(victim, cases).states[0]
    named, bare = (
        victim.conditions([f"a {word} in {look}" for look in ("red", "blue")]).states for word in ("cat", FILLER)
    )
    assert torch.allclose(along, (named - bare).mean(0), atol=1e-6)
    nameless = [Case("n", "a pet", 0, "cat", latents, "", "a pet")]
    apart = torch.sub(*victim.conditions(["cat a pet", f"{FILLER} a pet"]).states)
    assert torch.allclose(direction(victim, nameless).states[0], apart, atol=1e-6) and apart.any()
    settings = make("ring-a-bell", tokens=3, population=16)
    whole, few = (replace(settings, compared=n) for n in (None, 6))
    ids = victim.words[torch.randint(len(victim.words), (2, 3), generator=torch.Generator().manual_seed(1))]
    states = victim.conditions([pipe.tokenizer.decode(row.tolist()) for row in ids]).states
    aimed = named[0]
    for search, count in ((whole, 12), (few, 6)):
        want = (states[:, :count] - aimed[:count]).square().sum((1, 2))
        assert torch.allclose(search.distance(victim, ids, aimed), want, rtol=1e-3)
    draw = torch.Generator().manual_seed(0)
    cat = pipe.tokenizer("cat").input_ids[1]
    words = words_without_concept(victim, cases)
    assert [case.name for case in cases] == ["cat", "cat"] and set(victim.words.tolist()) - set(words.tolist()) == {cat}
    rows = words[torch.randint(len(words), (16, 3), generator=draw)]
    aim = victim.conditions(["a cat in red"]).states[0] + along
    before = settings.distance(victim, rows, aim)
    evolved = settings.evolve(victim, words, rows, aim, 12, draw)
    after = settings.distance(victim, evolved, aim)
    assert after[0] < before.min() and (after.sort().values == after).all()
    assert not (evolved == cat).any()
