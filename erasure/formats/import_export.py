"""Importing published files as patches, and exporting patches to published formats."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError
from erasure.formats import loaders
from erasure.formats.patch_builder import components, make_patch
from erasure.formats.published_file import PublishedFile
from erasure.formats.registry import FORMATS, METHODS, format_name, recognise
from erasure.formats.requirements import need_weights
from erasure.formats.truncated_svd import low_rank
from erasure.model.base import Base
from erasure.patch import Delta, Patch, fingerprint

AUTO = "auto"
Model = Base | str | Any  # a base, the name of a model, or a diffusers pipeline


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Args:
        path: the file or folder that was written.
        format: name of its format.
        error: relative error of approximating differences at low rank; None if nothing was approximated.
        notes: what the file leaves out of the patch, and what the programs that load it leave out.
    """

    path: Path
    format: str
    error: float | None
    notes: tuple[str, ...]


def import_patch(
    path: str | os.PathLike[str],
    form: str = AUTO,
    model: Model = "glyph",
    *,
    concepts: Sequence[str] = (),
    allow_pickle: bool = False,
    config: str | None = None,
) -> Patch:
    """Build a patch of a model from a published file; the config of the patch records the detected format.

    Args:
        path: file or folder.
        form: one of `FORMATS` or `METHODS`, or `auto` to detect it.
        model: the base. Full weights become differences from it, and every tensor must fit it. A base that is passed by
            name is loaded only after the file has been recognised.
        concepts: names of the erased concepts (default: those that the file records, else the name of the file).
        allow_pickle: whether to read pickles, as data only; no code in them is run.
        config: how to load a model that is one file, passed by name (see `single_file.identify`).

    Returns:
        The patch, with the fingerprint of `model`.

    Raises:
        ErasureError: the format is unknown, the file is damaged or not of that format, or it does not fit the model.
    """
    if form != AUTO:
        format_name(form)
    source = PublishedFile.open(path, allow_pickle)
    name = recognise(source) if form == AUTO else form
    kind = METHODS.get(name, name)
    if (source.kind == "checkpoint") != (kind == "checkpoint"):
        verb = "is" if source.kind == "checkpoint" else "is not"
        raise ErasureError(f"{source.path} {verb} the folder of a pipeline, so it cannot be imported as {name}")
    base = _load_base(model, config)
    imported = FORMATS[kind].read(source, base)
    if name in METHODS:
        imported = dataclasses.replace(imported, method=name)
    return make_patch(imported, source, base, name, concepts)


def export_patch(
    patch: Patch,
    path: str | os.PathLike[str],
    form: str,
    model: Model | None = None,
    *,
    rank: int | None = None,
    force: bool = False,
    config: str | None = None,
) -> Exported:
    """Write a patch in a published format.

    Args:
        patch: the patch.
        path: the file to write, or the folder for whole models; `~` is expanded.
        form: one of `FORMATS` or `METHODS`.
        model: the base, for formats that hold weights (default: the base that the patch names).
        rank: rank at which differences are approximated, for formats of low rank.
        force: whether to write weights onto another base than the patch was made from, provided that the shapes fit.
        config: how to load a model that is one file, passed by name (see `single_file.identify`).

    Returns:
        The path, the format, the error of the approximation, and what is left out.

    Raises:
        ErasureError: the format is unknown or cannot hold the patch, the patch changes no weight, or the base is
            another one. Nothing is written then.
    """
    name = format_name(form)
    target, location = FORMATS[name], Path(path).expanduser()
    if target.only_read:
        raise ErasureError(f"the format {name} can only be read: {target.only_read}. Nothing was written")
    need_weights(patch)
    patch, error = _approximate(patch, name, rank)
    try:
        target.check(patch)
    except ErasureError as fault:
        raise ErasureError(f"the format {name} {fault}. Nothing was written") from None
    notes = gate_notes(patch, name)
    if target.write is not None:
        notes += target.write(patch, location)
    elif target.rewrite is not None:
        base = _load_base(patch.base if model is None else model, config)
        notes += target.rewrite(_with_fingerprint_of(base, patch) if force else patch, location, base)
    return Exported(location, name, error, tuple([*notes, *loaders.notes(name, patch.weights)]))


def gate_notes(patch: Patch, name: str) -> list[str]:
    """Return a note if a format leaves out the gate of a patch.

    Args:
        patch: the patch.
        name: name of the format, one of `FORMATS`.
    """
    if patch.gate["kind"] == "always" or name == "spm":
        return []
    return [f"the {patch.gate['kind']} gate is left out, so the patch acts on every prompt"]


def _approximate(patch: Patch, name: str, rank: int | None) -> tuple[Patch, float | None]:
    """Return the patch at low rank if a rank is set, and the relative error of the approximation."""
    if rank is None:
        return patch, None
    if not FORMATS[name].factors:
        raise ErasureError(
            f"--rank (rank=) is for low-rank formats, and {name} holds {FORMATS[name].holds}. Nothing was written"
        )
    if not isinstance(patch.payload, Delta):
        raise ErasureError(
            "--rank (rank=) approximates differences, and this patch is of low rank already. Nothing was written"
        )
    payload, error = low_rank(patch.payload, rank)
    return dataclasses.replace(patch, payload=payload, results=None, stored={}), error


def _with_fingerprint_of(base: Base, patch: Patch) -> Patch:
    """Return the patch as if it had been made from `base`; writing it still checks names and shapes."""
    modules, payload = components(base), patch.payload
    prints = {part: fingerprint(modules[part], payload.names(part)) for part in patch.components if part in modules}
    return dataclasses.replace(patch, base_fingerprint=prints)


def _load_base(model: Model, config: str | None) -> Base:
    """Return the base; one that is passed by name is loaded on the CPU, because nothing is computed with it.

    Raises:
        ErasureError: the name is empty or unknown.
    """
    if not isinstance(model, str):
        return Base.of(model)
    if not model:
        raise ErasureError(
            "the patch does not record the base that it was made from; name it with --model (model=). "
            "Nothing was written"
        )
    return Base.load(model, device="cpu", **({} if config is None else {"config": config}))
