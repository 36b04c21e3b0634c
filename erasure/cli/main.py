"""The command `erasure`: parses, and calls what erasure/commands does."""

from __future__ import annotations

import argparse
import json
import sys

from erasure.cli import erase, evaluate, hub, listing, patch
from erasure.cli.parser import parser
from erasure.errors import ErasureError


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    commands = parser()
    given, rest = commands.parse_known_args(argv)
    if rest:
        hint = ": each setting takes a --set of its own" if "=" in rest[0] and not rest[0].startswith("-") else ""
        commands.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
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


RUN = {
    "demo": erase.run_demo,
    "erase": erase.run_erase,
    "plan": erase.run_plan,
    "generate": evaluate.run_generate,
    "evaluate": evaluate.run_evaluate,
    "attack": evaluate.run_attack,
    "verify": evaluate.run_verify,
    "patch": patch.run_patch,
    "push": hub.run_push,
    "pull": hub.run_pull,
    "methods": listing.run_methods,
    "models": listing.run_models,
    "suites": listing.run_suites,
    "prompts": listing.run_prompts,
    "bench": erase.run_bench,
}


if __name__ == "__main__":
    sys.exit(main())
