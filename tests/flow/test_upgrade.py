"""One process takes over from another: nothing is refused, nothing is cut, and the counters go on."""

import asyncio
import contextlib
import hashlib
import os
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from l4mesh.config.load import parse_config
from l4mesh.datapath import CARRIED_BYTES, Datapath, Traveller
from l4mesh.runtime.channel import Channel
from l4mesh.runtime.listeners import Listeners
from l4mesh.runtime.reload import NICENESS
from l4mesh.runtime.upgrade import PROTOCOL
from tests.conftest import Factory
from tests.support.certificates import Files
from tests.support.mesh import Mesh, environment_of_ours, simple
from tests.support.peers import (  # fmt: skip
    FIN,
    RST,
    Server,
    closed_port,
    connect,
    echo,
    is_refused,
    make_bytes,
    read_exactly,
    read_to_end,
    reset,
    talk,
    unsent,
)
from tests.support.tracer import Tracer, worker_thread
from tests.support.waiting import wait_until

HOUR = {"time": "1h", "over": "off"}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "l4mesh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment_of_ours())


class Loop:
    """A client that connects, talks and closes, again and again, and notes what goes wrong."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.failures: list[BaseException] = []
        self.done = 0
        self._work = work
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._work()
            except BaseException as error:
                self.failures.append(error)
            self.done += 1

    def __enter__(self) -> "Loop":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)


def test_no_connection_is_lost_and_no_counter_falls_back(mesh: Factory) -> None:
    dead = f"127.0.0.1:{closed_port()}"
    with Server(echo) as server:
        watched = {
            "outlier_detection": {"consecutive_failures": 1, "base_ejection": "100ms", "max_ejection": "100ms"},
            # Which says nothing of the dead one.
            "health_check": {"type": "tcp", "interval": "100ms", "port": int(server.address.rpartition(":")[2])},
            "balance": "round_robin",
        }
        m = mesh(simple(server.address, dead, **watched) | {"workers": 2})
        port = m.port()
        seen: dict[str, float] = {}

        def short() -> None:
            with connect(port) as client:
                talk(client)
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == (b"", FIN)

        def scrape() -> None:
            assert m.fetch("/ready")[0] == 200
            counters = {name: value for name, value in m.metrics().items() if "_total" in name or "_bucket" in name or "_count" in name}
            counters = {name: value for name, value in counters.items() if not name.startswith(("python_", "process_"))}
            for name, value in seen.items():
                assert counters[name] >= value, name
            seen.update(counters)

        with Loop(short) as one, Loop(short) as two, Loop(scrape) as scraping:
            for _ in range(5):
                before = one.done
                m.upgrade()
                wait_until(lambda: one.done > before + 5, "clients go on")
        assert one.failures + two.failures == []
        assert scraping.failures == []
        m.wait_alone()
        done = one.done + two.done
        assert m.total("l4mesh_listener_connections_opened_total") == done
        assert m.total("l4mesh_listener_connections_closed_total") == done
        assert m.total("l4mesh_worker_connections_accepted_total") == done
        assert m.total("l4mesh_connect_seconds_count") == done
        # One by each process.
        assert m.metrics()['l4mesh_config_reloads_total{result="succeeded"}'] == 6
        for name in ("l4mesh_outlier_ejections_total", "l4mesh_health_check_total"):
            assert 0 < sum(value for known, value in seen.items() if known.startswith(name)) <= m.total(name)
        assert m.closed() == {"downstream_closed": done}


class Stream:
    """Random bytes both ways over one connection, until told to stop; each side's digest of what it got is compared with the other's
    of what it sent. The readers wait for ``may_read``: until then as much goes as there is room for on the way."""

    def __init__(self, port: int, server: "StreamServer", chunk: int, rcvbuf: int = 0) -> None:
        self.client = connect(port, rcvbuf=rcvbuf)
        self.peer = server.take(self.client)
        # Those that are held up wait as long as the test does.
        self.client.settimeout(None)
        self.peer.settimeout(None)
        self.may_read, self.enough = threading.Event(), threading.Event()
        self.sent = {"client": 0, "server": 0}
        self.got = {"client": 0, "server": 0}
        self._digests: dict[tuple[str, str], str] = {}
        self._errors: list[BaseException] = []
        self._chunk = chunk
        self._threads = [
            threading.Thread(target=self._guard, args=(work, sock, name), daemon=True)
            for sock, name in ((self.client, "client"), (self.peer, "server"))
            for work in (self._send, self._read)
        ]
        for thread in self._threads:
            thread.start()

    def _guard(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._errors.append(error)

    def _send(self, sock: socket.socket, name: str) -> None:
        block = make_bytes(self._chunk, seed=sock.fileno())
        hashed = hashlib.sha256()
        while not self.enough.is_set():
            part = struct.pack("Q", self.sent[name]) + block
            sock.sendall(part)
            hashed.update(part)
            self.sent[name] += len(part)
            # Not as fast as it goes: the new process needs the processor as well.
            self.enough.wait(0.003)
        sock.shutdown(socket.SHUT_WR)
        self._digests["sent", name] = hashed.hexdigest()

    def _read(self, sock: socket.socket, name: str) -> None:
        hashed = hashlib.sha256()
        self.may_read.wait()
        while part := sock.recv(1 << 16):
            hashed.update(part)
            self.got[name] += len(part)
        self._digests["got", name] = hashed.hexdigest()

    def finish(self) -> int:
        """Bytes that went, both ways."""
        self.may_read.set()
        self.enough.set()
        for thread in self._threads:
            thread.join(60)
        assert self._errors == []
        assert self._digests["got", "client"] == self._digests["sent", "server"]
        assert self._digests["got", "server"] == self._digests["sent", "client"]
        self.client.close()
        self.peer.close()
        return sum(self.got.values())


class StreamServer:
    """Accepts one connection at a time, for the test to use both ends."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"

    def take(self, client: socket.socket) -> socket.socket:
        self._listening.settimeout(15)
        peer, _ = self._listening.accept()
        peer.settimeout(60)
        client.settimeout(60)
        return peer

    def __enter__(self) -> "StreamServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()


