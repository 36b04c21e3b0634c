"""Closed forms on PixArt: exact in the states behind the caption projection, against numpy and diffusers' own calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erasure.concepts import neighbors
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.forecast import plan
from erasure.model.base import Base
from erasure.model.text_columns import Pair, last_place, states_of, states_of_pair
from erasure.pipelines import ErasedPixArtSigmaPipeline
from erasure.takedown.lists import erase_list
from tests.tiny import SIDE
from tests.tiny_transformers import asked, tiny_transformer

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
    return Base("tiny", tiny_transformer("pixart"))


def rows(base: Base, text: str) -> np.ndarray:
    """What keys and values are made of: T5's states behind the caption projection, without padding."""
    pipe = base.pipe
    with torch.no_grad():
        states, mask, _, _ = pipe.encode_prompt([text], do_classifier_free_guidance=False)
        read = pipe.transformer.caption_projection(states)[0]
    return read[: int(mask.sum())].double().numpy()


def test_the_states_are_those_that_keys_and_values_read(base):
    """Caught at the layer itself, in a call of the whole network."""
    seen = []
    layer = base.network.get_submodule(LAYER)
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        asked(base.pipe, "pixart", x, torch.full((1,), 500.0), "a cat in red style")
    handle.remove()
    count = len(rows(base, "a cat in red style"))
    assert count == 6  # five words and the end token
    assert torch.allclose(seen[0][0, :count].double(), base.rows("a cat in red style").double(), atol=1e-6)
    assert not torch.allclose(base.rows("a cat")[0], base.rows("a dog")[0], atol=1e-4)  # "a" knows what follows


def test_places(base):
    assert [last_place(base, text) for text in ("", "cat", "Van Gogh")] == [0, 0, 1]
    cat = rows(base, "a red cat")
    for part, expected in (("all", cat), ("tail", cat), ("last", cat[2:3])):
        assert np.allclose(states_of(base, ["a red cat"], part), expected)
    assert states_of(base, [], "tail").shape == (0, cat.shape[1])
    named = rows(base, "a van gogh car")  # 0 a, 1 van, 2 gogh, 3 car, 4 end
    for instead, places, met in (
        ("a dog car", "ends", [0, 1, 1, 2, 3]),
        ("a dog car", "same", [0, 1, 2, 3, 3]),
        ("a red dog car", "ends", [0, 1, 2, 3, 4]),
        ("a car", "ends", [0, 1, 1, 1, 2]),
        ("", "ends", [0] * 5),
        ("", "same", [0] * 5),
    ):
        edit, guide = states_of_pair(base, Pair("a van gogh car", "van gogh", instead), "tail", places)
        assert np.allclose(edit, named, atol=1e-6), instead
        assert np.allclose(guide, rows(base, instead)[met], atol=1e-6), (instead, places)
    edit, guide = states_of_pair(base, Pair("a van gogh car", "van gogh", "a dog car"), "last", "ends")
    assert np.allclose(edit, named[2:3], atol=1e-6) and np.allclose(guide, rows(base, "a dog car")[1:2], atol=1e-6)


