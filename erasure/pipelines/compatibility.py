"""Checks that a patch fits a pipeline: its layers, their shapes, and the base weights that it was made from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.model.quantising import is_quantised
from erasure.patch import LowRank, Patch, same_base
from erasure.patch.fingerprint import QUANTISED, fingerprint_tensors
from erasure.patch.module_keys import find_module, find_parameter

log = logging.getLogger("erasure")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def check_shapes(name: str, patch: Patch, component: str, module: nn.Module) -> None:
    """Check that a component has every layer that a patch changes, with the right shape and type.

    Args:
        name: name of the patch, for the message.
        patch: the patch.
        component: name of the component, such as `unet`.
        module: the component of the pipeline.

    Raises:
        ErasureError: a layer is missing, has another shape, cannot take low-rank terms, or is quantised and the patch
            is not of low rank. The message says how many layers fit and which one is the first that does not.
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
        shape, layer = patch.payload.shape(component, parameter), find_module(module, parameter.rpartition(".")[0])
        if is_quantised(value):
            _check_quantised(name, patch, component, parameter, layer)
            continue
        if value is not None and tuple(value.shape) != shape:
            raise ErasureError(
                f"patch {name!r} does not fit: {component}.{parameter} has shape {list(value.shape)} in the pipeline "
                f"and {list(shape)} in the patch"
            )
        if isinstance(patch.payload, LowRank):
            _check_layer(component, parameter, layer)


def _check_quantised(name: str, patch: Patch, component: str, parameter: str, layer: nn.Module | None) -> None:
    """Check that a patch can act beside a quantised layer, whose weight may be packed into another shape."""
    if not isinstance(patch.payload, LowRank):
        raise ErasureError(
            f"{component}.{parameter} is quantised, and weight differences cannot be added to it. Make a low-rank "
            "patch of it (erasure patch resize --rank R), or load the base unquantised. Nothing was loaded"
        )
    if not isinstance(layer, nn.Linear):
        raise ErasureError(
            f"{component}.{parameter} belongs to a quantised {type(layer).__name__}; only Linear is known"
        )
    shape = patch.payload.shape(component, parameter)
    if (layer.out_features, layer.in_features) != shape:
        raise ErasureError(
            f"patch {name!r} does not fit: {component}.{parameter} has shape {[layer.out_features, layer.in_features]} "
            f"in the pipeline and {list(shape)} in the patch"
        )


def _check_layer(component: str, parameter: str, layer: nn.Module | None) -> None:
    supported = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    if not supported:
        raise ErasureError(
            f"{component}.{parameter} belongs to a {type(layer).__name__}, but low-rank terms need a Linear or an "
            "ungrouped Conv2d"
        )


def check_base(
    name: str,
    patch: Patch,
    pipe: Any,
    fingerprint: Callable[[str, tuple[str, ...]], str],
    unknown: Collection[str] = (),
) -> None:
    """Check that the unpatched weights of a pipeline are the ones that a patch was made from.

    Args:
        name: name of the patch, for the message.
        patch: the patch.
        pipe: the pipeline; only its name is used, for the message.
        fingerprint: function from a component and the names of its parameters to the fingerprint of their unpatched
            values.
        unknown: components that cannot be checked.

    Raises:
        ErasureError: the fingerprints differ, or the patch records none. The message names both bases.
    """
    pipeline_name = getattr(pipe, "name_or_path", "") or type(pipe).__name__
    for component in (component for component in patch.components if component not in unknown):
        recorded = patch.base_fingerprint.get(component)
        if recorded is None:
            raise ErasureError(
                f"patch {name!r} does not record which {component} it was made from, so it cannot be checked against "
                f"{pipeline_name}. Nothing was loaded; to load it anyway, use force=True (--force)"
            )
        if recorded == QUANTISED:
            log.warning(
                "%s was made from a quantised %s, and it cannot be checked that it was this one's", name, component
            )
            continue
        actual = fingerprint(component, tuple(patch.payload.names(component)))
        if not same_base(recorded, actual):
            raise ErasureError(
                f"patch {name!r} was made from {patch.base or 'an unnamed base'} ({component} {recorded[:16]}), but "
                f"this pipeline is {pipeline_name} ({component} {actual[:16]}). Nothing was loaded. The shapes fit: "
                "to transfer the patch to this base, use force=True (--force)"
            )


class Compatibility:
    """The checks of patches before they are loaded: what they have in common is computed once.

    Args:
        pipe: the pipeline.
        component: function from the name of a component to its module.
        fingerprint: function from a component and names of its parameters to their fingerprint.
    """

    def __init__(
        self,
        pipe: Any,
        component: Callable[[str], nn.Module],
        fingerprint: Callable[[str, tuple[str, ...]], str],
    ) -> None:
        self._pipe, self._component, self._fingerprint = pipe, component, cache(fingerprint)
        self._fitting: set[tuple[Any, ...]] = set()

    def check(self, name: str, patch: Patch, force: bool) -> None:
        """Check the layers and shapes of a patch, and its base unless forced.

        Args:
            name: name of the patch, for the message.
            patch: the patch.
            force: whether the patch may have been made from another base.

        Raises:
            ErasureError: a layer is missing or has another shape, or the base is another one.
        """
        for component in patch.components:
            names = patch.payload.names(component)
            shapes = tuple(patch.payload.shape(component, parameter) for parameter in names)
            layout = component, type(patch.payload), tuple(names), shapes
            if layout not in self._fitting:
                check_shapes(name, patch, component, self._component(component))
                self._fitting.add(layout)
        if not force:
            check_base(name, patch, self._pipe, self._fingerprint, self._quantised(name, patch))

    def _quantised(self, name: str, patch: Patch) -> set[str]:
        """Return the components in which a patch touches quantised layers, whose weights do not tell the base."""
        counts = {
            component: sum(
                is_quantised(find_parameter(self._component(component), parameter))
                for parameter in patch.payload.names(component)
            )
            for component in patch.components
        }
        if count := sum(counts.values()):
            log.warning(
                "%s: %d of the layers that it changes are quantised. There it acts beside the weights, and it cannot "
                "be checked that the patch was made from this base",
                name,
                count,
            )
        return {component for component, count in counts.items() if count}


class Fingerprints:
    """Fingerprints of unpatched weights, computed again only when a checksum says that the weights have changed.

    Args:
        base: function from a component and a parameter name to the unpatched value of that parameter.
    """

    def __init__(self, base: Callable[[str, str], Tensor]) -> None:
        self._base = base
        self._known: dict[tuple[str, tuple[str, ...]], tuple[list[Any], str]] = {}

    def __call__(self, component: str, names: tuple[str, ...]) -> str:
        """Return the fingerprint of some parameters of a component."""
        values = {name: self._base(component, name) for name in names}
        # Sums of the bits as whole numbers are exact: hashing three precisions takes twenty times as long.
        sums = [(value.dtype, int(value.detach().view(INTEGERS[value.itemsize]).sum())) for value in values.values()]
        known = self._known.get((component, names))
        if known is None or known[0] != sums:
            known = self._known[component, names] = sums, fingerprint_tensors(values)
        return known[1]
