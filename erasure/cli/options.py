"""Groups of options that several commands share."""

from __future__ import annotations

from pathlib import Path

from erasure.cli import choices
from erasure.cli.arguments import FILE, FOLDER, Options, Parser

FORCE = "Load a patch although it was made from another base, as long as the shapes fit"


def add_model(parser: Parser, purpose: str = "to use") -> None:
    """Say which checkpoint to load, and how."""
    model = Options(parser, "model")
    model.add(
        "--model",
        default="glyph",
        metavar="MODEL",
        completes=FOLDER,
        help=f"Checkpoint {purpose}: glyph (bundled), a hub id (owner/name), a diffusers folder or a .safetensors file",
    )
    add_model_config(model)
    model.add(
        "--variant", metavar="NAME", help="Variant of the weight files to load from a folder or hub id, such as fp16"
    )
    model.add("--dtype", metavar="DTYPE", names=choices.DTYPES, shown="fp32", help="Data type of the loaded weights")
    model.add(
        "--quantize",
        metavar="KIND",
        names=choices.QUANTISED,
        shown="as loaded",
        help="Load the network and large text encoders in 8 bits (needs torchao): half of the memory of bf16. What "
        "trains whole weights or solves for them cannot erase from it",
    )


def add_model_config(model: Options) -> None:
    """Say how to load a checkpoint that is one file."""
    model.add(
        "--model-config",
        metavar="TYPE",
        names=choices.checkpoint_kinds(),
        shown="detected and printed",
        help="Override the detected type of a .safetensors file, by a diffusers folder with its configuration or by "
        "name; for a transformer (FLUX, Stable Diffusion 3), the folder with all else",
    )


def add_device(computing: Options) -> None:
    """Say where to compute."""
    computing.add(
        "--device",
        metavar="DEVICE",
        names=choices.DEVICES,
        shown="an accelerator if there is one",
        help="Device to compute on",
    )


def add_patches(parser: Parser) -> None:
    """Say which patches to load."""
    patches = Options(parser, "patches")
    patches.add(
        "--patch",
        metavar="FILE[:STRENGTH]",
        repeat=True,
        completes=FILE,
        help="Load a patch file or a patch of the hub, at full strength or at this one",
    )
    patches.add("--force", action="store_true", help=FORCE)


def add_sampling(parser: Parser, suites: bool = True) -> None:
    """Say how images are sampled, and where that is computed."""
    either = ", or the suite's own" if suites else ""
    sampling = Options(parser, "sampling and computing")
    own = f"what suits the model{either}; see `erasure list presets`"
    sampling.add("--steps", type=int, metavar="N", shown=own, help="Sampling steps")
    sampling.add("--guidance", type=float, metavar="SCALE", shown=own, help="Classifier-free guidance scale")
    sampling.add("--batch-size", type=int, default=16, metavar="N", help="Images per batch")
    add_device(sampling)


def add_prompts(parser: Parser, default: str) -> Options:
    """Say which prompts are drawn, and who judges the images; returns the group, for more.

    Args:
        parser: of the command.
        default: which prompts are taken where none are named, in words.
    """
    prompts = Options(parser, "prompts and judge")
    prompts.add(
        "--prompts",
        metavar="SET",
        names=choices.prompt_sets(),
        shown=default,
        completes=FILE,
        help="Prompt set: hub:owner/name, a file whose labels (such as object, style) say what the judge should see, "
        "or a bundled one",
    )
    add_where(prompts)
    prompts.add(
        "--label",
        metavar="HEAD=VALUE",
        repeat=True,
        help="Label every row of --prompts, where the file has no such column, for example object=church",
    )
    prompts.add(
        "--judge",
        metavar="JUDGE",
        names=choices.JUDGES,
        shown="glyph",
        help="Judge of the images, as KIND[:SOURCE][?OPTION=VALUE&...], for example clip:FOLDER?labels=cat,dog; "
        "combine several as A+B, any(A+B) or all(A+B). Kinds",
    )
    return prompts


def add_where(prompts: Options) -> None:
    """Select rows of the prompt set."""
    prompts.add(
        "--where",
        metavar="CONDITION",
        repeat=True,
        help='Use only rows of --prompts that meet a condition such as "label=x" or "number>5"',
    )


def add_settings(group: Options, whose: str, see: str = "") -> None:
    """Change single settings."""
    group.add("--set", metavar="KEY=VALUE", repeat=True, see=see, help=f"Change a setting of {whose}")


def add_seed(group: Options) -> None:
    """Seed what is random."""
    group.add("--seed", type=int, default=0, metavar="N", help="Random seed")


def add_folder(output: Options, default: str) -> None:
    """Say which folder to write into."""
    output.add(
        "-o", "--out", type=Path, default=Path(default), metavar="FOLDER", completes=FOLDER, help="Folder to write into"
    )


def add_file(output: Options, default: str | None = None, text: str = "File to write") -> None:
    """Say which file to write; without a default it has to be given."""
    path = None if default is None else Path(default)
    output.add("-o", "--out", type=Path, default=path, required=path is None, metavar="FILE", completes=FILE, help=text)