def test_uce_is_least_squares_over_all_states_of_the_prompt(base):
    """Spelled with capitals, as the pipeline would read it in lower case."""
    patch = erase(base, {"name": "CAT", "keep": ["dog"]}, "uce", progress=False, **ALONE, ridge=0.5, rank=None)
    found = patch.payload.change("transformer", f"{LAYER}.weight").double().numpy()
    weight = base.network.get_submodule(LAYER).weight.detach().double().numpy()
    cat, dog, empty = rows(base, "cat"), rows(base, "dog"), rows(base, "")

    def solved(edit, guide, keep, ridge=0.5):
        stack = [edit, keep, np.sqrt(ridge) * np.eye(weight.shape[1])]
        wanted = [guide @ weight.T, keep @ weight.T, np.sqrt(ridge) * weight.T]
        return np.linalg.lstsq(np.vstack(stack), np.vstack(wanted), rcond=None)[0].T - weight

    scale = (cat**2).mean()  # the unit of lambda
    right = solved(cat, empty[[0, 0]], dog, 0.5 * scale)
    assert np.abs(found - right).max() < 1e-6
    twins = {
        "sign": -right,
        "the name without the end token": solved(cat[:1], empty, dog, 0.5 * scale),
        "the end token alone": solved(cat[1:], empty, dog, 0.5 * scale),
        "nothing kept": solved(cat, empty[[0, 0]], dog[:0], 0.5 * scale),
        "lambda without its unit": solved(cat, empty[[0, 0]], dog),
    }
    assert empty.shape[0] == 1
    for name, twin in twins.items():
        assert np.abs(found - twin).max() > 1e-4, name


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(("anchor", "keep"), [("dog", ()), ("dog", ("car",))])
def test_the_concept_is_answered_exactly_like_its_anchor(method, anchor, keep):
    """So the whole network predicts the same for both, at every latent and time; other words differ from before."""
    pipe = tiny_transformer("pixart", ErasedPixArtSigmaPipeline)
    x, t = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(5)), torch.tensor([900.0, 100.0])
    before = {text: asked(pipe, "pixart", x, t, text).detach() for text in ("cat", "dog", "car", "tree")}
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    settings = {**EXACT[method], "guide": "nearest"}
    patch = erase(pipe, {"name": "cat", "anchor": anchor, "keep": keep}, method, progress=False, **settings)
    assert all(torch.equal(weights[name], value) for name, value in pipe.transformer.state_dict().items())
    pipe.load_patch(patch)
    pipe.fuse_patches()
    after = {text: asked(pipe, "pixart", x, t, text).detach() for text in before}
    assert torch.allclose(after["cat"], before["dog"], atol=1e-4)
    assert not torch.allclose(before["cat"], before["dog"], atol=1e-2)
    assert torch.allclose(after["car"], before["car"], atol=1e-4) == bool(keep)
    pipe.unload_patches()
    assert torch.equal(asked(pipe, "pixart", x, t, "cat"), before["cat"])


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "dp"])
def test_every_closed_form_runs_without_a_call_of_the_network(method):
    base = Base("tiny", tiny_transformer("pixart"))
    forecast = plan(base, {"name": "cat", "keep": ["dog"]}, method, **ALONE)
    base.network.forward = None
    patch = erase(base, {"name": "cat", "keep": ["dog"]}, method, progress=False, **ALONE)
    assert patch.components == ["transformer"] and (patch.costs["F"], patch.costs["B"]) == (0, 0)
    assert {name.removesuffix(".weight") for name in patch.payload.names("transformer")} == set(
        base.targets("x-strict")
    )
    assert all(patch.payload.change("transformer", name).any() for name in patch.payload.names("transformer"))
    assert forecast.modules == 4 and forecast.F == 0


def test_speed_moves_nothing_that_is_kept_nor_the_empty_prompt(base):
    patch = erase(base, {"name": "cat", "keep": ["dog"]}, "speed", progress=False, **ALONE, null_below=1e-9, rank=None)
    change = patch.payload.change("transformer", f"{LAYER}.weight").double().numpy()
    moved = {text: np.abs(rows(base, text) @ change.T).max() for text in ("cat", "dog", "", "car")}
    assert moved["dog"] < 1e-5 and moved[""] < 1e-5 and moved["cat"] > 1e-3 and moved["car"] > 1e-3


def test_names_that_are_read_alike_and_lists_are_refused(base):
    with pytest.raises(ErasureError, match="'Van  Gogh'.*reads it like 'van gogh'.*Nothing was changed"):
        erase(base, {"name": "van gogh", "keep": ["Van  Gogh"]}, "uce", progress=False, **ALONE)
    with pytest.raises(ErasureError, match="tiny: a list needs CLIP's text states"):
        erase_list(base, {"erase": ["cat"]}, "uce")
