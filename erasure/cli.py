"""The command `erasure`: parses, calls the Python API, prints. Heavy imports stay inside the subcommands."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from erasure.arguments import parser
from erasure.errors import ErasureError


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    given = parser().parse_args(argv)
    _quiet()
    try:
        RUN[given.command](given)
    except ErasureError as fault:
        return _fail(given, str(fault), 2)
    except KeyboardInterrupt:
        return _fail(given, "interrupted; the same command goes on from here", 130)
    except BrokenPipeError:
        return 1
    except Exception as fault:
        if given.debug:
            raise
        return _fail(given, f"{type(fault).__name__}: {fault} (--debug shows where)", 1)
    return 0


def _fail(given: argparse.Namespace, message: str, code: int) -> int:
    if given.json:
        print(json.dumps({"error": message}))
    print(f"erasure: {message}", file=sys.stderr)
    return code


def _quiet() -> None:
    """Libraries' banners hide our own messages: only their errors are shown."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _say(given: argparse.Namespace, data: Any, text: str) -> None:
    from erasure.evaluation.shards import speaks

    if speaks():  # one of the processes that a launcher started
        print(json.dumps(data, indent=1) if given.json else text)


def _pipeline(given: argparse.Namespace) -> Any:
    """The model with the patches of the command line, which are read first: they fail quicker."""
    from erasure.patch import Patch

    files = [(Patch.load(path), strength) for path, strength in map(_strength, given.patch)]
    pipe = _model(given)
    for patch, strength in files:
        pipe.load_patch(patch, strength=strength, force=given.force)
    return pipe


def _model(given: argparse.Namespace) -> Any:
    """The model without patches."""
    from erasure.base import Base, quiet

    quiet()
    pipe = Base.load(given.model, device=given.device).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _strength(item: str) -> tuple[str, float]:
    """`file` or `file:0.5`."""
    path, sign, number = item.rpartition(":")
    if not sign or Path(item).is_file():
        return item, 1.0
    try:
        return path, float(number)
    except ValueError:
        return item, 1.0


def run_demo(given: argparse.Namespace) -> None:
    """`erasure demo`."""
    from erasure.base import quiet
    from erasure.demo import demo

    quiet()
    say = (lambda _: None) if given.json else print
    found = demo(given.concept, given.out, progress=not given.json, say=say)
    _say(given, found.to_json(), f"{found.summary}\n4. {found.seconds:.0f} s; the report: {found.report}")


def _concepts(given: argparse.Namespace) -> list[Any]:
    """The concepts of the command line.

    Raises:
        ErasureError: an alias, an anchor or a neighbour for several concepts at once.
    """
    from erasure.concept import Concept

    details = {"aliases": given.alias, "anchor": given.anchor, "keep": given.keep, "kind": given.kind}
    details = {key: value for key, value in details.items() if value}
    if len(given.concept) > 1 and details.keys() - {"kind"}:
        raise ErasureError(
            "--alias, --anchor and --keep belong to one concept: erase several from Python, "
            "erase(model, [{'name': .., 'anchor': ..}, ..])"
        )
    return Concept.list_of([{"name": name, **details} if details else name for name in given.concept])


def run_erase(given: argparse.Namespace) -> None:
    """`erasure erase`."""
    from erasure.base import Base, quiet
    from erasure.config import parse_overrides
    from erasure.methods import erase

    concepts = _concepts(given)
    quiet()
    patch = erase(
        Base.load(given.model, device=given.device),
        concepts,
        given.method,
        out=given.out,
        config=given.config,
        seed=given.seed,
        progress=False if given.json else None,
        preview_every=given.preview_every,
        trackers=given.log,
        **parse_overrides(given.set),
    )
    names = ", ".join(repr(one.name) for one in concepts)
    costs = patch.costs
    text = f"{given.out}: {given.method} erases {names}, {costs['F']} F + {costs['B']} B, {costs['seconds']} s"
    _say(given, {"patch": str(given.out), **patch.info()}, text)


def run_plan(given: argparse.Namespace) -> None:
    """`erasure plan`."""
    from erasure.base import quiet
    from erasure.config import parse_overrides, read_yaml
    from erasure.plan import plan

    concepts = _concepts(given)
    settings = read_yaml(given.config) if given.config else {}
    quiet()
    found = plan(given.model, concepts, given.method, seed=given.seed, **{**settings, **parse_overrides(given.set)})
    _say(given, found.to_json(), found.text())


def run_generate(given: argparse.Namespace) -> None:
    """`erasure generate`."""
    from erasure.evaluation.generate import GUIDANCE, STEPS, generate
    from erasure.evaluation.promptset import Prompt, PromptSet

    if bool(given.prompt) == bool(given.prompts):
        raise ErasureError("give prompts, or a prompt set with --prompts, and not both")
    if given.prompts:
        rows = PromptSet.read(given.prompts)
    else:
        rows = PromptSet(
            "command", [Prompt(f"{i:04d}", text, given.seed + i, None, {}) for i, text in enumerate(given.prompt)]
        )
    made = generate(
        _pipeline(given),
        rows,
        given.out,
        steps=given.steps or STEPS,
        guidance=GUIDANCE if given.guidance is None else given.guidance,
        batch_size=given.batch_size,
        progress=not given.json,
    )
    _say(given, {"folder": str(given.out), "images": len(made)}, f"{given.out}: {len(made)} images")


