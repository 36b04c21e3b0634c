"""`erasure app`: a page in the browser on which concepts are erased."""

from __future__ import annotations

import argparse

from erasure.cli import choices
from erasure.cli.arguments import FOLDER, Commands, Options, Parser
from erasure.cli.options import add_device
from erasure.cli.output import say


def add_commands(commands: Commands) -> None:
    """Add the command `app`."""
    commands.add(
        "app",
        "Open a page in the browser on which concepts are erased and looked at",
        run_app,
        _arguments,
        "Needs Gradio: pip install 'erasure-diffusion[app]'. The page needs no network, and only this machine can open "
        "it unless --host says otherwise. Ctrl-C ends it.",
        "erasure app\n"
        "erasure app --model sd15.safetensors --device cuda\n"
        "ERASURE_APP_LOGIN=me:long-password erasure app --host 0.0.0.0",
    )


def _arguments(parser: Parser) -> None:
    model = Options(parser, "model")
    model.add(
        "--model",
        metavar="MODEL",
        repeat=True,
        completes=FOLDER,
        help="Offer this diffusers folder, .safetensors file or hub id besides the bundled models",
    )
    model.add(
        "--judge",
        metavar="JUDGE",
        repeat=True,
        names=choices.JUDGES,
        help="Offer this judge of images besides glyph's, as `erasure evaluate` takes it; visitors from other machines "
        "can name no other. Kinds",
    )
    add_device(model)
    server = Options(parser, "server")
    server.add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="Address to listen on; one that other machines reach needs a login",
    )
    server.add("--port", type=int, default=7860, metavar="N", help="Port to listen on; 0 takes any that is free")
    server.add(
        "--login",
        metavar="USER:PASSWORD",
        shown="the environment variable ERASURE_APP_LOGIN",
        help="Let in only who knows these",
    )
    server.add(
        "--max-upload", type=int, default=500, metavar="MB", help="Size of the largest patch file that visitors may add"
    )


def run_app(args: argparse.Namespace) -> None:
    """Run `erasure app`."""
    from erasure.app.server import serve

    def tell(address: str) -> None:
        say(args, {"address": address}, f"Open {address} in a browser. Ctrl-C ends it.")

    serve(
        host=args.host,
        port=args.port,
        login=args.login,
        models=args.model,
        judges=args.judge,
        device=args.device,
        upload=args.max_upload,
        say=tell,
    )
