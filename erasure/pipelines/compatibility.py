"""Checks that a patch fits a pipeline: its layers, their shapes, and the base weights that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.patch import LowRank, Patch, same_base
from erasure.patch.fingerprint import fingerprint_tensors
from erasure.patch.module_keys import find_module, find_parameter


def check_shapes(name: str, patch: Patch, component: str, module: nn.Module) -> None:
    """Check that a component has every layer that a patch changes, with the right shape and type.

    Args:
        name: name of the patch, for the message.
        patch: the patch.
        component: name of the component, such as `unet`.
        module: the component of the pipeline.

    Raises:
        ErasureError: a layer is missing, has another shape, is not floating point, or cannot take low-rank terms. The
            message says how many layers fit and which one is the first that does not.
    """
    names = patch.payload.names(component)
    parameters = {parameter: find_parameter(module, parameter) for parameter in names}
    missing = [parameter for parameter, value in parameters.items() if value is None]
    if missing:
        raise ErasureError(
            f"patch {name!r} does not fit: this {component} has {len(names) - len(missing)} of the {len(names)} layers "
            f"that it changes (first missing: {missing[0]}). Was it made for another architecture?"
        )
    for parameter, value in parameters.items():
        shape = patch.payload.shape(component, parameter)
        if value is not None and tuple(value.shape) != shape:
            raise ErasureError(
                f"patch {name!r} does not fit: {component}.{parameter} has shape {list(value.shape)} in the pipeline "
                f"and {list(shape)} in the patch"
            )
        if value is not None and not value.is_floating_point():
            raise ErasureError(
                f"{component}.{parameter} has dtype {value.dtype}, but patches need floating-point weights"
            )
        if isinstance(patch.payload, LowRank):
            _check_layer(component, parameter, find_module(module, parameter.removesuffix(".weight")))


def _check_layer(component: str, parameter: str, layer: nn.Module | None) -> None:
    supported = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    if not supported:
        raise ErasureError(
            f"{component}.{parameter} belongs to a {type(layer).__name__}, but low-rank terms need a Linear or an "
            "ungrouped Conv2d"
        )


def check_base(name: str, patch: Patch, pipe: Any, base: Callable[[str, str], Tensor]) -> None:
    """Check that the unpatched weights of a pipeline are the ones that a patch was made from.

    Args:
        name: name of the patch, for the message.
        patch: the patch.
        pipe: the pipeline; only its name is used, for the message.
        base: function from a component and a parameter name to the unpatched value of that parameter.

    Raises:
        ErasureError: the fingerprints differ, or the patch records none. The message names both bases.
    """
    pipeline_name = getattr(pipe, "name_or_path", "") or type(pipe).__name__
    for component in patch.components:
        recorded = patch.base_fingerprint.get(component)
        if recorded is None:
            raise ErasureError(
                f"patch {name!r} does not record which {component} it was made from, so it cannot be checked against "
                f"{pipeline_name}. Nothing was loaded; to load it anyway, use force=True (--force)"
            )
        actual = fingerprint_tensors({key: base(component, key) for key in patch.payload.names(component)})
        if not same_base(recorded, actual):
            raise ErasureError(
                f"patch {name!r} was made from {patch.base or 'an unnamed base'} ({component} {recorded[:16]}), but "
                f"this pipeline is {pipeline_name} ({component} {actual[:16]}). Nothing was loaded. The shapes fit: "
                "to transfer the patch to this base, use force=True (--force)"
            )
