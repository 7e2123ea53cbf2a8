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


def test_each_direction_has_its_rate(mesh: Factory) -> None:
    limit = {"bandwidth_per_connection": {"to_upstream": "4MB/s", "to_downstream": "2MB/s"}}
    data = make_bytes(1 * MB)
    with Server(echo) as server, Server(drain) as sink:
        config = simple(server.address, **limit)
        config["listeners"].append({"name": "limited", "bind": "127.0.0.1:0", "cluster": "sink"} | limit)
        config["clusters"].append({"name": "sink", "endpoints": [sink.address]})
        m = mesh(config)
        with connect(m.port()) as client, no_sooner_than(len(data), 2 * MB):
            got, end = exchange(client, data)
        assert (digest(got), end) == (digest(data), FIN)
        with connect(m.port("limited")) as client, no_sooner_than(len(data), 4 * MB):
            assert exchange(client, data) == (b"", FIN)
        assert m.total("l4mesh_bandwidth_waits_total") > 10


def test_the_lower_of_two_rates_holds_and_streams_are_still_spliced(mesh: Factory) -> None:
    data = make_bytes(24 * MB)
    with Server(sends(data)) as server:
        low, high = ({"bandwidth_per_connection": {"to_downstream": rate}} for rate in ("40MB/s", "900MB/s"))
        m = mesh(simple(server.address, listener=high, **low))
        with connect(m.port()) as client, no_sooner_than(len(data), 40 * MB):
            got, end = read_to_end(client)
        assert (digest(got), end) == (digest(data), FIN)
        assert m.total("l4mesh_bytes_spliced_total") > len(data) * 0.7


def test_limits_of_tls_connections_count_what_it_carries(mesh: Factory, web: Files, redis: Files) -> None:
    """Two proxies with TLS between them: the first limits what goes up, the second what comes down."""
    data = make_bytes(1 * MB)
    with Server(echo) as server:
        inner, outer = inbound(redis, server.address), outbound(web, "")
        inner["clusters"][0]["bandwidth_per_connection"] = {"to_downstream": "2MB/s"}
        outer["clusters"][0] |= {
            "endpoints": [f"127.0.0.1:{mesh(inner).port()}"],
            "bandwidth_per_connection": {"to_upstream": "2MB/s"},
        }
        far = mesh(outer)
        with connect(far.port()) as client, no_sooner_than(len(data), 2 * MB):
            client.sendall(data)
            assert digest(read_exactly(client, len(data))) == digest(data)


def test_what_comes_by_tls_passes_no_sooner_either(mesh: Factory, web: Files, redis: Files) -> None:
    data = make_bytes(40 * KB)
    with Server(echo) as server:
        config = inbound(redis, server.address)
        config["clusters"][0]["bandwidth_per_connection"] = {"to_upstream": "50kB/s"}
        m = mesh(config)
        with secure(client_context(web, web.bundle), m.port()) as client, no_sooner_than(len(data), 50 * KB):
            client.sendall(data)
            assert read_exactly(client, len(data)) == data


def limited_workload(server: Server, **bandwidth: str) -> Config:
    return simple(server.address) | {"workloads": [{"name": "w", "addresses": ["127.0.0.9"], "bandwidth": bandwidth}]}


def test_the_connections_of_a_workload_share_its_rate_in_all_workers(mesh: Factory) -> None:
    data = make_bytes(500 * KB)
    with Server(echo) as server:
        m = mesh(limited_workload(server, send="4MB/s", receive="5MB/s"))
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
        m.reload(limited_workload(server, send="1kB/s"))
        with connect(port, source="127.0.0.8") as client:
            assert exchange(client, data) == (data, FIN)


def test_a_workload_that_serves_is_limited_as_well(mesh: Factory) -> None:
    data = make_bytes(1 * MB)
    with Server(sends(data), host="127.0.0.9") as server:
        m = mesh(limited_workload(server, send="2MB/s"))
        with connect(m.port()) as client, no_sooner_than(len(data), 2 * MB, 100):
            assert read_to_end(client) == (data, FIN)


def test_a_reload_speeds_live_connections_up(mesh: Factory) -> None:
    """At first this would take a quarter of an hour."""
    data = make_bytes(2 * MB)
    sources = ["127.0.0.9", "127.0.0.10"]

    def limited(*rates: str) -> Config:
        workloads = [
            {"name": source, "addresses": [source], "bandwidth": {"receive": rate}} for source, rate in zip(sources, rates, strict=True)
        ]
        return simple(server.address) | {"workloads": workloads}

    with Server(sends(data)) as server:
        m = mesh(limited("5kB/s", "5kB/s"))
        clients = [connect(m.port(), source=source) for source in sources * 2]
        begun = [client.recv(1) for client in clients]
        wait_until(lambda: m.total("l4mesh_bandwidth_waits_total") > 0, "a connection waits for its turn")
        m.reload(limited("200MB/s", "off"))
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
        # One that has nothing more to move is.
        with connect(m.port()) as client:
            assert read_to_end(client) == (data, FIN)
            m.wait_closed(half_closed_timeout=1)


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
