"""What operators see: admin server, metrics, access log, and the commands that show them."""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from l4mesh.config.load import parse_config
from l4mesh.datapath import Datapath, Traveller
from l4mesh.runtime.admin import CONNECTIONS_MAX
from l4mesh.runtime.listeners import Listeners
from l4mesh.snapshot import ConnectionRecord
from tests.conftest import Factory, skip_or_fail
from tests.support.mesh import simple
from tests.support.peers import FIN, Server, closed_port, connect, echo, is_refused, read_exactly, read_to_end, talk
from tests.support.tracer import Tracer, worker_thread
from tests.support.waiting import wait_until


def test_every_page_answers_and_nothing_else_is_allowed(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address))
        for path in ("/live", "/ready", "/status", "/clusters", "/connections", "/config", "/metrics"):
            assert m.fetch(path)[0] == 200, path
            assert m.fetch(path, "POST")[0] == 405, path
        assert m.fetch("/nothing")[0] == 404
        assert m.fetch("/clusters?name=nothing")[0] == 404
        for query in ("start=x", "limit=0", "limit=100000", "start=-1"):
            assert m.fetch(f"/connections?{query}")[0] == 400
        assert m.get("/config")["clusters"]["web"]["endpoints"][0]["port"] == server.port


def test_the_first_event_names_every_address(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, listener={"bind": ["127.0.0.1:0", "127.0.0.2:0"]}))
        [ready] = [event for event in m.events() if event["event"] == "ready"]
        assert ready["listeners"] == {"web": f"127.0.0.1:{m.port()}, 127.0.0.2:{m.port(bind=1)}"}


def test_the_admin_server_survives_abuse(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address))
        path = m._settings["admin"]["bind"].removeprefix("unix:")
        assert os.stat(path).st_mode & 0o777 == 0o600
        slow = []
        for junk in (
            b"\0" * 100,
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
            b"GET /status HTTP/1.1\r\nX: " + b"y" * 100_000,
            b"",
        ):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(path)
            try:
                peer.sendall(junk)
            except OSError:
                pass
            slow.append(peer)
        assert m.status()["ready"]
        for peer in slow:
            peer.close()
        with connect(m.port()) as client:
            talk(client)


def test_who_holds_admin_connections_keeps_nobody_out_and_takes_no_descriptors_of_traffic(mesh: Factory) -> None:
    with Server(echo) as server, contextlib.ExitStack() as stack:
        m = mesh(simple(server.address))
        before = m.count_descriptors()
        for _ in range(CONNECTIONS_MAX + CONNECTIONS_MAX // 2):
            slow = stack.enter_context(socket.socket(socket.AF_UNIX))
            slow.connect(m.admin.removeprefix("unix:"))
            # Some are gone already.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                slow.sendall(b"GET /live HT")
        assert m.status()["ready"]
        wait_until(lambda: m.count_descriptors() <= before + CONNECTIONS_MAX, "most of them are gone")
        assert m.status()["ready"]


def test_live_connections_are_shown_in_pages(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address))
        port = m.port()
        clients = [connect(port) for _ in range(120)]
        for client in clients:
            talk(client)
        shown, start = {}, 0
        while start is not None:
            page = m.get(f"/connections?start={start}&limit=50")
            assert len(page["connections"]) <= 50
            shown |= {one["id"]: one for one in page["connections"]}
            start = page["next"]
        assert len(shown) == 120
        sources = {f"127.0.0.1:{client.getsockname()[1]}" for client in clients}
        assert {one["source"] for one in shown.values()} == sources
        one = next(iter(shown.values()))
        assert (one["listener"], one["cluster"], one["endpoint"], one["state"]) == ("web", "web", server.address, "relaying")
        assert (one["bytes_to_upstream"], one["bytes_to_downstream"]) == (2, 2)
        for client in clients:
            client.close()


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_metrics_are_what_prometheus_wants(mesh: Factory, accept: str) -> None:
    if not shutil.which("promtool"):
        skip_or_fail("needs promtool, of the package prometheus")
    with Server(echo) as server:
        m = mesh(simple(server.address, f"127.0.0.1:{closed_port()}"))
        for _ in range(20):
            with connect(m.port()) as client:
                talk(client)
        wait_until(lambda: m.closed().get("downstream_closed") == 20, "all have ended")
        status, body = m.fetch("/metrics", headers={"Accept": accept})
        assert status == 200
        if accept:
            assert body.endswith(b"# EOF\n")
            return
        done = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        metrics = m.metrics()
        assert metrics['l4mesh_connect_seconds_count{cluster="web"}'] == 20
        assert metrics['l4mesh_connect_seconds_bucket{cluster="web",le="+Inf"}'] == 20
        assert metrics['l4mesh_bytes_total{cluster="web",direction="to_upstream"}'] == 40
        assert m.total("l4mesh_endpoint_connections_opened_total") == 20
        assert m.total("l4mesh_connect_failures_total") == m.total("l4mesh_endpoint_connect_failures_total") > 0


