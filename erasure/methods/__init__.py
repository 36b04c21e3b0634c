"""Methods of erasing: one file each, found by name. `erase` runs one and returns its patch."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.errors import ErasureError, unknown

if TYPE_CHECKING:
    from erasure.base import Base
    from erasure.concept import Concept
    from erasure.patch import Patch
    from erasure.training.loop import Learnt, Run

LOG = logging.getLogger("erasure")
GROUP = "erasure.methods"  # entry points of other packages


def names() -> list[str]:
    """Every method there is: the files of this folder, and other packages' entry points."""
    own = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    return sorted({*own, *(point.name for point in entry_points(group=GROUP))})


def find(name: str) -> type[Any]:
    """The dataclass of a method.

    Raises:
        ErasureError: no such method; the message lists them.
    """
    if name not in names():
        raise unknown("method", name, names())
    for point in entry_points(group=GROUP):
        if point.name == name:
            return point.load()
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and getattr(value, "method", None) == name
    )


def configure(name: str, kind: str, *layers: Mapping[str, Any], count: int = 1) -> Any:
    """A method with its settings: defaults, preset of the concept's kind, then `layers`.

    Of `count` things erased together, each gets what the method gives one (PER_CONCEPT); what `layers` say is for all.
    """
    from erasure import config

    cls = find(name)
    given = {key: value for layer in layers for key, value in layer.items()}
    if given.get("parity"):
        return config.build(cls, cls.PARITY, *layers)
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
    defaults |= config.preset(name, kind)
    grown = {key: defaults[key] * count for key in getattr(cls, "PER_CONCEPT", ())} if count > 1 else {}
    return config.build(cls, config.preset(name, kind), grown, *layers)


def configured(method: str, concepts: Sequence[Concept], *layers: Mapping[str, Any]) -> Any:
    """A method with its settings for these concepts."""
    kinds = {one.kind for one in concepts}
    # A content concept is as many things as it has names: a weapon is a bomb, a dagger, ...
    count = sum(len(one.names) if one.kind == "content" else 1 for one in concepts)
    return configure(method, kinds.pop() if len(kinds) == 1 else "mixed", *layers, count=count)


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
        overrides: single settings, over everything else: the method's, and how to compute (`engine.Computing`).

    Started by accelerate or torchrun as several processes, they do the one run together.

    Raises:
        ErasureError: an unknown method, setting, model or concept, an output that cannot be written, NaN.
    """
    from erasure import config as configuration
    from erasure.base import Base
    from erasure.concept import Concept
    from erasure.processes import crew
    from erasure.training.engine import Computing, Engine
    from erasure.training.loop import Run
    from erasure.training.monitor import Previews, Trackers

    wanted = Concept.list_of(concept)
    file = configuration.read_yaml(Path(config)) if config is not None else {}
    computing, layers = Computing.split(file, overrides)
    built = configured(method, wanted, *layers)
    target = Path(out) if out is not None else None
    if target is not None:
        check_writable(target)
    elif preview_every is not None or trackers:
        raise ErasureError("previews and logs lie beside the patch: say where with `out` (-o)")
    base = Base.of(model)
    if base.device != next(base.unet.parameters()).device:
        raise ErasureError(
            f"the UNet is offloaded: its weights do not lie on {base.device}, and what trains beside them would rest "
            "elsewhere too. Call pipe.remove_all_hooks() and pipe.to(device) first; nothing was changed"
        )
    warn_of_strangers(base, wanted)
    with crew(base.device.type == "cpu") as us, Engine(base, computing, us) as engine:
        run = Run(
            seed=seed,
            folder=target.with_name(f"{target.name}.run") if target else None,
            progress=sys.stderr.isatty() if progress is None else progress,
            engine=engine,
            crew=us,
        )
        settings = {"method": method, **dataclasses.asdict(built), **engine.computing.to_json()}
        run.open({"settings": settings, "concepts": [one.to_json() for one in wanted], "base": base.name, "seed": seed})
        if target is not None and preview_every is not None:
            run.previews = Previews(base, wanted, target.with_name(f"{target.name}.previews"), preview_every)
        if target is not None and trackers:
            run.trackers = Trackers(trackers, target.with_name(f"{target.name}.logs"), settings)
        try:
            learnt = built.fit(base, wanted, run)
        finally:
            if run.trackers is not None:
                run.trackers.close()
        engine.close()  # the fingerprint is taken of the base's own weights
        patch = assemble(learnt, settings, base, wanted, run)
        if target is not None:
            us.first(lambda: patch.save(target))
        run.close()
    return patch


def assemble(learnt: Learnt, settings: dict[str, Any], base: Base, concepts: list[Concept], run: Run) -> Patch:
    """A patch from what was learnt, with everything that its reader wants to know."""
    from erasure.patch import Patch, fingerprint

    payload, components = learnt.payload, {}
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
        gate=learnt.gate,
        versions=libraries,
        seed=run.seed,
        costs=run.costs.to_json(),
    )


def warn_of_strangers(base: Base, concepts: Sequence[Concept]) -> None:
    """Log what the embedded checkpoint has no word for; of other checkpoints nobody knows."""
    from erasure.base import BUNDLED
    from erasure.glyph import unheard

    strange = unheard(name for one in concepts for name in one.names) if base.name in BUNDLED else []
    if strange:
        LOG.warning("%s was never taught %s: there may be nothing to erase", base.name, ", ".join(map(repr, strange)))


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
