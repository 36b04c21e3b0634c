"""A model without its weights: what a method would find to train in it, counted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.model.loading import hub_file, look, resolve
from erasure.model.single_file import carried, kinds
from erasure.model.targets import TARGETS

UNET = "unet/config.json"


def outline(model: str | os.PathLike[str], **options: Any) -> Base:
    """A base whose UNet lies on the `meta` device: shapes, no weights.

    Args:
        model: as for `Base.load`, or a carried configuration (`checkpoints.kinds()`), such as sd1 or sdxl.
        options: as for `Base.load`.

    Raises:
        ErasureError: an unknown model, or one whose UNet is of another kind.
    """
    from diffusers import UNet2DConditionModel

    name = os.fspath(model)
    if name in kinds():
        found = carried(name)
    else:
        where = resolve(model)
        found = look(where, **options)
        if UNET not in found.files:
            path = Path(where, UNET) if Path(where).is_dir() else hub_file(where, UNET, **options)
            try:
                found.files[UNET] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as fault:
                raise ErasureError(f"{name}: its {UNET} cannot be read: {fault}") from None
    kind = found.files[UNET].get("_class_name")
    if kind != UNet2DConditionModel.__name__:
        raise ErasureError(f"{name}: its network is a {kind}; {UNet2DConditionModel.__name__} is known")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(found.files[UNET])
    return Base(name, SimpleNamespace(unet=unet), found.about)


def counts(base: Base) -> dict[str, dict[str, int]]:
    """For each variant that fits the UNet: modules, their weights and biases, and the numbers of a rank-1 term on them.

    A rank-1 term has two factors a module: one of its input's size (of a convolution: times the kernel), one of its
    output's.
    """
    found = {}
    for variant in TARGETS:
        try:
            modules = base.targets(variant).values()
        except ErasureError:  # none fits
            continue
        found[variant] = {
            "modules": len(modules),
            "weights": sum(p.numel() for one in modules for p in one.parameters(recurse=False)),
            "rank_1": sum(
                shape[0] + math.prod(shape[1:]) for shape in (one.get_parameter("weight").shape for one in modules)
            ),
        }
    return found