def test_the_access_log_tells_the_whole_story_of_a_connection(mesh: Factory) -> None:
    with Server(echo) as server:
        config = simple(f"127.0.0.1:{closed_port()}", server.address, balance="round_robin")
        m = mesh(config | {"access_log": {"when": "always"}})
        for _ in range(4):
            with connect(m.port()) as client:
                talk(client)
        wait_until(lambda: m.stdout.read_text().count("\n") == 4, "four lines are written")
        lines = [json.loads(line) for line in m.stdout.read_text().splitlines()]
        retried = [line for line in lines if line["attempts"] == 2]
        assert retried
        for line in lines:
            assert line["event"] == "connection"
            assert (line["listener"], line["cluster"], line["endpoint"]) == ("web", "web", server.address)
            assert (line["reason"], line["initiator"]) == ("downstream_closed", "downstream")
            assert (line["bytes_to_upstream"], line["bytes_to_downstream"]) == (2, 2)
            assert 0 < line["connect_ms"] <= line["first_byte_ms"] <= line["total_ms"]
            assert line["downstream_rtt_us"] >= 0
            assert line["upstream_retransmits"] == 0
            assert "error" not in line


def test_errors_only_and_logfmt(mesh: Factory, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    with Server(echo) as server:
        config = simple(server.address) | {"access_log": {"path": str(log), "format": "logfmt", "when": "errors"}}
        config["listeners"].append({"name": "bad", "bind": "127.0.0.1:0", "cluster": "bad"})
        config["clusters"].append({"name": "bad", "endpoints": [f"127.0.0.1:{closed_port()}"]})
        m = mesh(config)
        with connect(m.port()) as client:
            talk(client)
        assert is_refused(m.port("bad"))
        wait_until(lambda: log.exists() and log.read_text().count("\n") == 1, "one line is written")
        line = log.read_text()
        assert "reason=connect_refused" in line
        assert "error=ECONNREFUSED" in line
        moved = log.rename(tmp_path / "access.log.1")
        m.process.send_signal(1)
        assert is_refused(m.port("bad"))
        wait_until(lambda: log.exists() and log.read_text().count("\n") == 1, "the log goes on in a new file")
        assert moved.read_text().count("\n") == 1


@pytest.mark.parametrize("kind", ["fifo", "/dev/full"])
def test_a_log_that_is_stuck_costs_lines_and_never_traffic(mesh: Factory, tmp_path: Path, kind: str) -> None:
    path = Path(kind)
    keep = -1
    if kind == "fifo":
        path = tmp_path / "fifo"
        os.mkfifo(path)
        keep = os.open(path, os.O_RDWR)
    with Server(echo) as server:
        m = mesh(simple(server.address) | {"access_log": {"path": str(path), "when": "always"}})
        port = m.port()
        count = 0
        while m.total("l4mesh_access_log_dropped_total") == 0:
            for _ in range(100):
                with connect(port, source=f"127.0.0.{2 + count % 200}") as client:
                    talk(client)
                count += 1
            assert count < 20_000
        with connect(port) as client:
            talk(client)
    if keep >= 0:
        os.close(keep)


def test_a_log_that_is_full_for_a_while_loses_what_is_counted_and_no_more(mesh: Factory, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    with Server(echo) as server:
        config = simple(server.address) | {"access_log": {"path": str(path), "when": "always"}}
        m = mesh(config, prefix=("prlimit", "--fsize=20000:unlimited"))
        port, count = m.port(), 0

        def connect_once() -> None:
            nonlocal count
            with connect(port) as client:
                talk(client)
            count += 1

        def lost() -> int:
            return int(m.total("l4mesh_access_log_dropped_total"))

        while not lost():
            connect_once()
        resource.prlimit(m.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for _ in range(3):
            connect_once()
        wait_until(lambda: sum(map(is_json, path.read_text().splitlines())) + lost() == count, "every line is there or counted")
        said = [(event["event"], event.get("error")) for event in m.events() if event["event"].startswith("access_log")]
        assert said == [("access_log_failed", "File too large"), ("access_log_written", None)]


def is_json(line: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(json.loads(line))
    return False


@pytest.mark.parametrize("streams", ["2>/dev/full", "2> >(:)", "<&- >&- 2>&-", "2>{pipe}"], ids=["full", "unread", "closed", "blocked"])
def test_standard_streams_that_fail_cost_lines_and_never_the_process(mesh: Factory, tmp_path: Path, streams: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with Server(echo) as server, os.fdopen(os.open(pipe, os.O_RDWR | os.O_NONBLOCK), "wb", buffering=0) as filled:
        while filled.write(b"x" * 4096):
            pass
        config = simple(server.address) | {"access_log": {"when": "always"}}
        m = mesh(config, prefix=("bash", "-c", f'exec "$@" {streams.format(pipe=pipe)}', "bash"))
        m.write(config | {"nonsense": 1})
        wait_until(lambda: m.status()["config"]["failed"] >= 1, "there is something to say")
        with connect(m.port()) as client:
            talk(client)
        m.wait_closed(downstream_closed=1)
        m.write(config)
        wait_until(lambda: m.status()["config"]["last_error"] is None, "it goes on")


def test_the_commands_show_it(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address, {"address": "[fd00::1]:9", "weight": 0}))
        admin = m._settings["admin"]["bind"]

        def command(*words: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "l4mesh", *words, "--admin", admin], capture_output=True, text=True, check=True
            )
            return done.stdout

        with connect(m.port()) as client:
            talk(client)
            shown = command("status")
            assert server.address in shown
            assert "[fd00::1]:9" in shown
            assert "ready" in shown
            assert server.address in command("status", "--cluster", "web")
            assert f"127.0.0.1:{client.getsockname()[1]}" in command("connections")
            assert json.loads(command("connections", "--json"))[0]["cluster"] == "web"


def test_commands_without_a_server_say_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "l4mesh", "status", "--admin", "unix:/nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "is l4mesh running?" in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "said"), [(500, b'{"error": "the log says why"}', "the log says why"), (200, b"[]", "no answer of l4mesh")]
)
def test_commands_show_what_a_server_says_that_can_t_answer(status: int, body: bytes, said: str) -> None:
    def answer(peer: socket.socket) -> None:
        peer.recv(4096)
        peer.sendall(b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    with Server(answer) as server:
        for command in ("status", "connections", "drain"):
            done = subprocess.run(
                [sys.executable, "-m", "l4mesh", command, "--admin", server.address], capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert f" answers {status}: {said}" in done.stderr


def test_commands_without_an_output_that_takes_it_end_quietly(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(simple(server.address))
        for words in ("status --admin", "status --json --admin", "connections --admin"):
            command = f"{sys.executable} -m l4mesh {words} {m.admin}"
            closed = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True, check=False)
            assert (closed.returncode, closed.stderr) == (0, "")
            full = subprocess.run(f"{command} >/dev/full", shell=True, capture_output=True, text=True, check=False)
            assert (full.returncode, full.stderr) == (1, "l4mesh: standard output: No space left on device\n")


def test_an_answer_after_hours_is_not_told_as_an_early_one() -> None:
    [record] = asyncio.run(answer_late(2 * 3600))
    # As much as there is room for.
    assert record.first_byte_us == 2**32 - 1
    assert record.total_us >= 2 * 3600 * 10**6


async def answer_late(age_s: int) -> list[ConnectionRecord]:
    """The record of a connection that is handed over, and older than it was when it arrives: so nobody has to wait for that."""
    asked, late = threading.Event(), threading.Event()
    records: list[ConnectionRecord] = []
    aged: list[Traveller] = []

    def serve(peer: socket.socket) -> None:
        assert read_exactly(peer, 8) == b"question"
        asked.set()
        assert late.wait(15)
        peer.sendall(b"answer")

    def age(_: int, travellers: list[Traveller]) -> bool:
        for state, descriptors, *names in travellers:
            (accepted_ns,) = struct.unpack_from("Q", state)
            state = struct.pack("Q", (accepted_ns - age_s * 10**9) % 2**64) + state[8:]
            aged.append((state, [os.dup(descriptor) for descriptor in descriptors], *names))
        return True

    with Server(serve) as server:
        config = parse_config(yaml.safe_dump(simple(server.address) | {"access_log": {"when": "always"}}))
        listeners, datapath = Listeners(1), Datapath(1, 256, records.extend)
        sockets = listeners.open(config)
        datapath.apply(config, sockets, [], 100)
        datapath.start()
        with connect(sockets["web"][0][0].port) as client:
            client.sendall(b"question")
            assert await asyncio.to_thread(asked.wait, 15)
            assert datapath.hand_over(age) == 1
            assert datapath.take_in(0, aged, lambda: None)
            late.set()
            assert await asyncio.to_thread(read_to_end, client) == (b"answer", FIN)
        await asyncio.to_thread(wait_until, lambda: datapath.active == 0, "it has ended")
        datapath.stop()
        listeners.close()
    return records


def test_who_asks_for_connections_and_does_not_wait_is_in_nobody_s_way() -> None:
    asyncio.run(ask_twice())


async def ask_twice() -> None:
    listeners, datapath = Listeners(1), Datapath(1, 256, lambda records: None)
    config = parse_config(yaml.safe_dump(simple()))
    datapath.apply(config, listeners.open(config), [], 100)
    datapath.start()
    await asyncio.to_thread(datapath.wait_until_seen)
    with Tracer(worker_thread(os.getpid())) as tracer:
        tracer.wait_stopped()
        asks = asyncio.create_task(datapath.connections(0, 10))
        await asyncio.sleep(0)
        asks.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asks
    assert await datapath.connections(0, 10) == ([], None)
    datapath.stop()
    listeners.close()
