"""Commands that test whether an erasure holds: attack, verify."""

from __future__ import annotations

import argparse
from typing import Any

from erasure.cli import choices, reports
from erasure.cli.arguments import FILE, Commands, Options, Parser
from erasure.cli.inputs import concepts_of, erased_concepts, judge, model, pipeline, prompt_rows
from erasure.cli.options import (
    FORCE,
    add_folder,
    add_model,
    add_patches,
    add_prompts,
    add_sampling,
    add_seed,
    add_settings,
)
from erasure.cli.output import say
from erasure.errors import ErasureError

GLYPH = "glyph"  # the default of --model


def add_commands(commands: Commands) -> None:
    """Add attack and verify."""
    commands.add(
        "attack",
        "Try to recover the erased concept and report the attack success rate",
        run_attack,
        _attack_arguments,
        "Reports how often the concept is recovered, next to a control: equally many tries without a search.",
        "erasure attack --patch cat.safetensors --attack rece --cases 4 -o attack",
    )
    commands.add(
        "verify",
        "Evaluate and attack a patch, and write the results into a copy of it",
        run_verify,
        _verify_arguments,
        "Also writes a model card with the command that repeats the measurement. Verifying a verified patch compares "
        "the results. The given file is never changed.",
        "erasure verify cat.safetensors --attack rece --limit 20 --cases 4 -o verified\n"
        "erasure verify cat.safetensors -o verified --certificate\n"
        "erasure verify verified --check",
    )


def _attack_arguments(parser: Parser) -> None:
    Options(parser, "concept").add(
        "concept", nargs="?", metavar="CONCEPT", shown="the concepts that the patches name", help="What was erased"
    )
    attacks = Options(parser, "attacks")
    attacks.add(
        "--attack",
        metavar="ATTACK",
        names=choices.ATTACKS,
        repeat=True,
        shown="all but detune",
        see="erasure list attacks",
        help="Attack to run",
    )
    _search_arguments(attacks)
    add_settings(attacks, "the attack, where only one is run", "erasure list attacks NAME")
    attacks.add(
        "--export",
        metavar="FOLDER|PATCH",
        repeat=True,
        completes=FILE,
        help="Published checkpoint, or patch to be merged into one, for `--attack detune`, which needs two or more",
    )
    add_seed(attacks)
    attacks.add("--list", action="store_true", help="List the attacks and exit, as `erasure list attacks` does")
    add_prompts(parser, "prompts about the concept")
    add_model(parser)
    add_patches(parser)
    add_sampling(parser, suites=False)
    add_folder(Options(parser, "output"), "attack")


def _verify_arguments(parser: Parser) -> None:
    patch = Options(parser, "patch")
    text = "Patch file, or the name of a patch on the hub; with --check, the folder of a certificate"
    patch.add("file", metavar="FILE", completes=FILE, help=text)
    patch.add("--force", action="store_true", help=FORCE)
    _certificate_arguments(Options(parser, "certificate"))
    attacks = Options(parser, "attacks")
    attacks.add(
        "--attack",
        metavar="ATTACK",
        names=("none", *choices.ATTACKS[:-1]),
        repeat=True,
        default=None,
        shown="unlearndiffatk, inversion and rece",
        help="Attack to run, or none",
    )
    _search_arguments(attacks)
    prompts = add_prompts(parser, "prompts about the concept, its neighbours and others")
    prompts.add("--limit", type=int, metavar="N", shown="all", help="Use at most this many prompts in the evaluation")
    add_model(parser)
    add_sampling(parser, suites=False)
    add_folder(Options(parser, "output"), "verified")


def _certificate_arguments(certificate: Options) -> None:
    certificate.add(
        "--certificate",
        action="store_true",
        help="Also write a certificate for people who read no tables, as HTML and, where Chromium is installed, PDF",
    )
    certificate.add(
        "--sign",
        metavar="KEY",
        completes=FILE,
        help="Sign the certificate with this private Ed25519 key (PEM or OpenSSH)",
    )
    certificate.add(
        "--check",
        action="store_true",
        help="Check a certificate instead: its signature, and whether page, patch and model (--model, or none) are "
        "those it was written for; exit code 1 if anything differs",
    )
    certificate.add(
        "--key", metavar="KEY", completes=FILE, help="Public key of the signer, for --check (PEM or OpenSSH)"
    )


