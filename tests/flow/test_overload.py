"""Overload with real pressure: it is shed in steps, said, and over by itself. Invariant 11 of the design."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SANITIZERS, Factory
from tests.support.mesh import Config, Mesh, simple
from tests.support.peers import RST, Server, connect, echo, is_refused, read_to_end, talk
from tests.support.waiting import wait_until

OFF = {"connections": "off", "descriptors": "off", "memory": "off"}


def level(m: Mesh, resource: str) -> int:
    """0 before the first look."""
    return next((int(one["level"]) for one in m.status()["overload"]["resources"] if one["name"] == resource), 0)


def levels_said(m: Mesh, resource: str) -> list[int]:
    return [event["step"] for event in m.events() if event["event"] == "overload" and event["resource"] == resource]


def open_many(port: int, count: int, source: str | None = None) -> list[socket.socket]:
    clients = [connect(port, source=source) for _ in range(count)]
    for client in clients:
        talk(client)
    return clients


def close_all(clients: list[socket.socket]) -> None:
    for client in clients:
        client.close()


def wait_over(m: Mesh, resource: str) -> None:
    """It is over: nothing is ordered any more, and that was said."""
    wait_until(lambda: level(m, resource) == 0, "the pressure is over")
    overload = m.status()["overload"]
    assert (overload["level"], overload["idle_cap_ms"], overload["source_share"], overload["accepts_per_s"]) == (0, 0, 0, 0)
    assert m.metrics()[f'l4mesh_overload_level{{resource="{resource}"}}'] == 0
    assert levels_said(m, resource)[-1] == 0


def limited(endpoint: str, most: int, overload: Config | None = None, **cluster: object) -> Config:
    return simple(endpoint, **cluster) | {"limits": {"connections": most}, "workers": 1, "overload": overload or {}}


def test_the_longest_idle_go_first_and_no_more_than_need_be(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(limited(server.address, 40, {"idle": "200ms"} | OFF | {"connections": "85%"}, timeouts={"idle": "4s"}))
        busy = connect(m.port())
        talk(busy)
        idle = open_many(m.port(), 34)

        def is_shed() -> bool:
            talk(busy)
            return m.closed().get("overload", 0) > 0

        wait_until(is_shed, "idle connections end")
        assert levels_said(m, "connections")[0] == 1
        assert m.total("l4mesh_overload_shed_total") >= 1
        ended = [client for client in idle if client.fileno() >= 0]
        wait_until(lambda: level(m, "connections") == 0, "there is room again")
        talk(busy)
        assert read_to_end(ended[0]) == (b"", RST)
        wait_over(m, "connections")
        with connect(m.port()) as late:
            talk(late)
        close_all([busy, *idle])


def test_an_idle_timeout_that_is_off_stays_off(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(limited(server.address, 20, {"idle": "1ms"} | OFF | {"connections": "50%"}, timeouts={"idle": "off"}))
        clients = open_many(m.port(), 11)
        wait_until(lambda: m.status()["overload"]["idle_cap_ms"] == 1, "the cap is as low as it gets")
        for client in clients:
            talk(client)
        assert m.closed().get("overload", 0) == 0
        close_all(clients)
        wait_over(m, "connections")


def test_the_worst_source_is_refused_and_nobody_else(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(limited(server.address, 100, OFF | {"connections": "85%"}, timeouts={"idle": "off"}))
        port = m.port()
        many = open_many(port, 88, "127.0.0.2")
        others = [client for n in range(3, 9) for client in open_many(port, 1, f"127.0.0.{n}")]
        wait_until(lambda: m.status()["overload"]["source_share"], "the sources' shares are known")
        assert level(m, "connections") == 2
        assert is_refused(port, source="127.0.0.2")
        with connect(port, source="127.0.0.9") as other:
            talk(other)
        m.wait_closed(overload=1)
        assert m.metrics()['l4mesh_overload_shed_total{action="source_refused"}'] == 1
        for client in [*many, *others]:
            talk(client)
        close_all(many[:40])
        wait_over(m, "connections")
        for client in open_many(port, 3, "127.0.0.2"):
            client.close()
        close_all([*many[40:], *others])


def test_at_the_last_step_fewer_are_accepted_and_all_are_served(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(limited(server.address, 200, OFF | {"connections": "85%"}, timeouts={"idle": "off"}))
        port = m.port()
        held = open_many(port, 195)
        wait_until(lambda: level(m, "connections") == 3, "the last step is reached")
        late = [connect(port) for _ in range(4)]
        for client in late:
            talk(client)
        assert m.status()["overload"]["accepts_per_s"] > 0
        assert m.metrics()['l4mesh_overload_shed_total{action="accept_paused"}'] >= 1
        for client in held:
            talk(client)
        close_all(held)
        wait_over(m, "connections")
        close_all(open_many(port, 20))
        close_all(late)


def test_descriptors_that_run_out_are_shed_for(mesh: Factory) -> None:
    with Server(echo) as server:
        overload = OFF | {"descriptors": "25%", "idle": "100ms"}
        m = mesh(simple(server.address, timeouts={"idle": "2s"}) | {"workers": 1, "overload": overload}, nofile=640)
        clients = open_many(m.port(), 90)
        wait_until(lambda: m.closed().get("overload", 0) > 10, "idle connections end")
        wait_over(m, "descriptors")
        assert max(levels_said(m, "descriptors")) >= 1
        close_all(clients)


def resident_kib(m: Mesh) -> int:
    return int(Path(f"/proc/{m.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def send_much(peer: socket.socket) -> None:
    """More than sockets hold, so that the proxy keeps some for a client that does not read."""
    with contextlib.suppress(OSError):
        while True:
            peer.sendall(b"x" * 65536)


@contextlib.contextmanager
def stalled(port: int, count: int) -> Iterator[list[socket.socket]]:
    clients = [connect(port, rcvbuf=4096) for _ in range(count)]
    try:
        yield clients
    finally:
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()


@pytest.mark.skipif(bool(SANITIZERS), reason="a sanitizer keeps what is freed for a while")
def test_memory_that_grows_past_its_limit_is_given_back(mesh: Factory) -> None:
    with Server(send_much) as server:
        config = simple(server.address, timeouts={"idle": "20s"}) | {"workers": 1, "splice": "off", "access_log": {"when": "never"}}
        m = mesh(config | {"overload": OFF})
        for _ in range(5):
            m.fetch("/metrics")
        most = resident_kib(m) * 110 // 100
        m.reload(config | {"overload": OFF | {"memory": "96%", "memory_limit": f"{most}KiB", "idle": "100ms"}})
        with stalled(m.port(), 600):
            try:
                wait_until(lambda: m.closed().get("overload", 0) > 50, "those who do not read lose their place")
            finally:
                print(resident_kib(m), most, m.closed(), m.status()["overload"])
            wait_over(m, "memory")
            assert max(levels_said(m, "memory")) >= 1


@contextlib.contextmanager
def control_group() -> Iterator[tuple[Path, str, str]]:
    """A memory control group of our own: its folder, and the names of its limit and its usage."""
    for parent, most, current in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    ):
        folder = parent / f"l4mesh-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / most).exists():
                yield folder, most, current
                return
        finally:
            wait_until(lambda folder=folder: not (folder / "cgroup.procs").read_text(), "the group is empty")
            folder.rmdir()
    pytest.skip("needs a memory control group that can be written")


def test_the_limit_of_a_control_group_is_kept(mesh: Factory) -> None:
    with control_group() as (folder, most, current):
        prefix = ("sh", "-c", f'echo $$ >{folder}/cgroup.procs && exec "$@"', "sh")
        with Server(echo) as server:
            config = simple(server.address, timeouts={"idle": "2s"}) | {"overload": OFF | {"memory": "85%", "idle": "100ms"}}
            m = mesh(config, prefix)
            clients = open_many(m.port(), 20)
            assert level(m, "memory") == 0
            limit = int((folder / current).read_text()) * 100 // 88
            (folder / most).write_text(str(limit))
            wait_until(lambda: m.closed().get("overload", 0), "idle connections end")
            reading = next(one for one in m.status()["overload"]["resources"] if one["name"] == "memory")
            assert abs(reading["limit"] - limit) <= os.sysconf("SC_PAGE_SIZE")
            (folder / most).write_text(str(limit * 2))
            wait_over(m, "memory")
            close_all(clients)
            m.check_invariants()
            m.stop()


def test_a_full_accept_queue_is_seen(mesh: Factory) -> None:
    with Server(echo) as server:
        config = limited(server.address, 16, OFF | {"accept_queue": "50%"}, listener={"backlog": 8}, timeouts={"idle": "off"})
        m = mesh(config)
        port = m.port()
        held = open_many(port, 16)
        waiting = [connect(port) for _ in range(8)]
        wait_until(lambda: level(m, "accept_queue") >= 2, "the queue is full for a second")
        close_all(held)
        for client in waiting:
            talk(client)
        wait_over(m, "accept_queue")
        close_all(waiting)


def test_the_processors_are_seen_to_be_busy(mesh: Factory) -> None:
    def drain(peer: socket.socket) -> None:
        while peer.recv(1 << 20):
            pass

    with Server(drain) as server:
        m = mesh(simple(server.address) | {"splice": "off", "overload": OFF | {"cpu": "4%"}})
        with connect(m.port()) as client:

            def is_busy() -> bool:
                for _ in range(20):
                    client.sendall(b"x" * 1_000_000)
                return bool(levels_said(m, "cpu"))

            wait_until(is_busy, "the CPU is busy")
        # Not asked: that keeps it busy.
        wait_until(lambda: levels_said(m, "cpu")[-1] == 0, "the CPU has time again")


def test_status_shows_it_to_people(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(limited(server.address, 20, OFF | {"connections": "50%"}, timeouts={"idle": "off"}))
        clients = open_many(m.port(), 12)
        wait_until(lambda: level(m, "connections") == 1, "the first step is reached")
        shown = subprocess.run(
            [sys.executable, "-m", "l4mesh", "status", "--admin", m.admin], capture_output=True, text=True, check=True
        ).stdout
        assert "OVERLOAD, step 1 of 3: connections 60%;" in shown
        close_all(clients)


def test_admin_connections_that_take_every_descriptor_end_nothing(mesh: Factory) -> None:
    def are_back() -> bool:
        # As long as they are not, there is none for whoever asks.
        with contextlib.suppress(OSError):
            return level(m, "descriptors") == 0
        return False

    with Server(echo) as server, contextlib.ExitStack() as idle:
        m = mesh(simple(server.address), nofile=80)
        with connect(m.port()) as live:
            talk(live)
            for _ in range(80):
                client = idle.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(m.admin.removeprefix("unix:"))
            wait_until(lambda: 3 in levels_said(m, "descriptors"), "all are taken, and it was said")
            m.process.send_signal(signal.SIGHUP)
            wait_until(lambda: any(event["event"] == "config_refused" for event in m.events()), "the files were looked at in vain")
            idle.close()
            wait_until(are_back, "they are back")
            talk(live)
