"""Patches on quantised layers: they act beside the weights, which stay as they are."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from erasure.errors import ErasureError
from erasure.formats.single_file import save_single_file
from erasure.patch.ops.arithmetic import scale
from erasure.pipelines import ErasedStableDiffusionPipeline, load_patch
from tests.patch.making import delta_patch, low_rank_patch
from tests.tiny import latents, tiny_pipeline
from tests.tiny_transformers import tiny_transformer

PROMPTS = ["a cat", "a dog"]


class Int8Linear(nn.Linear):
    """A linear layer as bitsandbytes' in 8 bits: its weight is whole numbers, packed into another shape."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.factor = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (layer.weight / self.factor).round().to(torch.int8).reshape(-1, 1)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def forward(self, x):
        weight = self.weight.reshape(self.out_features, self.in_features).float() * self.factor
        return functional.linear(x, weight.to(x.dtype), self.bias)


def by_hand(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))


def by_torchao(module: nn.Module) -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    quantisation.quantize_(module, quantisation.Int8WeightOnlyConfig())


QUANTISERS = pytest.mark.parametrize("quantise", [by_hand, by_torchao])


def quantised(quantise):
    pipe = tiny_pipeline(ErasedStableDiffusionPipeline)
    quantise(pipe.unet)
    return pipe


def state_of(pipe):
    state = pipe.unet.state_dict()
    return {
        name: (value if type(value) is torch.Tensor else value.dequantize()).clone() for name, value in state.items()
    }


def drawn(pipe):
    return latents(pipe, PROMPTS)


@QUANTISERS
def test_a_patch_moves_a_quantised_base_as_it_moves_the_base(quantise, caplog):
    """What it changes differs from what it changes of the true base by far less than the change."""
    true, pipe = tiny_pipeline(ErasedStableDiffusionPipeline), quantised(quantise)
    patch, before, plain = low_rank_patch(true), drawn(pipe), drawn(true)
    state = state_of(pipe)
    with caplog.at_level(logging.WARNING):
        pipe.load_patch(patch)
    assert "quantised" in caplog.text and "cannot be checked" in caplog.text
    true.load_patch(patch)
    after = drawn(pipe)
    change, right = after - before, drawn(true) - plain
    assert right.abs().max() > 0.05
    assert (change - right).norm() < 0.1 * right.norm()
    assert all(torch.equal(value, state[name]) for name, value in state_of(pipe).items())
    pipe.unload_patches()
    assert torch.equal(drawn(pipe), before)


@QUANTISERS
def test_strengths_and_stacks_add_up(quantise):
    pipe = quantised(quantise)
    one, other = low_rank_patch(pipe_of(), seed=1), low_rank_patch(pipe_of(), seed=2)
    pipe.load_patch(one, "one")
    pipe.load_patch(other, "other")
    pipe.set_patches({"one": 0.5, "other": -1.0})
    found = drawn(pipe)
    pipe.unload_patches()
    for patch, factor in ((one, 0.5), (other, -1.0)):
        pipe.load_patch(scale(patch, factor))
    assert torch.allclose(found, drawn(pipe), atol=1e-4)
    pipe.set_patches({})
    assert torch.equal(drawn(pipe), drawn(quantised(quantise)))


def pipe_of():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


def test_the_term_is_added_once_and_on_every_row():
    """By hand at one layer, also after the strengths were changed several times."""
    pipe = quantised(by_hand)
    patch = low_rank_patch(pipe_of())
    pipe.load_patch(patch, "cat")
    for strength in (0.3, 2.0, 0.7):
        pipe.set_patches({"cat": strength})
    name = patch.payload.names("unet")[0]
    layer = pipe.unet.get_submodule(name.removesuffix(".weight"))
    x = torch.randn(3, 5, layer.in_features)
    right = Int8Linear.forward(layer, x) + 0.7 * functional.linear(x, patch.payload.change("unet", name))
    assert torch.allclose(layer(x), right, atol=1e-5)


def test_components_that_are_not_quantised_are_checked_as_always():
    pipe = quantised(by_hand)
    patch = low_rank_patch(pipe_of(), components=("unet", "text_encoder"))
    name = patch.payload.names("text_encoder")[0]
    pipe.text_encoder.get_parameter(name).data.add_(1.0)
    with pytest.raises(ErasureError, match="was made from .*text_encoder.*Nothing was loaded"):
        pipe.load_patch(patch)


def test_a_transformer_in_8_bits():
    from tests.formats.test_transformers import made

    pipe = tiny_transformer("sd3")
    patch = made(pipe)
    by_hand(pipe.transformer)
    before = drawn_by(pipe)
    load_patch(pipe, patch)
    assert (drawn_by(pipe) - before).abs().max() > 1e-3


def drawn_by(pipe):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
    return pipe("a cat", generator=generator, **options).images


def test_what_cannot_be_done_is_refused(tmp_path):
    pipe = quantised(by_hand)
    with pytest.raises(ErasureError, match=r"is quantised, and weight differences.*--rank R.*Nothing was loaded"):
        pipe.load_patch(delta_patch(pipe_of()))
    assert not pipe.get_list_patches()
    pipe.load_patch(low_rank_patch(pipe_of()))
    with pytest.raises(ErasureError, match="quantised"):
        save_single_file(pipe, tmp_path / "x.safetensors")
