"""The latent gate: its decisions, how predictions are combined, and the cost."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.diffusion import Counts, counting
from erasure.model.trajectories import walk
from erasure.patch import LowRank, Patch
from erasure.pipelines import ErasedStableDiffusionPipeline
from erasure.pipelines.gates import latent
from erasure.pipelines.gates.latent import clear, pick
from erasure.pipelines.stack import patch_stack
from tests.tiny import tiny_pipeline

GATE = {"kind": "latent", "after": 2, "steps": 4, "guidance": 2.0, "repeats": 4, "early": False}


@pytest.fixture
def pipe() -> ErasedStableDiffusionPipeline:
    pipeline = tiny_pipeline(ErasedStableDiffusionPipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def patch(pipe, scale: float = 1.0, **gate) -> Patch:
    draw = torch.Generator().manual_seed(5)
    layers = {
        path: (
            torch.randn(1, layer.in_features, generator=draw),
            scale * torch.randn(layer.out_features, 1, generator=draw),
            1.0,
        )
        for path, layer in pipe.unet.named_modules()
        if path.endswith(("attn2.to_k", "attn2.to_v"))
    }
    return Patch(
        payload=LowRank({"unet": layers}),
        method="hand",
        concepts=({"name": "cat"},),
        base="tiny",
        base_fingerprint={},
        config={},
        gate={**GATE, **gate},
        versions={},
        seed=0,
        costs={},
    )


def draw(pipe, prompts, images: int = 1, **options) -> torch.Tensor:
    prompts = [prompts] if isinstance(prompts, str) else prompts
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts) * images)]
    return pipe(
        prompts,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=noise,
        num_images_per_prompt=images,
        output_type="latent",
        **options,
    ).images


def decide(pipe, monkeypatch, named) -> None:
    monkeypatch.setattr(
        "erasure.pipelines.gates.latent.Decider.present", lambda self, key, gate, prompt, patched: prompt in named
    )


@pytest.mark.parametrize("measure", ["norm", "guidance"])
def test_the_decision_follows_the_formula(pipe, measure):
    gated = patch(pipe, measure=measure, ratio=1.0 if measure == "norm" else 1e-4)
    pipe.load_patch(gated, force=True)
    base, layers = Base("", pipe), gated.payload.layers["unet"]

    def distance(prompt: str) -> float:
        total = 0.0
        for seed in range(4):
            state = walk(base, [(prompt, "")], seeds=[seed], steps=4, guidance=2.0, stop=2, judged=False)
            with torch.no_grad():
                before, empty = (pipe.unet(state.x, state.t, base.encode([text])).sample for text in (prompt, ""))
                weights = {}
                for path, (down, up, _) in layers.items():
                    module = pipe.unet.get_submodule(path)
                    weights[path] = module.weight.data.clone()
                    module.weight.data += up @ down
                after = pipe.unet(state.x, state.t, base.encode([prompt])).sample
                for path, weight in weights.items():
                    pipe.unet.get_submodule(path).weight.data = weight
            if measure == "norm":
                total += float((after - before).norm()) / 4
            else:
                guidance = before - empty
                total += float(((before - after) * guidance).sum() / (guidance * guidance).sum()) / 4
        return total

    decisions = set()
    for prompt in ("cat", "a red tree", "dog", "a bird", "blue"):
        draw(pipe, prompt)
        decision = distance(prompt) > (distance("") if measure == "norm" else 1e-4)
        assert pipe.gate_log == [{"cat": 2.0 if decision else 0.0}], prompt
        decisions.add(decision)
    assert measure == "norm" or decisions == {True, False}


@pytest.mark.parametrize(("on", "weight"), [(0.0, 0.0), (-1.0, -1.0), (0.5, 0.5)])
def test_predictions_are_combined_row_by_row(pipe, monkeypatch, on, weight):
    decide(pipe, monkeypatch, {"cat"})
    base = draw(pipe, ["cat", "dog"])
    pipe.load_patch(patch(pipe, on=on), force=True)
    mixed = draw(pipe, ["cat", "dog"])
    assert torch.equal(mixed[1], base[1]) and not torch.equal(mixed[0], base[0])
    assert pipe.gate_log == [{"cat": 1 - weight}, {"cat": 0.0}]
    alone = draw(pipe, "cat")
    assert torch.allclose(alone[0], mixed[0], atol=1e-4)


def test_weight_0_is_the_patch_alone_and_weight_1_the_base_bit_for_bit(pipe, monkeypatch):
    decide(pipe, monkeypatch, {"cat"})
    base = draw(pipe, ["cat", "dog"])
    name = pipe.load_patch(patch(pipe, on=0.0), force=True)
    gated = draw(pipe, "cat")
    pipe.fuse_patches()
    assert torch.allclose(gated, draw(pipe, "cat"), atol=1e-3)
    pipe.unfuse_patches()
    assert torch.equal(draw(pipe, ["dog", "dog"]), draw(pipe, ["dog", "dog"])) and torch.equal(
        draw(pipe, ["cat", "dog"])[1], base[1]
    )
    pipe.set_patches({name: 0.0})
    assert torch.equal(draw(pipe, ["cat", "dog"]), base)
    pipe.unload_patches()
    assert torch.equal(draw(pipe, ["cat", "dog"]), base) and "forward" not in vars(pipe.unet)


def test_one_step_by_hand(pipe, monkeypatch):
    """The first call of the UNet returns w e_0 + (1 - w) e_L."""
    decide(pipe, monkeypatch, {"cat"})
    gated = patch(pipe, on=-1.0)
    pipe.load_patch(gated, force=True)
    x, texts = torch.randn(1, 4, 8, 8), Base("", pipe).encode(["cat"])
    stack = patch_stack(pipe)
    with torch.no_grad():
        plain = pipe.unet(x, 5, texts).sample
        with stack._gates.patched(gated)():
            lora = pipe.unet(x, 5, texts).sample
        with ExitStack() as scope:
            stack.open([["cat"]], 1, 1, scope)
            combined = pipe.unet(x, 5, texts).sample
        assert torch.equal(pipe.unet(x, 5, texts).sample, plain)
    assert torch.allclose(combined, -1 * plain + 2 * lora, atol=1e-5)


def test_strength_scales_the_difference_from_the_base(pipe, monkeypatch):
    decide(pipe, monkeypatch, {"cat"})
    name = pipe.load_patch(patch(pipe, on=-1.0), force=True)
    pipe.set_patches({name: 0.5})
    half = draw(pipe, "cat")
    pipe.unload_patches()
    pipe.load_patch(patch(pipe, on=0.0), force=True)
    assert torch.allclose(half, draw(pipe, "cat"), atol=1e-4)


def test_several_images_of_a_prompt_share_its_decision(pipe, monkeypatch):
    decide(pipe, monkeypatch, {"cat"})
    base = draw(pipe, ["cat", "dog"], images=2)
    pipe.load_patch(patch(pipe), force=True)
    patched = draw(pipe, ["cat", "dog"], images=2)
    changed = [not torch.equal(a, b) for a, b in zip(base, patched, strict=True)]
    assert changed == [True, True, False, False]


def test_decisions_are_made_once_and_do_not_depend_on_the_batch(pipe):
    pipe.load_patch(patch(pipe), force=True)
    draw(pipe, ["cat", "a dog", "tree"])
    together = [next(iter(row.values())) for row in pipe.gate_log]
    costs = Counts()
    with counting(pipe.unet, costs):
        draw(pipe, ["tree", "cat"])
    assert costs.forward == 3 * 2 * 2  # three steps, two prompts, both halves of guidance: no decision is repeated
    assert [next(iter(row.values())) for row in pipe.gate_log] == [together[2], together[0]]


def test_clear_decisions_stop_early(pipe):
    def forwards(**gate) -> int:
        pipe.unload_patches()
        pipe.load_patch(patch(pipe, repeats=9, **gate), force=True)
        costs = Counts()
        with counting(pipe.unet, costs):
            draw(pipe, "cat")
        return costs.forward

    # For each of 9 noises: 2 steps of 2 forwards and 2 more for the prompt, 2 steps of 1 forward and 2 more for "".
    assert forwards(early=False) == 9 * (4 + 2) + 9 * (2 + 2) + 3 * 2
    assert forwards(early=True) <= forwards(early=False)
    assert clear([1.0, 1.1, 0.9]) and not clear([1.0, -1.0, 0.2]) and not clear([1.0, 1.0])


def test_gates_with_the_same_settings_share_the_base_part_of_their_decisions(pipe):
    def decide_with(*patches):
        pipe.unload_patches()
        pipe.load_patches(patches, force=True)
        costs = Counts()
        with counting(pipe.unet, costs):
            pipe.encode_prompt("cat", "cpu", 1, False)  # outside a call, no gate decides
            with ExitStack() as scope:
                patch_stack(pipe).open([["cat"]], 1, 1, scope)
        return costs.forward, list(pipe.gate_log[0].values())

    gate = {"measure": "guidance", "ratio": 1e-4}
    one, other, third = patch(pipe, **gate), patch(pipe, scale=-1.0, **gate), patch(pipe, scale=0.3, **gate, repeats=2)
    alone = [decide_with(each)[1][0] for each in (one, other, third)]
    # For each of 4 noises: 2 steps of 2 forwards, e_0 for the prompt and "", and e_L of each patch.
    assert decide_with(one) == (4 * (4 + 2 + 1), alone[:1])
    assert decide_with(one, other) == (4 * (4 + 2 + 2), alone[:2])
    assert decide_with(one, other, third) == (4 * (4 + 2 + 2) + 2 * (4 + 2 + 1), alone)
    assert len(set(alone)) == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_gate_may_ask_at_the_published_timestep(pipe, monkeypatch, late):
    asked = []
    monkeypatch.setattr(latent, "shifts", lambda *given, **how: asked.append(how["late"]) or [1.0] * len(given[2]))
    pipe.load_patch(patch(pipe, **({"late": True} if late else {})), force=True)
    draw(pipe, "cat")
    assert set(asked) == {late}


def test_gates_of_both_kinds_act_together(pipe, monkeypatch):
    decide(pipe, monkeypatch, {"cat"})
    text = patch(pipe, scale=0.5)
    text = Patch(
        **{
            **{f: getattr(text, f) for f in ("payload", "method", "concepts", "base", "base_fingerprint")},
            "config": {},
            "versions": {},
            "seed": 0,
            "costs": {},
            "gate": {"kind": "text", "texts": ["dog"]},
        }
    )
    pipe.load_patch(text, name="text", force=True)
    alone = draw(pipe, ["cat", "dog"])
    pipe.load_patch(patch(pipe), name="latent", force=True)
    both = draw(pipe, ["cat", "dog"])
    assert torch.allclose(both[1], alone[1], atol=1e-5) and not torch.allclose(both[0], alone[0], atol=1e-3)


def test_rows_are_picked_from_nested_arguments():
    rows = torch.tensor([True, False])
    picked = pick({"a": torch.arange(2), "b": [torch.zeros(2, 3), 7], "c": torch.tensor(3)}, rows, 2)
    assert picked["a"].tolist() == [0] and picked["b"][0].shape == (1, 3) and picked["b"][1] == 7 and picked["c"] == 3


def test_a_gate_on_differences_is_refused(pipe):
    from tests.patch.making import delta_patch

    delta = delta_patch(pipe)
    wrong = Patch(
        **{
            **{f: getattr(delta, f) for f in ("payload", "method", "concepts", "base", "base_fingerprint")},
            "config": {},
            "versions": {},
            "seed": 0,
            "costs": {},
            "gate": {"kind": "latent"},
        }
    )
    with pytest.raises(ErasureError, match="low-rank"):
        pipe.load_patch(wrong)