@pytest.mark.parametrize("splice", ["on", "off"])
def test_live_streams_go_on_without_a_byte_lost(mesh: Factory, splice: str) -> None:
    with StreamServer() as server:
        # One worker: a refusal ends a pass over the connections, and all of them are to be in it.
        m = mesh(simple(server.address) | {"splice": splice, "workers": 1})
        port = m.port()
        idle = connect(port)
        idle_peer = server.take(idle)
        # Half of a close in either direction.
        ended, ended_peer = (first := connect(port)), server.take(first)
        ended.sendall(b"last")
        ended.shutdown(socket.SHUT_WR)
        assert read_to_end(ended_peer) == (b"last", FIN)
        silent, silent_peer = (second := connect(port)), server.take(second)
        silent_peer.sendall(b"last")
        silent_peer.shutdown(socket.SHUT_WR)
        assert read_to_end(silent) == (b"last", FIN)
        flowing = [Stream(port, server, 1 << 17), Stream(port, server, 700)]
        stuck = [Stream(port, server, 1 << 17, rcvbuf=4096), Stream(port, server, 1 << 16)]
        for stream in flowing:
            stream.may_read.set()

        def flow() -> None:
            before = [dict(stream.got) for stream in flowing]
            wait_until(
                lambda: all(
                    stream.got[side] > n + 20_000 for stream, at in zip(flowing, before, strict=True) for side, n in at.items()
                ),
                "the streams flow",
            )

        flow()
        # What the stuck streams hold crosses with them: in a pipe, or as it is.
        if splice == "on":
            wait_until(lambda: any(descriptors > 2 for _, descriptors in _refuse_all(m)), "a pipe would go over")
        else:
            wait_until(lambda: any(length > CARRIED_BYTES for length, _ in _refuse_all(m)), "bytes would go over")
            assert all(descriptors == 2 for _, descriptors in _refuse_all(m))
        for _ in range(2):
            flow()
            m.upgrade()
        flow()
        assert len(m.get("/connections")["connections"]) == m.active() == 7
        moved = sum(stream.finish() for stream in flowing + stuck)
        idle.sendall(b"hello")
        assert read_exactly(idle_peer, 5) == b"hello"
        idle_peer.sendall(b"you")
        assert read_exactly(idle, 3) == b"you"
        ended_peer.sendall(make_bytes(100_000))
        ended_peer.close()
        assert read_to_end(ended) == (make_bytes(100_000), FIN)
        silent.sendall(make_bytes(100_000))
        silent.close()
        assert read_to_end(silent_peer) == (make_bytes(100_000), FIN)
        for peer in (idle, idle_peer, ended, silent_peer):
            peer.close()
        m.wait_alone()
        assert [event["handed_over"] for event in m.events() if event["event"] == "upgraded"] == [7, 7]
        wait_until(lambda: m.active() == 0, "all have ended")
        assert m.closed().keys() <= {"downstream_closed", "upstream_closed"}
        assert m.total("l4mesh_bytes_total") == moved + 4 + 4 + 5 + 3 + 200_000


