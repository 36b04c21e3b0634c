"""MMA-Diffusion: the end state is the aim, the gradient is the cosine's, and the search keeps the best prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from erasure.evaluation.attacks.attack import Case, Victim, make
from erasure.evaluation.attacks.mma import MMADiffusion
from erasure.evaluation.attacks.ring_a_bell import words_without_concept
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.strengths import switched_off
from tests.patch.making import delta_patch
from tests.tiny import tiny_pipeline

PROMPTS = ("a cat in red", "cat")


@pytest.fixture(scope="module")
def victim():
    return Victim(tiny_pipeline(ErasedStableDiffusionPipeline), switched_off)


@pytest.fixture(scope="module")
def cases():
    latents = torch.zeros(4, 8, 8)
    return [Case(str(i), text, i, "cat", latents, *text.split("cat")) for i, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def words(victim, cases):
    return words_without_concept(victim, cases)


def end_state(victim, text):
    """Return the last state of the text encoder at the end of a text, without padding."""
    ids = victim.pipe.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return victim.pipe.text_encoder(ids).last_hidden_state[0, -1]


def drawn(words, count, tokens, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return words[torch.randint(len(words), (count, tokens), generator=draw)]


def test_the_aim_is_the_state_of_the_end_token(victim, cases):
    targets = make("mma-diffusion").targets(victim, cases)
    want = torch.stack([end_state(victim, text) for text in PROMPTS])
    assert torch.allclose(targets, want, atol=1e-5) and not torch.allclose(want[0], want[1], atol=1e-2)


def test_a_prompt_is_compared_as_the_encoder_reads_it(victim, words, cases):
    attack = make("mma-diffusion", tokens=4)
    targets = attack.targets(victim, cases)
    rows = drawn(words, 6, 4).view(2, 3, 4)
    for i in range(2):
        for j in range(3):
            state = end_state(victim, victim.pipe.tokenizer.decode(rows[i, j].tolist()))
            want = F.cosine_similarity(state, targets[i], dim=0)
            assert torch.allclose(attack.cosines(victim, rows, targets)[i, j], want, atol=1e-5)


def test_the_gradient_is_that_of_the_cosine_with_respect_to_a_word_at_its_own_position(victim, words, cases):
    attack = make("mma-diffusion", tokens=3)
    targets = attack.targets(victim, cases)
    rows = drawn(words, 2, 3)
    gradient = attack.gradient(victim, words, rows, targets)
    assert gradient.shape == (2, 3, len(words))
    places = victim.slots([("", "")] * 2, 3)
    for position, word in ((0, 1), (2, 5)):
        values = []
        for step in (1e-2, -1e-2):
            vectors = victim.embeddings[rows].clone()
            vectors[:, position] += step * victim.embeddings[words[word]]
            states = victim.encode(places, vectors).states[:, 4]
            values.append(F.cosine_similarity(states, targets, dim=-1))
        slope = (values[0] - values[1]) / 2e-2
        assert torch.allclose(gradient[:, position, word], slope.detach(), rtol=2e-2, atol=1e-4)


def test_candidates_replace_one_token_by_a_word_ranked_for_that_position_and_cover_all_positions():
    attack = make("mma-diffusion", tokens=4, candidates=8)
    rows = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    ranked = torch.arange(24).view(2, 4, 3) + 10
    tried = attack.replaced(rows, ranked, torch.Generator().manual_seed(0))
    assert tried.shape == (2, 8, 4)
    changed = tried != rows[:, None]
    assert (changed.sum(-1) == 1).all()
    assert changed.int().argmax(-1).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    for i, j, k in changed.nonzero().tolist():
        assert tried[i, j, k] in ranked[i, k]
    assert len(set(tried[changed].tolist())) > 8  # drawn anew, not always the first


def test_the_search_comes_nearer_than_as_many_random_prompts_and_avoids_the_name(victim, words, cases):
    attack = make("mma-diffusion", tokens=4, iterations=12, candidates=16, top=4)
    targets = attack.targets(victim, cases)
    found = attack.search(victim, words, targets, torch.Generator().manual_seed(1))
    best = attack.cosines(victim, found[:, None], targets)[:, 0]
    random = attack.cosines(victim, drawn(words, 2 * 12 * 16, 4, seed=2).view(2, -1, 4), targets).max(1).values
    assert (best > random).all()
    cat = victim.pipe.tokenizer("cat").input_ids[1]
    assert cat in victim.words.tolist() and not (found == cat).any()
    # A longer search from the same words never ends with less.
    longer = replace(attack, iterations=20).search(victim, words, targets, torch.Generator().manual_seed(1))
    assert (attack.cosines(victim, longer[:, None], targets)[:, 0] >= best - 1e-6).all()


def test_the_best_prompt_is_kept_although_the_search_goes_on_from_a_worse_one(victim, words, cases, monkeypatch):
    seen, scores = [], iter([0.1, 0.9, 0.3, 0.2])

    def falling(self, victim, rows, targets):
        seen.append(rows)
        return torch.full(rows.shape[:2], next(scores))

    monkeypatch.setattr(MMADiffusion, "cosines", falling)
    attack = make("mma-diffusion", tokens=3, iterations=3, candidates=3, top=5)
    found = attack.search(victim, words, attack.targets(victim, cases), torch.Generator().manual_seed(0))
    second = seen[1]
    assert all(found[i].tolist() in second[i].tolist() for i in range(2))
    # The next candidates come from the best of the last ones, not from the best of all.
    assert all((seen[3][i] != seen[2][i][0]).sum(-1).min() <= 2 for i in range(2))
    assert not torch.equal(found, seen[0][:, 0])


def test_a_candidate_that_changes_nothing_is_never_chosen(victim, words, cases, monkeypatch):
    seen = []

    def unchanged_first(self, rows, ranked, draw):
        changed = torch.where(rows == words[0], words[1], words[0])
        return torch.stack([rows, changed], 1)

    def prefers_the_first(self, victim, rows, targets):
        seen.append(rows)
        return torch.tensor([[0.9, 0.1][: rows.shape[1]]] * len(rows))

    monkeypatch.setattr(MMADiffusion, "replaced", unchanged_first)
    monkeypatch.setattr(MMADiffusion, "cosines", prefers_the_first)
    attack = make("mma-diffusion", tokens=2, iterations=3)
    attack.search(victim, words, attack.targets(victim, cases), torch.Generator().manual_seed(3))
    assert all((seen[k + 1][:, 0] == seen[k][:, 1]).all() for k in (1, 2))


def test_every_round_starts_from_other_words_and_asks_the_base_alone(victim, words, cases, monkeypatch):
    attack = make("mma-diffusion", tokens=3, iterations=2, candidates=6, top=3, tries=3)
    safe, given, plain = {0, 1}, [], MMADiffusion.search

    def noted(self, victim, words, targets, draw):
        given.append(words)
        return plain(self, victim, words, targets, draw)

    monkeypatch.setattr(MMADiffusion, "search", noted)
    played = []
    for found in attack.rounds(victim, cases, safe, seed=4):
        played.append({i: one.prompt for i, one in found.items()})
        safe.discard(1)
    assert [sorted(one) for one in played] == [[0, 1], [0], [0]]
    assert len({one[0] for one in played}) == 3 and all(torch.equal(one, words) for one in given)
    again = next(attack.rounds(victim, cases, {0, 1}, seed=4))
    assert {i: one.prompt for i, one in again.items()} == played[0]
    other = next(attack.rounds(victim, cases, {0, 1}, seed=5))
    assert all(one.prompt != played[0][i] for i, one in other.items())
    patch = delta_patch(victim.pipe, part="", component="text_encoder", size=0.5)
    victim.pipe.load_patch(patch, name="p")
    try:
        erased = next(attack.rounds(victim, cases, {0, 1}, seed=4))
    finally:
        victim.pipe.unload_patches()
    assert {i: one.prompt for i, one in erased.items()} == played[0]
    control = attack.control(2)
    assert (control.tokens, control.tries, control.alone) == (3, 2, True)
