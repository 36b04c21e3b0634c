"""The example workflows name nodes, inputs and outputs that exist, in both of ComfyUI's forms."""

from __future__ import annotations

import json

import pytest

from erasure.comfyui import NODE_CLASS_MAPPINGS
from erasure.comfyui.__main__ import EXAMPLES, install
from tests.comfyui import standin

# ComfyUI's own nodes in these graphs: their inputs with types, in the order of its panel, and their outputs (nodes.py).
CORE = {
    "CheckpointLoaderSimple": ({"ckpt_name": "COMBO"}, ["MODEL", "CLIP", "VAE"]),
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ["CONDITIONING"]),
    "EmptyLatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ["LATENT"]),
    "KSampler": (
        {
            "model": "MODEL",
            "seed": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "sampler_name": "COMBO",
            "scheduler": "COMBO",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "denoise": "FLOAT",
        },
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, []),
}
WIDGETS = ("COMBO", "STRING", "INT", "FLOAT")
NAMES = ("gated_patch", "erase_concept")


@pytest.fixture
def types(tmp_path, monkeypatch):
    """Return for each node its inputs with their types, the names of those that are needed, and its outputs."""
    standin.install(monkeypatch, tmp_path)
    found = {name: (inputs, set(inputs), outputs) for name, (inputs, outputs) in CORE.items()}
    for name, node in NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        both = {**inputs["required"], **inputs.get("optional", {})}
        kinds = {key: entry[0] if isinstance(entry[0], str) else "COMBO" for key, entry in both.items()}
        found[name] = (kinds, set(inputs["required"]), list(node.RETURN_TYPES))
    return found


def choices(name, key):
    """Return the values that an input of ours offers, or None if it is free or depends on the files."""
    node = NODE_CLASS_MAPPINGS.get(name)
    inputs = node.INPUT_TYPES() if node else {"required": {}}
    entry = {**inputs["required"], **inputs.get("optional", {})}.get(key, ((),))[0]
    return None if isinstance(entry, str) or key in ("patch", "checkpoint") else entry or None


@pytest.mark.parametrize("name", NAMES)
def test_the_api_form_connects_outputs_to_inputs_of_their_type(types, name):
    graph = json.loads((EXAMPLES / f"{name}.api.json").read_text())
    for node in graph.values():
        kinds, needed, _ = types[node["class_type"]]
        assert needed <= node["inputs"].keys() <= kinds.keys(), node
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                source, slot = value
                assert types[graph[source]["class_type"]][2][slot] == kinds[key], (node, key)
            else:
                assert kinds[key] in WIDGETS, (node, key)
                offered = choices(node["class_type"], key)
                assert offered is None or value in offered, (node, key)


@pytest.mark.parametrize("name", NAMES)
def test_the_form_of_the_page_is_the_same_graph(types, name):
    page = json.loads((EXAMPLES / f"{name}.json").read_text())
    api = json.loads((EXAMPLES / f"{name}.api.json").read_text())
    links = {number: link for number, *link in page["links"]}
    assert {str(node["id"]): node["type"] for node in page["nodes"]} == {k: n["class_type"] for k, n in api.items()}
    used = set()
    for node in page["nodes"]:
        inputs = api[str(node["id"])]["inputs"]
        wired = {key: value for key, value in inputs.items() if isinstance(value, list)}
        assert [entry["name"] for entry in node["inputs"]] == list(wired)
        for slot, entry in enumerate(node["inputs"]):
            source, source_slot, target, target_slot, kind = links[entry["link"]]
            assert [str(source), source_slot] == wired[entry["name"]] and kind == entry["type"]
            assert (target, target_slot) == (node["id"], slot)
            used.add(entry["link"])
        kinds = types[node["type"]][0]
        values = [inputs[key] for key in kinds if kinds[key] in WIDGETS and key in inputs]
        if node["type"] == "KSampler":
            values.insert(1, "fixed")  # what happens to the seed after a run
        assert node["widgets_values"] == values, node["type"]
    assert used == set(links)


def test_the_examples_come_with_the_nodes(tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    folder = install(tmp_path).parent / "example_workflows"
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.json" for name in NAMES)