def test_connections_that_went_over_end_as_others_do(mesh: Factory) -> None:
    with StreamServer() as server:
        config = simple(server.address, limits={"connections": 3})
        config["listeners"].append({"name": "timed", "bind": "127.0.0.1:0", "cluster": "timed"})
        timeouts = {"idle": "3s", "half_closed": "1s"}
        config["clusters"].append({"name": "timed", "endpoints": [server.address], "timeouts": timeouts})
        m = mesh(config | {"access_log": {"when": "always"}})
        port, timed = m.port(), m.port("timed")

        def pair(port: int) -> tuple[socket.socket, socket.socket]:
            client = connect(port)
            return client, server.take(client)

        (a, a_peer), (b, b_peer), (c, c_peer), (d, d_peer), (e, e_peer) = map(pair, (port, port, port, timed, timed))
        e.shutdown(socket.SHUT_WR)
        assert e_peer.recv(1) == b""
        m.upgrade()
        m.wait_alone()
        assert m.cluster()["active"] == 3
        assert is_refused(port)
        reset(a)
        assert read_to_end(a_peer) == (b"", RST)
        b_peer.sendall(make_bytes(200_000))
        wait_until(lambda: unsent(b_peer) == 0, "the endpoint's bytes are acknowledged")
        reset(b_peer)
        assert read_to_end(b) == (make_bytes(200_000), RST)
        c.close()
        assert read_to_end(c_peer) == (b"", FIN)
        c_peer.close()
        assert read_to_end(d) == (b"", RST)
        assert read_to_end(d_peer) == (b"", RST)
        assert read_to_end(e) == (b"", RST)
        m.wait_closed(downstream_reset=1, upstream_reset=1, downstream_closed=1, idle_timeout=1, half_closed_timeout=1, limit_cluster=1)
        assert sorted(record["reason"] for record in m.records()) == sorted(m.closed())
        for peer in (a_peer, b, d, d_peer, e, e_peer):
            peer.close()


def test_limits_of_bandwidth_go_on_and_faults_stay_where_they_are(mesh: Factory) -> None:
    with StreamServer() as server:
        config = simple(server.address, bandwidth_per_connection={"to_downstream": "1MB/s", "burst": "64KiB"})
        config["listeners"].append({"name": "slow", "bind": "127.0.0.1:0", "cluster": "slow"})
        slow = {"share": "100%", "slow": "1MB/s"}
        config["clusters"].append({"name": "slow", "endpoints": [server.address], "faults": [slow]})
        m = mesh(config | {"faults": {"enabled": True}, "drain": HOUR})
        (limited, limited_peer), (broken, broken_peer) = ((c := connect(m.port(name)), server.take(c)) for name in ("web", "slow"))
        m.upgrade()
        upgraded = next(event for event in m.events() if event["event"] == "upgraded")
        assert (upgraded["handed_over"], upgraded["left"]) == (1, 1)
        for client, peer in ((limited, limited_peer), (broken, broken_peer)):
            start = time.monotonic()
            peer.sendall(make_bytes(600_000))
            peer.close()
            assert read_to_end(client) == (make_bytes(600_000), FIN)
            # Slower than it may be is the machine's doing.
            assert time.monotonic() - start > 0.3
            client.close()


