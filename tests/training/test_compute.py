"""Precision, layout and checkpointing of a run: what they must not change, and what they may."""

from __future__ import annotations

import pytest
import torch

from erasure.concepts.concept import Concept
from erasure.distributed import ProcessGroup
from erasure.erasing import erase
from erasure.errors import ErasureError
from erasure.methods import configured
from erasure.model.base import Base
from erasure.patch import Patch
from erasure.training import loop as training
from erasure.training.adapters import LowRankTerm, Weights
from erasure.training.compute import DTYPES, Computing, Engine, Rows
from tests.conformance.quick import QUICK, changes, same, weights
from tests.tiny import tiny_pipeline

BOTH = ["weights", "low rank"]


def adapter(base, kind):
    if kind == "weights":
        return Weights(base.unet, base.targets("x"))
    term = LowRankTerm(base.unet, base.targets("x"), rank=2, generator=torch.Generator().manual_seed(0))
    for param in term.parameters().values():
        param.data.add_(0.1)
    return term


def inputs(base):
    draw = torch.Generator().manual_seed(1)
    x, states = torch.randn(3, 4, 8, 8, generator=draw), torch.randn(3, 12, 32, generator=draw)
    return x, torch.tensor([5, 500, 900]), states


def step(kind, stored=True, **options):
    """Output, gradients by name, and the dtypes of the UNet's weights after one backward of the tiny UNet."""
    base = Base.of(tiny_pipeline())
    with Engine(base, Computing(**options)) as engine:
        term = adapter(base, kind)
        if stored:
            engine.settle(term.parameters(), inside=True)
        out = base.unet(*inputs(base)).sample
        out.square().sum().backward()
        gradients = {name: param.grad.clone() for name, param in term.parameters().items()}
        types = {name: param.dtype for name, param in base.unet.named_parameters()}
        term.remove()
    return out.detach(), gradients, types


@pytest.mark.parametrize("kind", BOTH)
def test_checkpointing_and_layout_give_the_same_gradients(kind):
    plain, gradients, _ = step(kind)
    for option in ("gradient_checkpointing", "channels_last"):
        out, other, _ = step(kind, **{option: True})
        assert torch.allclose(out, plain, atol=1e-5)
        scale = max(float(value.abs().max()) for value in gradients.values())
        assert all(torch.allclose(other[key], gradients[key], atol=1e-5 * scale) for key in gradients)


def test_checkpointing_keeps_less():
    def kept(**options):
        base, sizes = Base.of(tiny_pipeline()), []
        with Engine(base, Computing(**options)):
            base.unet.requires_grad_(True)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda one: sizes.append(one.numel()) or one, lambda one: one
            ):
                base.unet(*inputs(base))
        return sum(sizes)

    assert kept(gradient_checkpointing=True) < kept() / 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", BOTH)
def test_half_precision_narrows_what_is_frozen_and_nothing_else(kind, precision):
    """Frozen weights lie in half precision, with the very numbers that autocast would make of them."""
    out, gradients, types = step(kind, precision=precision)
    wide, other, _ = step(kind, stored=False, precision=precision)
    assert torch.equal(out, wide) and out.dtype == torch.float32
    assert gradients.keys() == other.keys() and all(torch.equal(gradients[key], other[key]) for key in gradients)
    assert all(value.dtype == torch.float32 for value in gradients.values())
    exact = step(kind)[0]
    assert not torch.equal(out, exact) and torch.allclose(out, exact, atol=0.05)
    half = {name for name, dtype in types.items() if dtype == DTYPES[precision]}
    assert "mid_block.resnets.0.conv1.weight" in half
    assert not any("norm" in name for name in half) and "conv_in.weight" not in half
    assert (kind == "low rank") == any("attn2" in name for name in half)


@pytest.mark.parametrize("method", ["esd", "spm", "advunlearn"])
def test_erasing_in_bf16_goes_as_in_fp32_and_gives_the_model_back(method, monkeypatch):
    losses: dict[str, list[float]] = {}

    def run(precision):
        seen = losses.setdefault(precision, [])
        watch = training.Run.watch

        def note(self, at, terms, rate):
            seen.append(sum(value.item() for value in terms.values()))
            assert all(value.dtype == torch.float32 for value in terms.values())
            watch(self, at, terms, rate)

        monkeypatch.setattr(training.Run, "watch", note)
        pipe, settings = tiny_pipeline(), {**QUICK[method], "iterations": 16, "attack_steps": 0}
        settings = {key: value for key, value in settings.items() if method == "advunlearn" or key != "attack_steps"}
        before = weights(pipe)
        patch = erase(pipe, "cat", method, progress=False, precision=precision, **settings)
        monkeypatch.setattr(training.Run, "watch", watch)
        assert same(before, weights(pipe)) and "forward" not in vars(pipe.unet)
        return patch

    exact, half = run("fp32"), run("bf16")
    assert half.config["precision"] == "bf16" and exact.config["precision"] == "fp32"
    assert exact.base_fingerprint == half.base_fingerprint
    for seen in losses.values():
        assert sum(seen[-4:]) < sum(seen[:4])
    one, two = (torch.cat([value.flatten() for value in changes(patch).values()]) for patch in (exact, half))
    assert not torch.equal(one, two)
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.7


