"""Does a patch fit a pipeline: its layers, their shapes, and the base it was made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.patch import LowRank, Patch, same_base
from erasure.patch.fingerprint import fingerprint_tensors
from erasure.patch.module_keys import find_module, find_parameter


def check_shapes(name: str, patch: Patch, component: str, module: nn.Module) -> None:
    """Check that every layer that `patch` touches in `component` is there, of the right shape and kind.

    Raises:
        ErasureError: naming how many fit and the first that does not.
    """
    names = patch.payload.names(component)
    found = {parameter: find_parameter(module, parameter) for parameter in names}
    missing = [parameter for parameter, value in found.items() if value is None]
    if missing:
        raise ErasureError(
            f"{name!r} does not fit: {len(names) - len(missing)} of its {len(names)} layers are in this {component}; "
            f"{missing[0]} is not. Was it made for another architecture?"
        )
    for parameter, value in found.items():
        shape = patch.payload.shape(component, parameter)
        if value is not None and tuple(value.shape) != shape:
            raise ErasureError(
                f"{name!r} does not fit: {component}.{parameter} is {list(value.shape)} here "
                f"and {list(shape)} in the patch"
            )
        if value is not None and not value.is_floating_point():
            raise ErasureError(f"{component}.{parameter} is {value.dtype} here: patches need floating-point weights")
        if isinstance(patch.payload, LowRank):
            _check_layer(component, parameter, find_module(module, parameter.removesuffix(".weight")))


def _check_layer(component: str, parameter: str, layer: nn.Module | None) -> None:
    plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    if not plain:
        raise ErasureError(
            f"{component}.{parameter} belongs to a {type(layer).__name__}; low-rank terms need a Linear or Conv2d"
        )


def check_base(name: str, patch: Patch, pipe: Any, base: Callable[[str, str], Tensor]) -> None:
    """Check that the weights `patch` touches are, unpatched, those it was made from.

    Args:
        name: what the patch is called, for the message.
        patch: the patch.
        pipe: the pipeline, for its name in the message.
        base: the unpatched value of a component's parameter.

    Raises:
        ErasureError: naming both bases.
    """
    here = getattr(pipe, "name_or_path", "") or type(pipe).__name__
    for component in patch.components:
        recorded = patch.base_fingerprint.get(component)
        if recorded is None:
            raise ErasureError(
                f"{name!r} does not record which {component} it was made from, so it cannot be checked against {here}. "
                "Nothing was loaded; force=True (--force) loads it all the same"
            )
        found = fingerprint_tensors({key: base(component, key) for key in patch.payload.names(component)})
        if not same_base(recorded, found):
            raise ErasureError(
                f"{name!r} was made from {patch.base or 'an unnamed base'} ({component} {recorded[:16]}), "
                f"this pipeline is {here} ({component} {found[:16]}). Nothing was loaded; the shapes fit, and "
                "force=True (--force) carries it over"
            )
