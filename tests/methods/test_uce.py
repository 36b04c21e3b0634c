"""UCE against least squares that numpy solves row by row from token ids, and twins that must differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erasure.concepts import neighbors
from erasure.concepts.concept import Concept
from erasure.config import parse_overrides
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configure, configured
from erasure.methods.uce import orthogonal
from erasure.model import concept_columns
from erasure.model.base import Base
from erasure.model.closed_form import READERS
from tests.methods.encoding import states
from tests.tiny import LENGTH, tiny_pipeline

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
LISTED = {"keep": "listed", "keep_states": "all", "guide": "empty", "contexts": False, "ridge": 0.5, "rank": None}


def least_squares(weight, edit, answers, keep, ridge=0.5, keep_weight=1.0, edit_weight=1.0) -> np.ndarray:
    """The minimum of the objective as one stack of equations, without normal equations; returns W - W0."""
    rows = [np.sqrt(edit_weight) * edit, np.sqrt(keep_weight) * keep, np.sqrt(ridge) * np.eye(weight.shape[1])]
    wanted = [np.sqrt(edit_weight) * answers, np.sqrt(keep_weight) * keep @ weight.T, np.sqrt(ridge) * weight.T]
    return np.linalg.lstsq(np.vstack(rows), np.vstack(wanted), rcond=None)[0].T - weight


def change(base: Base, concept, **settings) -> np.ndarray:
    patch = erase(base, concept, "uce", progress=False, **settings)
    return patch.payload.change("unet", f"{LAYER}.weight").double().numpy()


def weight_of(base: Base) -> np.ndarray:
    return base.unet.get_submodule(LAYER).weight.detach().double().numpy()


def test_the_tail_of_a_name_is_answered_like_the_same_places_of_the_empty_prompt(base):
    """ "cat" is the token at place 1: places 1 to the last are edited, and all places of "dog" are kept."""
    weight, cat, empty, dog = weight_of(base), states(base, "cat"), states(base, ""), states(base, "dog")
    found = change(base, {"name": "cat", "keep": ["dog"]}, **LISTED)
    right = least_squares(weight, cat[1:], empty[1:] @ weight.T, dog)
    assert np.abs(found - right).max() < 1e-6
    twins = {
        "sign": -right,
        "lambda": least_squares(weight, cat[1:], empty[1:] @ weight.T, dog, ridge=0.6),
        "nothing kept": least_squares(weight, cat[1:], empty[1:] @ weight.T, dog[:0]),
        "one place early": least_squares(weight, cat[0:], empty[0:] @ weight.T, dog),
        "one place late": least_squares(weight, cat[2:], empty[2:] @ weight.T, dog),
        "guides one place off": least_squares(weight, cat[1:], empty[:-1] @ weight.T, dog),
        "weight of the kept": least_squares(weight, cat[1:], empty[1:] @ weight.T, dog, keep_weight=0.8),
    }
    for name, twin in twins.items():
        assert np.abs(found - twin).max() > 1e-4, name


def test_the_mean_guide_is_beyond_the_mean_of_the_other_names(base, monkeypatch):
    """The state at each place is moved to the mean of the other names' states there, and 0.4 of the way beyond."""
    words = [("object", "dog"), ("object", "red car"), ("style", "x")]
    monkeypatch.setattr(concept_columns, "retained", lambda base, concepts: words)
    weight, cat, others = weight_of(base), states(base, "cat"), [states(base, text) for text in ("dog", "red car")]
    mean = np.mean(others, axis=0)
    kept = np.vstack([others[0][1:], others[1][2:], states(base, "x style")[2:]])
    found = change(base, "cat", guide="mean", beyond=0.4, ridge=5.0, contexts=False, rank=None)

    def solved(guide, kept=kept, ridge=5.0):
        return least_squares(weight, cat[1:], guide[1:] @ weight.T, kept, ridge=ridge)

    assert np.abs(found - solved(1.4 * mean - 0.4 * cat)).max() < 1e-6
    everything = np.mean([*others, states(base, "x")], axis=0)
    for twin in (mean, 0.6 * mean + 0.4 * cat, 1.4 * everything - 0.4 * cat, states(base, "")):
        assert np.abs(found - solved(twin)).max() > 1e-4
    assert np.abs(found - solved(1.4 * mean - 0.4 * cat, ridge=0.5)).max() > 1e-4
    monkeypatch.setattr(concept_columns, "retained", lambda base, concepts: [("style", "x")])
    with pytest.raises(ErasureError, match="no other name.*'cat'.*give an anchor.*Nothing was changed"):
        change(base, "cat", guide="mean")


