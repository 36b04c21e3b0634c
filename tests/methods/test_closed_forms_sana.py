"""Closed forms on SANA: exact in the states behind the caption projection and its norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erasure.concepts import neighbors
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.model.base import Base
from erasure.model.text_columns import Pair, states_of, states_of_pair
from erasure.pipelines import ErasedSanaPipeline
from erasure.takedown.lists import erase_list
from tests.tiny import SIDE
from tests.tiny_transformers import INSTRUCTION, asked, tiny_sana

LAYER = "transformer_blocks.1.attn2.to_v"
ALONE = {"guide": "empty", "contexts": False, "keep": "listed"}
EXACT = {  # the concept's states alone are edited, and answered exactly
    "uce": {"contexts": False, "keep": "listed", "ridge": 1e-7, "rank": None},
    "dp": {"contexts": False, "keep": "listed", "kept_share": 1.0, "cut": 1e-9, "rank": None},
}


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    """Let the lists of common words be short: each word is a prompt to encode."""
    listed = {"object": ("dog", "car", "tree"), "identity": (), "style": ("monet",), "content": ()}
    monkeypatch.setattr(neighbors, "everyday_words", lambda: listed)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base("tiny", tiny_sana())


def rows(base: Base, text: str) -> np.ndarray:
    """What keys and values are made of: Gemma's states behind projection and norm, without padding."""
    pipe = base.pipe
    how = {"do_classifier_free_guidance": False, "complex_human_instruction": INSTRUCTION if text else None}
    with torch.no_grad():
        states, mask, _, _ = pipe.encode_prompt([text], **how)
        read = pipe.transformer.caption_norm(pipe.transformer.caption_projection(states))[0]
    return read[: int(mask.sum())].double().numpy()


def test_the_states_are_those_that_keys_and_values_read(base):
    """Caught at the layer itself, in a call of the whole network."""
    seen = []
    layer = base.network.get_submodule(LAYER)
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        asked(base.pipe, "sana", x, torch.full((1,), 500.0), "a cat in red style")
    handle.remove()
    count = len(rows(base, "a cat in red style"))
    assert count == 6  # the start token and five words: the instruction's last space is part of the first
    assert torch.allclose(seen[0][0, :count].double(), base.rows("a cat in red style").double(), atol=1e-6)
    assert torch.allclose(base.rows("a cat")[:2], base.rows("a dog")[:2], atol=1e-5)  # causal
    assert len(base.rows("")) == 1


def test_places_are_counted_from_the_end(base):
    cat = rows(base, "a red cat")  # 0 start, 1 a, 2 red, 3 cat
    for part, expected in (("all", cat), ("tail", cat[3:]), ("last", cat[3:])):
        assert np.allclose(states_of(base, ["a red cat"], part), expected, atol=1e-6)
    named, ends = rows(base, "a red cat by the car"), {"start": 0, "cat": 3, "car": 6}
    assert len(named) == ends["car"] + 1
    for instead, places, met in (
        ("a dog by the car", "ends", [2, 3, 4, 5]),
        ("a dog by the car", "same", [3, 4, 5, 5]),
        ("a blue red dog by the car", "ends", [4, 5, 6, 7]),
        ("car", "ends", [0, 0, 0, 1]),
        ("", "ends", [0] * 4),
        ("", "same", [0] * 4),
    ):
        pair = Pair("a red cat by the car", "red cat", instead)
        edit, guide = states_of_pair(base, pair, "tail", places)
        assert np.allclose(edit, named, atol=1e-6), instead
        assert np.allclose(guide[:3], named[:3], atol=1e-6), instead  # what is before the name's last token stays
        assert np.allclose(guide[3:], rows(base, instead)[met], atol=1e-5), (instead, places)
        edit, guide = states_of_pair(base, pair, "last", places)
        assert np.allclose(edit, named[3:4], atol=1e-6)
        assert np.allclose(guide, rows(base, instead)[met[:1]], atol=1e-5)


