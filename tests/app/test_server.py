"""Who may reach the page: this machine alone, or those who log in; and nothing is loaded from elsewhere."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest

from erasure.app.server import LOGIN, POLICY, Guard, checked_login, free_socket, is_local, serve
from erasure.cli.main import main
from erasure.errors import ErasureError


@pytest.fixture(autouse=True)
def no_login(monkeypatch):
    monkeypatch.delenv(LOGIN, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_addresses_of_this_machine_need_no_login(host):
    assert is_local(host) and checked_login(host, None) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "127.0.0.1.example.org"])
def test_other_addresses_are_refused_without_a_login(host):
    assert not is_local(host)
    with pytest.raises(ErasureError, match="--login USER:PASSWORD"):
        checked_login(host, None)
    with pytest.raises(ErasureError, match="Nothing was started"):
        serve(host=host, say=lambda text: pytest.fail("it listens"))


def test_a_login_comes_from_the_option_or_the_environment(monkeypatch):
    assert checked_login("0.0.0.0", "me:long enough: so") == ("me", "long enough: so")
    monkeypatch.setenv(LOGIN, "you:another one")
    assert checked_login("0.0.0.0", None) == ("you", "another one")
    assert checked_login("127.0.0.1", None) == ("you", "another one")
    assert checked_login("0.0.0.0", "me:long enough") == ("me", "long enough")


@pytest.mark.parametrize("login", ["me", "me:", ":password1", "me:short"])
def test_half_a_login_is_refused_everywhere(login):
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ErasureError, match="USER:PASSWORD"):
            checked_login(host, login)


def test_a_space_serves_anybody_but_lets_nobody_name_a_file(monkeypatch):
    from erasure.app import server

    asked = {}
    monkeypatch.setattr(server, "_serve", lambda listener, host, account, *rest: asked.update(host=host, login=account))
    server.serve_public(port=0)
    assert asked == {"host": "0.0.0.0", "login": None} and not is_local(asked["host"])  # so `any_path` is off


def test_a_taken_port_is_refused_with_a_reason():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ErasureError, match="Choose another with --port"):
            free_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ErasureError, match="--port"):
        free_socket("127.0.0.1", 70000)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--port", "0"]) == 2
    assert "pip install 'erasure-diffusion[app]'" in capsys.readouterr().err


def test_the_command_refuses_a_model_that_does_not_exist(capsys):
    assert main(["app", "--port", "0", "--model", "no/such/model"]) == 2
    assert "no/such/model" in capsys.readouterr().err


def answered(host: str, hosts: tuple[str, ...] | None) -> dict:
    """What a browser gets that asks a guarded page under a name."""
    sent: list[dict] = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", host.encode())]}
    asyncio.run(Guard(page, hosts)(scope, None, send))
    return {"status": sent[0]["status"], "headers": dict(sent[0]["headers"]), "body": sent[1]["body"]}


def test_every_answer_forbids_to_load_anything_from_elsewhere():
    found = answered("127.0.0.1:7860", ("127.0.0.1", "localhost"))
    assert found["status"] == 200 and found["body"] == b"page" and found["headers"][b"x"] == b"y"
    assert found["headers"][b"content-security-policy"] == POLICY.encode()
    assert "default-src 'self'" in POLICY and "http" not in POLICY and "*" not in POLICY


def test_names_of_other_sites_are_refused_where_nobody_logs_in():
    allowed = ("127.0.0.1", "localhost", "::1")
    for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert answered(host, allowed)["status"] == 200, host
    for host in ("evil.example:7860", "", "localhost.evil.example"):
        assert answered(host, allowed) == {**answered(host, allowed), "status": 421, "body": b"unknown host"}, host
    assert answered("my.server:7860", None)["status"] == 200
