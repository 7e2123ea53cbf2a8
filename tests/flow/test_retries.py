"""Attempts after the first: their budget, and the pauses between them."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests.conftest import Factory
from tests.support.mesh import simple
from tests.support.peers import Server, closed_port, connect, echo, is_refused, read_exactly, talk
from tests.support.waiting import wait_until


def test_without_a_budget_left_the_first_failure_is_the_last(mesh: Factory) -> None:
    with Server(echo) as server:
        dead = f"127.0.0.1:{closed_port()}"
        connect_settings = {"retry_budget": {"share": "0%", "minimum": 0}}
        m = mesh(simple(dead, server.address, balance="round_robin", connect=connect_settings) | {"workers": 1})
        for _ in range(10):
            with contextlib.suppress(ConnectionError), connect(m.port()) as client:
                client.sendall(b"x")
                client.recv(1)
        m.wait_closed(connect_refused=5, downstream_closed=5)
        assert m.cluster()["retries_refused"] == 5
        assert m.metrics()['l4mesh_retries_refused_total{cluster="web"}'] == 5
        records = wait_until(lambda: r if len(r := m.records()) == 5 else None, "all refusals are logged")
        assert {record["attempts"] for record in records} == {1}


def test_by_default_few_retries_are_never_refused(mesh: Factory) -> None:
    with Server(echo) as server:
        dead = f"127.0.0.1:{closed_port()}"
        m = mesh(simple(dead, server.address, balance="round_robin"))
        clients = [connect(m.port()) for _ in range(50)]
        for client in clients:
            talk(client)
            client.close()
        m.wait_closed(downstream_closed=50)
        assert m.cluster()["retries_refused"] == 0
        assert m.cluster()["connect_failures"] >= 20


@pytest.mark.parametrize(("backoff", "attempts"), [("off", 1), ("1ms", 4)])
def test_an_endpoint_that_refuses_is_dialled_again_only_after_a_pause(mesh: Factory, backoff: str, attempts: int) -> None:
    m = mesh(simple(f"127.0.0.1:{closed_port()}", connect={"attempts": 4, "backoff": backoff}))
    assert is_refused(m.port())
    m.wait_closed(connect_refused=1)
    (record,) = wait_until(m.records, "the connection is logged")
    assert record["attempts"] == attempts


@pytest.fixture
def late() -> Iterator[socket.socket]:
    """A socket that is bound and does not listen yet."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        yield listening


def test_a_pause_outlasts_a_restart_of_the_endpoint(mesh: Factory, late: socket.socket) -> None:
    endpoint = f"127.0.0.1:{late.getsockname()[1]}"
    m = mesh(simple(endpoint, connect={"attempts": 8, "backoff": "1s", "timeout": "15s"}))
    with connect(m.port()) as client:
        wait_until(lambda: m.cluster()["connect_failures"], "the endpoint has refused")
        assert m.cluster()["retrying"] == 1
        late.listen()
        client.sendall(b"hi")
        peer, _ = late.accept()
        with peer:
            assert read_exactly(peer, 2) == b"hi"
            assert m.cluster()["retrying"] == 0


def test_a_client_that_leaves_in_a_pause_is_not_dialled_for(mesh: Factory) -> None:
    m = mesh(simple(f"127.0.0.1:{closed_port()}", connect={"attempts": 8, "backoff": "1m", "timeout": "1m"}))
    with connect(m.port()):
        wait_until(lambda: m.cluster()["retrying"], "it pauses")
    m.wait_closed(downstream_left=1)


def test_a_pause_that_ends_after_the_time_of_all_attempts_is_not_made(mesh: Factory) -> None:
    m = mesh(simple(f"127.0.0.1:{closed_port()}", connect={"attempts": 8, "backoff": "5m", "budget": "1ms"}))
    assert is_refused(m.port())
    m.wait_closed(connect_refused=1)