def test_the_default_guide_is_the_nearest_other_name(base, monkeypatch):
    """The name whose state at the end token has the greatest cosine; never one that is erased too."""
    words = [("object", "dog"), ("object", "car"), ("object", "red tree"), ("style", "x")]
    for module in (concept_columns, neighbors):
        monkeypatch.setattr(module, "retained", lambda base, concepts: words)

    def end(text):
        state = states(base, text)[len(base.pipe.tokenizer(text).input_ids) - 1]
        return state / np.linalg.norm(state)

    cosines = {word: end(word) @ end("cat") for word in ("dog", "car", "red tree")}
    order = sorted(cosines, key=lambda word: -cosines[word])
    (concept,) = Concept.list_of({"name": "cat", "keep": ["van gogh"]})
    columns = configured("uce", [concept], {"contexts": False, "rank": None}).columns(base, [concept])
    places = {word: len(base.pipe.tokenizer(word).input_ids) - 2 for word in order}
    found = {word: np.allclose(columns.guide[0], states(base, word)[places[word]], atol=1e-6) for word in order}
    assert [word for word, same in found.items() if same] == order[:1]


def test_an_object_is_also_edited_in_styles(base, monkeypatch):
    """Six styles at most, each answered like the mean of the other objects in that style; together as much as alone."""
    styles = [("style", f"{word} red") for word in ("a", "the", "of", "in", "by", "at", "on")]
    words = [
        ("object", "dog"),
        ("object", "car"),
        ("object", "z" * 8),
        *styles,
    ]  # the last object's prompts are too long
    monkeypatch.setattr(concept_columns, "retained", lambda base, concepts: words)
    (concept,) = Concept.list_of("cat")
    columns = configured("uce", [concept], {"guide": "mean", "beyond": 0.0, "rank": None}).columns(base, [concept])
    assert len(columns.edit) == 7 * (LENGTH - 1)
    last = slice(6 * (LENGTH - 1), None)
    assert np.allclose(columns.edit[last], states(base, "cat in at red style")[1:], atol=1e-6)
    mean = (states(base, "dog in at red style") + states(base, "car in at red style"))[1:] / 2
    assert np.allclose(columns.guide[last], mean, atol=1e-6)
    weights = torch.as_tensor(columns.edit_weight)
    assert (weights[: LENGTH - 1] == 1).all() and torch.allclose(weights[last], torch.tensor(1 / 6).double())


def test_means_in_contexts_are_taken_over_a_spread_of_names():
    assert concept_columns.spread("abc") == ["a", "b", "c"]
    assert concept_columns.spread(range(24)) == list(range(0, 24, 2))


def test_the_mean_of_styles_is_taken_in_the_same_prompts(base, monkeypatch):
    words = [("style", "red"), ("style", "blue"), ("object", "dog")]
    monkeypatch.setattr(concept_columns, "retained", lambda base, concepts: words)
    (concept,) = Concept.list_of({"name": "monet", "kind": "style"})
    columns = configured("uce", [concept], {"guide": "mean", "contexts": True, "beyond": 0.0, "rank": None}).columns(
        base, [concept]
    )
    alone = (states(base, "red style") + states(base, "blue style"))[1:] / 2
    carried = (states(base, "a dog in red style") + states(base, "a dog in blue style"))[4:] / 2
    assert np.allclose(columns.guide[: LENGTH - 1], alone, atol=1e-6)
    assert np.allclose(columns.guide[LENGTH - 1 :][:8], carried, atol=1e-6)


