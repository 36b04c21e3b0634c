"""Commands that draw and judge: generate, evaluate, attack, verify."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from erasure.cli.inputs import model, pipeline, say, strength
from erasure.errors import ErasureError


def run_generate(given: argparse.Namespace) -> None:
    """`erasure generate`."""
    from erasure.evaluation.generate import GUIDANCE, STEPS, generate
    from erasure.prompts.prompt_set import PromptSet
    from erasure.prompts.row import Prompt

    if bool(given.prompt) == bool(given.prompts):
        raise ErasureError("give prompts, or a prompt set with --prompts, and not both")
    if given.prompts:
        rows = _rows(given)
    else:
        rows = PromptSet(
            "command", [Prompt(f"{i:04d}", text, given.seed + i, None, {}) for i, text in enumerate(given.prompt)]
        )
    made = generate(
        pipeline(given),
        rows,
        given.out,
        steps=given.steps or STEPS,
        guidance=GUIDANCE if given.guidance is None else given.guidance,
        batch_size=given.batch_size,
        progress=not given.json,
    )
    say(
        given,
        {"folder": str(given.out), "images": len(made)},
        f"{given.out}: {len(made)} image{'s' * (len(made) != 1)}",
    )


def run_evaluate(given: argparse.Namespace) -> None:
    """`erasure evaluate`."""
    from erasure.evaluation import evaluate
    from erasure.evaluation.judges.registry import check_judge
    from erasure.evaluation.suite import Suite, run_suite

    concept = _gone(given)
    options = {
        "folder": given.out,
        "limit": given.limit,
        "steps": given.steps,
        "guidance": given.guidance,
        "batch_size": given.batch_size,
        "progress": not given.json,
    }
    measures = {"features": given.features, "lpips": given.lpips, "reference": given.reference}
    if given.suite:
        if given.inside:
            raise ErasureError("--inside goes with --prompts, not with --suite")
        if given.prompts or given.where or given.label:
            raise ErasureError("a suite brings its own prompts: give --suite, or --prompts, --where and --label")
        suite = Suite.read(given.suite)
        if given.judge:
            check_judge(given.judge)  # a slip is said now; a judge whose model is missing, after the pictures are drawn
        found = run_suite(
            pipeline(given), concept, suite, data=given.data, judge=given.judge, measures=measures, **options
        )
        written = _more(given) if found.report else str(given.out / "suite.json")
        say(given, found.to_json(), f"{found.text()}\n{written}")
        return
    rows = _rows(given)
    if rows is not None:
        options["prompts"] = rows
    report = evaluate(pipeline(given), concept, judge=_judge(given), within=given.inside, **measures, **options)
    say(given, report.to_json(), f"{report.text()}\n{_more(given)}")


def _more(given: argparse.Namespace) -> str:
    return f"{given.out / 'report.html'}: what each figure means, and the pictures"


def _rows(given: argparse.Namespace) -> Any:
    """The prompt set of the command line, those of its rows that fit, with its labels; None: none is named."""
    from erasure.prompts.prompt_set import PromptSet

    labels = getattr(given, "label", [])
    if not given.prompts:
        if given.where or labels:
            raise ErasureError("--where and --label are about the rows of --prompts")
        return None
    rows = PromptSet.read(given.prompts)
    rows = rows.where(*given.where) if given.where else rows
    return rows.labelled(*labels) if labels else rows


def _judge(given: argparse.Namespace) -> Any:
    """The judge of the command line, or None for the usual one."""
    from erasure.evaluation.judges.registry import find_judge

    return find_judge(given.judge) if given.judge else None


def _gone(given: argparse.Namespace) -> Any:
    """What should be gone: the concept of the command line, or what the patches say."""
    if given.concept is not None:
        return given.concept
    return _gone_from([strength(item)[0] for item in given.patch])


def _gone_from(files: list[str]) -> list[str]:
    """The concepts that patch files say they erase."""
    from erasure.patch import read_header

    if not files or any(Path(file).is_dir() for file in files):
        raise ErasureError("say which concept should be gone, or give --patch")
    return [entry["name"] for file in files for entry in json.loads(read_header(file)["erasure.concepts"])]


def run_attack(given: argparse.Namespace) -> None:
    """`erasure attack`."""
    from erasure.config import parse_overrides
    from erasure.evaluation.attacks import detuning
    from erasure.evaluation.attacks.attack import find, names
    from erasure.evaluation.attacks.run import attack

    if given.list:
        rows = {name: (find(name).__doc__ or "").split("\n")[0] for name in names()}
        rows[detuning.NAME] = (detuning.detuning.__doc__ or "").split("\n")[0]
        say(given, rows, "\n".join(f"{name:20}{text}" for name, text in rows.items()))
        return
    shared = {
        "folder": given.out,
        "prompts": _rows(given),
        "cases": given.cases,
        "settings": parse_overrides(given.set),
        "judge": _judge(given),
        "steps": given.steps,
        "guidance": given.guidance,
        "batch_size": given.batch_size,
    }
    if given.export or detuning.NAME in given.attack:
        if given.attack != [detuning.NAME] or given.patch:
            raise ErasureError(
                f"--export belongs to `--attack {detuning.NAME}` alone, which takes no --patch: name patches as exports"
            )
        concept = given.concept or _gone_from(given.export[:1])
        report = detuning.detuning(model(given), concept, given.export, force=given.force, **shared)
    else:
        options = {"budget": given.budget, "seed": given.seed, "progress": not given.json}
        report = attack(pipeline(given), _gone(given), given.attack or "all", **shared, **options)
    say(given, report.to_json(), f"{report.text()}\n{given.out / 'report.html'}")


def run_verify(given: argparse.Namespace) -> None:
    """`erasure verify`."""
    from erasure.evaluation.verify import ATTACKS, verify
    from erasure.patch import read_header

    read_header(given.file)  # a bad file fails before the model loads
    found = verify(
        model(given),
        given.file,
        folder=given.out,
        attacks=ATTACKS if given.attack is None else [name for name in given.attack if name != "none"],
        prompts=_rows(given) if given.where or given.label else given.prompts,  # the card repeats a name, not rows
        limit=given.limit,
        cases=given.cases,
        budget=given.budget,
        judge=_judge(given),
        force=given.force,
        steps=given.steps,
        guidance=given.guidance,
        batch_size=given.batch_size,
        progress=not given.json,
    )
    say(given, found.to_json(), found.text())
