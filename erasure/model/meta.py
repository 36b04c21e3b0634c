"""Models without weights: load only the shapes of a network, and count what each variant would train in it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from erasure.config import CONFIGS
from erasure.errors import ErasureError
from erasure.model.architectures import ARCHITECTURES, of_network
from erasure.model.base import Base
from erasure.model.loading import hub_file, look, resolve
from erasure.model.single_file import carried, kinds

NETWORKS = CONFIGS / "networks"  # true configurations of published transformers, which are counted and not opened


def networks() -> list[str]:
    """List the names of the bundled configurations of transformers."""
    return sorted(path.stem for path in NETWORKS.glob("*.json"))


def load_meta(model: str | os.PathLike[str], **options: Any) -> Base:
    """Load a model without its weights: its network is on the `meta` device, and it has no other component.

    Args:
        model: as for `Base.load`, or a bundled configuration such as sd1, sdxl (see `single_file.kinds()`) or
            sd3-medium (see `networks()`).
        options: as for `Base.load`.

    Raises:
        ErasureError: the model is unknown, its configuration cannot be read, or its network is of no known
            architecture.
    """
    import diffusers

    name = os.fspath(model)
    if name in networks():
        stored = json.loads((NETWORKS / f"{name}.json").read_text(encoding="utf-8"))
        component, config, about = "transformer", stored["config"], stored["about"]
    else:
        component, config, about = _configured(name, options)
    kind = config.get("_class_name")
    architecture = of_network(str(kind))
    if architecture is None or architecture.component != component:
        known = ", ".join(other.network for other in ARCHITECTURES)
        raise ErasureError(f"{name}: its {component} is a {kind}. Supported: {known}")
    with torch.device("meta"):
        network = getattr(diffusers, architecture.network).from_config(config)
    return Base(name, SimpleNamespace(**{component: network}), about)


def parts_of(kind: str) -> Any:
    """Build every part of a bundled Stable Diffusion configuration on the `meta` device: shapes without weights.

    Args:
        kind: one of `single_file.kinds()`.

    Returns:
        The networks and the scheduler as attributes, as a pipeline has them, and a bare object for each tokenizer.

    Raises:
        ErasureError: there is no such configuration; the message lists them.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    files = carried(kind).files
    parts: dict[str, Any] = {"scheduler": DDIMScheduler.from_config(files["scheduler/scheduler_config.json"])}
    with torch.device("meta"):
        parts["unet"] = UNet2DConditionModel.from_config(files["unet/config.json"])
        parts["vae"] = AutoencoderKL.from_config(files["vae/config.json"])
        for name, cls in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if f"{name}/config.json" in files:
                parts[name] = cls(CLIPTextConfig.from_dict(files[f"{name}/config.json"]))
                parts[name.replace("text_encoder", "tokenizer")] = object()
    return SimpleNamespace(**parts)


def _configured(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Return the component that holds a model's network, its configuration, and what the model is."""
    if name in kinds():
        detected, where = carried(name), name
    else:
        where = resolve(name)
        detected = look(where, **options)
    transformers = [found.pipelines for found in ARCHITECTURES if found.component == "transformer"]
    of_transformer = any(detected.pipeline in names for names in transformers)
    component = "transformer" if of_transformer or Path(where, "transformer").is_dir() else "unet"
    file = f"{component}/config.json"
    if file not in detected.files:
        path = Path(where, file) if Path(where).is_dir() else hub_file(where, file, **options)
        try:
            detected.files[file] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise ErasureError(f"{name}: its {file} cannot be read: {fault}") from None
    return component, detected.files[file], detected.about


def counts(base: Base) -> dict[str, dict[str, int]]:
    """Count what each variant trains in a base's network; variants that match no module are left out.

    A low-rank term of rank 1 has two factors for each module: one of the input's size (for a convolution, times the
    size of the kernel) and one of the output's size.

    Returns:
        For each variant, "modules" (their number), "weights" (their weights and biases) and "rank_1" (parameters of a
        low-rank term of rank 1).
    """
    rows = {}
    for variant in base.architecture.variants:
        try:
            modules = base.targets(variant).values()
        except ErasureError:  # the variant matches no module
            continue
        rows[variant] = {
            "modules": len(modules),
            "weights": sum(p.numel() for module in modules for p in module.parameters(recurse=False)),
            "rank_1": sum(
                shape[0] + math.prod(shape[1:])
                for shape in (module.get_parameter("weight").shape for module in modules)
            ),
        }
    return rows
