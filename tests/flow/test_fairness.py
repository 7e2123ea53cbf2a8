"""Whose turn it is when one source opens more connections than can be served."""

import signal
import socket
import threading
from contextlib import ExitStack

from tests.conftest import Factory
from tests.support.mesh import Config, Mesh, simple
from tests.support.peers import Server, connect, read_to_end
from tests.support.waiting import wait_until

STORM = 400


class Order:
    """The sources of connections, as an endpoint gets them."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self._lock = threading.Lock()

    def note(self, peer: socket.socket) -> None:
        header = b""
        while not header.endswith(b"\r\n"):
            header += peer.recv(1)
        with self._lock:
            self.sources.append(header.split()[2].decode())
        read_to_end(peer)


def storm(m: Mesh, port: int, stack: ExitStack, *others: str) -> None:
    """Everything is in the kernel's queue before the first is accepted: the storm, then one of each other source."""
    m.process.send_signal(signal.SIGSTOP)
    try:
        for source in (*["127.0.0.2"] * STORM, *others):
            stack.enter_context(connect(port, source=source))
    finally:
        m.process.send_signal(signal.SIGCONT)


def recorder(server: Server) -> Config:
    return simple(server.address, proxy_protocol="v1", listener={"limits": {"connections": 10_000}}) | {"workers": 1}


def test_a_source_does_not_wait_for_the_storm_of_another(mesh: Factory) -> None:
    order = Order()
    with Server(order.note) as server, ExitStack() as stack:
        m = mesh(recorder(server))
        storm(m, m.port(), stack, "127.0.0.3", "127.0.0.4")
        wait_until(lambda: len(order.sources) == STORM + 2, "everything is served")
        # In the order of the queue they would be the last two.
        for source in ("127.0.0.3", "127.0.0.4"):
            assert order.sources.index(source) < STORM // 2, source
        assert m.total("l4mesh_accepts_put_aside_total") > STORM // 2


def test_few_connections_are_served_in_the_order_of_the_queue(mesh: Factory) -> None:
    order = Order()
    with Server(order.note) as server, ExitStack() as stack:
        m = mesh(recorder(server))
        for index in range(30):
            stack.enter_context(connect(m.port(), source=f"127.0.0.{index % 5 + 2}"))
            wait_until(lambda index=index: len(order.sources) == index + 1, "it is served")  # type: ignore[misc]
        assert m.total("l4mesh_accepts_put_aside_total") == 0


def test_a_storm_that_waits_survives_a_reload_that_removes_its_listener(mesh: Factory) -> None:
    order = Order()
    with Server(order.note) as server, ExitStack() as stack:
        config = recorder(server)
        m = mesh(config | {"listeners": [*config["listeners"], config["listeners"][0] | {"name": "second"}]})
        storm(m, m.port("second"), stack)
        m.reload(config)
        wait_until(lambda: len(order.sources) == STORM, "everything is served")


def test_a_storm_that_waits_may_leave(mesh: Factory) -> None:
    order = Order()
    with Server(order.note) as server, ExitStack() as stack:
        m = mesh(recorder(server))
        storm(m, m.port(), stack, "127.0.0.3")
        stack.close()
        wait_until(lambda: m.total("l4mesh_listener_connections_opened_total") == STORM + 1, "all have been accepted")
        wait_until(lambda: m.active() == 0, "all have ended")
