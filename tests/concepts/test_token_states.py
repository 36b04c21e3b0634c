"""The text gate of T5, Gemma and Qwen: its rule computed apart, what opens it, and what no state depends on."""

from __future__ import annotations

import pytest
import torch

from erasure.concepts import token_states as rule
from erasure.concepts.concept import Concept
from erasure.concepts.similarity import TextStates, gammas, measured, similarities, text_states
from erasure.erasing import erase
from erasure.model.base import Base
from erasure.pipelines import ErasedPixArtSigmaPipeline, ErasedQwenImagePipeline, ErasedSanaPipeline
from tests.patch.making import low_rank_patch
from tests.tiny import SIDE
from tests.tiny_qwen import tiny_qwen
from tests.tiny_transformers import tiny_sana, tiny_transformer

WORDS = ["dog", "a tree", "church", "starry night", "the red car", "monet", "a cat"]


@pytest.fixture(autouse=True)
def few_references(monkeypatch):
    monkeypatch.setattr(rule, "reference_texts", lambda: WORDS)


@pytest.fixture
def pipe():
    return tiny_transformer("pixart", ErasedPixArtSigmaPipeline)


def states(pipe, text):
    """A text's states and tokens, asked for as the pipeline does: padded, with a mask."""
    found = pipe.tokenizer(text.lower(), padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = pipe.text_encoder(found.input_ids, attention_mask=found.attention_mask).last_hidden_state[0]
    count = int(found.attention_mask.sum()) - 1  # the last one ends the text
    return out[:count].double(), found.input_ids[0, :count].tolist()


def gamma(pipe, prompt, name):
    every = torch.cat([states(pipe, word)[0] for word in WORDS])
    mean, spread = every.mean(0), every.std(0)

    def near(one, other):
        a, b = ((states(pipe, text)[0] - mean) / spread for text in (one, other))
        rows = [max(float(torch.cosine_similarity(i, j, dim=0)) for i in a) for j in b]
        return sum(rows) / len(rows)

    tokens = set(states(pipe, name)[1])
    others = [near(word, name) for word in WORDS if not tokens <= set(states(pipe, word)[1])]
    floor = sum(others) / len(others)
    share = len(tokens & set(states(pipe, prompt)[1])) / len(tokens)
    return min(1.0, max(share, (near(prompt, name) - floor) / (1 - floor)))


def test_it_is_its_formula(pipe):
    prompts, names = ["a photo of a dog", "van", "the blue tree by a church"], ["cat", "van gogh", "starry night"]
    found = similarities(pipe, prompts, names)
    for prompt, row in zip(prompts, found, strict=True):
        assert row == pytest.approx([gamma(pipe, prompt, name) for name in names], abs=1e-4), prompt
    assert found[1][1] >= 0.5 and any(0 < value < 0.5 for row in found for value in row)


def test_names_and_aliases_open_it_and_other_words_do_not(pipe):
    concept = Concept("Van Gogh", aliases=("starry night",))
    open_ = ["van gogh", "a painting by Van Gogh", "a STARRY NIGHT in the style of monet", "dog car van gogh tree"]
    shut = ["a dog", "monet", "a painting of a church by the tree", "the red car"]
    rows = similarities(pipe, [*open_, *shut], list(concept.names))
    best = [max(row) for row in rows]
    assert min(best[:4]) == 1.0 and max(best[4:]) < 0.7
    assert [max(row) for row in similarities(pipe, ["by night"], ["starry night"])] >= [0.5]  # half of the tokens


def test_a_word_with_a_near_state_opens_it_and_a_large_dimension_does_not(pipe):
    """Here "car" is made a synonym of "cat"; a dimension that is huge in every text makes all plain cosines 1."""
    table = pipe.text_encoder.shared.weight
    ids = {word: pipe.tokenizer(word).input_ids[0] for word in ("cat", "car", "dog")}
    with torch.no_grad():
        table[ids["car"]] = table[ids["cat"]] + 0.05 * table[ids["dog"]]
        table[:, 3] += 50 * table.std()
    cat, car, dog = (states(pipe, text)[0] for text in ("cat", "the car", "the dog"))
    assert torch.cosine_similarity(cat[0], dog[1], dim=0) > 0.9
    ((near,), (far,)) = similarities(pipe, ["the car", "the dog"], ["cat"])
    assert near > 0.9 and far < 0.5 and near < 1.0
    assert torch.cosine_similarity(cat[0], car[1], dim=0) > 0.9


def test_a_text_is_read_alike_alone_and_among_others(pipe):
    unit = measured(pipe)
    alone = text_states(pipe, ["a dog"], measure=unit)
    among = text_states(pipe, ["the blue tree by a church", "a dog", "a car"], measure=unit)
    assert torch.allclose(alone.rows[0], among.rows[1], atol=1e-6) and alone.words[0] == among.words[1]
    assert len(alone.rows[0]) == 2 and alone.flat.shape == (1, 0)
    whole = TextStates.join([alone, among])
    assert whole.texts == ["a dog", *among.texts] and len(whole.rows) == len(whole.floors) == 4
    taken = whole.take([3, 0])
    assert taken.texts == ["a car", "a dog"] and gammas(taken, alone)[1] == [1.0]
    assert gammas(taken, whole.take([0]))[0] == gammas(among.take([2]), alone)[0]


def test_a_name_among_the_reference_texts_does_not_raise_its_own_floor(pipe):
    unit = measured(pipe)
    (row,), (words,) = rule.token_states(pipe, pipe.tokenizer, pipe.text_encoder, ["cat"], torch.float64)
    row = unit.normal(row)
    each = [rule.nearness(other, row) for other in unit.rows]
    assert max(each) == each[-1] > 0.8  # "a cat"
    assert unit.floor(row, words) == pytest.approx(sum(each[:-1]) / 6)
    assert rule.nearness(row[:0], row) == rule.nearness(row, row[:0]) == 0.0


def test_the_references_ship_with_the_package(monkeypatch):
    monkeypatch.undo()
    texts = rule.reference_texts()
    assert len(texts) == len(set(texts)) == rule.REFERENCES and {"tench", "nudity"} <= set(texts)


def test_gated_patches_act_on_their_name_alone(pipe):
    options = {"height": 2 * SIDE, "width": 2 * SIDE, "num_inference_steps": 2, "output_type": "latent"}
    more = {"guidance_scale": 2.0, "use_resolution_binning": False, "clean_caption": False, **options}

    def draw():
        noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return pipe(["a cat", "the church"], generator=noise, **more).images

    plain = draw()
    gate = {"kind": "text", "texts": ["cat"], "power": 1.0, "threshold": 0.8}
    pipe.load_patch(low_rank_patch(pipe, part="", gate=gate, components=("transformer",), size=0.05), "cat")
    gated = draw()
    assert [entry["cat"] for entry in pipe.gate_log] == [1.0, 0.0]
    assert torch.equal(gated[1], plain[1]) and not torch.equal(gated[0], plain[0])
    pipe.load_patch(low_rank_patch(pipe, part="", gate={**gate, "texts": ["monet"]}, components=("transformer",)), "m")
    assert torch.equal(draw(), gated) and [entry["m"] for entry in pipe.gate_log] == [0.0, 0.0]


def test_a_guard_with_a_text_gate_acts_on_its_name_alone(pipe):
    patch = erase(Base("tiny", pipe), "cat", "sld", progress=False, gate="text")
    options = {"height": 2 * SIDE, "width": 2 * SIDE, "num_inference_steps": 2, "output_type": "latent"}
    more = {"guidance_scale": 2.0, "use_resolution_binning": False, "clean_caption": False, **options}
    noise = [[torch.Generator().manual_seed(seed) for seed in range(2)] for _ in range(2)]
    plain = pipe(["a cat", "the church"], generator=noise[0], **more).images
    pipe.load_patch(patch, "guard")
    guarded = pipe(["a cat", "the church"], generator=noise[1], **more).images
    assert [entry["guard"] for entry in pipe.gate_log] == [1.0, 0.0]
    assert torch.equal(guarded[1], plain[1]) and not torch.equal(guarded[0], plain[0])


def causal_gamma(pipe, prompt, name):
    """The rule of Gemma and Qwen apart: the name's last state alone, and every text behind a space."""
    gemma = isinstance(pipe, ErasedSanaPipeline)  # its pipeline writes small letters, its tokenizer a start token

    def read(text):
        ids = pipe.tokenizer(" " + (text.lower() if gemma else text), return_tensors="pt").input_ids
        with torch.no_grad():
            found = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
        return found[0, int(gemma) :].double(), ids[0, int(gemma) :].tolist()

    every = torch.cat([read(word)[0] for word in WORDS])
    mean, spread = every.mean(0), every.std(0)

    def near(one, other):
        a, b = ((read(text)[0] - mean) / spread for text in (one, other))
        return max(float(torch.cosine_similarity(i, b[-1], dim=0)) for i in a)

    tokens = set(read(name)[1])
    others = [near(word, name) for word in WORDS if not tokens <= set(read(word)[1])]
    floor = sum(others) / len(others)
    share = len(tokens & set(read(prompt)[1])) / len(tokens)
    return min(1.0, max(share, (near(prompt, name) - floor) / (1 - floor)))


@pytest.mark.parametrize("model", [(tiny_sana, ErasedSanaPipeline), (tiny_qwen, ErasedQwenImagePipeline)])
def test_of_a_language_model_the_names_last_state_counts(model):
    pipe = model[0](model[1])
    prompts, names = ["a photo of a Dog", "van", "a car by the blue tree"], ["cat", "van gogh", "red church"]
    for prompt, row in zip(prompts, similarities(pipe, prompts, names), strict=True):
        assert row == pytest.approx([causal_gamma(pipe, prompt, name) for name in names], abs=1e-4), prompt
    seen = text_states(pipe, names, measure=measured(pipe))
    assert [len(row) for row in seen.names] == [1, 1, 1] and len(seen.rows[1]) > 1
    whole = TextStates.join([seen, seen.take([0])])
    assert len(whole.names) == 4 and torch.equal(whole.take([3]).names[0], seen.names[0])


def test_a_name_opens_gemmas_gate_at_the_start_and_behind_a_space():
    """The tokenizer makes other tokens of the first word, which would shut the gate to one of the two."""
    pipe = tiny_sana(ErasedSanaPipeline)
    first, second = (pipe.tokenizer(text).input_ids[-1] for text in ("cat", "a cat"))
    assert first != second
    rows = similarities(pipe, ["cat", "a photo of a CAT", "cat by a tree", "van car", "a tree"], ["cat"])
    assert [row[0] for row in rows[:3]] == [1.0] * 3 and max(row[0] for row in rows[3:]) < 0.9


def test_a_prompt_that_begins_like_a_name_is_not_taken_for_it():
    """The states of its first tokens are the same as the name's own: the encoder has not read on yet."""
    pipe = tiny_sana(ErasedSanaPipeline)
    unit = measured(pipe)
    name, prompt = text_states(pipe, ["the red church", "the red car"], measure=unit).rows
    assert torch.allclose(name[:2], prompt[:2], atol=1e-5) and len(prompt) == 3
    assert rule.nearness(prompt, name) > rule.nearness(prompt, unit.name(name)) + 0.1


def test_gated_patches_act_on_their_name_alone_by_gemma():
    pipe = tiny_sana(ErasedSanaPipeline)

    def draw():
        noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
        size = {"height": 4 * SIDE, "width": 4 * SIDE, "num_inference_steps": 2, "output_type": "latent"}
        prompts = ["cat", "the church", "a red cat"]
        return pipe(prompts, generator=noise, guidance_scale=2.0, use_resolution_binning=False, **size).images

    plain = draw()
    gate = {"kind": "text", "texts": ["cat"], "power": 1.0, "threshold": 0.9}
    pipe.load_patch(low_rank_patch(pipe, part="attn", gate=gate, components=("transformer",), size=0.05), "cat")
    gated = draw()
    assert [entry["cat"] for entry in pipe.gate_log] == [1.0, 0.0, 1.0]
    assert torch.equal(gated[1], plain[1])
    assert not torch.equal(gated[0], plain[0]) and not torch.equal(gated[2], plain[2])
    pipe.delete_patches("cat")
    pipe.load_patch(erase(Base("tiny", pipe), "cat", "sld", progress=False, gate="text"), "guard")
    guarded = draw()
    assert [entry["guard"] for entry in pipe.gate_log] == [1.0, 0.0, 1.0]
    assert torch.equal(guarded[1], plain[1]) and not torch.equal(guarded[0], plain[0])
