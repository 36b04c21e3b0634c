"""The nodes on a stand-in for ComfyUI act as erased diffusers pipelines do."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erasure.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, nodes
from erasure.comfyui.__main__ import main
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.patch import LowRank
from erasure.pipelines import ErasedStableDiffusionPipeline
from tests.comfyui import standin
from tests.patch.making import delta_patch, gap, low_rank_patch
from tests.pipelines.making import LATENT
from tests.tiny import tiny_pipeline

GATE = {"kind": "text", "texts": ["van gogh"], "power": 2.0, "scale": 0.8}
PROMPTS = ["a photo of a cat by van gogh", "a red dog", "starry night"]
NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pipe():
    return tiny_pipeline(ErasedStableDiffusionPipeline)


@pytest.fixture
def graph(pipe, tmp_path, monkeypatch):
    """Return model and text encoders of a graph, and a function that saves a patch and loads it by the node."""
    standin.install(monkeypatch, tmp_path)

    def load(patch, strength=1.0, gate=nodes.IN_FILE, patches=None):
        file = patch.save(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors")
        return nodes.LoadPatch().load(file.name, strength, gate, patches)[0]

    return standin.model_of(pipe), standin.Clip(pipe), load


def run(pipe, graph, patches, prompt, negative="", other_base="refuse"):
    """Return the predictions under both conditionings of the nodes, and the reading."""
    model, clip, _ = graph
    model, clip, gated = nodes.ApplyPatches().apply(model, clip, patches, other_base)
    positive, negative, text = nodes.EncodePrompt().encode(clip, gated, prompt, negative)
    return standin.sampled(pipe, model, positive, NOISE), standin.sampled(pipe, model, negative, NOISE), text


def expected(pipe, strengths, prompt):
    """Return the prediction of the UNet for a prompt, with patches at given strengths, without the nodes."""
    plain = tiny_pipeline(ErasedStableDiffusionPipeline)
    for number, (patch, strength) in enumerate(strengths):
        plain.load_patch(replace(patch, gate={"kind": "always"}, stored={}), f"{number}", strength=strength)
    if strengths:
        plain.fuse_patches()
    with torch.no_grad():
        states = plain.encode_prompt(prompt, "cpu", 1, False)[0]
        return plain.unet(NOISE, 500, states).sample


def log_of(pipe, patch, prompt, strength=1.0):
    """Return the strength that the pipeline reports for a prompt."""
    pipe.load_patch(patch, "x", strength=strength)
    pipe(prompt, num_inference_steps=1, output_type="latent", height=16, width=16)
    (row,) = pipe.gate_log
    pipe.unload_patches()
    return row["x"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_gated_patch_acts_as_in_an_erased_pipeline(pipe, graph, prompt):
    patch = low_rank_patch(pipe, gate=GATE, alpha=5.0)
    want = log_of(pipe, patch, prompt, 0.5)
    positive, negative, text = run(pipe, graph, graph[2](patch, 0.5), prompt, "a dog")
    assert text == f"{want:6.3f}  van gogh: {prompt}"
    assert gap(positive, expected(pipe, [(patch, want)], prompt)) < 1e-5
    # The negative prompt is drawn with the strength of the positive one, as under classifier-free guidance.
    assert gap(negative, expected(pipe, [(patch, want)], "a dog")) < 1e-5
    assert gap(positive, expected(pipe, [], prompt)) > (1e-3 if want > 0.1 else 0)


def test_a_gate_that_reads_nothing_changes_no_bit(pipe, graph):
    patch = low_rank_patch(pipe, gate={**GATE, "threshold": 0.99})
    model, clip, load = graph
    patches = load(patch)
    model, clip, gated = nodes.ApplyPatches().apply(model, clip, patches, "refuse")
    positive, negative, text = nodes.EncodePrompt().encode(clip, gated, "a red dog", "")
    assert "hooks" not in positive[0][1] and "hooks" not in negative[0][1] and text.startswith(" 0.000")
    positive, negative, _ = nodes.EncodePrompt().encode(clip, gated, "van gogh", "")
    assert positive[0][1]["hooks"] is negative[0][1]["hooks"], "one group, so that both share a batch"


def test_patches_stack_and_ungated_ones_go_onto_the_model(pipe, graph):
    gated, plain = low_rank_patch(pipe, 1, gate=GATE), delta_patch(pipe, 2)
    patches = graph[2](plain, -0.7, patches=graph[2](gated))
    assert list(patches) == ["van gogh", "van gogh-2"]
    want = log_of(pipe, gated, PROMPTS[0])
    positive, _, text = run(pipe, graph, patches, PROMPTS[0])
    assert gap(positive, expected(pipe, [(gated, want), (plain, -0.7)], PROMPTS[0])) < 1e-5
    assert "van gogh-2" not in text
    assert not graph[0].patches and not graph[1].patcher.patches, "the inputs are left as they were"


def test_a_patch_of_the_text_encoder_acts_at_the_strength_of_its_prompt(pipe, graph):
    patch = low_rank_patch(pipe, part="attn2", components=("unet", "text_encoder"), gate=GATE)
    want = log_of(pipe, patch, PROMPTS[0])
    positive, _, _ = run(pipe, graph, graph[2](patch), PROMPTS[0])
    assert gap(positive, expected(pipe, [(patch, want)], PROMPTS[0])) < 1e-5
    assert gap(positive, expected(pipe, [(unet_alone(patch), want)], PROMPTS[0])) > 1e-3


def unet_alone(patch):
    prints = {"unet": patch.base_fingerprint["unet"]}
    return replace(patch, payload=LowRank({"unet": patch.payload.layers["unet"]}), base_fingerprint=prints)


def test_a_gate_can_be_switched_off(pipe, graph):
    patch = low_rank_patch(pipe, gate=GATE)
    positive, _, text = run(pipe, graph, graph[2](patch, 1.0, nodes.ALWAYS), "a red dog")
    assert gap(positive, expected(pipe, [(patch, 1.0)], "a red dog")) < 1e-5 and text == "no patch has a gate"


def test_every_part_of_a_long_prompt_is_read(pipe, graph):
    """ComfyUI draws with all parts, so a name in the second one must open the gate."""
    clip, long = graph[1], "a photo of a red dog in the tree by a blue car " * 2 + "van gogh"
    entries = graph[2](low_rank_patch(pipe, gate={"kind": "text", "texts": ["van gogh"]}))
    assert nodes.reading.strengths(clip, entries, long) == {"van gogh": 1.0}
    assert nodes.reading.strengths(clip, entries, "a photo of a red dog in the tree by a")["van gogh"] < 1.0
    assert clip.loaded, "the text encoder was brought to its device"


def test_start_end_and_padding_are_no_words(pipe, graph):
    """Otherwise every prompt would share some with every text."""
    ids = pipe.tokenizer("a cat", add_special_tokens=False).input_ids
    assert nodes.reading.states(graph[1], ["a cat"]).words == [set(ids)]


def test_the_readings_of_several_prompts(pipe, graph):
    shown = nodes.ReadGates().read(graph[1], graph[2](low_rank_patch(pipe, gate=GATE)), "\n".join(["", *PROMPTS]))
    (text,) = shown["result"]
    lines = text.splitlines()
    assert shown["ui"]["text"] == [text] and [line.split(": ")[1] for line in lines] == PROMPTS
    assert lines[0].split()[0] == "0.800" and float(lines[1].split()[0]) < 0.8


def test_what_does_not_fit_is_refused(pipe, graph, caplog):
    model, clip, load = graph
    apply = nodes.ApplyPatches().apply
    other = tiny_pipeline(ErasedStableDiffusionPipeline, seed=5)
    foreign = load(low_rank_patch(other))
    with pytest.raises(ErasureError, match="was made from tiny .* set other_base to allow"):
        apply(model, clip, foreign, "refuse")
    apply(model, clip, foreign, "allow")
    wide = tiny_pipeline(kind="sdxl")
    with pytest.raises(ErasureError, match="has shape .* here and .* in the patch"):
        apply(model, clip, load(low_rank_patch(wide)), "allow")
    with pytest.raises(ErasureError, match="latent gate"):
        load(low_rank_patch(pipe, gate=LATENT))
    assert load(low_rank_patch(pipe, gate=LATENT), gate=nodes.ALWAYS)
    norms = load(delta_patch(pipe, part="final_layer_norm", component="text_encoder"))
    with pytest.raises(ErasureError, match="none of its 2 layers"):
        apply(model, clip, norms, "refuse")
    both = load(delta_patch(pipe, part="layers.0", component="text_encoder"))
    apply(model, clip, both, "refuse")
    assert "no layer for" in caplog.text


def test_weights_under_other_loras_are_compared_with_their_backup(pipe, graph):
    """ComfyUI writes LoRAs onto the weights while a model is loaded, and keeps the originals."""
    model, clip, load = graph
    patches = load(low_rank_patch(pipe))
    for key, value in model.model.tensors.items():
        model.backup[key] = standin.Backup(value.clone(), False)
        model.model.tensors[key] = value + 1
    nodes.ApplyPatches().apply(model, clip, patches, "refuse")


def test_the_inputs_are_those_of_the_functions(tmp_path, monkeypatch):
    """ComfyUI passes each input by its name, and takes as many outputs as RETURN_TYPES says."""
    standin.install(monkeypatch, tmp_path)
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        parameters = dict(inspect.signature(getattr(node, node.FUNCTION)).parameters)
        parameters.pop("self")
        assert list(parameters) == [*inputs["required"], *inputs.get("optional", {})], node
        needed = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
        assert needed == list(inputs["required"]), node
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) and node.CATEGORY and node.DESCRIPTION


def test_a_closed_form_in_the_graph(pipe, graph, tmp_path, monkeypatch):
    """The patch is made from the file that the node names, and fits the model of the graph."""
    opened = []

    def load(path, device=None):
        opened.append((Path(path).name, device))
        return Base("tiny", pipe)

    monkeypatch.setattr(Base, "load", load)
    (tmp_path / "model.safetensors").write_text("")
    below = graph[2](low_rank_patch(pipe))
    erase = nodes.EraseConcept().erase
    (patches,) = erase("model.safetensors", "cat", "uce", 0.5, anchor=" dog ", keep="car, tree,", patches=below)
    assert opened == [("model.safetensors", "cpu")] and list(patches) == ["van gogh", "cat"]
    (concept,) = patches["cat"].patch.concepts
    assert (concept["anchor"], concept["keep"]) == ("dog", ["car", "tree"]) and patches["cat"].strength == 0.5
    made = {"cat": patches["cat"]}
    positive, _, _ = run(pipe, graph, made, "a cat")
    assert gap(positive, expected(pipe, [(patches["cat"].patch, 0.5)], "a cat")) < 1e-5
    assert gap(positive, expected(pipe, [], "a cat")) > 1e-4


def test_a_changed_file_is_loaded_again(pipe, graph, tmp_path):
    graph[2](low_rank_patch(pipe))
    (file,) = tmp_path.iterdir()
    before = nodes.LoadPatch.IS_CHANGED(patch=file.name, strength=1.0, gate="")
    assert nodes.LoadPatch.IS_CHANGED(patch=file.name) == before
    os.utime(file, ns=(1, 1))
    assert nodes.LoadPatch.IS_CHANGED(patch=file.name) != before


class Bright:
    """A judge that sees a cat in every image that is bright."""

    name, heads = "bright", {"object": ["cat", "none"]}

    def find(self, name):
        if name != "cat":
            raise ErasureError(f"unknown label {name!r}")
        return "object", ["cat"]

    def judge(self, images):
        values = [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]
        return [{"object": {"cat": value, "none": 1 - value}} for value in values]


def test_a_batch_of_images_is_judged(monkeypatch):
    monkeypatch.setattr(nodes, "_judge", lambda spec: Bright())
    bright, dark = torch.ones(3, 8, 8, 3), torch.zeros(1, 8, 8, 3)
    judged = nodes.JudgeImages().judge(torch.cat([bright, dark]), "cat", "bright", torch.ones(4, 8, 8, 3))
    share, text = judged["result"]
    assert share == 0.75 and "3 of 4 (30 to 95 %) show cat" in text and "4 of 4 (51 to 100 %) show it" in text
    assert "p = 1" in text and judged["ui"]["text"] == [text]
    with pytest.raises(ErasureError, match="4 images and `images` 3"):
        nodes.JudgeImages().judge(bright, "cat", "bright", torch.ones(4, 8, 8, 3))
    with pytest.raises(ErasureError, match="no images"):
        nodes.JudgeImages().judge(torch.ones(0, 8, 8, 3), "cat", "bright")


def test_the_nodes_are_installed_into_a_comfyui_folder(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "no custom_nodes" in capsys.readouterr().err
    assert main([]) == 2 and "usage" in capsys.readouterr().err
    (tmp_path / "custom_nodes").mkdir()
    assert main([str(tmp_path)]) == 0 and main([str(tmp_path)]) == 0
    file = tmp_path / "custom_nodes" / "erasure" / "__init__.py"
    assert str(file) in capsys.readouterr().out
    found: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), found)
    assert found["NODE_CLASS_MAPPINGS"] is NODE_CLASS_MAPPINGS
    file.write_text("mine")
    assert main([str(tmp_path)]) == 2 and "left as it is" in capsys.readouterr().err and file.read_text() == "mine"
