"""The parser of the command `erasure`, put together from the files of the command groups."""

from __future__ import annotations

from erasure.cli import app, attack, completion, erase, evaluate, hub, listing, patch
from erasure.cli.arguments import Commands, Options, Parser
from erasure.version import __version__

EXAMPLES = """examples:
  erasure demo
  erasure erase cat -o cat.safetensors
  erasure generate "a cat" "a dog" --patch cat.safetensors -o out
  erasure evaluate cat --patch cat.safetensors -o report"""
SECTIONS = {
    "Erase": ("demo", "app", "erase", "plan"),
    "Use and measure": ("generate", "evaluate", "attack", "verify", "bench"),
    "Patch files": ("patch", "push", "pull"),
    "Look up": ("list", *listing.ALIASES),
    "Shell": ("completion",),
}


def parser() -> Parser:
    """Return the parser of the whole command line; each subcommand sets `run`, the function that does it."""
    top = Parser(
        prog="erasure",
        description="Make a text-to-image diffusion model forget a concept, and prove it.",
        epilog=f"{EXAMPLES}\n\n`erasure COMMAND --help` shows the arguments of a command.",
    )
    commands = Commands(top, "command", "COMMAND", SECTIONS)
    for group in (erase, evaluate, attack, patch, hub, listing, app, completion):
        group.add_commands(commands)
    general = Options(top, "general")
    general.add("-h", "--help", action="help", help="Show this help and exit")
    general.add("--version", action="version", version=f"erasure {__version__}", help="Show the version and exit")
    top.set_defaults(root=top, json=False, debug=False)
    return top
