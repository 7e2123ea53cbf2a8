"""Bandwidth on real sockets: the bytes stay exact, nothing comes sooner than its rate lets it, and nothing else is disturbed.

How exact a rate is and how fair is shown in simulated time (tests/native) and measured (bench); here only what is too soon is wrong.
"""

import array
import contextlib
import fcntl
import socket
import termios
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import Factory
from tests.flow.test_tls import client_context, inbound, outbound, secure
from tests.support.certificates import Files
from tests.support.mesh import Config, simple
from tests.support.peers import FIN, RST, Server, connect, digest, echo, make_bytes, read_exactly, read_to_end, reset
from tests.support.waiting import wait_until

KB, MB = 1000, 1_000_000


def burst(rate: int, per_s: int = 50) -> float:
    return rate * 0.025 + max(rate / per_s, 4096)


@contextlib.contextmanager
def no_sooner_than(count: int, rate: int, per_s: int = 50) -> Iterator[None]:
    """``count`` bytes at ``rate`` take their time."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start >= (count - burst(rate, per_s)) / rate


def sends(data: bytes) -> Callable[[socket.socket], None]:
    def script(peer: socket.socket) -> None:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        read_to_end(peer)

    return script


def drain(peer: socket.socket) -> None:
    read_to_end(peer)


def exchange(client: socket.socket, up: bytes) -> tuple[bytes, str]:
    sender = threading.Thread(target=lambda: (client.sendall(up), client.shutdown(socket.SHUT_WR)))
    sender.start()
    data, end = read_to_end(client)
    sender.join()
    return data, end


@pytest.mark.parametrize("where", ["listener", "cluster"])
def test_each_direction_has_its_rate(mesh: Factory, where: str) -> None:
    limit = {"bandwidth_per_connection": {"to_upstream": "4MB/s", "to_downstream": "2MB/s"}}
    data = make_bytes(2 * MB)
    with Server(echo) as server:
        m = mesh(simple(server.address, listener=limit) if where == "listener" else simple(server.address, **limit))
        with connect(m.port()) as client, no_sooner_than(2 * MB, 2 * MB):
            got, end = exchange(client, data)
        assert (digest(got), end) == (digest(data), FIN)
        with Server(drain) as sink:
            m.reload(simple(sink.address, listener=limit) if where == "listener" else simple(sink.address, **limit))
            with connect(m.port()) as client, no_sooner_than(2 * MB, 4 * MB):
                assert exchange(client, data) == (b"", FIN)
        assert m.total("l4mesh_bandwidth_waits_total") > 20


def test_the_lower_of_two_rates_holds_and_streams_are_still_spliced(mesh: Factory) -> None:
    data = make_bytes(24 * MB)
    with Server(sends(data)) as server:
        low, high = ({"bandwidth_per_connection": {"to_downstream": rate}} for rate in ("40MB/s", "900MB/s"))
        m = mesh(simple(server.address, listener=high, **low))
        with connect(m.port()) as client, no_sooner_than(len(data), 40 * MB):
            got, end = read_to_end(client)
        assert (digest(got), end) == (digest(data), FIN)
        assert m.total("l4mesh_bytes_spliced_total") > len(data) * 0.7


@pytest.mark.parametrize("tls", ["downstream", "upstream"])
def test_limits_of_tls_connections_count_what_it_carries(mesh: Factory, web: Files, redis: Files, tls: str) -> None:
    limit = {"bandwidth_per_connection": {"to_upstream": "3MB/s", "to_downstream": "3MB/s"}}
    data = make_bytes(2 * MB)
    with Server(echo) as server:
        inner = inbound(redis, server.address)
        if tls == "downstream":
            inner["clusters"][0] |= limit
        outer = outbound(web, f"127.0.0.1:{mesh(inner).port()}")
        if tls == "upstream":
            outer["clusters"][0] |= limit
        far = mesh(outer)
        with connect(far.port()) as client, no_sooner_than(2 * MB, 3 * MB):
            got, end = exchange(client, data)
        assert (digest(got), end) == (digest(data), FIN)


def limited_workload(server: Server, **bandwidth: str) -> Config:
    return simple(server.address) | {"workloads": [{"name": "w", "addresses": ["127.0.0.9"], "bandwidth": bandwidth}]}


@pytest.mark.parametrize("direction", ["send", "receive"])
def test_the_connections_of_a_workload_share_its_rate_in_all_workers(mesh: Factory, direction: str) -> None:
    data = make_bytes(500 * KB)
    with Server(echo) as server:
        m = mesh(limited_workload(server, **{direction: "4MB/s"}))
        port = m.port()
        results: list[tuple[bytes, str]] = []

        def run() -> None:
            with connect(port, source="127.0.0.9") as client:
                results.append(exchange(client, data))

        with no_sooner_than(8 * len(data), 4 * MB, 100):
            threads = [threading.Thread(target=run) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [(digest(got), end) for got, end in results] == [(digest(data), FIN)] * 8
        # Others are as fast as ever: this would take ten minutes.
        m.reload(limited_workload(server, **{direction: "1kB/s"}))
        with connect(port, source="127.0.0.8") as client:
            assert exchange(client, data) == (data, FIN)


def test_a_workload_that_serves_is_limited_as_well(mesh: Factory) -> None:
    data = make_bytes(1 * MB)
    with Server(sends(data), host="127.0.0.9") as server:
        m = mesh(limited_workload(server, send="2MB/s"))
        with connect(m.port()) as client, no_sooner_than(len(data), 2 * MB, 100):
            assert read_to_end(client) == (data, FIN)


@pytest.mark.parametrize("after", ["200MB/s", "off"])
def test_a_reload_speeds_live_connections_up(mesh: Factory, after: str) -> None:
    """At first this would take a quarter of an hour."""
    data = make_bytes(4 * MB)
    with Server(sends(data)) as server:
        m = mesh(limited_workload(server, receive="5kB/s"))
        clients = [connect(m.port(), source="127.0.0.9") for _ in range(3)]
        begun = [client.recv(1) for client in clients]
        wait_until(lambda: m.total("l4mesh_bandwidth_waits_total") > 0, "a connection waits for its turn")
        m.reload(limited_workload(server, receive=after))
        for client, first in zip(clients, begun, strict=True):
            rest, end = read_to_end(client)
            assert (digest(first + rest), end) == (digest(data), FIN)
            client.close()


def test_one_that_waits_for_its_bandwidth_is_not_idle(mesh: Factory) -> None:
    data = make_bytes(4 * KB)
    with Server(sends(data)) as server:
        timeouts = {"idle": "200ms", "half_closed": "200ms"}
        m = mesh(simple(server.address, timeouts=timeouts, bandwidth_per_connection={"to_downstream": "2kB/s"}))
        with connect(m.port()) as client, no_sooner_than(len(data), 2 * KB):
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == (data, FIN)
        m.wait_closed(downstream_closed=1)


def test_a_limited_connection_that_is_silent_is_idle(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, timeouts={"idle": "200ms"}, bandwidth_per_connection={"to_downstream": "2kB/s"}))
        with connect(m.port()) as client:
            client.sendall(b"hi")
            assert read_exactly(client, 2) == b"hi"
            assert read_to_end(client) == (b"", RST)
        m.wait_closed(idle_timeout=1)


def test_a_reset_comes_after_what_was_sent_before_it(mesh: Factory) -> None:
    data = make_bytes(50 * KB)

    def script(peer: socket.socket) -> None:
        peer.sendall(data)
        wait_until(lambda: _queued(peer) == 0, "the proxy's socket has all of it")
        reset(peer)

    with Server(script) as server:
        m = mesh(simple(server.address, timeouts={"half_closed": "200ms"}, bandwidth_per_connection={"to_downstream": "40kB/s"}))
        with connect(m.port()) as client, no_sooner_than(len(data), 40 * KB):
            assert read_to_end(client) == (data, RST)
        m.wait_closed(upstream_reset=1)


def test_clients_that_leave_while_they_wait_leave_nothing(mesh: Factory) -> None:
    with Server(sends(make_bytes(1 * MB))) as server:
        m = mesh(limited_workload(server, receive="20kB/s"))
        for ends in (socket.socket.close, reset) * 5:
            client = connect(m.port(), source="127.0.0.9")
            client.recv(1)
            ends(client)
        wait_until(lambda: m.active() == 0, "all have ended")
        # Their turns went back: the next has the whole rate.
        m.reload(limited_workload(server, receive="20MB/s"))
        with connect(m.port(), source="127.0.0.9") as client:
            assert len(read_to_end(client)[0]) == 1 * MB


def test_what_a_limit_holds_back_stays_with_the_sender(mesh: Factory) -> None:
    """Back-pressure end to end: we read no more than the rate lets us pass on."""
    with Server(drain) as server:
        m = mesh(limited_workload(server, send="1kB/s"))
        with connect(m.port(), source="127.0.0.9") as client:
            client.setblocking(False)
            sent = [0]

            def is_full() -> bool:
                before = sent[0]
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent[0] += client.send(bytes(1 << 16))
                return sent[0] == before and _queued(client) > 0

            wait_until(is_full, "the sender stands still")
            assert m.get("/connections")["connections"][0]["bytes_to_upstream"] < sent[0] / 4
            reset(client)
        # What had come before the reset is delivered first.
        m.reload(limited_workload(server, send="100MB/s"))
        m.wait_closed(downstream_reset=1)


def _queued(peer: socket.socket) -> int:
    """Bytes that its peer has not acknowledged."""
    queued = array.array("i", [0])
    fcntl.ioctl(peer.fileno(), termios.TIOCOUTQ, queued)
    return queued[0]


def test_limits_do_not_outlive_the_configuration_that_has_them(mesh: Factory, web: Files, redis: Files) -> None:
    data = make_bytes(1 * MB)
    with Server(sends(data)) as server:
        m = mesh(inbound(redis, server.address, clusters=[{"name": "app", "endpoints": [server.address]}]))
        slow = {"bandwidth_per_connection": {"to_downstream": "1kB/s"}}
        m.reload(inbound(redis, server.address, clusters=[{"name": "app", "endpoints": [server.address]} | slow]))
        m.reload(inbound(redis, server.address, clusters=[{"name": "app", "endpoints": [server.address]}]))
        with secure(client_context(web, web.bundle), m.port()) as client:
            assert len(read_to_end(client)[0]) == len(data)
