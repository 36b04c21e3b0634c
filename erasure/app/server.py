"""Serve the page: to this machine alone, unless another address is asked for, and then only with a login."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from erasure.errors import ErasureError

LOGIN = "ERASURE_APP_LOGIN"  # environment variable with USER:PASSWORD, which a list of processes does not show
PORT = 7860
UPLOAD = 500  # MB
SHORTEST = 8  # characters of a password
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "frame-src 'self' blob:",
        "object-src 'none'",
        "form-action 'self'",
    )
)


def is_local(host: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_login(host: str, login: str | None) -> tuple[str, str] | None:
    """Return user and password, or None where nobody has to log in.

    Args:
        host: the address to listen on.
        login: `USER:PASSWORD`; None: the environment variable ERASURE_APP_LOGIN, if it is set.

    Raises:
        ErasureError: the address can be reached from elsewhere and there is no login, or the login is not of that form
            or too short.
    """
    text = login if login is not None else os.environ.get(LOGIN)
    if not text:
        if is_local(host):
            return None
        raise ErasureError(
            f"{host} can be reached from other machines, and whoever reaches it could use this one: give a login with "
            f"--login USER:PASSWORD, or in the environment variable {LOGIN}. Nothing was started"
        )
    user, colon, password = text.partition(":")
    if not colon or not user.strip() or len(password) < SHORTEST:
        raise ErasureError(
            f"a login is USER:PASSWORD with a password of at least {SHORTEST} characters; nothing was started"
        )
    return user.strip(), password


def free_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Args:
        host: the address.
        port: the port; 0 takes any that is free.

    Raises:
        ErasureError: the address is unknown, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as fault:
        listener.close()
        raise ErasureError(
            f"{host}, port {port}: {getattr(fault, 'strerror', None) or fault}. Choose another with --port, or 0 for "
            "any that is free"
        ) from None
    return listener


class Guard:
    """Adds headers to every answer that keep the page from loading anything from elsewhere.

    Args:
        app: the application behind it.
        hosts: names under which the page may be asked for; None: any. Other names are those of pages elsewhere that
            would like to use this one (DNS rebinding).
    """

    def __init__(self, app: Any, hosts: Sequence[str] | None = None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = given.rsplit(":", 1)[0] if not given.endswith("]") else given
        if self.hosts is not None and name.strip("[]") not in self.hosts:
            await send({"type": "http.response.start", "status": 421, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"unknown host"})
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        await self.app(scope, receive, guarded)


def application(
    models: Any, visits: Any, login: tuple[str, str] | None, *, upload: int = UPLOAD, hosts: Sequence[str] | None = None
) -> Any:
    """Return the page as an ASGI application.

    Args:
        models: the models that it offers.
        visits: where it remembers its visitors.
        login: user and password; None: nobody has to log in.
        upload: size of the largest file that is taken, in MB.
        hosts: as for `Guard`.

    Raises:
        ErasureError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(visits.folder / "files")
    try:
        import gradio
        from fastapi import FastAPI
    except ImportError:
        raise ErasureError(
            "the page needs Gradio, which is not installed: pip install 'erasure-diffusion[app]'. Nothing was started"
        ) from None
    from erasure.app.look import CSS, theme
    from erasure.app.page import build

    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mounted = gradio.mount_gradio_app(
        outer,
        build(models, visits),
        path="/",
        footer_links=[],
        run_history=False,
        auth=login,
        auth_message="Erasure" if login else None,
        show_error=False,
        max_file_size=f"{upload}mb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
    )
    return Guard(mounted, hosts)


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    login: str | None = None,
    models: Sequence[str] = (),
    judges: Sequence[str] = (),
    device: str | None = None,
    upload: int = UPLOAD,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        host: the address to listen on.
        port: the port; 0 takes any that is free.
        login: `USER:PASSWORD`, which an address that others can reach needs.
        models: folders, `.safetensors` files or hub ids to offer besides the bundled models.
        judges: judges to offer besides glyph's, as `find_judge` takes them.
        device: where to compute; None: the accelerator if there is one.
        upload: size of the largest file that is taken, in MB.
        say: called with the address once the page can be opened.

    Raises:
        ErasureError: a login is missing or malformed, a model does not exist, a judge is of no known kind, the port is
            taken, or Gradio is not installed.
    """
    account = checked_login(host, login)
    if upload < 1:
        raise ErasureError(f"--max-upload {upload}: must be at least 1 (MB)")
    listener = free_socket(host, port)
    try:
        _serve(listener, host, account, (models, judges), device, upload, say)
    finally:
        listener.close()


def serve_public(port: int = PORT, *, models: Sequence[str] = (), judges: Sequence[str] = (), upload: int = 50) -> None:
    """Serve the page to anybody, without a login: for a container that holds nothing else, such as a Space.

    Visitors share one queue and can name no file of the machine.

    Args:
        port: the port.
        models: folders, `.safetensors` files or hub ids to offer besides the bundled models.
        judges: judges to offer besides glyph's, as `find_judge` takes them.
        upload: size of the largest file that is taken, in MB.

    Raises:
        ErasureError: as for `serve`.
    """
    listener = free_socket("0.0.0.0", port)
    try:
        _serve(listener, "0.0.0.0", None, (models, judges), None, upload, print)
    finally:
        listener.close()


def _end(*signal_and_frame: Any) -> None:
    raise SystemExit(0)


def _serve(
    listener: socket.socket,
    host: str,
    account: tuple[str, str] | None,
    offered: tuple[Sequence[str], Sequence[str]],
    device: str | None,
    upload: int,
    say: Callable[[str], None],
) -> None:
    from erasure.app.models import Models
    from erasure.app.visits import Visits

    local = is_local(host)
    models = Models(offered[0], device, any_path=local, judges=offered[1])
    visits = Visits(models.offered[0], lasting=True)
    try:
        app = application(models, visits, account, upload=upload, hosts=(host, "localhost") if local else None)
        import uvicorn

        models.open(models.offered[0])
        port = listener.getsockname()[1]
        say(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)  # uvicorn raises it again; by default, no file would be deleted
        with suppress(KeyboardInterrupt):  # Ctrl-C is how the page ends
            uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run([listener])
    finally:
        visits.close()
