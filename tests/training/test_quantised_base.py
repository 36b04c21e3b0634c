"""Erasing from a base in 8 bits: low-rank terms train beside the layers, and nothing else can."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline

from erasure import erase
from erasure.cli.main import main
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.quantising import is_quantised
from erasure.patch import Patch
from erasure.patch.fingerprint import QUANTISED
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.conformance.quick import QUICK
from tests.pipelines.test_quantised import QUANTISERS, by_hand, state_of
from tests.tiny import tiny_pipeline
from tests.tiny_transformers import tiny_transformer

ESD = {**QUICK["esd"], "rank": 2}


def network(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def made(kind):
    return tiny_pipeline(StableDiffusionPipeline) if kind == "sd1" else tiny_transformer(kind)


def flat(patch):
    (component,) = patch.components
    payload = patch.payload
    return torch.cat([payload.change(component, name).flatten() for name in payload.names(component)])


@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [("sd1", "esd", ESD), ("sd1", "unguide", QUICK["unguide"]), ("flux", "gem", QUICK["gem"])],
)
@QUANTISERS
def test_a_low_rank_term_learns_beside_8_bit_layers_what_it_learns_beside_whole_ones(quantise, kind, method, settings):
    whole, pipe = made(kind), made(kind)
    quantise(network(pipe))
    before = {name: value.clone() for name, value in network(pipe).state_dict().items() if not is_quantised(value)}
    packed = {name: value for name, value in network(pipe).named_parameters() if is_quantised(value)}
    values = {name: dense(value) for name, value in packed.items()}
    right = flat(erase(whole, "cat", method, **settings))
    found = erase(pipe, "cat", method, **settings)
    change = flat(found)
    assert torch.nn.functional.cosine_similarity(change, right, dim=0) > 0.95 and right.abs().max() > 0
    after = dict(network(pipe).named_parameters())
    assert packed and all(after[name] is value for name, value in packed.items())
    assert all(torch.equal(dense(after[name]), value) for name, value in values.items())
    assert all(torch.equal(network(pipe).state_dict()[name], value) for name, value in before.items())
    assert set(found.base_fingerprint.values()) == {QUANTISED}


def dense(value):
    return (value.dequantize() if hasattr(value, "dequantize") and value.is_floating_point() else value).clone()


def test_the_patch_loads_on_the_whole_model_and_says_that_the_base_was_not_checked(tmp_path, caplog):
    pipe = tiny_pipeline(StableDiffusionPipeline)
    by_hand(pipe.unet)
    erase(pipe, "cat", "esd", out=tmp_path / "cat.safetensors", **ESD)
    whole = tiny_pipeline(ErasedStableDiffusionPipeline)
    with caplog.at_level(logging.WARNING):
        whole.load_patch(tmp_path / "cat.safetensors")
    assert "made from a quantised unet" in caplog.text and whole.get_list_patches()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("esd", QUICK["esd"], r"unet\..* is quantised, and whole weights cannot train.*rank=R.*Nothing was trained"),
        ("salun", QUICK["salun"], "is quantised, and whole weights cannot train"),
        ("uce", QUICK["uce"], "are quantised, and a closed form solves for them.*Nothing was changed"),
    ],
)
@QUANTISERS
def test_what_changes_whole_weights_is_refused(quantise, method, settings, message):
    pipe = tiny_pipeline(StableDiffusionPipeline)
    quantise(pipe.unet)
    before = state_of(pipe)
    with pytest.raises(ErasureError, match=message):
        erase(pipe, "cat", method, **settings)
    assert all(torch.equal(value, before[name]) for name, value in state_of(pipe).items())


def test_a_model_is_loaded_in_8_bits_by_name_and_only_its_large_parts(tmp_path):
    pytest.importorskip("torchao")
    tiny_transformer("flux").save_pretrained(tmp_path / "flux")
    whole, base = Base.load(tmp_path / "flux"), Base.load(tmp_path / "flux", quantize="int8")
    assert base.quantised and not whole.quantised
    assert is_quantised(base.network.transformer_blocks[0].attn.to_q.weight)
    counts = {
        name: sum(map(is_quantised, part.parameters()))
        for name, part in base.pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert counts["text_encoder"] == counts["vae"] == 0 and counts["text_encoder_2"] and counts["transformer"]
    with pytest.raises(ErasureError, match="unknown quantize 'int3'.*Allowed: int8"):
        Base.load(tmp_path / "flux", quantize="int3")


def test_the_command_erases_from_8_bits(tmp_path):
    pytest.importorskip("torchao")
    tiny_pipeline(StableDiffusionPipeline).save_pretrained(tmp_path / "model")
    given = [f"--set={key}={value}" for key, value in ESD.items()]
    words = ["erase", "cat", "--model", str(tmp_path / "model"), "--quantize", "int8", "--kind", "object"]
    out = tmp_path / "cat.safetensors"
    assert main([*words, "--method", "esd", *given, "-o", str(out)]) == 0
    assert Patch.load(out).base_fingerprint == {"unet": QUANTISED}