def run_evaluate(given: argparse.Namespace) -> None:
    """`erasure evaluate`."""
    from erasure.evaluation import evaluate

    concept = _gone(given)
    options = {"prompts": given.prompts} if given.prompts else {}
    report = evaluate(
        _pipeline(given),
        concept,
        folder=given.out,
        limit=given.limit,
        steps=given.steps,
        guidance=given.guidance,
        batch_size=given.batch_size,
        progress=not given.json,
        **options,
    )
    _say(given, report.to_json(), f"{report.text()}\n{given.out / 'report.html'}")


def _gone(given: argparse.Namespace) -> Any:
    """What should be gone: the concept of the command line, or what the patches say."""
    from erasure.patch import read_header

    if given.concept is not None:
        return given.concept
    if not given.patch:
        raise ErasureError("say which concept should be gone, or give --patch")
    concepts = [
        entry for item in given.patch for entry in json.loads(read_header(_strength(item)[0])["erasure.concepts"])
    ]
    return [entry["name"] for entry in concepts]


def run_attack(given: argparse.Namespace) -> None:
    """`erasure attack`."""
    from erasure.config import parse_overrides
    from erasure.evaluation.attacks import find, names
    from erasure.evaluation.attacks.run import attack

    if given.list:
        rows = {name: (find(name).__doc__ or "").split("\n")[0] for name in names()}
        _say(given, rows, "\n".join(f"{name:20}{text}" for name, text in rows.items()))
        return
    report = attack(
        _pipeline(given),
        _gone(given),
        given.attack or "all",
        folder=given.out,
        prompts=given.prompts,
        cases=given.cases,
        budget=given.budget,
        settings=parse_overrides(given.set),
        steps=given.steps,
        guidance=given.guidance,
        batch_size=given.batch_size,
        seed=given.seed,
        progress=not given.json,
    )
    _say(given, report.to_json(), f"{report.text()}\n{given.out / 'report.html'}")


def run_verify(given: argparse.Namespace) -> None:
    """`erasure verify`."""
    from erasure.evaluation.verify import ATTACKS, verify
    from erasure.patch import read_header

    read_header(given.file)  # a bad file fails before the model loads
    found = verify(
        _model(given),
        given.file,
        folder=given.out,
        attacks=ATTACKS if given.attack is None else [name for name in given.attack if name != "none"],
        prompts=given.prompts,
        limit=given.limit,
        cases=given.cases,
        budget=given.budget,
        force=given.force,
        steps=given.steps,
        guidance=given.guidance,
        batch_size=given.batch_size,
        progress=not given.json,
    )
    _say(given, found.to_json(), found.text())


def run_patch(given: argparse.Namespace) -> None:
    """`erasure patch info|import|export`."""
    from erasure.patch import Patch

    if given.action != "info":
        from erasure.base import quiet
        from erasure.formats import export_patch, import_patch

        if given.out is None:
            raise ErasureError(f"patch {given.action}: say where to write with -o")
        if given.action == "export":
            export_patch(Patch.load(given.file), given.out, given.format)
        else:
            quiet()
            import_patch(given.file, given.format, given.model).save(given.out)
        _say(given, {"file": str(given.out)}, f"{given.out}: written")
        return
    found = Patch.load(given.file).info()
    width = max(map(len, found))
    lines = [f"{key:{width}}  {value if isinstance(value, str) else json.dumps(value)}" for key, value in found.items()]
    _say(given, found, "\n".join(lines))


def run_methods(given: argparse.Namespace) -> None:
    """`erasure methods`."""
    import dataclasses
    import inspect

    from erasure import methods

    if given.name:
        cls = methods.find(given.name)
        fields = {f.name: {"default": f.default, "type": str(f.type)} for f in dataclasses.fields(cls)}
        _say(given, fields, f"{inspect.getdoc(inspect.getmodule(cls))}\n\n{inspect.getdoc(cls)}")
        return
    rows = {
        name: (inspect.getdoc(inspect.getmodule(methods.find(name))) or "").split("\n")[0] for name in methods.names()
    }
    _say(given, rows, "\n".join(rows.values()))


def run_models(given: argparse.Namespace) -> None:
    """`erasure models`."""
    from erasure.base import BUNDLED

    also = "also: a hub id (owner/name), a diffusers folder, a .safetensors file"
    _say(given, BUNDLED, "\n".join([*(f"{name}: {text}" for name, text in BUNDLED.items()), also]))


def run_prompts(given: argparse.Namespace) -> None:
    """`erasure prompts`."""
    from erasure.evaluation.promptset import PromptSet, names

    if given.name:
        rows = PromptSet.read(given.name).rows
        found = [{"id": row.id, "prompt": row.prompt, "seed": row.seed, **row.labels} for row in rows]
        _say(given, found, "\n".join(f"{row.id}  {row.prompt}" for row in rows))
        return
    sizes = {name: len(PromptSet.read(name).rows) for name in names()}
    _say(given, sizes, "\n".join(f"{name}: {count} prompts" for name, count in sizes.items()))


def run_bench(given: argparse.Namespace) -> None:
    """`erasure bench`."""
    from erasure.base import quiet
    from erasure.bench import bench
    from erasure.config import parse_overrides

    quiet()
    table = bench(
        given.methods,
        given.concepts,
        given.out,
        limit=given.limit,
        progress=not given.json,
        overrides=parse_overrides(given.set),
    )
    _say(given, table.to_json(), table.markdown())


RUN = {
    "demo": run_demo,
    "erase": run_erase,
    "plan": run_plan,
    "generate": run_generate,
    "evaluate": run_evaluate,
    "attack": run_attack,
    "verify": run_verify,
    "patch": run_patch,
    "methods": run_methods,
    "models": run_models,
    "prompts": run_prompts,
    "bench": run_bench,
}

if __name__ == "__main__":
    sys.exit(main())