def test_tls_stays_and_ends_where_it_is_and_counts(mesh: Factory, web: Files, redis: Files) -> None:
    with Server(echo) as server:
        config = simple(server.address, listener={"tls": {"mode": "strict", "identity": "redis"}})
        m = mesh(config | {"identities": [redis.identity("redis")], "drain": HOUR})
        port = m.port()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(web.bundle)
        context.load_cert_chain(web.certificate, web.key)
        with context.wrap_socket(connect(port)) as client:
            talk(client)
            before = m.upgrade()
            upgraded = next(event for event in m.events() if event["event"] == "upgraded")
            assert (upgraded["handed_over"], upgraded["left"]) == (0, 1)
            talk(client)
            assert m.active() == 1
            # Two generations on it still lives, and still counts.
            m.upgrade()
            talk(client)
            assert m.active() == 1
            assert before.poll() is None
            with context.wrap_socket(connect(port)) as other:
                talk(other)
                other.unwrap().close()
            client.unwrap().close()
        m.wait_alone()
        m.wait_closed(downstream_closed=2)
        assert m.total("l4mesh_tls_handshakes_total") == 2
        assert m.total("l4mesh_bytes_total") == 16


def test_no_upgrade_sends_anybody_to_an_endpoint_that_is_known_to_be_bad(mesh: Factory) -> None:
    """One that is ejected, and one that its check took out; which serve goes over as well, though new ones do so after a check only."""

    def shown() -> list[Any]:
        return [endpoint["out"] for name in ("web", "checked") for endpoint in m.cluster(name)["endpoints"]]

    def as_before(outs: list[Any]) -> list[Any]:
        # Told as how long ago it was, in ms.
        return [[out | {"since_unix_s": pytest.approx(out["since_unix_s"], abs=0.1)} for out in of_one] for of_one in outs]

    with Server(echo) as server, Server(echo) as checked:
        dead, hole = (f"127.0.0.1:{closed_port()}" for _ in range(2))
        config = simple(
            dead, server.address, balance="round_robin", outlier_detection={"consecutive_failures": 2}, panic_threshold="off"
        )
        config["clusters"].append(
            {
                "name": "checked", "endpoints": [hole, checked.address], "panic_threshold": "off",
                "health_check": {"type": "tcp", "initial": "down", "interval": "1h", "fast_interval": "200ms"},
            }
        )  # fmt: skip
        config["listeners"].append({"name": "checked", "bind": "127.0.0.1:0", "cluster": "checked"})
        m = mesh(config | {"workers": 2})

        def talk_to(listener: str) -> None:
            with connect(m.port(listener)) as client:
                talk(client)

        wait_until(lambda: m.cluster("checked")["endpoints"][1]["health"]["state"] == "healthy", "one is healthy")
        wait_until(lambda: m.cluster("checked")["endpoints"][0]["health"]["state"] == "unhealthy", "the other is not")
        while not m.cluster("web")["endpoints"][0]["out"]:
            talk_to("web")
        before = shown()
        assert [[out["cause"] for out in outs] for outs in before] == [["ejected"], [], ["unhealthy"], []]
        tried = [m.cluster(name)["endpoints"][0]["connect_failures"] for name in ("web", "checked")]
        with Loop(lambda: talk_to("web")) as one, Loop(lambda: talk_to("checked")) as two:
            m.upgrade()
            done = one.done, two.done
            wait_until(lambda: one.done > done[0] + 5 and two.done > done[1] + 5, "clients go on")
            assert shown() == as_before(before)
        assert one.failures + two.failures == []
        m.wait_alone()
        assert [m.cluster(name)["endpoints"][0]["connect_failures"] for name in ("web", "checked")] == tried
        assert not [event for event in m.events() if event["event"] == "panic_begins" and event["cluster"] == "web"]


