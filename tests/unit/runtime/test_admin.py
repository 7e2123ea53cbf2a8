"""The admin server by itself: whom it answers, and for how long it waits. ``/live`` asks nothing of the rest of the process."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from l4mesh.config.load import parse_config
from l4mesh.runtime import admin
from l4mesh.runtime.admin import AdminServer, Facts
from tests.support.peers import read_to_end

CONFIG = """
listeners: [{name: web, bind: "127.0.0.1:1", cluster: web}]
clusters: [{name: web, endpoints: ["127.0.0.1:2"], health_check: {send: {text: "AUTH secret"}, expect: {text: "+OK"}}}]
"""
Talk = Callable[[int], Awaitable[None]]


def serve(talk: Talk) -> None:
    async def run() -> None:
        server = AdminServer(cast(Any, None), cast(Any, None), Facts(lambda: True, lambda: parse_config(CONFIG), list))
        port = int(server.listen("127.0.0.1:0").rpartition(":")[2])
        await server.answer()
        try:
            await talk(port)
        finally:
            await server.stop()

    asyncio.run(run())


async def ask(port: int, request: str) -> str:
    def exchange() -> str:
        with socket.create_connection(("127.0.0.1", port), 15) as client:
            client.sendall(request.encode())
            return read_to_end(client)[0].decode()

    return await asyncio.to_thread(exchange)


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("Host: 127.0.0.1:15000", True), ("Host: 127.0.0.1", True), ("Host: [::1]:15000", True), ("Host: localhost:15000", True),
        ("Host: LOCALHOST", True), ("Host:", True), ("X: no host", True),
        ("Host: evil.example:15000", False), ("Host: 127.0.0.1.evil.example", False), ("Host: localhost.evil.example", False),
        ("Host: [evil", False),
    ],
)  # fmt: skip
def test_a_name_that_is_not_this_host_s_is_refused_on_loopback(host: str, answered: bool) -> None:
    async def talk(port: int) -> None:
        answer = await ask(port, f"GET /live HTTP/1.0\r\n{host}\r\n\r\n")
        if answered:
            assert answer.startswith("HTTP/1.0 200 ")
        else:
            assert answer.startswith("HTTP/1.0 421 ")
            assert "is not this server: ask by address or as localhost" in answer

    serve(talk)


@pytest.mark.parametrize("sent", ["", "GET /live HTTP/1.1\r\n", "GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_connection_that_is_kept_for_long_is_ended(monkeypatch: pytest.MonkeyPatch, sent: str) -> None:
    monkeypatch.setattr(admin, "LIFE_S", 0.1)

    async def talk(port: int) -> None:
        answer = await ask(port, sent)
        assert ("200 OK" in answer) == sent.endswith("\r\n\r\n")

    serve(talk)


def test_what_a_health_check_sends_is_not_shown() -> None:
    async def talk(port: int) -> None:
        answer = await ask(port, "GET /config HTTP/1.0\r\n\r\n")
        assert "secret" not in answer
        assert '"send": "11 bytes"' in answer

    serve(talk)
