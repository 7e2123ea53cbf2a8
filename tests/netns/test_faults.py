"""Faults that need a network of their own: no route, and no memory of where a connection was meant to go."""

import subprocess
import sys

import pytest

from tests.conftest import Factory
from tests.support.mesh import Config, Mesh, simple

pytestmark = pytest.mark.netns

ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
ASK = """
import socket, sys, threading
server = socket.create_server(("127.0.0.1", 9001))
def serve():
    while True:
        peer, _ = server.accept()
        peer.sendall(b"hello")
        peer.close()
threading.Thread(target=serve, daemon=True).start()
try:
    with socket.create_connection(("127.0.0.1", 8080), 10) as client:
        print(client.recv(100).decode() or "nothing")
except ConnectionResetError:
    print("reset")
"""


def ask(m: Mesh) -> str:
    command = ["nsenter", "-t", str(m.process.pid), "-n", sys.executable, "-c", ASK]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def listener(**more: object) -> Config:
    return {"bind": "127.0.0.1:8080"} | more


def test_an_endpoint_without_a_route_is_left_for_the_next_at_once(mesh: Factory) -> None:
    config = simple("10.9.9.9:80", "127.0.0.1:9001", listener=listener(), balance="round_robin", connect={"timeout": "1h"})
    m = mesh(config | {"workers": 1}, ALONE)
    assert {ask(m) for _ in range(2)} == {"hello"}
    assert m.cluster()["connect_failures"] >= 1


def test_nothing_but_endpoints_without_a_route_is_a_reset_that_says_so(mesh: Factory) -> None:
    m = mesh(simple("10.9.9.9:80", "10.9.9.8:80", listener=listener(), connect={"timeout": "1h"}), ALONE)
    assert ask(m) == "reset"
    m.wait_closed(connect_unreachable=1)


def test_a_connection_whose_destination_nobody_knows_goes_nowhere(mesh: Factory) -> None:
    # No rule has redirected it, and no conntrack entry tells where it went: as after a flush, or with a full table.
    config = simple("127.0.0.1:9001", listener=listener(capture="redirect", direction="outbound"))
    m = mesh(config, ALONE)
    assert ask(m) == "reset"
    m.wait_closed(no_original_destination=1)
    assert m.opened() == {"127.0.0.1:9001": 0}