def test_the_older_script(base):
    """The ends of both prompts meet: the last token of "van gogh" (place 2) is answered like that of "art"."""
    settings = LISTED | {"states": "tail", "places": "ends", "guide": "script", "keep_weight": None}
    concept = {"name": "van gogh", "keep": ["blue", "red"], "kind": "object"}
    found = change(base, concept, **settings, keep_empty=True)
    weight, edit, guide = weight_of(base), states(base, "van gogh"), states(base, "")
    keep = np.vstack([states(base, text) for text in ("blue", "red", "")])
    right = least_squares(weight, edit[2:], guide[:-2] @ weight.T, keep, keep_weight=1 / 3)
    assert np.abs(found - right).max() < 1e-6
    many = {"name": "van gogh", "keep": [f"red {word}" for word in "a the of in by at photo cat dog car tree".split()]}
    columns = configured("uce", [Concept.of(many)], settings).columns(base, [Concept.of(many)])
    assert columns.keep_weight == 0.1  # never less


@pytest.mark.parametrize(("kind", "guide"), [("object", ""), ("style", "art")])
def test_parity_is_the_present_script(base, kind, guide):
    """The last token of the name alone, towards the last token of the guide, and only what is listed is kept."""
    found = change(base, {"name": "van gogh", "keep": ["red tree"], "kind": kind}, parity=True)
    weight, end = weight_of(base), len(base.pipe.tokenizer(guide).input_ids) - 2
    edit, answer = states(base, "van gogh")[2:3], states(base, guide)[end : end + 1] @ weight.T
    style = " style" if kind == "style" else ""
    kept = states(base, "red tree" + style)[2 + bool(style)][None]
    assert np.abs(found - least_squares(weight, edit, answer, kept)).max() < 1e-6
    assert np.abs(found - least_squares(weight, edit, answer, kept[:0])).max() > 1e-4


def test_other_names_are_columns_and_anchors_are_guides(base):
    concept = {"name": "cat", "aliases": ["red cat"], "anchor": "dog", "keep": ["tree"]}
    settings = {**LISTED, "places": "same"}
    weight, dog = weight_of(base), states(base, "dog")
    edit = np.vstack([states(base, "cat")[1:], states(base, "red cat")[2:]])
    right = least_squares(weight, edit, np.vstack([dog[1:], dog[2:]]) @ weight.T, states(base, "tree"))
    assert np.abs(change(base, concept, **settings) - right).max() < 1e-6
    alone = change(base, {**concept, "aliases": []}, **settings)
    assert np.abs(alone - right).max() > 1e-3
    ends = least_squares(weight, edit, np.vstack([dog[1:], dog[1:-1]]) @ weight.T, states(base, "tree"))
    assert np.abs(change(base, concept, **LISTED) - ends).max() < 1e-6 < np.abs(ends - right).max()


def test_a_style_is_erased_from_subjects_towards_the_subjects(base):
    (concept,) = Concept.list_of({"name": "monet", "kind": "style"})
    columns = configured("uce", [concept], {**LISTED, "contexts": True}).columns(base, [concept])
    weight = torch.as_tensor(columns.edit_weight)
    alone = LENGTH - 1
    assert torch.equal(columns.edit[:alone], torch.tensor(states(base, "monet style")[1:]))
    assert torch.equal(columns.guide[:alone], torch.tensor(states(base, "")[1:]))
    assert torch.equal(columns.edit[alone : alone + 7], torch.tensor(states(base, "a dog in monet style")[4:11]))
    assert torch.allclose(columns.guide[alone : alone + 7], torch.tensor(states(base, "a dog")[4:11]), atol=1e-6)
    assert (weight[:alone] == 1).all() and torch.allclose(weight[alone:], torch.tensor(1 / 6, dtype=torch.float64))
    fewer = configured("uce", [concept], LISTED).columns(base, [concept])
    assert len(fewer.edit) == alone


def test_templates_are_more_prompts_whose_ends_meet(base):
    (concept,) = Concept.list_of({"name": "cat", "keep": ["tree"]})
    settings = {**LISTED, "templates": ("a photo of a {x} by night",), "places": "ends"}
    columns = configured("uce", [concept], settings).columns(base, [concept])
    edit, guide = states(base, "a photo of a cat by night"), states(base, "a photo of a by night")
    assert torch.equal(columns.edit[-7:], torch.tensor(edit[5:]))
    assert torch.allclose(columns.guide[-7:], torch.tensor(guide[4:11]), atol=1e-6)


