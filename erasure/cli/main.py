"""The command `erasure`: parses the command line, runs the subcommand, turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from erasure.cli.arguments import WrongUse
from erasure.cli.output import fail
from erasure.cli.parser import parser
from erasure.errors import ErasureError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after `erasure`; default: those of this process.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted.

    Raises:
        SystemExit: with code 2 for a command line that cannot be parsed, with 0 after --help and --version.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parsed(words)
    _quiet()
    try:
        return args.run(args) or 0
    except ErasureError as fault:
        return _fail(args, str(fault), 2)
    except KeyboardInterrupt:
        return _fail(args, "interrupted; repeat the same command to resume", 130, "")
    except BrokenPipeError:
        return 1
    except Exception as fault:
        if args.debug:
            raise
        return _fail(args, f"{type(fault).__name__}: {fault} (--debug shows the traceback)", 1)


def _parsed(words: list[str]) -> argparse.Namespace:
    try:
        args, rest = parser().parse_known_args(words)
        if rest:
            setting = "=" in rest[0] and not rest[0].startswith("-")
            hint = ": each setting needs its own --set" if setting else ""
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    except WrongUse as fault:
        if "--json" in words:
            print(json.dumps({"error": str(fault)}))
        fault.parser.print_usage(sys.stderr)
        fail(f"{fault} (`{fault.parser.prog} --help` lists the arguments)")
        raise SystemExit(2) from None
    return args


def _fail(args: argparse.Namespace, message: str, code: int, word: str = "error") -> int:
    if args.json:
        print(json.dumps({"error": message}))
    fail(message, word)
    return code


def _quiet() -> None:
    """Show only errors of the libraries, whose banners would hide our own messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