@pytest.mark.parametrize("numbers", [(1, 3), (3, 2)])
def test_another_number_of_workers_loses_nothing(mesh: Factory, numbers: tuple[int, int]) -> None:
    with Server(echo) as server, contextlib.ExitStack() as stack:
        m = mesh(simple(server.address) | {"workers": numbers[0]})
        port = m.port()
        live = [stack.enter_context(connect(port)) for _ in range(30)]
        for client in live:
            talk(client)
        m._settings["workers"] = numbers[1]
        # A worker has an epoll and an eventfd.
        m._descriptors += 2 * (numbers[1] - numbers[0])
        m.write(simple(server.address))
        # Nobody accepts: these wait in the queues while the new process starts.
        m.process.send_signal(signal.SIGSTOP)
        waiting = [stack.enter_context(connect(port)) for _ in range(30)]
        m.process.send_signal(signal.SIGCONT)
        m.upgrade()
        for client in waiting + live:
            talk(client)
        for _ in range(30):
            talk(stack.enter_context(connect(port)))
        workers = m.status()["workers"]
        assert len(workers) == numbers[1]
        assert all(worker["active"] for worker in workers)
        stack.close()
        m.wait_alone()
        m.wait_closed(downstream_closed=90)


class Impostor:
    """A new process that speaks the protocol as far as a test wants."""

    def __init__(self, m: Mesh, **greeting: Any) -> None:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connected.connect(m.upgrade_socket)
        self.channel = Channel(connected)
        self._descriptors: list[int] = []
        self.channel.send("takeover", {"protocol": PROTOCOL, "carried": CARRIED_BYTES, "version": "test"} | greeting)

    def hear(self, *expected: str) -> dict[str, Any]:
        message = self.channel.receive(10, *expected)
        self._descriptors += message.descriptors
        return message.body

    def die(self) -> None:
        """As kill -9 does: everything closes at once."""
        self.channel.close()
        for descriptor in self._descriptors:
            os.close(descriptor)


def _refuse_all(m: Mesh) -> list[tuple[int, int]]:
    """Takes over up to the connections, takes none of those and dies; gives the length of each one's state and its descriptors."""
    failed = _failures(m)
    impostor = Impostor(m)
    _after_ready(impostor)
    carried = []
    while (said := impostor.hear("connections", "yours"))["say"] == "connections":
        carried += [(length, descriptors) for length, descriptors, *_ in said["of"]]
        impostor.channel.send("not_taken")
    impostor.die()
    wait_until(lambda: _failures(m) > failed, "it is noticed")
    return carried


def _failures(m: Mesh) -> int:
    return sum(event["event"] == "upgrade_failed" for event in m.events())


def _after_greeting(impostor: Impostor) -> None:
    pass


def _after_offer(impostor: Impostor) -> None:
    impostor.hear("offer")


def _after_ready(impostor: Impostor) -> None:
    impostor.hear("offer")
    impostor.channel.send("ready")


def _with_connections(impostor: Impostor) -> None:
    _after_ready(impostor)
    impostor.hear("connections")


def _after_refusing_connections(impostor: Impostor) -> None:
    _with_connections(impostor)
    for _ in range(3):
        impostor.channel.send("not_taken")
    impostor.hear("connections")
    impostor.hear("connections")


def _before_serving(impostor: Impostor) -> None:
    _after_refusing_connections(impostor)
    assert "totals" in impostor.hear("yours")


def _saying_nonsense(impostor: Impostor) -> None:
    _with_connections(impostor)
    impostor.channel.send("serving")


