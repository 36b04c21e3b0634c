"""The registry of formats: what each holds, how it is read and written, and how a file of it is recognised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from erasure.errors import ErasureError, unknown
from erasure.formats.checkpoint import read_checkpoint, write_checkpoint
from erasure.formats.diff import ENDS, check_diff, read_diff, write_diff
from erasure.formats.kohya import read_kohya, write_kohya
from erasure.formats.patch_builder import BaseWriter, Reader, Writer
from erasure.formats.peft import FACTOR, read_peft, write_peft
from erasure.formats.published_file import PublishedFile
from erasure.formats.requirements import need_low_rank, need_only
from erasure.formats.single_file import check_single_file, read_single_file, write_single_file
from erasure.formats.spm import check_spm, read_spm, write_spm
from erasure.formats.text_encoder import TEXT, TWINS, read_text_encoder, write_text_encoder
from erasure.formats.transformer_lora import check_transformer
from erasure.formats.unet import UNET, read_unet, write_unet
from erasure.formats.unguide import A, B, read_unguide
from erasure.patch import Patch
from erasure.patch.module_keys import DOWN, NESTED, TRANSFORMER, UP


@dataclass(frozen=True)
class Format:
    """One format of published files, with the functions that read and write it.

    Args:
        about: what such a file is.
        holds: `low rank`, `differences` or `weights`.
        read: builds a payload from a file.
        write: writes a patch, for formats that need no base; None if the format is only read, or needs a base.
        rewrite: writes a patch, for formats that hold weights and therefore need the base.
        check: raises an ErasureError for a patch that the format cannot hold.
        only_read: why the format is not written; empty if it is.
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
        """Return whether the format holds low-rank factors, so that differences must be approximated by some."""
        return self.holds == "low rank"


def check_kohya(patch: Patch) -> None:
    """Refuse patches that kohya's keys cannot hold: differences, and transformers other than FLUX.1 and SD 3."""
    payload = need_low_rank(patch)
    if TRANSFORMER in patch.components:
        check_transformer(payload)


FORMATS = {
    "spm": Format(
        "SPM's file: kohya keys, header with prompts, rank, alpha", "low rank", read_spm, write_spm, check=check_spm
    ),
    "kohya": Format("LoRA under kohya's keys, plain", "low rank", read_kohya, write_kohya, check=check_kohya),
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
        check=check_single_file,
    ),
    "unguide": Format(
        "UnGuide's lora.pth",
        "low rank",
        read_unguide,
        only_read="its files are pickles; peft holds the same in a safetensors file",
    ),
}
# Names of published codes, accepted as formats: each stands for the format of its files and records the method.
METHODS = {"esd": "unet", "uce": "unet", "salun": "unet", "advunlearn": "text-encoder"}


def format_name(form: str) -> str:
    """Return the name of the format that a name stands for.

    Args:
        form: one of `FORMATS` or `METHODS`.

    Raises:
        ErasureError: the name is unknown.
    """
    name = METHODS.get(form, form)
    if name not in FORMATS:
        raise unknown("format", form, [*FORMATS, *METHODS])
    return name


def recognise(source: PublishedFile) -> str:
    """Return the name of the format of a file, detected by its keys and header.

    Args:
        source: the file or folder.

    Raises:
        ErasureError: the file is a patch of this package, or of no known format.
    """
    if source.kind == "checkpoint":
        return "checkpoint"
    keys = source.keys
    if "erasure.format" in source.metadata:
        raise ErasureError(
            f"{source.path} is a patch already and can be loaded directly; to import its factors without the header, "
            "use --format kohya"
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
    if any(key.startswith(("model.diffusion_model.", "double_blocks.", "joint_blocks.")) for key in keys):
        return "single-file"
    streams = ("transformer_blocks.", "single_transformer_blocks.", "context_embedder.")
    if any(key.removeprefix(f"{TRANSFORMER}.").startswith(streams) for key in keys):
        return "unet"
    first = keys[0] if keys else "missing"
    raise ErasureError(f"{source.path} is none of {', '.join(FORMATS)}; its first tensor is {first}")
