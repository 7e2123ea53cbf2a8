"""Whose turn it is when one source wants more than can be served at once."""

import signal
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.conftest import Factory
from tests.flow.test_tls import inbound, outbound, pair, server_context
from tests.support.certificates import Files
from tests.support.mesh import Config, Mesh, simple
from tests.support.openssl import HINT, make_hello
from tests.support.peers import DEADLINE_S, Server, connect, read_exactly, read_to_end
from tests.support.waiting import wait_until

STORM = 400
SO_TIMESTAMPNS = 35
ESTABLISHED = "01"


class Order:
    """The sources of connections, as an endpoint gets them."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self._lock = threading.Lock()

    def note(self, peer: socket.socket) -> None:
        source = read_line(peer).split()[2]
        with self._lock:
            self.sources.append(source)
        read_to_end(peer)


def read_line(peer: socket.socket) -> str:
    """The PROXY header: nothing but it is sent as soon as a connection is made."""
    line = b""
    while not line.endswith(b"\r\n"):
        line += read_exactly(peer, 1)
    return line.decode()


def storm(m: Mesh, port: int, stack: ExitStack, *others: str) -> None:
    """Everything is in the kernel's queue before the first is accepted: the storm, then one of each other source."""
    with at_once(m):
        for source in (*["127.0.0.2"] * STORM, *others):
            stack.enter_context(connect(port, source=source))


@contextmanager
def at_once(m: Mesh) -> Iterator[None]:
    """What is done in it, l4mesh finds all together."""
    m.process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{m.process.pid}/task")
    try:
        wait_until(
            lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in tasks.glob("*/stat")), "it stands still"
        )
        yield
    finally:
        m.process.send_signal(signal.SIGCONT)


def arrival(peer: socket.socket) -> tuple[int, bytes]:
    """What ``peer`` reads first, and when the kernel got it, in ns (SO_TIMESTAMPNS, socket(7))."""
    data, ancillary, _, _ = peer.recvmsg(1 << 16, socket.CMSG_SPACE(16))
    [(_, _, stamp)] = ancillary
    seconds, ns = struct.unpack("qq", stamp)
    return int(seconds * 10**9 + ns), data


def arrival_ns(peer: socket.socket) -> int:
    return arrival(peer)[0]


@contextmanager
def listening() -> Iterator[socket.socket]:
    """A server whose connections tell when something arrived."""
    with socket.create_server(("127.0.0.1", 0), backlog=2 * STORM) as server:
        server.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        server.settimeout(DEADLINE_S)
        yield server


def accepted(server: socket.socket, stack: ExitStack) -> socket.socket:
    peer = stack.enter_context(server.accept()[0])
    peer.settimeout(DEADLINE_S)
    return peer