def test_a_new_process_that_dies_leaves_the_old_one_serving(mesh: Factory) -> None:
    with Server(echo) as server:
        config = simple(server.address) | {"workers": 1}
        m = mesh(config)
        port = m.port()
        steps = (
            _after_greeting, _after_offer, _after_ready, _with_connections, _after_refusing_connections, _before_serving,
            _saying_nonsense, _after_greeting,
        )  # fmt: skip
        with connect(port) as client:
            talk(client)
            for turn, until in enumerate(steps, 1):
                impostor = Impostor(m)
                until(impostor)
                impostor.die()
                wait_until(lambda: _failures(m) == turn, f"{until.__name__} is noticed")
                talk(client)
                with connect(port) as other:
                    talk(other)
                wait_until(lambda: m.fetch("/ready")[0] == 200, "it answers again")
            # And the configuration can change again.
            m.reload(config | {"access_log": {"when": "never"}})
        m.wait_closed(downstream_closed=len(steps) + 1)


def test_connections_that_were_taken_go_with_who_took_them_and_the_rest_stays(mesh: Factory) -> None:
    with Server(echo) as server, contextlib.ExitStack() as stack:
        m = mesh(simple(server.address) | {"workers": 1})
        clients = [stack.enter_context(connect(m.port())) for _ in range(60)]
        for client in clients:
            talk(client)
        impostor = Impostor(m)
        _with_connections(impostor)
        impostor.channel.send("taken")
        impostor.hear("connections")
        impostor.die()
        wait_until(lambda: m.closed().get("handed_over") == 40, "the first batch is gone")
        wait_until(lambda: m.active() == 20, "the second is back")
        alive = 0
        for client in clients:
            with contextlib.suppress(OSError, AssertionError):
                talk(client)
                alive += 1
        assert alive == 20


def test_garbage_is_harmless(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address))
        for packet in (b"x", b".", b".\xff\xff\xff\xff{}", b".\x02\0\0\0{}", b".\x02\0\0\0[]", b"." + struct.pack("I", 20) + b'{"say": "taken"}    ',
                       b"+" * 65536, b"." + struct.pack("I", 50000) + b"[" * 50000):  # fmt: skip
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
                caller.connect(m.upgrade_socket)
                caller.settimeout(15)
                caller.send(packet)
                if packet[:1] == b"+":
                    caller.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert caller.recv(100) == b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller, open("/dev/null") as null:
            caller.connect(m.upgrade_socket)
            before = m.count_descriptors()
            socket.send_fds(caller, [b".\x02\0\0\0{}"], [null.fileno()] * 100)
            assert caller.recv(100) == b""
            wait_until(lambda: m.count_descriptors() <= before, "descriptors that nobody asked for are closed")
        with connect(m.port()) as client:
            talk(client)


def test_a_process_that_speaks_another_protocol_is_refused(mesh: Factory) -> None:
    m = mesh(simple("127.0.0.1:9"))
    for wrong in ({"protocol": PROTOCOL + 1}, {"carried": CARRIED_BYTES + 8}):
        impostor = Impostor(m, **wrong)
        assert "can't take over" in impostor.hear("refused")["why"]
        impostor.die()
    assert m.status()["ready"]


def test_a_second_upgrade_at_once_is_refused(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address))
        first = Impostor(m)
        first.hear("offer")
        done = run("run", "-c", str(m.file.parent))
        assert done.returncode == 1
        assert f"an upgrade of process {m.process.pid} is under way already" in done.stderr
        done = run("upgrade", "-c", str(m.file.parent))
        assert done.returncode == 1
        assert "under way already" in done.stderr
        first.die()
        with connect(m.port()) as client:
            talk(client)
            wait_until(lambda: any(event["event"] == "upgrade_failed" for event in m.events()), "it is noticed")
            m.upgrade()
            talk(client)


