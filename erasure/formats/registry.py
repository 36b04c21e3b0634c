"""The index of formats: what each holds, how it is read and written, how it is recognised."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError, unknown
from erasure.formats import loaders
from erasure.formats.checkpoint import (
    read_checkpoint,
    read_single_file,
    write_checkpoint,
    write_single_file,
    write_text_encoder,
)
from erasure.formats.conversion import (
    BaseWriter,
    Reader,
    Writer,
    components,
    make_patch,
    need_low_rank,
    need_only,
)
from erasure.formats.diff import ENDS, check_diff, read_diff, write_diff
from erasure.formats.kohya import read_kohya, write_kohya
from erasure.formats.peft import FACTOR, read_peft, write_peft
from erasure.formats.source import Source
from erasure.formats.spm import check_spm, read_spm, write_spm
from erasure.formats.svd import low_rank
from erasure.formats.unguide import A, B, read_unguide
from erasure.formats.weights import TEXT, TWINS, UNET, read_text_encoder, read_unet, write_unet
from erasure.model.base import Base
from erasure.patch import Delta, LowRank, Patch, fingerprint
from erasure.patch.module_keys import DOWN, NESTED, UP

AUTO = "auto"
Model = Base | str | Any  # a base, a model's name, or a diffusers pipeline


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        about: what the file is.
        holds: what of a model it holds.
        read: makes a payload of it.
        write: writes a patch; None where the format is only read.
        rewrite: the same, for formats that hold weights and so need the base.
        check: raises an ErasureError for a patch that it cannot hold.
        only_read: why it is not written.
    """

    about: str
    holds: str
    read: Reader
    write: Writer | None = None
    rewrite: BaseWriter | None = None
    check: Callable[[Patch], object] = lambda patch: None
    only_read: str = ""

    @property
    def factors(self) -> bool:
        """Whether it holds low-rank factors: differences are cut to some on the way."""
        return self.holds == "low rank"


FORMATS = {
    "spm": Format(
        "SPM's file: kohya keys, header with prompts, rank, alpha", "low rank", read_spm, write_spm, check=check_spm
    ),
    "kohya": Format("LoRA under kohya's keys, plain", "low rank", read_kohya, write_kohya, check=need_low_rank),
    "peft": Format("LoRA under diffusers' paths, alpha = rank", "low rank", read_peft, write_peft, check=need_low_rank),
    "diff": Format("differences under kohya's keys", "differences", read_diff, write_diff, check=check_diff),
    "unet": Format(
        "UNet weights under diffusers' names, all or some: ESD, UCE, SalUn",
        "weights",
        read_unet,
        rewrite=write_unet,
        check=partial(need_only, component=UNET),
    ),
    "text-encoder": Format(
        "a text encoder's weights, file or CLIPTextModel folder: AdvUnlearn",
        "weights",
        read_text_encoder,
        rewrite=write_text_encoder,
        check=partial(need_only, component=TEXT),
    ),
    "checkpoint": Format("a pipeline's diffusers folder", "weights", read_checkpoint, rewrite=write_checkpoint),
    "single-file": Format(
        "a whole checkpoint as one file, under the original names",
        "weights",
        read_single_file,
        rewrite=write_single_file,
    ),
    "unguide": Format(
        "UnGuide's lora.pth", "low rank", read_unguide, only_read="it is a pickle; peft holds the same and is none"
    ),
}
# Names of the codes whose files these are: they say which method made it.
METHODS = {"esd": "unet", "uce": "unet", "salun": "unet", "advunlearn": "text-encoder"}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        path: file or folder.
        format: of it.
        error: relative error of cutting differences to low rank; None where nothing was cut.
        notes: what stayed behind, and what loaders leave out.
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
) -> Patch:
    """A patch from a published file, made for `model`; its config says which format it was taken for.

    Args:
        path: file or folder.
        form: one of FORMATS or METHODS, or "auto" to look at the file.
        model: the base: full weights become differences from it, and everything must fit it. One that is named is
            loaded once the file is found good.
        concepts: names of what the file erases; default: what it says, else its own name.
        allow_pickle: read a pickle, as data only; nothing in it is run.

    Raises:
        ErasureError: an unknown format, a damaged file, one that is not of the format, or does not fit the model.
    """
    if form != AUTO:
        _named(form)
    source = Source.open(path, allow_pickle)
    name = recognise(source) if form == AUTO else form
    kind = METHODS.get(name, name)
    if (source.kind == "checkpoint") != (kind == "checkpoint"):
        raise ErasureError(f"{source.path}: {'is' if source.kind == 'checkpoint' else 'is not'} a pipeline's folder")
    base = _base(model)
    found = FORMATS[kind].read(source, base)
    if name in METHODS:
        found = dataclasses.replace(found, method=name)
    return make_patch(found, source, base, name, concepts)