@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_loaded_in_half_precision_can_be_trained(loaded, precision):
    pipe = tiny_pipeline().to(dtype=loaded)
    before = weights(pipe)
    patch = erase(pipe, "cat", "esd", progress=False, precision=precision, **QUICK["esd"])
    assert same(before, weights(pipe)) and all(value.dtype == loaded for value in weights(pipe).values())
    assert any(change.any() for change in changes(patch).values())


def test_fp16_scales_its_gradients_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    settings = {"progress": False, "precision": "fp16", **QUICK["esd"]}
    straight = erase(tiny_pipeline(), "cat", "esd", **settings)
    out, real = tmp_path / "p.safetensors", training._write

    def killed(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        erase(tiny_pipeline(), "cat", "esd", out=out, **settings)
    monkeypatch.setattr(training, "_write", real)
    with pytest.raises(ErasureError, match="other settings"):
        erase(tiny_pipeline(), "cat", "esd", out=out, **{**settings, "precision": "bf16"})
    assert same(changes(erase(tiny_pipeline(), "cat", "esd", out=out, **settings)), changes(straight))
    assert Patch.load(out).config["precision"] == "fp16"


def test_gradients_that_pass_through_fp16_are_scaled_inside_and_true_outside():
    base, gradients = Base.of(tiny_pipeline()), {}
    for precision in ("fp32", "fp16"):
        with Engine(base, Computing(precision=precision)) as engine:
            base.unet.requires_grad_(False)
            engine.settle({}, inside=False)
            x, t, states = inputs(base)
            states.requires_grad_(True)
            loss = base.unet(x, t, states).sample.mean() * 1e-4  # about the least that fp16 can hold, an element
            (gradients[precision],) = torch.autograd.grad(loss, states)
    assert gradients["fp16"].any()
    near = torch.nn.functional.cosine_similarity(gradients["fp32"].flatten(), gradients["fp16"].flatten(), dim=0)
    assert near > 0.9 and 0.8 < gradients["fp16"].norm() / gradients["fp32"].norm() < 1.25


def test_a_compiled_unet_sees_the_adapter_on_and_off(monkeypatch):
    """Through dynamo, without a compiler."""
    compiled, real = [], torch.compile

    def plainly(function):
        compiled.append(function)
        return real(function, backend="eager")

    monkeypatch.setattr(torch, "compile", plainly)
    base, plain = Base.of(tiny_pipeline()), Base.of(tiny_pipeline())
    with Engine(base, Computing(compile=True)) as engine, torch.no_grad():
        before = base.unet(*inputs(base)).sample
        assert not compiled
        term, other = adapter(base, "low rank"), adapter(plain, "low rank")
        engine.settle(term.parameters(), inside=True)
        assert torch.allclose(base.unet(*inputs(base)).sample, plain.unet(*inputs(base)).sample, atol=1e-5)
        with term.off():
            assert torch.allclose(base.unet(*inputs(base)).sample, before, atol=1e-5)
        assert len(compiled) == 1
        term.remove()
    torch._dynamo.reset()
    other.remove()
    assert "forward" not in vars(base.unet)


def test_settings_come_from_anywhere_and_wrong_ones_are_told():
    computing, (rest,) = Computing.split({"precision": "bf16", "iterations": 3})
    assert computing == Computing(precision="bf16") and rest == {"iterations": 3}
    assert configured("esd", Concept.list_of("cat"), rest).iterations == 3
    assert Computing().on(torch.device("cpu")).precision == "fp32"
    with pytest.raises(ErasureError, match="fp32.*bf16|bf16.*fp32"):
        Computing.split({"precision": "bf15"})
    with pytest.raises(ErasureError, match="channels_last"):
        Computing.split({"channels_last": "maybe"})
    with pytest.raises(ErasureError, match="unknown config key"):
        configured("esd", Concept.list_of("cat"), *Computing.split({"channel_last": True})[1])


def test_the_command_line_says_how_to_compute():
    from erasure.cli.erase import settings
    from erasure.cli.parser import parser

    line = ["cat", "--precision", "bf16", "--gradient-checkpointing", "--set", "iterations=3"]
    for command in ("erase", "plan"):
        values = settings(parser().parse_args([command, *line]))
        assert values == {"iterations": 3, "precision": "bf16", "gradient_checkpointing": True}
        assert settings(parser().parse_args([command, "cat"])) == {}


def test_every_row_is_computed_once_and_short_shares_are_filled():
    for n in (1, 3, 4, 5):
        rows = [Rows(ProcessGroup(index, 3), n).own(torch.device("cpu")).tolist() for index in range(3)]
        assert len({len(part) for part in rows}) == 1
        assert sum(rows, [])[:n] == list(range(n)) and set(sum(rows, [])[n:]) <= {n - 1}
