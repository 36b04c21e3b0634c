"""The arguments of the command `erasure`; what each subcommand does stands in cli.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from erasure.version import __version__

EXAMPLES = """examples:
  erasure demo
  erasure erase cat --method esd -o cat.safetensors
  erasure generate "a cat" "a dog" --patch cat.safetensors -o out/
  erasure evaluate cat --patch cat.safetensors -o report/
"""
Add = Callable[..., argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="erasure",
        description="Make a text-to-image diffusion model forget a concept, and prove it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"erasure {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document, nothing else")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common, *parents])

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="glyph", help="glyph, a hub id, a diffusers folder or a .safetensors file")
    model.add_argument(
        "--device", help="where to compute: cpu, cuda, cuda:1, mps; default: an accelerator if there is one"
    )
    model.add_argument("--dtype", help="of the weights: fp32 (default), fp16, bf16")
    model.add_argument("--variant", help="which copy of the weights of a folder or hub id, such as fp16")
    model.add_argument(
        "--model-config", metavar="KIND", help="what a .safetensors file is, such as sd2-v, or a diffusers folder"
    )
    _erasing(add, model)
    _drawing(add, model)
    _bench(add)
    _patching(add, common, model)
    _sharing(add)
    _listing(add)
    return top


def _erasing(add: Add, model: argparse.ArgumentParser) -> None:
    demo = add("demo", "erase a concept from glyph, load the patch, measure, write a report")
    demo.add_argument("concept", nargs="?", default="cat")
    _folder(demo, "erasure-demo")

    what = argparse.ArgumentParser(add_help=False)
    what.add_argument("concept", nargs="+", help="a name; several are erased together")
    what.add_argument("--method", default="esd", help="see `erasure methods`")
    what.add_argument("--alias", action="append", default=[], help="another name of the concept; may be repeated")
    what.add_argument("--anchor", help="what its prompts should show instead")
    what.add_argument("--kind", help="object, style, identity or content")
    what.add_argument(
        "--keep",
        action="append",
        default=[],
        help="a neighbour to keep; may be repeated (esd has no retain term: there it is only recorded)",
    )
    what.add_argument("--config", type=Path, help="a YAML file of settings")
    what.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument(
        "--precision", help="of the UNet: fp32, bf16, fp16; default: bf16 on GPUs that have it, else fp32"
    )
    for flag, text in (
        ("--channels-last", "lay images out channels last, which convolutions on GPUs like"),
        ("--compile", "compile the UNet: worth it for long runs"),
        ("--gradient-checkpointing", "less memory, about a third more time"),
    ):
        what.add_argument(flag, action="store_true", default=None, help=text)

    erase = add("erase", "erase concepts and write the patch", model, what)
    erase.add_argument("--preview-every", type=int, metavar="STEPS", help="draw pictures on the way: FILE.previews")
    erase.add_argument("--log", action="append", default=[], help="tensorboard or wandb: FILE.logs; may be repeated")
    erase.add_argument("-o", "--out", type=Path, default=Path("patch.safetensors"))

    plan = add("plan", "forecast an erasure's cost: UNet calls, seconds, memory", model, what)
    plan.add_argument("--processes", type=int, default=1, help="that share the work, as a launcher starts them")


def _drawing(add: Add, model: argparse.ArgumentParser) -> None:
    patches = argparse.ArgumentParser(add_help=False)
    patches.add_argument(
        "--patch", action="append", default=[], metavar="FILE[:STRENGTH]", help="load a patch; may be repeated"
    )
    patches.add_argument("--force", action="store_true", help="load a patch of another base where the shapes fit")
    sampling = argparse.ArgumentParser(add_help=False)
    sampling.add_argument("--steps", type=int, help="sampling steps; default: 25, or what a suite says")
    sampling.add_argument("--guidance", type=float, help="classifier-free guidance; default: 3, or what a suite says")
    sampling.add_argument("--batch-size", type=int, default=16, help="pictures at once; default: %(default)s")

    asking = _asking()

    generate = add("generate", "make images, with patches or without", model, patches, sampling)
    generate.add_argument("prompt", nargs="*", help="prompts; or --prompts")
    generate.add_argument("--prompts", help="a prompt set: a name, a CSV file or hub:owner/name")
    generate.add_argument("--where", action="append", default=[], help='only rows that fit: "label=x", "number>5"')
    generate.add_argument("--seed", type=int, default=0)
    _folder(generate, "out")

    evaluate = add("evaluate", "measure what is erased and what is kept", model, patches, asking, sampling)
    evaluate.add_argument("concept", nargs="?", help="what should be gone; default: what the patches say")
    evaluate.add_argument("--suite", help="a recipe: a name (see `erasure suites`) or a YAML file")
    evaluate.add_argument("--data", type=Path, help="the folder of a suite's own files")
    evaluate.add_argument(
        "--inside", action="store_true", help="measure the weights too, without a judge: drift, margin, leak"
    )
    evaluate.add_argument(
        "--features",
        metavar="JUDGE",
        help="whose features KID and FD are over, such as inception; default: the judge's",
    )
    evaluate.add_argument(
        "--lpips", metavar="BACKBONE[:FILE]", help="LPIPS to the base at the same seed: alex, vgg or squeeze"
    )
    evaluate.add_argument("--reference", type=Path, help="a folder of pictures for KID and FD of the kept images")
    evaluate.add_argument("--limit", type=int, help="at most this many prompts")
    _folder(evaluate, "report")
    _attacking(add, model, patches, asking, sampling)


def _attacking(
    add: Add,
    model: argparse.ArgumentParser,
    patches: argparse.ArgumentParser,
    asking: argparse.ArgumentParser,
    sampling: argparse.ArgumentParser,
) -> None:
    attack = add("attack", "what an attacker gets back", model, patches, asking, sampling)
    attack.add_argument("concept", nargs="?", help="what was erased; default: what the patches say")
    attack.add_argument(
        "--attack", action="append", default=[], metavar="NAME", help="see --list; default: all; may be repeated"
    )
    attack.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="FOLDER|PATCH",
        help="for `--attack detune`: a published checkpoint, or a patch merged into one; two or more",
    )
    attack.add_argument("--list", action="store_true", help="name the attacks and end")
    attack.add_argument("--cases", type=int, default=12, help="prompts to attack; default: %(default)s")
    attack.add_argument("--budget", default="lite", help="lite (for a CPU) or full (as published)")
    attack.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the one attack")
    attack.add_argument("--seed", type=int, default=0)
    _folder(attack, "attack")

    verify = add(
        "verify", "measure and attack a patch, and write what was found into a copy of it", model, asking, sampling
    )
    verify.add_argument("file", help="a patch, or its name on the hub")
    verify.add_argument(
        "--attack",
        action="append",
        metavar="NAME",
        help="see `erasure attack --list`; default: unlearndiffatk, inversion and rece; `none` for none",
    )
    verify.add_argument("--limit", type=int, help="at most this many prompts")
    verify.add_argument("--cases", type=int, default=12, help="prompts to attack; default: %(default)s")
    verify.add_argument("--budget", default="lite", help="of the attacks: lite (for a CPU) or full (as published)")
    verify.add_argument("--force", action="store_true", help="verify on another base where the shapes fit")
    _folder(verify, "verified")


def _asking() -> argparse.ArgumentParser:
    """Which prompts are asked, and who judges the pictures."""
    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument(
        "--prompts",
        help="a prompt set: a name (see `erasure prompts`), hub:owner/name, or a CSV file of id, prompt, seed and "
        "labels, such as object and style, that say what the judge should see",
    )
    asking.add_argument("--where", action="append", default=[], help='only rows that fit: "label=x", "number>5"')
    asking.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="HEAD=VALUE",
        help="what every row of --prompts asks for, where the file does not say: object=church",
    )
    asking.add_argument(
        "--judge",
        metavar="JUDGE[+JUDGE]",
        help="such as nudenet, clip:MODEL?labels=cat,dog, classifier:MODEL; joined by +, or in any(A+B) or "
        "all(A+B), several; default: glyph",
    )
    return asking


def _folder(command: argparse.ArgumentParser, default: str) -> None:
    """The option that says where to write."""
    command.add_argument("-o", "--out", type=Path, default=Path(default), help="where to write; default: %(default)s")


def _bench(add: Add) -> None:
    bench = add("bench", "methods x concepts on glyph, as a table")
    bench.add_argument("--methods", nargs="+", default=["all"], help="names, or all")
    several = '"a+b": by one patch, "a&b": by stacked ones'
    bench.add_argument("--concepts", nargs="+", help=f"default: configs/concepts/glyph.yaml; {several}")
    bench.add_argument("--limit", type=int, help="prompts a concept, about")
    bench.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    _folder(bench, "build/bench")


def _patching(add: Add, common: argparse.ArgumentParser, model: argparse.ArgumentParser) -> None:
    patch = add("patch", "look into a patch, or carry it from and to the files of published code")
    actions = patch.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text, parents=[common, *parents])

    action("info", "what a patch holds, what loads it, what export makes of it").add_argument("file", type=Path)
    action("formats", "the published formats that are read and written")
    bring = action("import", "a patch from a published file or folder")
    bring.add_argument("file")
    bring.add_argument("--model", default="glyph", help="the base that it must fit; full weights are compared with it")
    bring.add_argument("--format", default="auto", help="of the file, see `erasure patch formats`; default: look at it")
    bring.add_argument("--concept", action="append", default=[], help="what it erases; may be repeated")
    bring.add_argument("--allow-pickle", action="store_true", help="read a .pt or .pth: as data, nothing in it is run")
    carry = action("export", "a patch as a published file or folder")
    carry.add_argument("file", type=Path)
    carry.add_argument("--format", required=True, help="see `erasure patch formats`")
    carry.add_argument("--rank", type=int, help="cut differences to a LoRA of this rank; the error is stated")
    carry.add_argument("--model", help="the base, for formats that hold weights; default: the one the patch names")
    carry.add_argument("--force", action="store_true", help="write onto another base where the shapes fit")
    for command in (bring, carry):
        command.add_argument("-o", "--out", type=Path, required=True, help="where to write")
    _algebra(action)


def _algebra(action: Add) -> None:
    """Patches from patches. Files are texts, not paths: a name on the hub will do as well."""
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("file", help="a patch, or its name on the hub")
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("-o", "--out", type=Path, required=True, help="where to write")
    dtyped = argparse.ArgumentParser(add_help=False)
    dtyped.add_argument("--dtype", help="of the tensors: fp32, bf16 or fp16; default: fp32")
    based = argparse.ArgumentParser(add_help=False)
    based.add_argument("--model", help="the base, where it has to be read; default: what the patches say")
    based.add_argument("--force", action="store_true", help="go on with other or unrecorded bases where the shapes fit")
    gated = argparse.ArgumentParser(add_help=False)
    gated.add_argument("--drop-gate", action="store_true", help="let the result act on every prompt")

    scale = action("scale", "a patch with every change times a factor", one, written, dtyped)
    scale.add_argument("factor", type=float, help="such as 0.5 or -1")
    action("negate", "the patch that undoes a patch", one, written, dtyped)
    merge = action("merge", "one patch that does what several do, weighted", written, dtyped, based, gated)
    merge.add_argument("file", nargs="+", metavar="FILE[:WEIGHT]", help="patches, or their names on the hub")
    subtract = action("subtract", "a patch without what another does", one, written, dtyped, based, gated)
    subtract.add_argument("other", help="what is taken away")
    resize = action("resize", "a smaller patch, and how much it differs", one, dtyped, based)
    resize.add_argument("--rank", type=int, help="in each layer at most")
    resize.add_argument("--energy", type=float, help="share of each layer's squared change to keep, such as 0.9")
    resize.add_argument("--drop", action="store_true", help="leave out biases, norms and embeddings, as error")
    resize.add_argument("--report", action="store_true", help="only tell what each rank would take and lose")
    resize.add_argument("-o", "--out", type=Path, help="where to write; with --report, a PNG chart")
    diff = action("diff", "the patch that leads from one checkpoint to another", written, dtyped)
    diff.add_argument("base", help="glyph, a diffusers folder, a .safetensors file or a hub id")
    diff.add_argument("other", help="the same, with the concept gone")
    diff.add_argument("--concept", action="append", required=True, help="what is gone there; may be repeated")
    diff.add_argument("--component", action="append", help="unet, text_encoder or text_encoder_2; default: all")
    conflicts = action("conflicts", "which patches touch the same weights, and whether they pull the same way")
    conflicts.add_argument("file", nargs="+", help="patches, or their names on the hub")


def _sharing(add: Add) -> None:
    push = add("push", "put a patch with its model card on the Hugging Face hub")
    push.add_argument("file", type=Path)
    push.add_argument("repository", help="owner/name")
    push.add_argument("--folder", type=Path, help="lay the repository out here, and upload nothing")
    push.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    push.add_argument("--license", help="of the patch, as the hub calls it, such as openrail")
    push.add_argument("--message", help="of the commit")
    pull = add("pull", "fetch a patch from the Hugging Face hub and check it")
    pull.add_argument("source", help="owner/name[@revision][/file.safetensors], or a folder of that layout")
    pull.add_argument("-o", "--out", type=Path, help="where to write; default: its own name, here")
    pull.add_argument("--overwrite", action="store_true", help="replace another file that is there")


def _listing(add: Add) -> None:
    methods = add("methods", "the methods there are; with a name, its settings")
    methods.add_argument("name", nargs="?")
    models = add("models", "the models there are; with a name, what each variant of a method would train in it")
    models.add_argument("name", nargs="?", help="as --model, or sd1, sd2, sd2-v, sdxl")
    suites = add("suites", "the suites that come with the package; with a name, its parts")
    suites.add_argument("name", nargs="?")
    prompts = add("prompts", "the prompt sets that come with the package; with a name, its rows")
    prompts.add_argument("name", nargs="?")
