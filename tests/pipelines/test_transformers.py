"""Patches on SD3, FLUX and PixArt: exact removal, strengths, stacks, gates, and the file in diffusers' own loader."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.loading import open_pipeline
from erasure.patch import LowRank, Patch, fingerprint
from erasure.pipelines import (
    ErasedFluxPipeline,
    ErasedPixArtSigmaPipeline,
    ErasedStableDiffusion3Pipeline,
    load_patch,
    load_pipeline,
    patch_stack,
)
from tests.tiny import SIDE, tiny_pipeline
from tests.tiny_transformers import KINDS, tiny_transformer

ERASED = {"sd3": ErasedStableDiffusion3Pipeline, "flux": ErasedFluxPipeline, "pixart": ErasedPixArtSigmaPipeline}
CALL = {
    "sd3": {"guidance_scale": 3.0, "max_sequence_length": 8},
    "flux": {"true_cfg_scale": 3.0, "negative_prompt": [""] * 2, "max_sequence_length": 8},
    "pixart": {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8},
}
GATE = {"kind": "text", "texts": ["cat"], "threshold": 0.999}


def draw(pipe, kind, prompts=("a cat", "a dog"), **more):
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    size = {"height": 2 * SIDE, "width": 2 * SIDE, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(list(prompts), generator=noise, **size, **{**CALL[kind], **more}).images


def patched(pipe, *, seed=0, variant="x", gate=None, alphas=(4.0,), ranks=(2,)):
    """A low-rank patch of random factors on the modules of a variant."""
    draws, layers = torch.Generator().manual_seed(seed), {}
    for number, (path, module) in enumerate(Base("tiny", pipe).targets(variant).items()):
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        down = torch.randn(rank, module.in_features, generator=draws) * 0.3
        layers[path] = (down, torch.randn(module.out_features, rank, generator=draws) * 0.3, alpha)
    payload = LowRank({"transformer": layers})
    prints = {"transformer": fingerprint(pipe.transformer, payload.names("transformer"))}
    more = {} if gate is None else {"gate": gate}
    return Patch(payload, "esd", [{"name": "cat"}], base="tiny", base_fingerprint=prints, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_stacking_and_unloading(kind):
    pipe = tiny_transformer(kind, ERASED[kind])
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    plain, patch, second = draw(pipe, kind), patched(pipe), patched(pipe, seed=1)
    pipe.load_patch(patch, "one")
    pipe.load_patch(second, "two", strength=0.5)
    both = draw(pipe, kind)
    assert pipe.gate_log == [{"one": 1.0, "two": 0.5}] * 2
    weight = pipe.transformer.get_parameter(patch.payload.names("transformer")[0])
    name = patch.payload.names("transformer")[0]
    changes = [one.payload.change("transformer", name) for one in (patch, second)]
    expected = before[name] + changes[0] + 0.5 * changes[1]
    assert torch.allclose(weight, expected, atol=1e-6)
    pipe.set_patches({"one": 1.0})
    assert not torch.allclose(draw(pipe, kind), both, atol=1e-3) and not torch.allclose(both, plain, atol=1e-3)
    pipe.unload_patches()
    assert all(torch.equal(before[name], value) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(draw(pipe, kind), plain)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_text_gate_opens_for_the_prompt_alone(kind):
    """Gates read the first CLIP; the prompts that do not name the concept keep every bit, also under guidance."""
    pipe = tiny_transformer(kind, ERASED[kind])
    plain = draw(pipe, kind)
    folded = draw(ERASED[kind].from_pipe(pipe), kind)
    assert torch.equal(plain, folded)
    pipe.load_patch(patched(pipe, gate=GATE), "gated")
    more = {"negative_prompt": ["cat"] * 2} if kind == "flux" else {}
    gated = draw(pipe, kind, **more)
    assert [row["gated"] for row in pipe.gate_log] == [1.0, 0.0]
    pipe.set_patches({})
    off = draw(pipe, kind, **more)
    assert torch.equal(gated[1], off[1]) and not torch.allclose(gated[0], off[0], atol=1e-3)
    pipe.set_patches(["gated"])
    pipe.fuse_patches()
    assert torch.allclose(draw(pipe, kind, **more)[0], gated[0], atol=1e-4)


@pytest.mark.parametrize(("kind", "plain"), [("sd3", StableDiffusion3Pipeline), ("flux", FluxPipeline)])
@pytest.mark.parametrize("ranks", [(2,), (2, 3)])
def test_diffusers_own_loader_reads_the_file_exactly(kind, plain, ranks, tmp_path):
    """Scales other than 1 and different ranks are in the factors, because the files of transformers hold no alphas."""
    path = tmp_path / "cat.safetensors"
    patch = patched(tiny_transformer(kind), alphas=(4.0, 1.0), ranks=ranks)
    patch.save(path)
    loaded = Patch.load(path)
    assert loaded.payload.digest == patch.payload.digest
    ours, theirs = tiny_transformer(kind), tiny_transformer(kind)
    load_patch(ours, loaded)
    assert type(theirs) is plain
    theirs.load_lora_weights(path)
    assert torch.allclose(draw(theirs, kind), draw(ours, kind), atol=1e-4)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    for name in patch.payload.names("transformer"):
        assert torch.allclose(theirs.transformer.get_parameter(name), ours.transformer.get_parameter(name), atol=1e-6)


def test_a_patch_of_one_family_is_refused_on_another():
    patch = patched(tiny_transformer("sd3"))
    with pytest.raises(ErasureError, match="StableDiffusionPipeline has no transformer"):
        load_patch(tiny_pipeline(), patch)
    for kind, force in (("flux", False), ("pixart", True)):  # the tiny FLUX has layers of the same names and shapes
        other = tiny_transformer(kind)
        before = {name: value.clone() for name, value in other.transformer.state_dict().items()}
        with pytest.raises(ErasureError, match="does not fit" if force else "was made from tiny"):
            load_patch(other, patch, force=force)
        assert not patch_stack(other).loaded
        assert all(torch.equal(before[name], value) for name, value in other.transformer.state_dict().items())


def test_flux_refuses_a_negative_prompt_that_does_nothing():
    pipe = tiny_transformer("flux", ErasedFluxPipeline)
    with pytest.raises(ErasureError, match="negative_prompt does nothing without true_cfg_scale"):
        pipe("a cat", negative_prompt="dog")


def test_folders_open_as_the_erased_class_also_without_t5(tmp_path, caplog):
    folder = tmp_path / "sd3"
    tiny_transformer("sd3").save_pretrained(folder)
    pipe = load_pipeline(folder, device="cpu")
    assert type(pipe) is ErasedStableDiffusion3Pipeline and pipe.text_encoder_3 is None
    base = Base.load(folder, device="cpu")
    assert type(base.pipe) is StableDiffusion3Pipeline and "no T5" in caplog.text
    assert torch.equal(
        base.conditions(["a cat"]).states, Base("t", tiny_transformer("sd3")).conditions(["a cat"]).states
    )
    with pytest.raises(ErasureError, match="ErasedFluxPipeline cannot hold it"):
        open_pipeline(ErasedFluxPipeline, folder)


def test_a_scale_other_than_one_goes_into_the_factors():
    """The change of a layer is (alpha / rank) up down, also where its file holds no alpha."""
    layers = {f"a.{rank}": (torch.randn(rank, 5), torch.randn(4, rank), alpha) for rank, alpha in ((2, 8.0), (3, 1.5))}
    payload = LowRank({"transformer": layers})
    for path, (down, up, alpha) in layers.items():
        change = payload.change("transformer", f"{path}.weight")
        assert torch.allclose(change, alpha / len(down) * up @ down, atol=1e-6)
        assert payload.layers["transformer"][path][2] == len(down)