def test_uce_is_least_squares_with_what_precedes_the_name_kept(base):
    patch = erase(base, {"name": "CAT", "keep": ["dog"]}, "uce", progress=False, **ALONE, ridge=0.5, rank=None)
    found = patch.payload.change("transformer", f"{LAYER}.weight").double().numpy()
    weight = base.network.get_submodule(LAYER).weight.detach().double().numpy()
    cat, dog, empty = rows(base, "cat"), rows(base, "dog"), rows(base, "")

    def solved(edit, guide, keep, ridge=0.5):
        stack = [edit, keep, np.sqrt(ridge) * np.eye(weight.shape[1])]
        wanted = [guide @ weight.T, keep @ weight.T, np.sqrt(ridge) * weight.T]
        return np.linalg.lstsq(np.vstack(stack), np.vstack(wanted), rcond=None)[0].T - weight

    scale = (cat**2).mean()  # the unit of lambda
    guide = np.vstack([cat[:1], empty])
    right = solved(cat, guide, dog[1:], 0.5 * scale)
    assert np.abs(found - right).max() < 1e-6
    twins = {
        "sign": -right,
        "the start token is not kept": solved(cat[1:], empty, dog[1:], 0.5 * scale),
        "the start token is edited": solved(cat, empty[[0, 0]] + 0 * cat, dog[1:], 0.5 * scale),
        "nothing kept": solved(cat, guide, dog[:0], 0.5 * scale),
        "lambda without its unit": solved(cat, guide, dog[1:]),
    }
    assert len(cat) == 2
    differ = {name: np.abs(found - twin).max() for name, twin in twins.items()}
    assert differ.pop("the start token is edited") < 1e-6  # the empty prompt is the start token: both are the same
    assert min(differ.values()) > 1e-5, differ


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("keep", [(), ("car",)])
def test_the_concept_is_answered_exactly_like_its_anchor(method, keep):
    """So the whole network predicts the same for both, at every latent and time; other words differ from before."""
    pipe = tiny_sana(ErasedSanaPipeline)
    x, t = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(5)), torch.tensor([900.0, 100.0])
    texts = ("cat", "dog", "car", "tree", "")
    before = {text: asked(pipe, "sana", x, t, text).detach() for text in texts}
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    settings = {**EXACT[method], "guide": "nearest"}
    patch = erase(pipe, {"name": "cat", "anchor": "dog", "keep": keep}, method, progress=False, **settings)
    assert all(torch.equal(weights[name], value) for name, value in pipe.transformer.state_dict().items())
    pipe.load_patch(patch)
    pipe.fuse_patches()
    after = {text: asked(pipe, "sana", x, t, text).detach() for text in before}
    assert torch.allclose(after["cat"], before["dog"], atol=1e-4)
    assert torch.allclose(after[""], before[""], atol=1e-4)  # the start token alone: guidance is led as before
    assert not torch.allclose(before["cat"], before["dog"], atol=1e-2)
    assert torch.allclose(after["car"], before["car"], atol=1e-4) == bool(keep)
    pipe.unload_patches()
    assert torch.equal(asked(pipe, "sana", x, t, "cat"), before["cat"])


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "dp"])
def test_every_closed_form_runs_without_a_call_of_the_network(method):
    base = Base("tiny", tiny_sana())
    forecast = plan(base, {"name": "cat", "keep": ["dog"]}, method, **ALONE)
    base.network.forward = None
    patch = erase(base, {"name": "cat", "keep": ["dog"]}, method, progress=False, **ALONE)
    assert patch.components == ["transformer"] and (patch.costs["F"], patch.costs["B"]) == (0, 0)
    names = patch.payload.names("transformer")
    assert {name.removesuffix(".weight") for name in names} == set(base.targets("x-strict"))
    assert all(patch.payload.change("transformer", name).any() for name in names)
    assert forecast.modules == 4 and forecast.F == 0


def test_lists_are_refused(base):
    with pytest.raises(ErasureError, match="tiny: a list needs CLIP's text states"):
        erase_list(base, {"erase": ["cat"]}, "uce")
