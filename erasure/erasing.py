"""`erase`: choose the settings, run a method on a checkpoint and concepts, and assemble the patch."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.config import shown
from erasure.errors import ErasureError
from erasure.methods import Chosen, choose, configured, count_of, default, find, kind_of, worded

if TYPE_CHECKING:
    from erasure.concepts.concept import Concept
    from erasure.method import Method
    from erasure.model.base import Base
    from erasure.model.presets import Family
    from erasure.patch import Patch
    from erasure.training.compute import Computing
    from erasure.training.run import FitResult, Run

LOG = logging.getLogger("erasure")


def erase(
    model: Any,
    concept: str | Mapping[str, Any] | Concept | Sequence[str | Mapping[str, Any] | Concept],
    method: str | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    preview_every: int | None = None,
    trackers: Sequence[str] = (),
    preset: str | None = None,
    dtype: str = "fp32",
    **overrides: Any,
) -> Patch:
    """Erase concepts and return the patch; the model is left as it was.

    Several processes started by accelerate or torchrun work on the one run together.

    Args:
        model: a pipeline, a `Base`, or the name of a model.
        concept: a name, a mapping of `Concept`'s fields, or a `Concept`; or a list of them, to erase together.
        method: the name of a method, see `erasure list methods`; None: what the preset of the model's family says is
            best for the kind of concept.
        out: where to save the patch. The run then keeps its state in `<out>.run`, and the same call resumes it.
        config: a YAML file of settings, which override the method's preset.
        seed: seed of everything random in the run.
        progress: whether to show a progress bar; None: on a terminal only.
        preview_every: draw the concept and its neighbours every so many steps, into `<out>.previews`; a closed form
            draws the base and the result.
        trackers: log the losses with accelerate, into `<out>.logs`: tensorboard, wandb.
        preset: the preset whose settings are taken; None: that of the family which the model belongs to.
        dtype: type of the tensors in the file; see `Patch.save`.
        overrides: single settings of the method and of `Computing`, which override everything else.

    Raises:
        ErasureError: an unknown method, setting, model or concept, an option without meaning for the method, an output
            that cannot be written, a model of no known family without settings, or a loss that is NaN.
    """
    from erasure.config import read_yaml
    from erasure.model.base import Base
    from erasure.training.compute import Computing

    file = read_yaml(Path(config)) if config is not None else {}
    computing, layers = Computing.split(file, overrides)
    # Bad input is refused before the model is loaded, which a method that depends on the model has to wait for.
    check_named(method, concept, layers, computing, preview_every, trackers)
    output = Output(Path(out) if out is not None else None, preview_every, trackers, dtype)
    output.check()
    base = Base.of(model)
    check_resident(base)
    settled = settle(base, concept, method, dict(zip(LAYERS, layers, strict=True)), preset=preset)
    settled.chosen.method.check_options(computing, preview_every, trackers)
    settled.log()
    shown = sys.stderr.isatty() if progress is None else progress
    return _run(settled.chosen.method, base, settled.concepts, computing, seed, shown, output)


MOST_LINES = 12  # concepts that are listed one by one
LAYERS = ("the file of --config", "given")  # where settings that override a preset come from, the stronger one last


@dataclass(frozen=True)
class Settled:
    """What a run will do: the concepts, and the method's settings with their sources.

    Args:
        base: the checkpoint.
        concepts: what is erased, with the prompts and anchors of the preset.
        chosen: the method with its settings, and where each came from.
        family: the family whose preset was taken.
        assumed: names of which no list knows the kind, so that they are erased as objects.
        reason: why this method was taken, where none was named.
    """

    base: Base
    concepts: list[Concept]
    chosen: Chosen
    family: Family
    assumed: tuple[str, ...] = ()
    reason: str = ""

    def lines(self) -> list[str]:
        """Return for people what was chosen and why: the method, the family, the kinds, then a line for each source."""
        name = self.chosen.method.method
        lines = [f"method {name}, as none is named: {self.reason}"] if self.reason else []
        lines.append(f"settings of {name} for {self.base.name}: {self.family.text}")
        if len(self.concepts) <= MOST_LINES:
            lines += [f"{concept.name!r} is erased as {_as_kind(concept)}" for concept in self.concepts]
        else:
            counts = Counter(concept.kind for concept in self.concepts)
            kinds = ", ".join(f"{count} of kind {kind}" for kind, count in counts.items())
            lines.append(f"{len(self.concepts)} concepts are erased together: {kinds}")
        for source, values in self.chosen.by_source().items():
            lines.append(f"{', '.join(f'{key}={shown(value)}' for key, value in values.items())}: {source}")
        return lines

    def log(self) -> None:
        """Log where each setting came from, and warn of what was guessed."""
        for line in self.lines():
            LOG.info("%s", line)
        if not self.family.named:
            LOG.warning("%s is no checkpoint that a preset names: %s", self.base.name, self.family.text)
        for name in self.assumed:
            LOG.warning("no list knows %r: it is erased as an object (kind= or --kind says what it is)", name)
        warn_of_unknown_names(self.base, self.concepts)


def settle(
    base: Base, concept: Any, method: str | None, layers: Mapping[str, Mapping[str, Any]], *, preset: str | None = None
) -> Settled:
    """Choose the settings of a run: those of the model's family and the concepts' kinds, then those of `layers`.

    Where no method is named, the family's preset chooses it for the concepts' kinds first.

    Args:
        base: the checkpoint.
        concept: as for `erase`.
        method: the name of a method; None: the preset's choice.
        layers: settings of the method by where they come from; later layers override earlier ones.
        preset: the preset whose settings are taken; None: that of the family which the model belongs to.

    Raises:
        ErasureError: anything that `choose` and `Concept.list_of` refuse.
    """
    from erasure.concepts.concept import Concept
    from erasure.concepts.name_list import MOST_NAMES

    family, reason = base.family(preset), ""
    if method is None:
        method, reason = default(Concept.list_of(concept, base.words, MOST_NAMES), family, base.architecture)
    check_network(method, base)
    concepts = Concept.list_of(concept, base.words, find(method).MOST)
    count = count_of(concepts, family.preset is None or family.preset.counts_members)
    try:
        chosen = choose(method, kind_of(concepts), layers, count=count, family=family)
    except ErasureError as fault:
        if not reason:
            raise
        raise ErasureError(f"{fault}. {_taken(method)}") from None
    parity = getattr(chosen.method, "parity", False)
    if parity and base.component != "unet":
        raise ErasureError(
            f"parity follows the published script of {method}, which trains a UNet, and {base.name} has a "
            f"{type(base.network).__name__}. Leave parity out; nothing was changed"
        )
    if not parity:  # parity modes bring the prompts of their scripts
        concepts = worded(concepts, method, family)
    return Settled(base, concepts, chosen, family, unlisted(base, concept), reason)


def check_named(
    method: str | None,
    concept: Any,
    layers: Sequence[Mapping[str, Any]],
    computing: Computing,
    preview_every: int | None = None,
    trackers: Sequence[str] = (),
) -> None:
    """Refuse concepts, and settings and options of a method that is named, before any model is loaded.

    Raises:
        ErasureError: anything that `choose`, `Concept.list_of` and `Method.check_options` refuse.
    """
    from erasure.concepts.concept import Concept
    from erasure.concepts.name_list import MOST_NAMES

    concepts = Concept.list_of(concept, most=MOST_NAMES if method is None else find(method).MOST)
    if method is not None:
        configured(method, concepts, *layers).check_options(computing, preview_every, trackers)


def _taken(method: str) -> str:
    """Return what to say after a refusal of settings by a method that the user did not name."""
    return f"{method} was taken because no method is named: name the one that you mean (--method, or method=)"


def check_network(method: str, base: Base) -> None:
    """Refuse a method that cannot erase from the kind of network that a model has.

    Raises:
        ErasureError: saying why, and which methods can.
    """
    from erasure.methods import names

    if reason := find(method).unsuited(base.architecture):
        able = [name for name in names() if not find(name).unsuited(base.architecture)]
        raise ErasureError(
            f"{method} cannot erase from {base.name}, whose network is a {type(base.network).__name__}: {reason}. "
            f"Methods that can: {', '.join(able) or 'none'}. Nothing was changed"
        )


def unlisted(base: Base, concept: Any) -> tuple[str, ...]:
    """Return the names that are given without a kind and that no list knows, unless the model has a vocabulary."""
    from erasure.concepts.word_lists import WordLists

    if base.vocabulary is not None:
        return ()
    entries = concept if isinstance(concept, Sequence) and not isinstance(concept, str) else [concept]
    names = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
    open_names = [entry["name"] for entry in names if isinstance(entry, Mapping) and "kind" not in entry]
    return tuple(name for name in open_names if WordLists().find(name) is None)


def _as_kind(concept: Concept) -> str:
    """Return the kind of a concept, with its article, and its other names."""
    kind = f"{'an' if concept.kind[0] in 'aeiou' else 'a'} {concept.kind}"
    return kind + (f", with {', '.join(concept.aliases)}" if concept.aliases else "")


def identity(
    method: Method, base: Base, concepts: Sequence[Concept], computing: Computing, seed: int = 0
) -> dict[str, Any]:
    """Return everything that decides the result of a run, as plain data, by which its state is known again."""
    settings = {"method": method.method, **dataclasses.asdict(method)}  # type: ignore[call-overload]
    if method.CALLS_UNET:
        settings |= computing.on(base.device).to_json()
    about = {"base": base.name, **({"quantised": True} if base.quantised else {})}
    return {"settings": settings, "concepts": [one.to_json() for one in concepts], **about, "seed": seed}


def _run(
    method: Method,
    base: Base,
    concepts: list[Concept],
    computing: Computing,
    seed: int,
    progress: bool,
    output: Output,
) -> Patch:
    """Run a method, in all processes of a launch together, and write its patch."""
    from erasure.distributed import process_group
    from erasure.training.compute import Engine
    from erasure.training.run import Run

    known = identity(method, base, concepts, computing, seed)
    settings = known["settings"]
    with process_group(base.device.type == "cpu") as group, Engine(base, computing, group, method.CALLS_UNET) as engine:
        run = Run(seed, output.next_to("run"), progress, engine=engine, group=group)
        run.open(known)
        output.watch(run, base, concepts, settings)
        try:
            result = method.fit(base, concepts, run)
        finally:
            if run.trackers is not None:
                run.trackers.close()
        engine.close()  # the fingerprint is taken of the base's own weights
        patch = assemble(result, settings, base, concepts, run)
        if (target := output.patch) is not None:
            group.first(lambda: patch.save(target, output.dtype))
        run.close()
    return patch


@dataclass(frozen=True)
class Output:
    """The files that a run writes: the patch, and next to it the state of the run, its previews and its logs.

    Args:
        patch: path of the patch; None writes nothing.
        preview_every: steps between previews; None draws none.
        trackers: names of the trackers that take the losses.
        dtype: type of the patch's tensors in the file.
    """

    patch: Path | None
    preview_every: int | None
    trackers: Sequence[str]
    dtype: str = "fp32"

    def check(self) -> None:
        """Refuse a path that cannot be written before the work is done.

        Raises:
            ErasureError: the path is a folder, or its folder cannot be created or written to; or there is no path for
                previews and logs to be written next to.
        """
        if self.patch is not None:
            check_writable(self.patch)
        elif self.preview_every is not None or self.trackers:
            raise ErasureError("previews and logs are written next to the patch: give its path with `out` (-o)")

    def next_to(self, ending: str) -> Path | None:
        """Return the path of a file or folder named after the patch, or None if nothing is written."""
        return self.patch.with_name(f"{self.patch.name}.{ending}") if self.patch is not None else None

    def watch(self, run: Run, base: Base, concepts: Sequence[Concept], settings: Mapping[str, Any]) -> None:
        """Give a run its previews and trackers."""
        from erasure.training.callbacks import Previews, Trackers

        previews, logs = self.next_to("previews"), self.next_to("logs")
        if previews is not None and self.preview_every is not None:
            run.previews = Previews(base, concepts, previews, self.preview_every)
        if logs is not None and self.trackers:
            run.trackers = Trackers(self.trackers, logs, settings)


def assemble(result: FitResult, settings: dict[str, Any], base: Base, concepts: list[Concept], run: Run) -> Patch:
    """Return the patch: the result of a method with the header fields that describe how it was made."""
    from erasure.patch import Patch, fingerprint

    payload = result.payload
    fingerprints = {
        component: fingerprint(getattr(base.pipe, component), payload.names(component))
        for component in payload.components
    }
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")}
    return Patch(
        payload=payload,
        method=settings["method"],
        concepts=tuple(concept.to_json() for concept in concepts),
        base=base.name,
        base_fingerprint=fingerprints,
        config={key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
        gate=result.gate,
        versions=libraries,
        seed=run.seed,
        costs=run.costs.to_json(),
        curves=run.record(),
        kept=getattr(base, "record", None),
    )


def warn_of_unknown_names(base: Base, concepts: Sequence[Concept]) -> None:
    """Log a warning for names that the checkpoint's vocabulary lacks, if the vocabulary is known."""
    words = base.vocabulary
    if words is not None and (missing := words.unknown(name for concept in concepts for name in concept.names)):
        LOG.warning("%s was never taught %s: there may be nothing to erase", base.name, ", ".join(map(repr, missing)))


def check_resident(base: Base) -> None:
    """Refuse a network whose weights are offloaded.

    Raises:
        ErasureError: its weights are not on the device that it computes on.
    """
    devices = {param.device for param in base.network.parameters()}
    if base.device not in devices:
        raise ErasureError(
            f"the {base.component} is offloaded: its weights are not on {base.device}, where it computes, and could "
            "not be trained there. Call pipe.remove_all_hooks() and pipe.to(device) first; nothing was changed"
        )


def check_writable(target: Path) -> None:
    """Refuse an output that cannot be written before the work is done.

    Raises:
        ErasureError: the path is a folder, or its folder cannot be created or written to.
    """
    if target.is_dir():
        raise ErasureError(f"{target} is a folder: give the patch a file name, such as {target / 'patch.safetensors'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ErasureError(f"{target}: its folder cannot be created: {fault.strerror or fault}") from None
    if not os.access(target.parent, os.W_OK):
        raise ErasureError(f"{target}: its folder cannot be written to")
