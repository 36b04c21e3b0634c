"""The parts of a single file that a closed form reads: the same weights, and nothing else in memory."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erasure.erasing import check_resident, erase
from erasure.errors import ErasureError
from erasure.formats.single_file import save_single_file
from erasure.model.base import Base
from erasure.model.closed_form import READERS
from erasure.model.readers_only import open_readers
from erasure.model.single_file import HEADER
from tests.tiny import KINDS, tiny_pipeline, write_tiny

SETTINGS = {"guide": "empty", "contexts": False, "keep": "listed"}


@pytest.fixture(scope="module", params=KINDS)
def file(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("file")
    return save_single_file(tiny_pipeline(kind=request.param), folder / "model.safetensors")


def test_the_weights_and_states_are_those_of_the_whole_model(file):
    parts, whole = open_readers(file), Base.load(file, device="cpu")
    assert type(parts.pipe) is type(whole.pipe) and parts.device.type == "cpu" and parts.about == whole.about
    prompts = ["cat", "a photo of a dog", ""]
    assert torch.equal(parts.encode(prompts), whole.encode(prompts))
    loaded = 0
    for name, param in whole.unet.named_parameters():
        mine = parts.unet.get_parameter(name)
        if name.removesuffix(".weight").endswith(READERS):
            assert torch.equal(mine, param) and mine.dtype == torch.float32, name
            loaded += 1
        else:
            assert mine.is_meta, name
    assert loaded and parts.pipe.vae is None
    assert parts.family().preset == whole.family().preset


def test_the_patch_is_that_of_the_whole_model(file):
    patches = [
        erase(base, {"name": "cat", "keep": ["dog"]}, "uce", progress=False, **SETTINGS)
        for base in (open_readers(file), Base.load(file, device="cpu"))
    ]
    for name in patches[0].payload.names("unet"):
        one, other = (patch.payload.change("unet", name) for patch in patches)
        assert torch.equal(one, other) and one.any(), name
    assert patches[0].base_fingerprint == patches[1].base_fingerprint


def test_only_what_is_read_is_read(file, monkeypatch):
    read = []

    class Spy:
        def __init__(self, *args) -> None:
            self.file = safe_open(*args)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *fault):
            return self.file.__exit__(*fault)

        def __getattr__(self, name):
            def wrapped(*args):
                if name in ("get_tensor", "get_slice"):
                    read.append(args[0])
                return getattr(self.file, name)(*args)

            return wrapped

    monkeypatch.setattr("safetensors.safe_open", Spy)
    open_readers(file)
    start = "model.diffusion_model."
    assert not [name for name in read if name.startswith("first_stage_model.")]
    networks = [name for name in read if name.startswith(start)]
    assert networks and all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in networks)
    assert len(networks) == len(set(networks))


def test_a_file_of_another_layout_is_loaded_whole(file, tmp_path):
    """A file that lacks a layer is not opened in part; the ordinary loader says what is wrong with it."""
    tensors = load_file(file)
    with safe_open(file, "pt") as source:
        header = {HEADER: source.metadata()[HEADER]}
    name = next(name for name in tensors if name.endswith("attn2.to_v.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "less.safetensors", header)
    with pytest.raises(ErasureError, match="it cannot be loaded as that|weights are missing"):
        open_readers(tmp_path / "less.safetensors")


def test_a_folder_is_loaded_whole(tmp_path):
    base = open_readers(write_tiny(tmp_path / "model"), device="cpu")
    assert not any(param.is_meta for param in base.unet.parameters()) and base.pipe.vae is not None


def test_no_layer_of_another_device_counts_as_loaded(file):
    base = open_readers(file)
    check_resident(base)
    base.unet.to("meta")
    assert base.device.type == "meta"
