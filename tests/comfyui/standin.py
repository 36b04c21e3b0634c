"""A stand-in for the parts of ComfyUI that the nodes call, over a tiny diffusers pipeline.

It has the names, arguments and results of ComfyUI 0.3.64 (comfy/lora.py, comfy/hooks.py, comfy/model_patcher.py,
comfy/sd.py, comfy/sd1_clip.py, folder_paths.py), and does nothing else of what ComfyUI does. Weights go by ComfyUI's
names: the original ones after `diffusion_model.`, and transformers' after `clip_l.transformer.`.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from erasure.model.original_keys import compvis_names

Backup = namedtuple("Backup", ["weight", "inplace_update"])
ENDS = (".lora_down.weight", ".lora_up.weight", ".alpha", ".diff", ".diff_b")


class Weights:
    """What ComfyUI calls a model: an object with a state dict."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


class Patcher:
    """A ModelPatcher: the MODEL of a graph, and the `patcher` of a CLIP."""

    def __init__(self, model: Any) -> None:
        self.model, self.patches, self.backup = model, {}, {}

    def clone(self) -> Patcher:
        copy = Patcher(self.model)
        copy.patches = {key: list(entries) for key, entries in self.patches.items()}
        copy.backup = self.backup
        return copy

    def add_patches(self, patches: dict[str, Tensor], strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        known = [key for key in patches if key in self.model.state_dict()]
        for key in known:
            self.patches.setdefault(key, []).append((strength_patch, patches[key]))
        return known

    def patched(self, more: dict[str, list] | None = None) -> dict[str, Tensor]:
        """Return the weights as they are while the model runs."""
        weights = dict(self.model.state_dict())
        for table in (self.patches, more or {}):
            for key, entries in table.items():
                for strength, change in entries:
                    weights[key] = weights[key] + strength * change.reshape(weights[key].shape)
        return weights


class Transformer(nn.Module):
    """ComfyUI's CLIPTextModel: it returns a tuple that begins with the last hidden states."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.inner = encoder

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_tokens: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        output = self.inner(input_tokens)
        return output.last_hidden_state, None, output.pooler_output, output.pooler_output


class Clip:
    """The CLIP of a graph. Prompts of more tokens than fit are read in parts, as ComfyUI does."""

    def __init__(self, pipe: Any, key: str = "l") -> None:
        self.pipe, self.key = pipe, key
        ids = pipe.tokenizer
        special = {"start": ids.bos_token_id, "end": ids.eos_token_id, "pad": ids.pad_token_id}
        encoder = SimpleNamespace(transformer=Transformer(pipe.text_encoder), special_tokens=special)
        names = {name.removeprefix("text_model."): value for name, value in pipe.text_encoder.named_parameters()}
        tensors = {f"clip_{key}.transformer.text_model.{name}": value.detach() for name, value in names.items()}
        self.cond_stage_model = Weights(tensors)
        setattr(self.cond_stage_model, f"clip_{key}", encoder)
        self.patcher = Patcher(self.cond_stage_model)
        self.loaded = 0

    def clone(self) -> Clip:
        copy = object.__new__(Clip)
        copy.__dict__ = {**self.__dict__, "patcher": self.patcher.clone()}
        return copy

    def add_patches(self, patches: dict[str, Tensor], strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        return self.patcher.add_patches(patches, strength_patch, strength_model)

    def load_model(self) -> Patcher:
        self.loaded += 1
        return self.patcher

    def tokenize(self, text: str) -> dict[str, list[list[tuple[int, float]]]]:
        tokenizer = self.pipe.tokenizer
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        room = tokenizer.model_max_length - 2
        chunks = []
        for start in range(0, max(len(ids), 1), room):
            row = [tokenizer.bos_token_id, *ids[start : start + room], tokenizer.eos_token_id]
            row += [tokenizer.pad_token_id] * (room + 2 - len(row))
            chunks.append([(token, 1.0) for token in row])
        return {self.key: chunks}

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any]) -> list[list[Any]]:
        prefix = f"clip_{self.key}.transformer.text_model."
        own = {name.removeprefix("text_model."): name for name, _ in self.pipe.text_encoder.named_parameters()}
        weights = {own[key.removeprefix(prefix)]: value for key, value in self.patcher.patched().items()}
        ids = torch.tensor([[token for token, _ in chunk] for chunk in tokens[self.key]])
        with torch.no_grad():
            output = torch.func.functional_call(self.pipe.text_encoder, weights, (ids,))
        return [[output.last_hidden_state.flatten(0, 1)[None], {"pooled_output": output.pooler_output[:1]}]]


class HookGroup:
    """A group of hooks, which a conditioning carries."""

    def __init__(self) -> None:
        self.hooks: list[Any] = []

    def add(self, hook: Any) -> None:
        self.hooks.append(hook)


def create_hook_lora(lora: dict[str, Tensor], strength_model: float, strength_clip: float) -> HookGroup:
    group = HookGroup()
    group.add(SimpleNamespace(weights=lora, strength_model=strength_model, strength_clip=strength_clip))
    return group


def conditioning_set_values_with_hooks(conditioning: list, values: dict[str, Any]) -> list:
    return [[states, {**options, **values}] for states, options in conditioning]


def model_lora_keys_unet(model: Any, key_map: dict[str, str]) -> dict[str, str]:
    for key in model.state_dict():
        if key.endswith(".weight"):
            path = key.removeprefix("diffusion_model.").removesuffix(".weight")
            for spelling in (path, model.diffusers[path]):
                key_map[f"lora_unet_{spelling.replace('.', '_')}"] = key
    return key_map


def model_lora_keys_clip(model: Any, key_map: dict[str, str]) -> dict[str, str]:
    for key in model.state_dict():
        if ".encoder.layers." in key and ".layer_norm" not in key and key.endswith(".weight"):
            path = key.partition("transformer.")[2].removesuffix(".weight").replace(".", "_")
            key_map |= {f"lora_te_{path}": key, f"lora_te1_{path}": key}
    return key_map


def load_lora(lora: dict[str, Tensor], to_load: dict[str, str], log_missing: bool = True) -> dict[str, Tensor]:
    """Return the change of each weight; ComfyUI keeps the factors, and multiplies them when the model is loaded."""
    changes = {}
    for prefix, key in to_load.items():
        parts = {end: lora[prefix + end] for end in ENDS if prefix + end in lora}
        if ".diff" in parts:
            changes[key] = parts[".diff"]
        if ".diff_b" in parts:
            changes[key.removesuffix("weight") + "bias"] = parts[".diff_b"]
        if ".lora_up.weight" in parts:
            down, up = parts[".lora_down.weight"], parts[".lora_up.weight"]
            scale = float(parts[".alpha"]) / down.shape[0] if ".alpha" in parts else 1.0
            changes[key] = scale * up.flatten(1) @ down.flatten(1)
    return changes


def model_of(pipe: Any) -> Patcher:
    """Return the UNet of a pipeline as a MODEL."""
    names = compvis_names(pipe.unet)
    weights = Weights(
        {f"diffusion_model.{names[name]}": value.detach() for name, value in pipe.unet.named_parameters()}
    )
    weights.diffusers = {theirs.rpartition(".")[0]: ours.rpartition(".")[0] for ours, theirs in names.items()}
    return Patcher(weights)


def sampled(pipe: Any, model: Patcher, conditioning: list, noise: Tensor, time: int = 500) -> Tensor:
    """Return what the model predicts under a conditioning, with the patches of its hooks, as ComfyUI samples it."""
    states, options = conditioning[0]
    more: dict[str, list] = {}
    for hook in getattr(options.get("hooks"), "hooks", []):
        for key, change in load_lora(hook.weights, model_lora_keys_unet(model.model, {})).items():
            more.setdefault(key, []).append((hook.strength_model, change))
    names = {f"diffusion_model.{theirs}": ours for ours, theirs in compvis_names(pipe.unet).items()}
    weights = {names[key]: value for key, value in model.patched(more).items()}
    with torch.no_grad():
        return torch.func.functional_call(pipe.unet, weights, (noise, time, states)).sample


def install(monkeypatch: Any, folder: Any) -> None:
    """Put the stand-in in ComfyUI's place until the test ends; all kinds of files lie in one folder."""

    def path_of(kind: str, name: str) -> str:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"Model in folder '{kind}' with filename '{name}' not found.")
        return str(folder / name)

    modules = {
        "comfy.lora": {
            "model_lora_keys_unet": model_lora_keys_unet,
            "model_lora_keys_clip": model_lora_keys_clip,
            "load_lora": load_lora,
        },
        "comfy.hooks": {
            "HookGroup": HookGroup,
            "create_hook_lora": create_hook_lora,
            "conditioning_set_values_with_hooks": conditioning_set_values_with_hooks,
        },
        "folder_paths": {
            "get_filename_list": lambda kind: sorted(file.name for file in folder.iterdir()),
            "get_full_path_or_raise": path_of,
        },
    }
    package = ModuleType("comfy")
    monkeypatch.setitem(sys.modules, "comfy", package)
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if name.startswith("comfy."):
            setattr(package, name.removeprefix("comfy."), module)
