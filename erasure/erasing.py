"""`erase`: run a method on a checkpoint and a concept, and put the patch together."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError
from erasure.methods import configured

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.model.base import Base
    from erasure.patch import Patch
    from erasure.training.run import FitResult, Run

LOG = logging.getLogger("erasure")


def erase(
    model: Any,
    concept: str | Mapping[str, Any] | Concept | Sequence[str | Mapping[str, Any] | Concept],
    method: str = "esd",
    *,
    out: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    preview_every: int | None = None,
    trackers: Sequence[str] = (),
    **overrides: Any,
) -> Patch:
    """Erase a concept and return the patch. The model is given back as it was.

    Args:
        model: a pipeline, a `Base`, or a model's name.
        concept: a name, a mapping of `Concept`'s fields, or a `Concept`; or a list of them, erased together.
        method: file name in `erasure/methods`.
        out: where to save the patch; the run then keeps its state in `<out>.run` and resumes after a kill.
        config: a YAML file of settings, over the method's preset.
        seed: of everything random in the run.
        progress: show a bar; None does so on a terminal.
        preview_every: draw the concept and its neighbours every so many steps, into `<out>.previews`.
        trackers: log the losses with accelerate, into `<out>.logs`: tensorboard, wandb.
        overrides: single settings, over everything else: of the method and of `Computing`.

    Started by accelerate or torchrun as several processes, they do the one run together.

    Raises:
        ErasureError: an unknown method, setting, model or concept, an output that cannot be written, NaN.
    """
    from erasure import config as configuration
    from erasure.concepts.concept import Concept
    from erasure.distributed import process_group
    from erasure.model.base import Base
    from erasure.training.callbacks import Previews, Trackers
    from erasure.training.compute import Computing, Engine
    from erasure.training.run import Run

    file = configuration.read_yaml(Path(config)) if config is not None else {}
    computing, layers = Computing.split(file, overrides)
    # Bad input is refused before the model is loaded.
    configured(method, Concept.list_of(concept), *layers).check_watched(preview_every, trackers)
    target = Path(out) if out is not None else None
    if target is not None:
        check_writable(target)
    elif preview_every is not None or trackers:
        raise ErasureError("previews and logs are written beside the patch: say where with `out` (-o)")
    base = Base.of(model)
    check_resident(base)
    wanted = Concept.list_of(concept, base.vocabulary)
    built = configured(method, wanted, *layers)
    warn_of_strangers(base, wanted)
    with process_group(base.device.type == "cpu") as us, Engine(base, computing, us) as engine:
        run = Run(
            seed=seed,
            folder=target.with_name(f"{target.name}.run") if target else None,
            progress=sys.stderr.isatty() if progress is None else progress,
            engine=engine,
            group=us,
        )
        settings = {"method": method, **dataclasses.asdict(built), **engine.computing.to_json()}
        run.open({"settings": settings, "concepts": [one.to_json() for one in wanted], "base": base.name, "seed": seed})
        if target is not None and preview_every is not None:
            run.previews = Previews(base, wanted, target.with_name(f"{target.name}.previews"), preview_every)
        if target is not None and trackers:
            run.trackers = Trackers(trackers, target.with_name(f"{target.name}.logs"), settings)
        try:
            fitted = built.fit(base, wanted, run)
        finally:
            if run.trackers is not None:
                run.trackers.close()
        engine.close()  # the fingerprint is taken of the base's own weights
        patch = assemble(fitted, settings, base, wanted, run)
        if target is not None:
            us.first(lambda: patch.save(target))
        run.close()
    return patch


def assemble(fitted: FitResult, settings: dict[str, Any], base: Base, concepts: list[Concept], run: Run) -> Patch:
    """Put a patch together from what was fitted, with everything that its reader wants to know."""
    from erasure.patch import Patch, fingerprint

    payload, components = fitted.payload, {}
    for component in payload.components:
        components[component] = fingerprint(getattr(base.pipe, component), payload.names(component))
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")}
    return Patch(
        payload=payload,
        method=settings["method"],
        concepts=tuple(concept.to_json() for concept in concepts),
        base=base.name,
        base_fingerprint=components,
        config={key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
        gate=fitted.gate,
        versions=libraries,
        seed=run.seed,
        costs=run.costs.to_json(),
    )


def warn_of_strangers(base: Base, concepts: Sequence[Concept]) -> None:
    """Log a warning for names that the checkpoint's vocabulary does not hold, where the vocabulary is known."""
    words = base.vocabulary
    if words is not None and (strange := words.unknown(name for one in concepts for name in one.names)):
        LOG.warning("%s was never taught %s: there may be nothing to erase", base.name, ", ".join(map(repr, strange)))


def check_resident(base: Base) -> None:
    """Refuse an offloaded UNet.

    Raises:
        ErasureError: the UNet's weights do not lie where it computes.
    """
    if base.device != next(base.unet.parameters()).device:
        raise ErasureError(
            f"the UNet is offloaded: its weights do not lie on {base.device}, and what trains beside them would rest "
            "elsewhere too. Call pipe.remove_all_hooks() and pipe.to(device) first; nothing was changed"
        )


def check_writable(target: Path) -> None:
    """Refuse an output before the work, not after it.

    Raises:
        ErasureError: the path is a folder, or its folder cannot be made or written.
    """
    if target.is_dir():
        raise ErasureError(f"{target} is a folder: give the patch a file name, such as {target / 'patch.safetensors'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ErasureError(f"{target}: its folder cannot be made: {fault.strerror or fault}") from None
    if not os.access(target.parent, os.W_OK):
        raise ErasureError(f"{target}: its folder cannot be written")
