"""Timeouts, limits, and running out. Invariants 8 to 12 of the design."""

import contextlib
import socket

import pytest

from tests.conftest import Factory
from tests.support.mesh import simple
from tests.support.peers import FIN, RST, Server, closed_port, connect, echo, is_refused, read_exactly, read_to_end, talk
from tests.support.proxies import free_port
from tests.support.waiting import wait_until


def test_an_idle_connection_is_reset_after_its_timeout(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, timeouts={"idle": "200ms"}))
        with connect(m.port()) as client:
            talk(client)
            assert read_to_end(client) == (b"", RST)
        m.wait_closed(idle_timeout=1)


def test_traffic_keeps_a_connection_from_being_idle(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, timeouts={"idle": "2s"}))
        with connect(m.port()) as client:
            ages = 0
            while ages < 2500:
                talk(client)
                ages = m.get("/connections")["connections"][0]["age_ms"]
        m.wait_closed(downstream_closed=1)


def test_a_half_closed_connection_is_bounded_by_its_own_timer(mesh: Factory) -> None:
    def hold(peer: socket.socket) -> None:
        read_to_end(peer)
        assert read_to_end(peer)[1] in (FIN, RST)
        with contextlib.suppress(OSError):
            while True:
                peer.send(b"")
                if _is_reset(peer):
                    return

    with Server(hold) as server:
        m = mesh(simple(server.address, timeouts={"half_closed": "200ms"}))
        with connect(m.port()) as client:
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == (b"", RST)
        m.wait_closed(half_closed_timeout=1)


def _is_reset(peer: socket.socket) -> bool:
    return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 7


def test_a_lifetime_ends_a_busy_connection(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, timeouts={"lifetime": "400ms", "lifetime_jitter": "50%"}))
        with connect(m.port()) as client, pytest.raises(ConnectionError):
            while True:
                client.sendall(b"x")
                if not client.recv(100):
                    raise AssertionError("a lifetime must end in a reset")
        m.wait_closed(lifetime=1)


LIMITS = [
    ("limit_listener", {"listener": {"limits": {"connections": 3}}}),
    ("limit_cluster", {"limits": {"connections": 3}}),
    ("limit_endpoint", {"limits": {"connections_per_endpoint": 3}}),
]


@pytest.mark.parametrize(("reason", "settings"), LIMITS, ids=[reason for reason, _ in LIMITS])
def test_a_limit_refuses_the_next_and_lets_in_again(mesh: Factory, reason: str, settings: dict[str, object]) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, **settings))  # type: ignore[arg-type]
        port = m.port()
        held = [connect(port) for _ in range(3)]
        for client in held:
            talk(client)
        assert is_refused(port)
        held.pop().close()
        m.wait_closed(**{reason: 1, "downstream_closed": 1})
        with connect(port) as client:
            talk(client)
        for client in held:
            talk(client)
            client.close()


def test_the_limit_by_source_counts_each_source(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"limits": {"connections_per_source": 2}, "workers": 2})
        port = m.port()
        held = [connect(port, source=f"127.0.0.{n}") for n in (2, 2, 3, 3)]
        for client in held:
            talk(client)
        for n in (2, 3):
            assert is_refused(port, source=f"127.0.0.{n}")
        for client in held:
            client.close()
        m.wait_closed(limit_source=2, downstream_closed=4)
        with connect(port, source="127.0.0.2") as client:
            talk(client)


def is_served(port: int, source: str) -> bool:
    try:
        with connect(port, source=source) as client:
            talk(client)
    except ConnectionResetError:
        return False
    return True


def test_a_limit_by_source_that_a_reload_brings_counts_who_is_there(mesh: Factory) -> None:
    with Server(echo) as server, contextlib.ExitStack() as stack:
        config = simple(server.address, listener={"bind": f"127.0.0.1:{free_port()}"})
        m = mesh(config)
        port = m.port()
        held = [stack.enter_context(connect(port, source=f"127.0.0.{n}")) for n in (2, 2, 2, 3)]
        for client in held:
            talk(client)
        m.reload(config | {"limits": {"connections_per_source": 2}})
        wait_until(lambda: not is_served(port, "127.0.0.2"), "those that were there are counted")
        assert is_served(port, "127.0.0.3")
        for left in (3, 2):
            assert not is_served(port, "127.0.0.2")
            held.pop(0).close()
            wait_until(lambda left=left: m.active() == left, "it has ended")  # type: ignore[misc]
        assert is_served(port, "127.0.0.2")


def test_the_limit_of_the_process_makes_new_connections_wait(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"limits": {"connections": 4}, "workers": 1})
        port = m.port()
        held = [connect(port) for _ in range(4)]
        for client in held:
            talk(client)
        waiting = connect(port)
        waiting.sendall(b"hi")
        wait_until(lambda: m.total("l4mesh_accept_pauses_total") > 0, "accepting pauses")
        for client in held:
            talk(client)
        held.pop().close()
        assert read_exactly(waiting, 2) == b"hi"
        for client in [waiting, *held]:
            client.close()


def test_running_out_of_descriptors_harms_nobody_who_is_connected(mesh: Factory) -> None:
    # Room for a few dozen connections, and many more want in.
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"workers": 1, "limits": {"connections": 100_000}}, nofile=320)
        port = m.port()
        held: list[socket.socket] = []
        first = connect(port)
        talk(first)
        for _ in range(200):
            client = connect(port)
            client.settimeout(0.2)
            held.append(client)
        wait_until(lambda: m.total("l4mesh_accept_pauses_total") > 0, "accepting pauses")
        cpu_s = m.cpu_s()
        turns = m.total("l4mesh_worker_turns_total")
        for _ in range(200):
            talk(first)
        pauses = m.total("l4mesh_accept_pauses_total")
        wait_until(lambda: m.total("l4mesh_accept_pauses_total") >= pauses + 5, "half a second has passed without room")
        assert m.cpu_s() - cpu_s < 0.6, "it spins"
        assert m.total("l4mesh_worker_turns_total") - turns < 5000
        for client in held:
            client.close()
        with connect(port) as late:
            talk(late)
        talk(first)
        first.close()


def test_our_own_trouble_is_not_booked_on_the_endpoint(mesh: Factory) -> None:
    # No route to a documentation address from a loopback source: the kernel refuses locally.
    m = mesh(simple("255.255.255.255:9"))
    assert is_refused(m.port())
    reasons = m.closed()
    assert set(reasons) <= {"local_exhausted", "connect_unreachable", "connect_failed"}


def test_every_refusal_is_counted_once(mesh: Factory) -> None:
    m = mesh(simple(f"127.0.0.1:{closed_port()}"))
    port = m.port()
    for _ in range(40):
        assert is_refused(port)
    m.wait_closed(connect_refused=40)
    assert m.metrics()['l4mesh_connections_closed_total{cluster="web",initiator="upstream",reason="connect_refused"}'] == 40
    assert m.metrics()['l4mesh_connections_opened_total{cluster="web"}'] == 40


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "0.0.0.0", "[::ffff:127.0.0.1]"])
def test_a_listener_that_leads_to_itself_refuses(mesh: Factory, host: str) -> None:
    from tests.support.proxies import free_port

    port = free_port()
    config = simple(f"{host}:{port}", listener={"bind": f"0.0.0.0:{port}"})
    m = mesh(config)
    assert is_refused(port)
    m.wait_closed(self_call=1)
