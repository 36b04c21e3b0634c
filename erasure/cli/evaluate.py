"""Commands that draw and judge images: generate, evaluate."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from erasure.cli import choices, reports
from erasure.cli.arguments import FILE, FOLDER, Commands, Options, Parser
from erasure.cli.inputs import erased_concepts, judge, pipeline, prompt_rows
from erasure.cli.options import (
    add_folder,
    add_model,
    add_patches,
    add_prompts,
    add_sampling,
    add_seed,
    add_where,
)
from erasure.cli.output import say
from erasure.errors import ErasureError


def add_commands(commands: Commands) -> None:
    """Add generate and evaluate."""
    commands.add(
        "generate",
        "Generate images, with or without patches",
        run_generate,
        _generate_arguments,
        examples='erasure generate "a cat" "a dog" --patch cat.safetensors:0.5 -o out',
    )
    commands.add(
        "evaluate",
        "Measure what is erased and what is kept",
        run_evaluate,
        _evaluate_arguments,
        "Draws a prompt set with the patches and, from the same seeds, without them; lets a judge say what the images "
        "show; writes the metrics and the images as report.json and report.html.",
        "erasure evaluate cat --patch cat.safetensors --limit 80 -o report\n"
        "erasure evaluate cat --patch cat.safetensors --suite glyph-quick",
    )


def _generate_arguments(parser: Parser) -> None:
    prompts = Options(parser, "prompts")
    prompts.add("prompt", nargs="*", metavar="PROMPT", help="Text to draw; image i gets the seed of --seed plus i")
    prompts.add(
        "--prompts",
        metavar="SET",
        names=choices.prompt_sets(),
        completes=FILE,
        help="Prompt set to draw instead: hub:owner/name, a file, or a bundled one",
    )
    add_where(prompts)
    add_seed(prompts)
    add_model(parser)
    add_patches(parser)
    add_sampling(parser, suites=False)
    add_folder(Options(parser, "output"), "out")


def _evaluate_arguments(parser: Parser) -> None:
    Options(parser, "concept").add(
        "concept", nargs="?", metavar="CONCEPT", shown="the concepts that the patches name", help="What should be gone"
    )
    prompts = add_prompts(parser, "prompts about the concept, its neighbours and others")
    prompts.add(
        "--limit", type=int, metavar="N", shown="all", help="Use at most this many prompts (of each part of a suite)"
    )
    suite = Options(parser, "suite")
    suite.add(
        "--suite",
        metavar="SUITE",
        names=choices.suites(),
        completes=FILE,
        see="erasure list suites",
        help="Run a recipe of prompts, judge and attacks instead of --prompts: a YAML file, or a bundled one",
    )
    suite.add("--data", type=Path, metavar="FOLDER", completes=FOLDER, help="Folder with the files that a suite needs")
    measures = Options(parser, "further measures")
    measures.add(
        "--inside",
        action="store_true",
        help="Also measure the weights, without a judge: drift, margin and leak of the concept",
    )
    measures.add(
        "--features",
        metavar="JUDGE",
        shown="the judge's",
        help="Feature extractor for KID and FD, for example inception",
    )
    measures.add(
        "--lpips",
        metavar="BACKBONE[:FILE]",
        names=choices.BACKBONES,
        help="Also measure LPIPS between the images with and without the patches, with one of these backbones",
    )
    measures.add(
        "--scorer",
        metavar="KIND:SOURCE",
        help="Also rate the images, for example with aesthetic:FILE.safetensors, LAION's predictor over CLIP",
    )
    measures.add(
        "--reference",
        type=Path,
        metavar="FOLDER",
        completes=FOLDER,
        help="Also measure KID and FD of the kept images to the images in this folder",
    )
    add_model(parser)
    add_patches(parser)
    add_sampling(parser)
    output = Options(parser, "output")
    add_folder(output, "report")
    output.add(
        "--base-images",
        type=Path,
        metavar="FOLDER",
        shown="OUT/base",
        completes=FOLDER,
        help="Folder for the images without patches; runs on one model that name the same folder draw them once",
    )
    output.add(
        "--submission",
        nargs="*",
        type=Path,
        metavar="ATTACKS",
        completes=FILE,
        help="Also write the file of results that eval-unlearn ranks, with the success rates in these reports "
        "(report.json) of erasure attack",
    )


def run_generate(args: argparse.Namespace) -> None:
    """Run `erasure generate`."""
    from erasure.evaluation.generate import generate
    from erasure.prompts.prompt_set import PromptSet
    from erasure.prompts.row import Prompt

    if bool(args.prompt) == bool(args.prompts):
        raise ErasureError("give prompts, or a prompt set with --prompts, and not both")
    if args.prompts:
        rows = prompt_rows(args)
    else:
        texts = enumerate(args.prompt)
        rows = PromptSet("command", [Prompt(f"{i:04d}", text, args.seed + i, None, {}) for i, text in texts])
    images = generate(
        pipeline(args),
        rows,
        args.out,
        steps=args.steps,
        guidance=args.guidance,
        batch_size=args.batch_size,
        progress=not args.json,
    )
    say(
        args,
        {"folder": str(args.out), "images": len(images)},
        f"{args.out}: {len(images)} image{'s' * (len(images) != 1)}",
    )


def run_evaluate(args: argparse.Namespace) -> int:
    """Run `erasure evaluate`, and return its exit code."""
    from erasure.evaluation import evaluate

    concept = erased_concepts(args)
    options = {
        "folder": args.out,
        "limit": args.limit,
        "steps": args.steps,
        "guidance": args.guidance,
        "batch_size": args.batch_size,
        "progress": not args.json,
        "base_folder": args.base_images,
    }
    measures = {"features": args.features, "lpips": args.lpips, "reference": args.reference, "scorer": args.scorer}
    if args.suite:
        return _run_suite(args, concept, measures, options)
    rows = prompt_rows(args)
    if rows is not None:
        options["prompts"] = rows
    attacks = [_attack_report(path) for path in args.submission or ()]
    report = evaluate(pipeline(args), concept, judge=judge(args), within=args.inside, **measures, **options)
    written = _written(args) + _write_submission(args, report, attacks)
    say(args, report.to_json(), *reports.evaluation(report), written)
    return 0


def _run_suite(args: argparse.Namespace, concept: Any, measures: dict[str, Any], options: dict[str, Any]) -> int:
    from erasure.evaluation.judges.registry import check_judge
    from erasure.evaluation.suite import Suite, run_suite

    if args.inside:
        raise ErasureError("--inside works with --prompts, not with --suite")
    if args.prompts or args.where or args.label:
        raise ErasureError("a suite brings its own prompts: give either --suite, or --prompts with --where and --label")
    suite = Suite.read(args.suite)
    if args.judge:
        check_judge(args.judge)  # a typo is reported now; a judge whose model is missing, after the images are drawn
    attacks = [_attack_report(path) for path in args.submission or ()]
    outcome = run_suite(pipeline(args), concept, suite, data=args.data, judge=args.judge, measures=measures, **options)
    written = _written(args) if outcome.report else f"\nWritten: {args.out / 'suite.json'}"
    if outcome.report:
        attacks += [outcome.attacks.to_json()] if outcome.attacks else []
        written += _write_submission(args, outcome.report, attacks)
    say(args, outcome.to_json(), *reports.suite(outcome), written)
    return 1 if outcome.missing else 0


def _attack_report(path: Path) -> dict[str, Any]:
    """Read a report of `erasure attack`, before anything is drawn."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise ErasureError(f"{path} is no report.json of erasure attack: {fault}. Nothing was drawn") from None
    if not isinstance(data, dict) or "attacks" not in data:
        raise ErasureError(f"{path} is no report.json of erasure attack. Nothing was drawn")
    return data


def _write_submission(args: argparse.Namespace, report: Any, attacks: list[dict[str, Any]]) -> str:
    """Write eval-unlearn's file if it was asked for, and return a line that names it and what it lacks."""
    if args.submission is None:
        return ""
    from erasure.evaluation.report.submission import file_name, submission
    from erasure.evaluation.text_files import write_text

    data = submission(report.to_json(), attacks, time.time())
    path = args.out / file_name(data)
    write_text(path, json.dumps(data, indent=4))
    lacks = ", ".join(data["not_measured"])
    return f"\nFor eval-unlearn: {path}" + (f" (not measured: {lacks})" if lacks else "")


def _written(args: argparse.Namespace) -> str:
    return f"\nReport: {args.out / 'report.html'} (what each figure means, and the images)"
