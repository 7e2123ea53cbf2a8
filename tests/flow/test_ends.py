"""How connections end: the same script against l4mesh and the others, side by side. Invariants 1, 2, 3 and 5 of the design."""

import contextlib
import platform
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import Factory
from tests.flow.test_fairness import at_once
from tests.support.mesh import simple
from tests.support.peers import RST, Server, black_hole, closed_port, connect, is_refused, read_exactly, read_to_end, reset, unsent
from tests.support.proxies import run_proxy
from tests.support.tracer import Tracer, worker_thread
from tests.support.waiting import wait_until

KB_100 = b"x" * 100_000
EPOLL_CTL = {"x86_64": 233, "aarch64": 21}.get(platform.machine(), -1)


@dataclass
class Stage:
    """An endpoint whose connection the script holds."""

    peers: list[socket.socket] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def serve(self, peer: socket.socket) -> None:
        self.peers.append(peer)
        self.done.wait(30)

    def peer(self) -> socket.socket:
        wait_until(lambda: self.peers, "the endpoint has the connection")
        return self.peers[-1]


def downstream_ends_first(client: socket.socket, stage: Stage) -> str:
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    peer = stage.peer()
    read_to_end(peer)
    with contextlib.suppress(ConnectionError):
        peer.sendall(KB_100)
        peer.shutdown(socket.SHUT_WR)
    data, end = read_to_end(client)
    return "delivered" if data == KB_100 and end == "FIN" else f"lost: {len(data)} B, {end}"


def upstream_ends_first(client: socket.socket, stage: Stage) -> str:
    client.sendall(b"hello")
    peer = stage.peer()
    read_exactly(peer, 5)
    peer.shutdown(socket.SHUT_WR)
    read_to_end(client)
    with contextlib.suppress(ConnectionError):
        client.sendall(KB_100)
        client.shutdown(socket.SHUT_WR)
    data, end = read_to_end(peer)
    return "delivered" if data == KB_100 and end == "FIN" else f"lost: {len(data)} B, {end}"


def upstream_resets_idle(client: socket.socket, stage: Stage) -> str:
    client.sendall(b"hello")
    peer = stage.peer()
    read_exactly(peer, 5)
    reset(peer)
    return read_to_end(client)[1]


def downstream_resets(client: socket.socket, stage: Stage) -> str:
    client.sendall(b"hello")
    peer = stage.peer()
    read_exactly(peer, 5)
    reset(client)
    return read_to_end(peer)[1]


def upstream_sends_then_resets(client: socket.socket, stage: Stage) -> str:
    client.sendall(b"hello")
    peer = stage.peer()
    read_exactly(peer, 5)
    peer.sendall(b"y" * 200_000)
    # Only what has left the endpoint can arrive: a reset discards the rest at the endpoint itself.
    wait_until(lambda: unsent(peer) == 0, "the endpoint's bytes are acknowledged")
    reset(peer)
    data, end = read_to_end(client)
    return f"{len(data) // 1000} kB, {end}"


def upstream_refuses(client: socket.socket, stage: Stage) -> str:
    return read_to_end(client)[1]


Script = Callable[[socket.socket, Stage], str]
CASES: list[tuple[str, Script, str]] = [
    ("downstream SHUT_WR, upstream then sends 100 kB", downstream_ends_first, "delivered"),
    ("upstream SHUT_WR, downstream then sends 100 kB", upstream_ends_first, "delivered"),
    ("upstream RST while idle: downstream sees", upstream_resets_idle, "RST"),
    ("downstream RST: upstream sees", downstream_resets, "RST"),
    ("upstream sends 200 kB, then RST: downstream has", upstream_sends_then_resets, "200 kB, RST"),
    ("upstream refuses: downstream sees", upstream_refuses, "RST"),
]
PROXIES = ["l4mesh", "haproxy", "nginx", "envoy"]


@contextlib.contextmanager
def run_any(name: str, mesh: Factory, folder: Path, endpoint: int) -> Iterator[int]:
    if name == "l4mesh":
        yield mesh(simple(f"127.0.0.1:{endpoint}")).port()
    else:
        with run_proxy(name, folder, endpoint) as port:
            yield port


def play(port: int, script: Script, stage: Stage) -> str:
    try:
        with connect(port) as client:
            return script(client, stage)
    except ConnectionResetError:
        return "RST"
    except (AssertionError, OSError) as error:
        return f"{type(error).__name__}"


