"""`plan`: forecast the cost of a run before it is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from erasure.erasing import LAYERS, check_named, settle
from erasure.errors import ErasureError
from erasure.model.base import Base
from erasure.training.compute import Computing
from erasure.training.dry_run import Forecast

__all__ = ["Forecast", "plan"]


def plan(
    model: Any,
    concept: Any,
    method: str | None = None,
    *,
    seed: int = 0,
    processes: int = 1,
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Forecast:
    """Forecast what `erase(model, concept, method, **overrides)` will cost; the model is left as it was.

    Args:
        model: as for `erase`, or a base whose UNet is on the `meta` device.
        concept: as for `erase`.
        method: as for `erase`.
        seed: seed of everything random in the run.
        processes: number of processes that will share the work.
        preset: as for `erase`.
        file: settings that `overrides` override, as `erase` reads them from a file.
        overrides: single settings of the method and of `Computing`.

    Raises:
        ErasureError: as for `erase`; or the base has no weights, and the method reads them before it starts.
    """
    if processes < 1:
        raise ErasureError(f"processes={processes}: must be at least 1")
    computing, layers = Computing.split(file or {}, overrides)
    # Bad input is refused before the model is loaded.
    check_named(method, concept, layers, computing)
    base = Base.of(model)
    settled = settle(base, concept, method, dict(zip(LAYERS, layers, strict=True)), preset=preset)
    chosen = settled.chosen.method
    chosen.check_options(computing)
    forecast = chosen.forecast(base, settled.concepts, computing, seed, processes)
    told = {"method": chosen.method, "settings": settled.chosen.to_json(), "sources": tuple(settled.lines())}
    return replace(forecast, **told)