def test_attributes_move_the_concept_from_the_bases_weights(base):
    """Debiasing: W0 (c + r a), with a at its last token."""
    settings = {**LISTED, "attributes": {"red": 0.5, "blue tree": -0.25}, "states": "last"}
    found = change(base, {"name": "cat", "keep": ["dog"]}, **settings)
    weight, cat = weight_of(base), states(base, "cat")[1:2]
    moved = cat + 0.5 * states(base, "red")[1] - 0.25 * states(base, "blue tree")[2]
    right = least_squares(weight, cat, moved @ weight.T, states(base, "dog"))
    assert np.abs(found - right).max() < 1e-6 < np.abs(found).max()


def test_answers_orthogonal_to_the_guides(base):
    found = change(base, {"name": "cat", "anchor": "dog", "keep": ["tree"]}, **LISTED, answer="orthogonal")
    weight, cat, dog = weight_of(base), states(base, "cat")[1:], states(base, "dog")[1:]
    own, away = cat @ weight.T, dog @ weight.T
    shares = (own * away).sum(1) / (away * away).sum(1)
    right = least_squares(weight, cat, own - shares[:, None] * away, states(base, "tree"))
    assert np.abs(found - right).max() < 1e-6
    assert torch.allclose(orthogonal(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])), torch.tensor([[3.0, 0]]))


def test_what_is_kept(base):
    concepts = Concept.list_of({"name": "cat", "keep": ["dog"]})
    kept = {
        keep: len(configure("uce", "object", {"keep": keep, "keep_states": "last"}).columns(base, concepts).keep)
        for keep in ("listed", "neighbours", "vocabulary")
    }
    assert kept["listed"] == 1 == kept["neighbours"] and kept["vocabulary"] > 100
    settings = {"keep": "listed", "keep_states": "last", "keep_empty": True}
    assert len(configure("uce", "object", settings).columns(base, concepts).keep) == 2


def test_a_rank_gives_a_smaller_patch_that_does_nearly_the_same(base):
    whole = change(base, "cat", rank=None)
    few = erase(base, "cat", "uce", progress=False, rank=4).payload
    assert few.ranks == [4]
    other = few.change("unet", f"{LAYER}.weight").double().numpy()
    assert 1e-6 < np.linalg.norm(other - whole) < 0.5 * np.linalg.norm(whole)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"templates": ["a photo"]}, "needs {x} in the place of the name"),
        ({"answer": "orthogonal", "rank": 3}, "needs rank=null"),
        ({"states": "first"}, "states.*tail, last"),
        ({"attributes": {"red": "much"}}, "red='much' is not a finite number"),
        ({"attributes": {"red": float("nan")}}, "red=nan is not a finite number"),
        ({"ridge": 0}, "ridge.*above 0"),
    ],
)
def test_bad_settings(base, settings, says):
    with pytest.raises(ErasureError, match=says):
        erase(base, "cat", "uce", **settings)


def test_attributes_come_from_the_command_line_with_their_signs():
    given = parse_overrides(["attributes={red: 0.5, blue tree: -1}"])
    assert configure("uce", "object", given).attributes == {"red": 0.5, "blue tree": -1}


def test_every_layer_that_reads_text_is_solved_on_both_encoders_of_xl():
    pipe = tiny_pipeline(kind="sdxl")
    payload = erase(pipe, "cat", "uce", progress=False).payload
    readers = [path for path, _ in pipe.unet.named_modules() if path.endswith(READERS)]
    assert payload.names("unet") == sorted(f"{path}.weight" for path in readers)
    (concept,) = Concept.list_of("cat")
    wide = Base("xl", pipe)
    columns = configured("uce", [concept], {"rank": None}).columns(wide, [concept])
    assert torch.equal(columns.edit[: LENGTH - 1], wide.encode(["cat"])[0, 1:].double())
