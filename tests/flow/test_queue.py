"""Connections beyond a limit that wait for a place: who gets it, who gives up, and who may not be forgotten."""

import contextlib
import resource
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.conftest import Factory
from tests.support.mesh import Config, Mesh, simple
from tests.support.peers import DEADLINE_S, RST, Server, connect, echo, is_refused, read_exactly, read_to_end, reset, talk
from tests.support.waiting import wait_until

QUEUE = {"size": 100, "timeout": "1m"}


def wait_for_waiting(m: Mesh, count: int) -> None:
    wait_until(lambda: m.cluster()["waiting"] == count, f"{count} connections wait")


def finish_all(clients: list[socket.socket]) -> None:
    """Each is answered and then closes, in the order in which they get their place: with two workers, any."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.sendall(b"x")
            selector.register(client, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(DEADLINE_S)
            assert ready, "nobody is served any more"
            for key, _ in ready:
                selector.unregister(key.fd)
                client = key.fileobj
                assert isinstance(client, socket.socket)
                assert client.recv(1) == b"x"
                client.close()


@contextlib.contextmanager
def full(mesh: Factory, server: Server, workers: int = 1, **queue: object) -> Iterator[tuple[Mesh, socket.socket]]:
    """A cluster of one place, which is taken."""
    m = mesh(simple(server.address, limits={"connections": 1, "queue": QUEUE | queue}) | {"workers": workers})
    with connect(m.port()) as holder:
        talk(holder)
        yield m, holder


def test_places_go_to_those_who_wait_in_their_order(mesh: Factory) -> None:
    served: list[bytes] = []

    def note(peer: socket.socket) -> None:
        served.append(read_exactly(peer, 1))
        peer.sendall(b"!")
        read_to_end(peer)

    with Server(note) as server, ExitStack() as stack:
        m = mesh(simple(server.address, limits={"connections": 1, "queue": QUEUE}) | {"workers": 1})
        clients = []
        for index in range(6):
            client = stack.enter_context(connect(m.port()))
            client.sendall(b"%d" % index)
            clients.append(client)
            wait_for_waiting(m, index)
        wait_until(lambda: served, "the first is served")
        assert server.accepted == 1
        for client in clients:
            assert read_exactly(client, 1) == b"!"
            client.close()
        assert served == [b"%d" % index for index in range(6)]
        m.wait_closed(downstream_closed=6)


def test_what_waits_is_shown_and_logged(mesh: Factory) -> None:
    with Server(echo) as server:
        config = simple(server.address, limits={"connections": 1, "queue": QUEUE}) | {"workers": 1, "access_log": {"when": "always"}}
        m = mesh(config)
        with connect(m.port()) as holder, connect(m.port()) as waiter:
            talk(holder)
            wait_for_waiting(m, 1)
            assert {c["state"] for c in m.get("/connections")["connections"]} == {"relaying", "queued"}
            assert m.metrics()['l4mesh_connections_waiting{cluster="web"}'] == 1
            assert m.cluster()["active"] == 1
            holder.close()
            talk(waiter)
        m.wait_closed(downstream_closed=2)
        shown = m.cluster()
        assert (shown["waiting"], shown["queued"]) == (0, 1)
        assert shown["queued_ms_mean"] > 0
        assert m.metrics()['l4mesh_connections_queued_total{cluster="web"}'] == 1
        assert m.metrics()['l4mesh_queue_seconds_total{cluster="web"}'] > 0
        records = wait_until(lambda: r if len(r := m.records()) == 2 else None, "both are logged")
        assert sorted("queued_ms" in record for record in records) == [False, True]


def test_who_waits_too_long_is_reset(mesh: Factory) -> None:
    with Server(echo) as server, full(mesh, server, timeout="200ms") as (m, holder):
        with connect(m.port()) as waiter:
            waiter.sendall(b"anybody?")
            assert read_to_end(waiter) == (b"", RST)
        m.wait_closed(queue_timeout=1)
        (record,) = wait_until(m.records, "it is logged")
        assert record["queued_ms"] >= 199
        talk(holder)


@pytest.mark.parametrize("how", ["reset", "close"])
def test_who_leaves_is_not_waited_for(mesh: Factory, how: str) -> None:
    with Server(echo) as server, full(mesh, server) as (m, holder):
        leaver, stayer = connect(m.port()), connect(m.port())
        wait_for_waiting(m, 2)
        reset(leaver) if how == "reset" else leaver.close()
        wait_for_waiting(m, 1)
        m.wait_closed(downstream_left=1)
        holder.close()
        talk(stayer)
        stayer.close()
        assert server.accepted == 2


def test_half_a_close_after_a_request_waits_for_its_answer(mesh: Factory) -> None:
    with Server(echo) as server, full(mesh, server) as (m, holder), connect(m.port()) as waiter:
        waiter.sendall(b"question")
        waiter.shutdown(socket.SHUT_WR)
        wait_for_waiting(m, 1)
        holder.close()
        assert read_to_end(waiter)[0] == b"question"


LIMITS = [("limit_cluster", {"connections": 1}), ("limit_endpoint", {"connections_per_endpoint": 1})]


@pytest.mark.parametrize(("reason", "limits"), LIMITS, ids=[reason for reason, _ in LIMITS])
def test_a_full_queue_refuses_at_once(mesh: Factory, reason: str, limits: Config) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, limits=limits | {"queue": QUEUE | {"size": 2}}))
        with connect(m.port()) as holder:
            talk(holder)
            clients = [holder]
            for waiting in (1, 2):
                clients.append(connect(m.port()))
                wait_for_waiting(m, waiting)
            for _ in range(5):
                assert is_refused(m.port())
            m.wait_closed(**{reason: 5})
            holder.close()
            finish_all(clients[1:])


def test_a_place_that_another_worker_frees_is_offered(mesh: Factory) -> None:
    def workers(m: Mesh) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for connection in m.get("/connections")["connections"]:
            found.setdefault(connection["state"], []).append(connection["id"].partition(".")[0])
        return found

    with Server(echo) as server, full(mesh, server, workers=2) as (m, holder), ExitStack() as stack:
        (own,) = workers(m)["relaying"]
        # Until one waits with the other worker; it then has all of the places after this, one by one.
        clients = [stack.enter_context(connect(m.port()))]
        wait_for_waiting(m, 1)
        while set(workers(m)["queued"]) == {own}:
            clients.append(stack.enter_context(connect(m.port())))
            wait_for_waiting(m, len(clients))
        holder.close()
        finish_all(clients)
        m.wait_closed(downstream_closed=len(clients) + 1)


CHANGES: dict[str, Config] = {
    "more connections": {"limits": {"connections": 4, "queue": QUEUE}},
    "no limit": {"limits": {"connections_per_endpoint": 100, "queue": QUEUE}},
    "no queue": {"limits": {"connections": 4}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_reload_that_makes_places_serves_those_who_wait(mesh: Factory, change: str) -> None:
    with Server(echo) as server, full(mesh, server, workers=2) as (m, holder), ExitStack() as stack:
        waiters = [stack.enter_context(connect(m.port())) for _ in range(3)]
        wait_for_waiting(m, 3)
        m.reload(simple(server.address, **CHANGES[change]))
        for client in (*waiters, holder):
            talk(client)
        assert m.cluster()["active"] == 4


def test_an_endpoint_that_joins_serves_those_who_wait(mesh: Factory) -> None:
    limits = {"connections_per_endpoint": 1, "queue": QUEUE}
    with Server(echo) as old, Server(echo) as new:
        m = mesh(simple(old.address, limits=limits))
        with connect(m.port()) as holder, connect(m.port()) as waiter:
            wait_for_waiting(m, 1)
            m.reload(simple(old.address, new.address, limits=limits))
            talk(holder)
            talk(waiter)
            assert (old.accepted, new.accepted) == (1, 1)


def test_those_who_wait_for_a_cluster_that_is_removed_are_still_served(mesh: Factory) -> None:
    with Server(echo) as server, full(mesh, server) as (m, holder), connect(m.port()) as waiter:
        wait_for_waiting(m, 1)
        other = simple(server.address)
        other["listeners"][0]["cluster"] = other["clusters"][0]["name"] = "other"
        m.reload(other)
        talk(holder)
        holder.close()
        talk(waiter)


def test_a_retry_waits_for_an_endpoint_that_is_full(mesh: Factory) -> None:
    from tests.support.peers import closed_port

    limits = {"connections_per_endpoint": 1, "queue": QUEUE}
    with Server(echo) as server:
        config = simple(f"127.0.0.1:{closed_port()}", server.address, limits=limits, connect={"timeout": "20s"})
        m = mesh(config | {"workers": 1})
        with connect(m.port()) as holder:
            talk(holder)
            with connect(m.port()) as client:
                wait_until(lambda: m.cluster()["retrying"] == 1, "the bad endpoint has refused, the good one is full")
                holder.close()
                talk(client)


@pytest.mark.parametrize(
    "limits", [{"connections": 3}, {"connections_per_endpoint": 1}, {"connections": 2, "connections_per_endpoint": 1}]
)
def test_nobody_is_forgotten(mesh: Factory, limits: Config) -> None:
    failures: list[BaseException] = []

    def come_and_go(port: int) -> None:
        try:
            for _ in range(60):
                with connect(port) as client:
                    talk(client)
        except BaseException as error:
            failures.append(error)

    with ExitStack() as stack:
        servers = [stack.enter_context(Server(echo)) for _ in range(3)]
        m = mesh(simple(*(server.address for server in servers), limits=limits | {"queue": QUEUE}) | {"workers": 2})
        port = m.port()
        threads = [threading.Thread(target=come_and_go, args=(port,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        m.wait_closed(downstream_closed=12 * 60)
        assert m.cluster()["queued"] > 0


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_descriptors")
def test_thousands_who_wait_may_leave_at_once(mesh: Factory) -> None:
    with Server(echo) as server, full(mesh, server, workers=2, size=5000) as (m, holder):
        port = m.port()
        crowd = [connect(port) for _ in range(2000)]
        stayer = connect(port)
        wait_for_waiting(m, 2001)
        for client in crowd:
            reset(client)
        wait_for_waiting(m, 1)
        m.wait_closed(downstream_left=2000)
        talk(holder)
        holder.close()
        talk(stayer)
        stayer.close()
        assert server.accepted == 2


@pytest.mark.usefixtures("many_descriptors")
def test_those_who_wait_may_use_up_the_descriptors(mesh: Factory) -> None:
    with Server(echo) as server:
        limits = {"connections": 4, "queue": {"size": 100_000, "timeout": "1m"}}
        m = mesh(simple(server.address, limits=limits) | {"workers": 1, "limits": {"connections": 100_000}}, nofile=320)
        port = m.port()
        with connect(port) as first:
            talk(first)
            crowd = []
            for _ in range(400):
                client = connect(port)
                crowd.append(client)
            wait_until(lambda: m.total("l4mesh_accept_pauses_total") > 0, "accepting pauses")
            talk(first)
            for client in crowd:
                reset(client)
        with connect(port) as late:
            talk(late)