def test_the_command_says_how_it_went(mesh: Factory) -> None:
    with Server(echo) as server:
        config = simple(server.address)
        m = mesh(config)
        with connect(m.port()) as client:
            talk(client)
            m.file.write_text("listeners: nonsense\n")
            done = run("upgrade", "-c", str(m.file.parent))
            assert done.returncode == 1
            assert "listeners: must be a list" in done.stderr
            talk(client)
            m.write(config)
            before = m.process
            done = run("upgrade", "-c", str(m.file.parent))
            assert done.returncode == 0, done.stderr
            assert f"has replaced process {before.pid}" in done.stdout
            assert "live connections handed over: 1, left with it until they end: 0" in done.stdout
            talk(client)
        assert before.wait(15) == 0
        # It is no child of ours: its end shows at its socket.
        successor = m.status()["pid"]
        os.kill(successor, signal.SIGTERM)
        wait_until(lambda: not Path(m.upgrade_socket).exists(), "the successor ends")
        wait_until(lambda: not Path(f"/proc/{successor}").exists() or _is_zombie(successor), "it is gone")
    done = run("upgrade", "-c", str(m.file.parent))
    assert done.returncode == 1
    assert "no process runs at" in done.stderr


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_new_process_that_can_not_start_changes_nothing(mesh: Factory) -> None:
    with Server(echo) as server, socket.create_server(("127.0.0.1", 0)) as taken:
        config = simple(server.address)
        m = mesh(config)
        with connect(m.port()) as client:
            talk(client)
            # Fine for the running process, which refuses it at a reload; the new one finds its port taken.
            both = config | {"listeners": [*config["listeners"], {"name": "other", "bind": f"127.0.0.1:{taken.getsockname()[1]}", "cluster": "web"}]}  # fmt: skip
            m.write(both)
            done = run("upgrade", "-c", str(m.file.parent))
            assert done.returncode == 1
            assert "listener other: can't listen on" in done.stderr
            assert "the running process goes on" in done.stderr
            talk(client)
            with connect(m.port()) as other:
                talk(other)
            m.write(config)
            wait_until(lambda: m.status()["config"]["last_error"] is None, "the mistake is gone")


def test_no_room_for_all_descriptors_leaves_the_rest_where_it_is(mesh: Factory) -> None:
    with Server(echo) as server, contextlib.ExitStack() as stack:
        m = mesh(simple(server.address) | {"workers": 1, "drain": HOUR})
        clients = [stack.enter_context(connect(m.port())) for _ in range(120)]
        for client in clients:
            talk(client)
        m.upgrade(nofile=150)
        upgraded = next(event for event in m.events() if event["event"] == "upgraded")
        assert upgraded["handed_over"] == 40
        assert upgraded["left"] == 80
        for client in clients:
            talk(client)
        assert m.active() == 120
        stack.close()
        m.wait_alone()
        m.wait_closed(downstream_closed=120)


