"""Models without weights: load only the shapes of a UNet, and count what each variant would train in it."""

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

UNET = "unet/config.json"


def load_meta(model: str | os.PathLike[str], **options: Any) -> Base:
    """Load a model without its weights: its UNet is on the `meta` device, and it has no other component.

    Args:
        model: as for `Base.load`, or a bundled configuration such as sd1 or sdxl (see `single_file.kinds()`).
        options: as for `Base.load`.

    Raises:
        ErasureError: the model is unknown, its configuration cannot be read, or its network is not a
            UNet2DConditionModel.
    """
    from diffusers import UNet2DConditionModel

    name = os.fspath(model)
    if name in kinds():
        detected = carried(name)
    else:
        where = resolve(model)
        detected = look(where, **options)
        if UNET not in detected.files:
            path = Path(where, UNET) if Path(where).is_dir() else hub_file(where, UNET, **options)
            try:
                detected.files[UNET] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as fault:
                raise ErasureError(f"{name}: its {UNET} cannot be read: {fault}") from None
    kind = detected.files[UNET].get("_class_name")
    if kind != UNet2DConditionModel.__name__:
        raise ErasureError(f"{name}: its network is a {kind}, and only {UNet2DConditionModel.__name__} is supported")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(detected.files[UNET])
    return Base(name, SimpleNamespace(unet=unet), detected.about)


def counts(base: Base) -> dict[str, dict[str, int]]:
    """Count what each variant trains in a base's UNet; variants that match no module are left out.

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