def _search_arguments(attacks: Options) -> None:
    attacks.add("--cases", type=int, default=12, metavar="N", help="Number of prompts to attack")
    attacks.add(
        "--budget",
        default="lite",
        metavar="BUDGET",
        help="Effort of each attack: lite, adapted to a CPU, or full, as published",
    )


def run_attack(args: argparse.Namespace) -> None:
    """Run `erasure attack`."""
    from erasure.cli.listing import run_attacks
    from erasure.config import parse_overrides
    from erasure.evaluation.attacks import detuning
    from erasure.evaluation.attacks.run import attack

    if args.list:
        run_attacks(args)
        return
    shared = {
        "folder": args.out,
        "prompts": prompt_rows(args),
        "cases": args.cases,
        "settings": parse_overrides(args.set),
        "judge": judge(args),
        "steps": args.steps,
        "guidance": args.guidance,
        "batch_size": args.batch_size,
    }
    if args.export or detuning.NAME in args.attack:
        if args.attack != [detuning.NAME] or args.patch:
            raise ErasureError(
                f"--export belongs to `--attack {detuning.NAME}` alone, which takes no --patch: name patches as exports"
            )
        concept = args.concept or concepts_of(args.export[:1])
        report = detuning.detuning(model(args), concept, args.export, force=args.force, **shared)
    else:
        options = {"budget": args.budget, "seed": args.seed, "progress": not args.json}
        report = attack(pipeline(args), erased_concepts(args), args.attack or "all", **shared, **options)
    say(args, report.to_json(), *reports.attacks(report), f"\nReport: {args.out / 'report.html'}")


def run_verify(args: argparse.Namespace) -> int:
    """Run `erasure verify`."""
    from erasure.evaluation.certificate import certify
    from erasure.evaluation.signing import private_key
    from erasure.evaluation.verify import ATTACKS, verify
    from erasure.patch import read_header

    _check_certificate_options(args)
    if args.check:
        return run_check(args)
    key = None if args.sign is None else private_key(args.sign)  # a bad key or file fails before the model loads
    read_header(args.file)
    pipe = model(args)
    verification = verify(
        pipe,
        args.file,
        folder=args.out,
        attacks=ATTACKS if args.attack is None else [name for name in args.attack if name != "none"],
        prompts=prompt_rows(args) if args.where or args.label else args.prompts,  # the card repeats a name, not rows
        limit=args.limit,
        cases=args.cases,
        budget=args.budget,
        judge=judge(args),
        force=args.force,
        steps=args.steps,
        guidance=args.guidance,
        batch_size=args.batch_size,
        progress=not args.json,
    )
    data, texts = verification.to_json(), [verification.text()]
    if args.certificate:
        certificate = certify(verification, pipe, key=key)
        data["certificate"] = certificate.to_json()
        texts.append(certificate.text())
    say(args, data, *texts)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Run `erasure verify --check`."""
    from erasure.evaluation.certificate_check import NO_MODEL, check_certificate
    from erasure.evaluation.signing import public_key

    public = None if args.key is None else public_key(args.key)

    def load(name: str) -> Any:
        """Load the model of the command line; a certificate alone does not make anybody load what it names."""
        if args.model == GLYPH and name != GLYPH:
            raise ErasureError(
                f"the certificate is for the model {name}: give --model with your copy of it, or --model {NO_MODEL} to "
                "leave the model out; nothing was checked"
            )
        return model(args)

    found = check_certificate(args.file, public=public, model=None if args.model == NO_MODEL else load)
    say(args, found.to_json(), found.text())
    return 1 if found.differs else 0


def _check_certificate_options(args: argparse.Namespace) -> None:
    """Refuse options of a certificate that contradict each other.

    Raises:
        ErasureError: they do.
    """
    if args.check and (args.certificate or args.sign):
        raise ErasureError("--check reads a certificate, and --certificate and --sign write one: give one of them")
    if args.sign is not None and not args.certificate:
        raise ErasureError("--sign signs a certificate: give --certificate, too")
    if args.key is not None and not args.check:
        raise ErasureError("--key is the public key for --check; --sign takes the private key for --certificate")