def export_patch(
    patch: Patch,
    path: str | os.PathLike[str],
    form: str,
    model: Model | None = None,
    *,
    rank: int | None = None,
    force: bool = False,
) -> Exported:
    """Write a patch as a published format.

    Args:
        patch: what to write.
        path: where; a folder for whole models.
        form: one of FORMATS or METHODS.
        model: the base, for formats that hold weights; default: the one that the patch names.
        rank: cut differences to this rank, for formats of low rank.
        force: write weights onto another base than the patch was made from, where the shapes fit.

    Raises:
        ErasureError: an unknown format, a patch that it cannot hold, a wrong base. Nothing is written then.
    """
    name = _named(form)
    one, where = FORMATS[name], Path(path).expanduser()
    if one.only_read:
        raise ErasureError(f"{name} is not written: {one.only_read}")
    patch, error = _cut(patch, name, rank)
    try:
        one.check(patch)
    except ErasureError as fault:
        raise ErasureError(f"{name} {fault}. Nothing was written") from None
    notes = _behind(patch, name)
    if one.write is not None:
        notes += one.write(patch, where)
    elif one.rewrite is not None:
        base = _base(patch.base if model is None else model)
        notes += one.rewrite(_adopted(patch, base) if force else patch, where, base)
    return Exported(where, name, error, tuple([*notes, *loaders.notes(name, patch.payload)]))


def _cut(patch: Patch, name: str, rank: int | None) -> tuple[Patch, float | None]:
    """The patch at low rank where one is asked for, and the relative error of that."""
    if rank is None:
        return patch, None
    if not FORMATS[name].factors:
        raise ErasureError(f"{name} holds changes whole: --rank is for formats of low rank. Nothing was written")
    if not isinstance(patch.payload, Delta):
        raise ErasureError("the patch is of low rank already: --rank cuts differences. Nothing was written")
    payload, error = low_rank(patch.payload, rank)
    return dataclasses.replace(patch, payload=payload, results=None, stored={}), error


def _behind(patch: Patch, name: str) -> list[str]:
    if patch.gate["kind"] == "always" or name == "spm":
        return []
    return [f"its {patch.gate['kind']} gate stays behind: it acts on every prompt"]


def _adopted(patch: Patch, base: Base) -> Patch:
    """The patch as if it had been made from `base`; its names and shapes are checked all the same."""
    modules, payload = components(base), patch.payload
    prints = {part: fingerprint(modules[part], payload.names(part)) for part in patch.components if part in modules}
    return dataclasses.replace(patch, base_fingerprint=prints)


def recognise(source: Source) -> str:
    """The format of a file, by its keys.

    Raises:
        ErasureError: a patch of ours, or nothing that is known.
    """
    if source.kind == "checkpoint":
        return "checkpoint"
    keys = source.keys
    if "erasure.format" in source.metadata:
        raise ErasureError(
            f"{source.path}: a patch already: it loads as it is (--format kohya takes its factors alone)"
        )
    if any(key.endswith((DOWN, UP)) for key in keys):
        return "spm" if "prompts" in source.metadata else "kohya"
    if any(key.endswith(tuple(ENDS.values())) for key in keys):
        return "diff"
    if any(key.endswith((A, B)) for key in keys):
        return "unguide"
    if any(FACTOR.fullmatch(key) for key in keys):
        return "peft"
    if any(key.startswith((f"{TEXT}.", NESTED, *TWINS)) for key in keys):
        return "text-encoder"
    blocks = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.")
    if any(key.removeprefix(f"{UNET}.").startswith(blocks) for key in keys):
        return "unet"
    if any(key.startswith("model.diffusion_model.") for key in keys):
        return "single-file"
    first = keys[0] if keys else "missing"
    raise ErasureError(f"{source.path}: none of {', '.join(FORMATS)}; its first tensor is {first}")


def rows() -> list[dict[str, Any]]:
    """The support matrix: a row a format with what it holds, whether it is read and written, and what loads it."""
    return [
        {
            "format": name,
            "about": one.about,
            "holds": one.holds,
            "reads": True,
            "writes": not one.only_read,
            "needs_base": one.rewrite is not None,
            "loaders": loaders.takes(name),
        }
        for name, one in FORMATS.items()
    ]


def matrix() -> str:
    """The support matrix as Markdown, for README."""
    heads = ["`--format`", "what", "reads", "writes", *loaders.LOADS]
    lines = [heads, ["---"] * len(heads)]
    for row in rows():
        marks = ["yes" if row[key] else "" for key in ("reads", "writes")]
        marks += ["yes" if name in row["loaders"] else "" for name in loaders.LOADS]
        lines.append([f"`{row['format']}`", row["about"], *marks])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def exports(patch: Patch) -> dict[str, str]:
    """What export makes of a patch in each format, or why it cannot."""
    found = {}
    for name, one in FORMATS.items():
        if one.only_read:
            continue
        if one.check is need_low_rank and isinstance(patch.payload, Delta):
            found[name] = "with --rank R, cut to that rank"
            continue
        try:
            one.check(patch)
        except ErasureError as fault:
            found[name] = f"no: {fault}"
            continue
        notes = [*_behind(patch, name), *loaders.notes(name, patch.payload)]
        if one.rewrite is not None:
            notes.insert(0, "with --model, the base")
        if name == "diff" and isinstance(patch.payload, LowRank):
            notes.insert(0, "multiplied out")
        found[name] = "; ".join(["yes", *notes])
    return found


def _named(form: str) -> str:
    name = METHODS.get(form, form)
    if name not in FORMATS:
        raise unknown("format", form, [*FORMATS, *METHODS])
    return name


def _base(model: Model) -> Base:
    """The base; one that is named is loaded where no accelerator is needed, for nothing is computed with it.

    Raises:
        ErasureError: no name, or an unknown one.
    """
    if not isinstance(model, str):
        return Base.of(model)
    if not model:
        raise ErasureError("the patch does not say which base it was made from: --model (model=). Nothing was written")
    return Base.load(model, device="cpu")