def opened(port: int, server: socket.socket, source: str, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """A connection that has said something: its client, and its end at the server."""
    client = stack.enter_context(connect(port, source=source))
    client.sendall(b"hello")
    peer = accepted(server, stack)
    read_line(peer)
    assert read_exactly(peer, 5) == b"hello"
    return client, peer


def recorder(address: str) -> Config:
    return simple(address, proxy_protocol="v1", listener={"limits": {"connections": 10_000}}) | {"workers": 1}


def test_a_source_does_not_wait_for_the_storm_of_another(mesh: Factory) -> None:
    order = Order()
    with Server(order.note) as server, ExitStack() as stack:
        m = mesh(recorder(server.address))
        storm(m, m.port(), stack, "127.0.0.3", "127.0.0.4")
        wait_until(lambda: len(order.sources) == STORM + 2, "everything is served")
        # In the order of the queue they would be the last two.
        for source in ("127.0.0.3", "127.0.0.4"):
            assert order.sources.index(source) < STORM // 2, source
        assert m.total("l4mesh_accepts_put_aside_total") > STORM // 2


def test_few_connections_are_served_in_the_order_of_the_queue(mesh: Factory) -> None:
    order = Order()
    with Server(order.note) as server, ExitStack() as stack:
        m = mesh(recorder(server.address))
        for index in range(30):
            stack.enter_context(connect(m.port(), source=f"127.0.0.{index % 5 + 2}"))
            wait_until(lambda index=index: len(order.sources) == index + 1, "it is served")  # type: ignore[misc]
        assert m.total("l4mesh_accepts_put_aside_total") == 0


def test_a_storm_that_waits_survives_a_reload_that_removes_its_listener(mesh: Factory) -> None:
    order = Order()
    with Server(order.note) as server, ExitStack() as stack:
        config = recorder(server.address)
        m = mesh(config | {"listeners": [*config["listeners"], config["listeners"][0] | {"name": "second"}]})
        storm(m, m.port("second"), stack)
        m.reload(config)
        wait_until(lambda: len(order.sources) == STORM, "everything is served")


def test_a_storm_that_waits_may_leave(mesh: Factory) -> None:
    order = Order()
    with Server(order.note) as server, ExitStack() as stack:
        m = mesh(recorder(server.address))
        storm(m, m.port(), stack, "127.0.0.3")
        stack.close()
        wait_until(lambda: m.total("l4mesh_listener_connections_opened_total") == STORM + 1, "all have been accepted")
        wait_until(lambda: m.active() == 0, "all have ended")


def test_what_a_connection_says_does_not_wait_for_hundreds_of_another_source(mesh: Factory) -> None:
    with listening() as server, ExitStack() as stack:
        m = mesh(recorder("{}:{}".format(*server.getsockname())))
        port = m.port()
        pairs = [opened(port, server, "127.0.0.2", stack) for _ in range(STORM)]
        client, peer = opened(port, server, "127.0.0.3", stack)
        with at_once(m):
            for one in (*[crowd for crowd, _ in pairs], client):
                one.sendall(b"x")
        order = sorted([arrival_ns(one) for _, one in pairs] + [at := arrival_ns(peer)])
        # In the order in which they were sent it would be the last.
        assert order.index(at) < STORM // 4


def test_what_is_begun_goes_before_new_connections_of_the_same_source_but_not_for_ever(mesh: Factory) -> None:
    with listening() as server, ExitStack() as stack:
        m = mesh(recorder("{}:{}".format(*server.getsockname())))
        port = m.port()
        pairs = [opened(port, server, "127.0.0.2", stack) for _ in range(STORM // 2)]
        with at_once(m):
            for _ in range(STORM // 2):
                stack.enter_context(connect(port, source="127.0.0.2"))
            for client, _ in pairs:
                client.sendall(b"x")
        new = sorted(arrival_ns(accepted(server, stack)) for _ in range(STORM // 2))
        begun = sorted(arrival_ns(peer) for _, peer in pairs)
        # In the order in which they were sent all of them would be later than the last new one.
        assert begun[-1] < new[STORM // 4]  # of STORM // 2
        assert new[STORM // 20] < begun[-1]


def test_a_handshake_does_not_wait_for_a_hundred_of_another_source(mesh: Factory, web: Files, redis: Files) -> None:
    def begin(source: str) -> tuple[socket.socket, bytes]:
        """A handshake with the endpoint, and what the endpoint would say next."""
        stack.enter_context(connect(port, source=source))
        peer = accepted(server, stack)
        heard, says = ssl.MemoryBIO(), ssl.MemoryBIO()
        end = context.wrap_bio(heard, says, server_side=True)
        while not says.pending:
            heard.write(peer.recv(1 << 16))
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
        return peer, says.read()

    context = server_context(redis)
    with listening() as server, ExitStack() as stack:
        m = mesh(outbound(web, "{}:{}".format(*server.getsockname()), workers=1))
        port = m.port()
        begun = [begin("127.0.0.2") for _ in range(100)] + [begin("127.0.0.3")]
        with at_once(m):
            for peer, flight in begun:
                peer.sendall(flight)
        order = [arrival_ns(peer) for peer, _ in begun]
        # In the order in which they were answered it would be the last.
        assert sorted(order).index(order[-1]) < 25


QUIET = ("127.0.0.3", "127.0.0.4", "127.0.0.5")
"""Several, for one alone might share a lane with the storm: there are few hints."""


def heard(port: int) -> int:
    """Connections to a port that have sent what nobody has read."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == ESTABLISHED and row[1].endswith(f":{port:04X}") and not row[4].endswith(":00000000") for row in rows)


def test_between_nodes_a_workload_does_not_wait_for_the_storm_of_another(mesh: Factory, web: Files, redis: Files) -> None:
    sources = (*["127.0.0.2"] * STORM, *QUIET)
    with listening() as server, ExitStack() as stack:
        far, near = pair(mesh, web, redis, "{}:{}".format(*server.getsockname()))
        port = near.port()
        # All of it comes to the second node from one address.
        with at_once(near):
            for source in sources:
                stack.enter_context(connect(far.port(), source=source)).sendall(source.encode())
            wait_until(lambda: heard(port) == len(sources), "all handshakes have begun")
        order = [source.decode() for _, source in sorted(arrival(accepted(server, stack)) for _ in sources)]
        assert min(order.index(source) for source in QUIET) < STORM // 2


def test_a_source_gets_no_more_turns_by_inventing_hints(mesh: Factory, redis: Files) -> None:
    sources = (*["127.0.0.2"] * 128, *QUIET)
    with ExitStack() as stack:
        m = mesh(inbound(redis, "127.0.0.1:1", workers=1))
        clients = [stack.enter_context(connect(m.port(), source=source)) for source in sources]
        wait_until(lambda: m.active() == len(clients), "all have been accepted")
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        with at_once(m):
            for number, client in enumerate(clients):
                client.sendall(make_hello((HINT, bytes([1 + number % 32]))))
        # What each gets is an alert: the order counts. With turns by hint the quiet would be behind one of each of the others'.
        answered = [arrival_ns(client) for client in clients]
        assert sorted(answered).index(min(answered[-len(QUIET) :])) < 16