@pytest.mark.peers
def test_connections_end_as_designed_beside_the_other_proxies(
    mesh: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes: dict[tuple[str, str], str] = {}
    for name in PROXIES:
        refused = closed_port()
        stages = {what: Stage() for what, _, _ in CASES}
        current = [Stage()]
        with Server(lambda peer: current[0].serve(peer)) as server, run_any(name, mesh, tmp_path, server.port) as port:
            for what, script, _ in CASES[:-1]:
                current[0] = stages[what]
                outcomes[what, name] = play(port, script, stages[what])
                stages[what].done.set()
        with run_any(name, mesh, tmp_path / "refused", refused) as port:
            what, script, _ = CASES[-1]
            outcomes[what, name] = play(port, script, stages[what])
    with capsys.disabled():
        print("\n" + "".join(f"{head:<52}" if i == 0 else f"{head:<26}" for i, head in enumerate(["how connections end", *PROXIES])))
        for what, _, _ in CASES:
            print(f"{what:<52}" + "".join(f"{outcomes[what, name]:<26}" for name in PROXIES))
    for what, _, wanted in CASES:
        assert outcomes[what, "l4mesh"] == wanted, what
        assert all(outcomes[what, name] for name in PROXIES)


def test_a_refused_dial_goes_to_the_next_endpoint_at_once(mesh: Factory) -> None:
    with Server(lambda peer: peer.sendall(b"here")) as server:
        m = mesh(simple(f"127.0.0.1:{closed_port()}", server.address, balance="round_robin", connect={"timeout": "10s"}))
        for _ in range(10):
            with connect(m.port()) as client:
                assert read_to_end(client) == (b"here", "FIN")
        assert m.cluster()["connect_failures"] >= 3


def test_a_black_hole_ends_in_the_connect_timeout_and_the_next_endpoint(mesh: Factory) -> None:
    with Server(lambda peer: peer.sendall(b"here")) as server, black_hole() as hole:
        m = mesh(simple(f"127.0.0.1:{hole}", server.address, balance="round_robin", connect={"timeout": "100ms"}))
        for _ in range(4):
            with connect(m.port()) as client:
                assert read_to_end(client) == (b"here", "FIN")
        assert m.cluster()["connect_failures"] >= 1


def test_only_black_holes_end_within_the_budget(mesh: Factory) -> None:
    with black_hole() as hole:
        m = mesh(simple(f"127.0.0.1:{hole}", connect={"timeout": "80ms", "attempts": 3}))
        assert is_refused(m.port())
        m.wait_closed(connect_timeout=1)
        assert m.cluster()["connect_attempts"] == 3


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_a_client_that_leaves_while_we_dial_cancels_the_dial(mesh: Factory, leave: str) -> None:
    with black_hole() as hole:
        m = mesh(simple(f"127.0.0.1:{hole}", connect={"timeout": "60s", "attempts": 1}))
        client = connect(m.port())
        wait_until(lambda: m.active() == 1, "the dial is under way")
        if leave == "close":
            client.close()
        else:
            reset(client)
        m.wait_closed(downstream_left=1)


def test_a_client_that_ends_its_half_after_a_request_is_still_dialled_for(mesh: Factory) -> None:
    with Server(lambda peer: peer.sendall(read_to_end(peer)[0].upper())) as server, black_hole() as hole:
        m = mesh(simple(f"127.0.0.1:{hole}", server.address, balance="round_robin", connect={"timeout": "300ms"}))
        for _ in range(2):
            with connect(m.port()) as client:
                client.sendall(b"question")
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == (b"QUESTION", "FIN")


def test_a_cluster_without_endpoints_refuses_and_says_so(mesh: Factory) -> None:
    m = mesh(simple())
    assert is_refused(m.port())
    m.wait_closed(no_endpoint=1)


def test_two_resets_end_a_connection_that_both_sides_had_blocked(mesh: Factory) -> None:
    # The client is gone with bytes of the server's unacknowledged in our socket, and nobody could say so: the half that would have
    # noticed waits for the server to read. Then the server resets, and what the client never acknowledged must not be waited for.
    stage = Stage()
    with Server(stage.serve) as server:
        m = mesh(simple(server.address))
        client = connect(m.port(), rcvbuf=4096)
        client.sendall(b"x")
        peer = stage.peer()
        peer.sendall(b"y" * 150_000)
        wait_until(lambda: m.cluster()["bytes_to_downstream"] == 150_000, "all of it is in our socket to the client")
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send(b"z" * 1_000_000)
        reset(client)
        m.get("/connections")
        reset(peer)
        stage.done.set()
        wait_until(lambda: m.active() == 0, "the connection has ended")


@pytest.mark.parametrize("who", ["downstream", "upstream"])
def test_a_reset_that_comes_with_the_end_before_it_is_a_reset(mesh: Factory, who: str) -> None:
    stage = Stage()
    with Server(stage.serve) as server:
        m = mesh(simple(server.address))
        client = connect(m.port())
        client.sendall(b"hello")
        read_exactly(stage.peer(), 5)
        leaves, stays = (client, stage.peer()) if who == "downstream" else (stage.peer(), client)
        with at_once(m):
            leaves.sendall(b"the last")
            leaves.shutdown(socket.SHUT_WR)
            reset(leaves)
        assert read_to_end(stays) == (b"the last", RST)
        stage.done.set()
        m.wait_closed(**{f"{who}_reset": 1})
        client.close()


@pytest.mark.parametrize("proxy_protocol", ["off", "v2"])
def test_an_answer_and_a_reset_behind_it_that_come_before_we_look_are_passed_on(mesh: Factory, proxy_protocol: str) -> None:
    over = threading.Event()

    def answer_and_reset(peer: socket.socket) -> None:
        peer.sendall(b"answer")
        reset(peer)
        over.set()

    with Server(answer_and_reset) as server:
        m = mesh(simple(server.address, proxy_protocol=proxy_protocol) | {"workers": 1, "watchdog": "off"})
        port = m.port()
        with Tracer(worker_thread(m.process.pid), EPOLL_CTL) as tracer:
            client = connect(port)
            # It has dialled, and is about to watch that socket.
            tracer.wait_stopped()
            assert over.wait(15)
        with client:
            assert read_to_end(client) == (b"answer", RST)
        m.wait_closed(upstream_reset=1)
        assert m.cluster()["connect_failures"] == 0
        assert server.accepted == 1