@contextlib.contextmanager
def systemd(folder: Path) -> Iterator[Callable[[], list[str]]]:
    """What systemd would hear; the socket's place is ``folder``/notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"{folder}/notify")

        def heard() -> list[str]:
            said = []
            while select.select([listening], [], [], 0)[0]:
                said.append(listening.recv(4096).decode())
            return said

        yield heard


def test_systemd_is_told_who_is_the_main_process(mesh: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(echo) as server, systemd(tmp_path) as heard:
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        m = mesh(simple(server.address))
        assert heard() == ["READY=1"]
        m.upgrade()
        m.wait_alone()
        assert sorted(heard()) == [f"MAINPID={m.process.pid}", "READY=1"]
        m.stop()
        assert heard() == ["STOPPING=1"]


def test_a_container_waits_to_be_stopped(mesh: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a DaemonSet that surges: one that ended by itself would be started again, and take over from its successor.
    with Server(echo) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
        m = mesh(simple(server.address))
        done = run("upgrade", "-c", str(m.file.parent))
        assert done.returncode == 1
        assert "start another container beside it" in done.stderr
        with connect(m.port()) as client:
            talk(client)
            before = m.upgrade()
            wait_until(lambda: any(event["event"] == "waits_for_sigterm" for event in m.events()), "it waits")
            talk(client)
            before.send_signal(signal.SIGTERM)
            m.wait_alone()
            talk(client)


def test_another_configuration_is_what_the_new_process_has(mesh: Factory) -> None:
    with Server(echo) as one, Server(echo) as two, contextlib.ExitStack() as stack:
        config = simple(one.address) | {"workers": 1}
        config["clusters"].append({"name": "gone", "endpoints": [two.address], "health_check": {"type": "tcp", "interval": "100ms"}})
        config["listeners"].append({"name": "gone", "bind": "127.0.0.1:0", "cluster": "gone"})
        m = mesh(config)
        port, gone = m.port(), m.port("gone")
        clients = [stack.enter_context(connect(port)), stack.enter_context(connect(gone))]
        for client in clients:
            talk(client)
        # In another folder: the running process does not see it.
        m.file = m.folder / "new" / "l4mesh.yaml"
        m.file.parent.mkdir()
        m.write(simple(two.address, listener={"backlog": 77, "keepalive": {"idle": "77s"}}))
        m.upgrade()
        m.wait_alone()
        for client in clients:
            talk(client)
        with pytest.raises(ConnectionRefusedError):
            connect(gone)
        talk(stack.enter_context(connect(port)))
        assert two.accepted == 2
        removed = 'l4mesh_listener_connections_opened_total{listener="(removed)"}'
        assert m.metrics()[removed] == 1
        assert m.metrics()['l4mesh_connections_active{cluster="(removed)"}'] == 1
        # Of checks there is nothing that the rest would belong to.
        assert not [name for name in m.metrics() if name.startswith("l4mesh_health_check_total")]
        stack.close()
        wait_until(lambda: m.active() == 0, "all have ended")
        assert (
            m.metrics()['l4mesh_connections_closed_total{cluster="(removed)",initiator="downstream",reason="downstream_closed"}'] == 1
        )


def test_a_reload_that_does_not_end_fails_the_upgrade_and_freezes_nothing(mesh: Factory) -> None:
    with Server(echo) as server:
        config = simple(server.address)
        m = mesh(config)
        tasks = [int(task) for task in os.listdir(f"/proc/{m.process.pid}/task")]
        # The one that loads, and then those that it has started.
        nice = [task for task in tasks if os.getpriority(os.PRIO_PROCESS, task) == NICENESS]
        with Tracer(min(nice)) as tracer:
            tracer.wait_stopped()
            m.process.send_signal(signal.SIGHUP)
            done = run("run", "-c", str(m.file.parent))
            assert done.returncode == 1
            assert "the running process has not come to it within 10 s" in done.stderr
        m.reload(config | {"access_log": {"when": "never"}})
        m.upgrade()
        with connect(m.port()) as client:
            talk(client)


def test_off_is_off(mesh: Factory) -> None:
    m = mesh(simple("127.0.0.1:9") | {"upgrade": {"socket": "off"}})
    done = run("upgrade", "-c", str(m.file.parent))
    assert done.returncode == 1
    assert "upgrade.socket is off" in done.stderr
    assert yaml.safe_load(m.file.read_text())["upgrade"] == {"socket": "off"}


def test_a_worker_that_is_late_hands_nothing_over_that_nobody_waits_for() -> None:
    asyncio.run(_hand_over_late())


async def _hand_over_late() -> None:
    given: list[Traveller] = []

    def decline(_: int, travellers: list[Traveller]) -> bool:
        given.extend(travellers)
        return False

    with Server(echo) as server:
        config = parse_config(yaml.safe_dump(simple(server.address)))
        listeners, datapath = Listeners(1), Datapath(1, 256, lambda records: None)
        sockets = listeners.open(config)
        datapath.apply(config, sockets, [], 100)
        datapath.start()
        with connect(sockets["web"][0][0].port) as client:
            await asyncio.to_thread(talk, client)
            with Tracer(worker_thread(os.getpid())) as tracer:
                tracer.wait_stopped()
                with pytest.raises(TimeoutError):
                    await asyncio.to_thread(datapath.hand_over, decline)
            await asyncio.to_thread(talk, client)
            assert not given
            assert await asyncio.to_thread(datapath.hand_over, decline) == 0
            assert len(given) == 1
            await asyncio.to_thread(talk, client)
        datapath.stop()
        listeners.close()
