"""Many gated patches: what loading and a call cost by count, and that they act like the same patches one by one."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from erasure.errors import ErasureError
from erasure.patch import fingerprint
from erasure.pipelines import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline, compatibility
from erasure.pipelines.gated_lora import Membrane
from erasure.pipelines.gates.gate_texts import BATCH
from tests.patch.making import delta_patch, gap, low_rank_patch, weights
from tests.pipelines.making import LATENT, PROMPTS, Unchanged, draw, hooks, tiny_xl
from tests.tiny import WORDS, tiny_pipeline

BOTH = ("unet", "text_encoder")
PAIRS = [" ".join(pair) for pair in itertools.permutations(WORDS, 2)]  # many different texts


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def gated(pipe, text, seed=1, threshold=0.99, **more):
    """Return a patch that acts on prompts with the words of `text`."""
    gate = {"kind": "text", "texts": [text], "threshold": threshold}
    return low_rank_patch(pipe, seed, gate=gate, concepts=[{"name": text}], **more)


@contextmanager
def encodings(pipe):
    """Yield a list that receives the number of texts of each call of the text encoder."""
    rows: list[int] = []
    handle = pipe.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


def test_gate_texts_are_encoded_once_at_loading_and_prompts_once_a_call(pipe):
    with encodings(pipe) as base:
        draw(pipe)
    n = BATCH + 6
    first = gated(pipe, "monet")
    patches = [gated(pipe, text, part="mid_block.attentions.0.transformer_blocks.0.attn2.to_k") for text in PAIRS[:n]]
    with encodings(pipe) as loading:
        pipe.load_patches(patches)
    assert loading == [BATCH, 6]
    with encodings(pipe) as loading:
        pipe.load_patch(first)
        name = pipe.load_patch(patches[0], name="the same text")
    assert loading == [1]
    for act in (
        lambda: None,
        lambda: pipe.set_patches("monet"),
        lambda: pipe.set_patches({patch.names[0]: 0.5 for patch in patches}),
        lambda: pipe.delete_patches([name, patches[1].names[0]]),
        lambda: (pipe.fuse_patches(), pipe.unfuse_patches()),
    ):
        with encodings(pipe) as calls:
            act()
            draw(pipe)
            draw(pipe, ["monet", PAIRS[0]])  # open
        assert calls == 2 * base == [2, 2, 2, 2]
    assert pipe.gate_log[0]["monet"] == 0.0 and pipe.gate_log[1][PAIRS[0]] == 0.5


def test_prompts_are_encoded_once_more_only_for_patches_of_the_text_encoder_that_act(pipe):
    pipe.load_patch(gated(pipe, "van gogh", components=BOTH))
    for prompts, rows in ((["a cat"], [1, 1]), (["van gogh"], [1, 1, 1, 1])):
        with encodings(pipe) as calls:
            draw(pipe, prompts)
        assert calls == rows
    pipe.unload_patches()
    pipe.load_patch(gated(pipe, "van gogh"))
    embeds, negative = pipe.encode_prompt(["van gogh"], "cpu", 1, True)
    with encodings(pipe) as calls:
        draw(pipe, prompt_embeds=embeds, negative_prompt_embeds=negative, erasure_prompts=["van gogh"])
    assert calls == [1]  # for the gate alone


def hooks_by_layer(pipe, prompts):
    """Return the number of hooks on each layer of the UNet during a call."""
    found: list[Counter[str]] = []

    def look(pipe, step, time, tensors):
        found.append(Counter({path: len(layer._forward_hooks) for path, layer in pipe.unet.named_modules()}))
        return tensors

    draw(pipe, prompts, callback_on_step_end=look)
    return +found[0]


def test_patches_that_act_share_one_hook_a_layer_and_closed_ones_have_none(pipe, monkeypatch):
    texts = ["van gogh", "monet", "cat", "dog", "tree"]
    patches = [gated(pipe, text, seed) for seed, text in enumerate(texts)]
    pipe.load_patches(patches)
    built = []
    create = Membrane.__init__
    monkeypatch.setattr(
        Membrane, "__init__", lambda self, down, *more: (built.append(len(down)), create(self, down, *more))[1]
    )
    assert hooks_by_layer(pipe, ["a house of blue", "car"]) == {} and built == []
    layers = {name.removesuffix(".weight"): 1 for name in patches[0].payload.names("unet")}
    assert hooks_by_layer(pipe, ["monet", "a house"]) == layers and set(built) == {2}
    built.clear()
    assert hooks_by_layer(pipe, ["van gogh by a tree", "cat dog monet"]) == layers
    assert len(built) == len(layers) and set(built) == {5 * 2}
    assert hooks(pipe) == 0


def test_a_mixed_batch_equals_folded_patches_of_the_logged_strengths(pipe):
    patches = {
        "one": gated(pipe, "van gogh", 1, components=BOTH, part="", size=0.03),
        "two": gated(pipe, "cat", 2, rank=3, alpha=1.0),
        "three": gated(pipe, "painting", 3, rank=1, part="attentions", size=0.03),
        "four": gated(pipe, "monet", 4),
    }
    prompts = ["a painting of van gogh", "a cat", "the tree", "van gogh cat"]
    base = draw(pipe, prompts)
    pipe.load_patches(patches)
    pipe.set_patches({"one": 0.5, "two": -0.7, "three": 1.5, "four": 1.0})
    together, log = draw(pipe, prompts), pipe.gate_log
    assert [sorted(name for name, value in row.items() if value) for row in log] == [
        ["one", "three"],
        ["two"],
        [],
        ["one", "two"],
    ]
    assert torch.equal(together[2], base[2])
    for row, prompt in enumerate(prompts):
        folded = tiny_pipeline(ErasedStableDiffusionPipeline)
        for name, strength in log[row].items():
            folded.load_patch(patches[name], name=name, strength=strength)
        folded.fuse_patches()
        if row != 2:
            assert gap(draw(folded, [prompt], seed=row), together[row : row + 1]) < 2e-5
            assert gap(together[row], base[row]) > 1e-3


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1)])
def test_stacked_factors_equal_the_sum_of_single_ones(layer):
    layer, kernel = layer.double(), () if isinstance(layer, nn.Linear) else (3, 3)
    x = torch.randn(6, 7, 6, dtype=torch.float64) if not kernel else torch.randn(6, 6, 4, 4, dtype=torch.float64)
    factors = [(torch.randn(rank, 6, *kernel).double(), torch.randn(5, rank).double()) for rank in (1, 3)]
    strengths = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.5, 2.0]])
    columns = torch.cat([strengths[:, :1], strengths[:, 1:].expand(-1, 3)], 1)
    stacked = Membrane(torch.cat([down for down, _ in factors]), torch.cat([up for _, up in factors], 1), columns)
    base = layer(x)
    expected = base.clone()
    for number, (down, up) in enumerate(factors):
        linear = not kernel
        inner = x @ down.T if linear else nn.functional.conv2d(x, down, padding=1)
        term = inner @ up.T if linear else nn.functional.conv2d(inner, up[..., None, None])
        expected += strengths[:, number].double().repeat(2).view(-1, *[1] * (x.dim() - 1)) * term
    handle = stacked.attach(layer)
    output = layer(x)
    handle.remove()
    assert torch.allclose(output, expected, atol=1e-12) and torch.equal(output[[0, 3]], base[[0, 3]])
    assert stacked.calls == 1


def test_a_factor_that_overflows_reaches_only_the_rows_of_its_patch():
    layer, x = nn.Linear(4, 3).bfloat16(), torch.rand(3, 4).bfloat16()
    base, small = layer(x), torch.ones(1, 4)
    up = torch.tensor([[3.4e38, 1.0]]).expand(3, 2)  # infinite in bfloat16
    membrane = Membrane(torch.cat([small, small]), up, torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    handle = membrane.attach(layer)
    output = layer(x)
    handle.remove()
    assert torch.equal(output[0], base[0]) and torch.isinf(output[2]).all()
    assert torch.allclose(output[1], base[1] + x[1].sum(), rtol=0.05)


def test_loading_together_equals_loading_one_by_one_in_any_order_and_leaves_no_trace(pipe, tmp_path):
    texts = {"a": "van gogh", "b": "cat", "c": "painting"}
    patches = {name: gated(pipe, text, ord(name), components=BOTH) for name, text in texts.items()}
    for name, patch in patches.items():
        patch.save(tmp_path / f"{name}.safetensors")
    images = []
    for load in (
        lambda: [pipe.load_patch(patch, name=name, strength=0.5) for name, patch in patches.items()],
        lambda: pipe.load_patches(patches, strength=0.5),
        lambda: pipe.load_patches(list(patches.values())[::-1], strength=0.5),
        lambda: pipe.load_patches(tmp_path, strength=0.5),
    ):
        with Unchanged(pipe):
            load()
            images.append(draw(pipe))
            pipe.delete_patches(list(pipe.get_list_patches())[1])
            pipe.unload_patches()
    assert all(torch.equal(image, images[0]) for image in images)
    assert pipe.load_patches(tmp_path) == ["van gogh", "cat", "painting"]


def test_if_one_patch_does_not_fit_none_is_loaded(pipe, tmp_path):
    fitting = [gated(pipe, "cat"), delta_patch(pipe)]
    before = weights(pipe)
    wrong = low_rank_patch(pipe, base_fingerprint={"unet": fingerprint(pipe.unet, ["conv_in.weight"])})
    for patches, message in (
        ([*fitting, wrong], "was made from tiny"),
        ([*fitting, gated(pipe, "cat", components=("text_encoder",)), tmp_path / "none.safetensors"], "cannot be read"),
        (tmp_path, "not a folder with patches"),
        ({"x": fitting[0], "": fitting[1]}, "non-empty string"),
    ):
        with pytest.raises(ErasureError, match=message):
            pipe.load_patches(patches)
        assert pipe.get_list_patches() == {}
        after = weights(pipe)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(ErasureError, match="finite number"):
        pipe.load_patches(fitting, strength=float("nan"))
    assert pipe.load_patches([gated(pipe, "cat"), gated(pipe, "cat"), fitting[0]]) == ["cat", "cat-2", "cat-3"]


def test_names_in_two_spellings_and_long_lists_are_summed_up_in_messages(pipe, caplog):
    patches = [gated(pipe, text, seed) for seed, text in enumerate(["van gogh", "Van  Gogh", "cat", "CAT", "dog"])]
    pipe.load_patches(patches)
    (text,) = [record.getMessage() for record in caplog.records if record.name == "erasure.pipelines.loaded"]
    assert text.startswith("2 names are erased by more than one of these patches")
    assert text.endswith("(such as 'van gogh' by 'van gogh', 'Van  Gogh')")
    pipe.load_patches([gated(pipe, pair, 9 + seed) for seed, pair in enumerate(PAIRS[:8])])
    embeds = torch.zeros(1, 12, 32)
    with pytest.raises(ErasureError, match="'van gogh', .* and 5 more: gated by the prompt, but only prompt_embeds"):
        draw(pipe, prompt_embeds=embeds, negative_prompt_embeds=embeds)
    pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 12, 32))
    assert "and 5 more: gated, but this call of UNet2DConditionModel bypasses" in caplog.text


def test_a_call_that_fails_while_encoding_leaves_no_states_behind(pipe):
    pipe.load_patch(gated(pipe, "monet", threshold=0.0))
    draw(pipe, ["a dog"])
    log = pipe.gate_log
    encoder, seen = pipe.text_encoder, []

    def fail(*_):
        seen.append(1)
        if len(seen) == 2:  # the negative prompt
            raise RuntimeError("stop")

    handle = encoder.register_forward_hook(fail)
    with torch.no_grad():
        scale = torch.linspace(-1, 1, 32)
        weight = next(value for name, value in encoder.named_parameters() if name.endswith("final_layer_norm.weight"))
        weight.data.mul_(scale)  # unseen, as by a LoRA
        with pytest.raises(RuntimeError, match="stop"):
            draw(pipe, ["a dog"])
        weight.data.div_(scale)
    handle.remove()
    embeds = torch.zeros(1, 12, 32)
    draw(pipe, prompt_embeds=embeds, negative_prompt_embeds=embeds, erasure_prompts=["a dog"])
    assert pipe.gate_log[0]["monet"] == pytest.approx(log[0]["monet"], abs=1e-6)


def test_weights_are_hashed_once_until_they_change(pipe, monkeypatch):
    hashed = []
    compute = compatibility.fingerprint_tensors
    monkeypatch.setattr(compatibility, "fingerprint_tensors", lambda values: hashed.append(1) or compute(values))
    patches = [gated(pipe, text) for text in PAIRS[:5]]
    for patch in patches:
        pipe.load_patch(patch)
    assert len(hashed) == 1
    pipe.unload_patches()
    name = patches[0].payload.names("unet")[0]
    pipe.unet.get_parameter(name).data[0, 0] += 1
    with pytest.raises(ErasureError, match="was made from tiny"):
        pipe.load_patch(patches[0])
    with pytest.raises(ErasureError, match="was made from tiny"):
        pipe.load_patches(patches)


CHANGES = {
    "written to": lambda pipe: pipe.text_encoder.get_parameter(
        next(name for name, _ in pipe.text_encoder.named_parameters() if name.endswith("final_layer_norm.weight"))
    ).mul_(torch.linspace(-1, 1, 32)),
    "cast to fp16": lambda pipe: pipe.to(dtype=torch.float16),
    "cast": lambda pipe: pipe.to(dtype=torch.bfloat16),
    "patched": lambda pipe: pipe.load_patch(
        delta_patch(pipe, component="text_encoder", part="layer_norm", size=1.0), name="always", force=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_gate_texts_are_encoded_again_when_the_text_encoder_changes(pipe, change):
    def gates(*steps):
        twin = tiny_pipeline(ErasedStableDiffusionPipeline)
        with torch.no_grad():
            for step in steps:
                step(twin)
        draw(twin, ["a dog"])
        return twin.gate_log[0]["monet"]

    def load(pipe):
        pipe.load_patch(gated(pipe, "monet", threshold=0.0), name="monet", force=True)

    before, after, unchanged = gates(load, CHANGES[change]), gates(CHANGES[change], load), gates(load)
    assert before == pytest.approx(after, abs=1e-6)
    assert abs(before - unchanged) < 1e-2 if "cast" in change else abs(before - unchanged) > 1e-3


def test_closed_latent_gates_cost_nothing_after_their_decision(pipe, monkeypatch):
    patches = [low_rank_patch(pipe, seed, gate={**LATENT, "ratio": 1e9}) for seed in range(4)]
    base = draw(pipe)
    pipe.load_patches(patches)
    assert torch.equal(draw(pipe), base)
    monkeypatch.setattr(Membrane, "__init__", lambda *_: pytest.fail("nothing acts"))
    calls = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(draw(pipe), base) and len(calls) == 2
    handle.remove()


def test_the_second_prompt_of_xl_is_encoded_for_the_gate():
    pipe = tiny_xl(ErasedStableDiffusionXLPipeline)
    with encodings(pipe) as base:
        draw(pipe, PROMPTS)
    pipe.load_patches([gated(pipe, text) for text in ("van gogh", "cat")])
    with encodings(pipe) as calls:
        draw(pipe, PROMPTS)
    assert calls == base
    with encodings(pipe) as calls:
        draw(pipe, ["a dog"], prompt_2=["a cat"])
    assert len(calls) == len(base) + 1
    assert pipe.gate_log == [{"van gogh": 0.0, "cat": 1.0}]
