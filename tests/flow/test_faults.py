"""Injected faults on real sockets: each kind does exactly what it says, to those it is for, and is told of."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import Factory
from tests.flow.test_tls import client_context, inbound, outbound, secure
from tests.support.certificates import REDIS, Files
from tests.support.mesh import Config, Mesh, environment_of_ours, simple
from tests.support.peers import FIN, RST, Server, connect, digest, echo, is_refused, make_bytes, read_exactly, read_to_end, reset
from tests.support.waiting import wait_until

MB = 1 << 20
ON: Config = {"faults": {"enabled": True}, "access_log": {"when": "always"}}


def several(server: Server, faults: dict[str, Config], **cluster: Any) -> Config:
    """A listener and a cluster for each, of the same name; of each fault all connections there."""
    return {
        "listeners": [{"name": name, "bind": "127.0.0.1:0", "cluster": name} for name in faults],
        "clusters": [
            {"name": name, "endpoints": [server.address], "faults": [{"share": "100%"} | fault]} | cluster
            for name, fault in faults.items()
        ],
    } | ON


def faulty(server: Server, *faults: Config, **cluster: Any) -> Config:
    return simple(server.address, faults=[{"share": "100%"} | fault for fault in faults], **cluster) | ON


def records(m: Mesh, count: int = 1) -> list[Any]:
    return wait_until(lambda: m.records() if len(m.records()) >= count else None, f"{count} lines in the access log") or []


def injected(m: Mesh, fault: str, cluster: str = "web") -> float:
    return m.metrics().get(f'l4mesh_faults_injected_total{{cluster="{cluster}",fault="{fault}"}}', 0)


def check_told(m: Mesh, fault: str, reason: str, cluster: str = "web", count: int = 1) -> None:
    """The record, the counters, and that no endpoint is blamed."""
    line = wait_until(lambda: [line for line in m.records() if line["cluster"] == cluster][count - 1 :], "it is in the access log")[0]
    assert (line["fault"], line["reason"]) == (fault, reason)
    if reason == "fault":
        assert line["initiator"] == "proxy"
    assert injected(m, fault, cluster) == count
    assert m.status()["faults"]["injected"][fault] >= count
    assert [endpoint["connect_failures"] for endpoint in m.cluster(cluster)["endpoints"]] == [0]
    assert m.cluster(cluster)["connect_failures"] == 0


def pours(count: int) -> tuple[bytes, Any]:
    """Data, and a server that sends it when it is asked: a reset that overtakes the client's ``connect`` would take it along."""
    data = make_bytes(count)

    def script(peer: socket.socket) -> None:
        assert peer.recv(1)
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        read_to_end(peer)

    return data, script


@contextlib.contextmanager
def at_least(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start >= seconds


# -- each kind ------------------------------------------------------------------------------------------------------------


def test_a_delay_comes_before_the_connect(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(faulty(server, {"delay": "200ms-400ms"}, connect={"timeout": "100ms", "attempts": 1}))
        with connect(m.port()) as client, at_least(0.2):
            client.sendall(b"early")
            wait_until(lambda: m.get("/connections")["connections"], "the connection waits")
            assert m.get("/connections")["connections"][0]["state"] == "dialling"
            assert server.accepted == 0
            assert read_exactly(client, 5) == b"early"
        check_told(m, "delay", "downstream_closed")
        assert records(m)[0]["connect_ms"] >= 200


def test_a_client_that_leaves_during_the_delay_costs_no_dial(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(faulty(server, {"delay": "1h"}))
        connect(m.port()).close()
        m.wait_closed(downstream_left=1)
        reset(connect(m.port()))
        m.wait_closed(downstream_left=2)
        check_told(m, "delay", "downstream_left", count=2)
        assert server.accepted == 0


def test_refuse_is_a_reset_without_a_dial(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(faulty(server, {"refuse": True}))
        assert is_refused(m.port())
        check_told(m, "refuse", "fault")
        assert server.accepted == 0
        assert m.closed() == {"fault": 1}


def test_a_reset_comes_after_exactly_so_many_bytes(mesh: Factory) -> None:
    data = make_bytes(4 * MB)
    ends: list[str] = []

    def script(peer: socket.socket) -> None:
        try:
            assert peer.recv(1)
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            ends.append(read_to_end(peer)[1])
        except ConnectionError:
            ends.append(RST)

    counts = [1, 1000, 100_000, 3 * MB + 7]
    with Server(script) as server:
        m = mesh(several(server, {str(count): {"reset": {"after": f"{count}B"}} for count in [*counts, len(data) + 1]}))
        for number, count in enumerate(counts):
            with connect(m.port(str(count))) as client:
                client.sendall(b"?")
                got, end = read_to_end(client)
            assert (len(got), digest(got), end) == (count, digest(data[:count]), RST)
            check_told(m, "reset", "fault", str(count))
            wait_until(lambda number=number: len(ends) > number, "the endpoint has its end")  # type: ignore[misc]
        assert ends == [RST] * len(counts)
        # One that ends before its reset is none of these.
        name = str(len(data) + 1)
        with connect(m.port(name)) as client:
            client.sendall(b"?")
            client.shutdown(socket.SHUT_WR)
            got, end = read_to_end(client)
        assert (digest(got), end) == (digest(data), FIN)
        m.wait_closed(fault=len(counts), downstream_closed=1)
        assert "fault" not in records(m, len(counts) + 1)[-1]
        assert injected(m, "reset", name) == 0


def test_a_reset_counts_what_the_client_sends_if_told_to(mesh: Factory) -> None:
    seen: list[tuple[bytes, str]] = []
    with Server(lambda peer: seen.append(read_to_end(peer))) as server:
        m = mesh(faulty(server, {"reset": {"after": "70000B", "direction": "to_upstream"}}))
        data = make_bytes(MB)
        with connect(m.port()) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
            assert read_to_end(client)[1] == RST
        wait_until(lambda: seen, "the endpoint has its end")
        assert seen == [(data[:70_000], RST)]
        check_told(m, "reset", "fault")


def test_a_reset_is_as_exact_with_tls_on_either_side(mesh: Factory, web: Files, redis: Files) -> None:
    """Connections go through two proxies with TLS between them: the fault is in the first, whose upstream it is, or in the second."""
    data, script = pours(MB)
    counts = [1, 20_000, 300_000]
    with Server(script) as server:
        faults: dict[str, Config] = {str(count): {"reset": {"after": f"{count}B"}} for count in counts}
        inner = inbound(redis, server.address) | several(server, faults)
        inner["listeners"] = [one | {"tls": {"identity": "redis"}} for one in inner["listeners"]]
        inner["listeners"].append({"name": "sound", "bind": "127.0.0.1:0", "cluster": "sound", "tls": {"identity": "redis"}})
        inner["clusters"].append({"name": "sound", "endpoints": [server.address]})
        near = mesh(inner)
        outer = outbound(web, "") | several(server, {f"up-{name}": fault for name, fault in faults.items()})
        for cluster in outer["clusters"]:
            cluster |= {"endpoints": [f"127.0.0.1:{near.port('sound')}"]}
        for name in faults:
            outer["clusters"].append({"name": f"down-{name}", "endpoints": [f"127.0.0.1:{near.port(name)}"]})
            outer["listeners"].append({"name": f"down-{name}", "bind": "127.0.0.1:0", "cluster": f"down-{name}"})
        for cluster in outer["clusters"]:
            cluster["tls"] = {"peers": [REDIS]}
        far = mesh(outer)
        for count in counts:
            for side in ("up", "down"):
                with connect(far.port(f"{side}-{count}")) as client:
                    client.sendall(b"?")
                    got, end = read_to_end(client)
                assert (len(got), digest(got), end) == (count, digest(data[:count]), RST), side
            check_told(far, "reset", "fault", f"up-{count}")
            check_told(near, "reset", "fault", str(count))


def test_a_reset_waits_for_a_client_that_reads_late(mesh: Factory) -> None:
    """More than all buffers hold: the fault comes when the client has the bytes, not when we have read them."""
    data, script = pours(24 * MB)
    count = 20 * MB
    with Server(script) as server:
        m = mesh(faulty(server, {"reset": {"after": f"{count}B"}}))
        with connect(m.port(), rcvbuf=8192) as client:
            client.sendall(b"?")

            def stands_still() -> bool:
                before = moved()
                return 0 < before < count and before == moved()

            def moved() -> int:
                return int(m.get("/connections")["connections"][0]["bytes_to_downstream"])

            wait_until(stands_still, "the stream stands still")
            assert injected(m, "reset") == 0
            got, end = read_to_end(client)
        assert (digest(got), end) == (digest(data[:count]), RST)
        check_told(m, "reset", "fault")


def test_a_reset_by_time_does_not_wait_for_a_half_that_is_blocked(mesh: Factory) -> None:
    _, script = pours(24 * MB)
    with Server(script) as server:
        m = mesh(faulty(server, {"reset": {"after": "300ms"}}))
        with connect(m.port(), rcvbuf=8192) as client:
            client.sendall(b"?")
            with at_least(0.25):
                m.wait_closed(fault=1)
            assert read_to_end(client)[1] == RST
        check_told(m, "reset", "fault")


def test_the_other_side_s_reset_may_come_while_a_fault_is_still_to_come(mesh: Factory) -> None:
    data = make_bytes(50_000)

    def script(peer: socket.socket) -> None:
        assert peer.recv(1)
        peer.sendall(data)
        assert peer.recv(1)
        reset(peer)

    with Server(script) as server:
        m = mesh(faulty(server, {"reset": {"after": "40000B"}}, bandwidth_per_connection={"to_downstream": "100kB/s"}))
        with connect(m.port()) as client:
            client.sendall(b"??")
            assert read_to_end(client) == (data[:40_000], RST)
        check_told(m, "reset", "fault")


def test_a_black_hole_swallows_for_its_time(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(faulty(server, {"black_hole": "300ms"}))
        with connect(m.port()) as client, at_least(0.25):
            client.sendall(b"hello?")
            assert read_to_end(client) == (b"", RST)
        check_told(m, "black_hole", "fault")
        assert server.accepted == 0


def test_a_black_hole_ends_when_the_client_gives_up(mesh: Factory) -> None:
    with Server(echo) as server:
        m = mesh(faulty(server, {"black_hole": True}, timeouts={"idle": "off", "half_closed": "200ms"}))
        count = 0
        for says in (b"", b"hello?"):
            for leave in (socket.socket.close, reset):
                client = connect(m.port())
                client.sendall(says)
                count += 1
                wait_until(lambda count=count: injected(m, "black_hole") == count, "the connection is in the hole")  # type: ignore[misc]
                leave(client)
                # One that has said something and ended may wait for its answer: it gets the half-closed time.
                reason = "fault" if says and leave is not reset else "downstream_left"
                check_told(m, "black_hole", reason, count=count)


def test_a_black_hole_ends_for_a_client_that_ended_its_half_before(mesh: Factory) -> None:
    """While it waited for a place: no event tells of that again."""
    with Server(echo) as server:
        limits = {"connections": 1, "queue": {"size": 1, "timeout": "1m"}}
        config = faulty(server, {"black_hole": True}, timeouts={"idle": "off", "half_closed": "200ms"}, limits=limits)
        m = mesh(config | {"workers": 1})
        first = connect(m.port())
        wait_until(lambda: injected(m, "black_hole") == 1, "the first is in the hole")
        with connect(m.port()) as second:
            wait_until(lambda: m.cluster()["waiting"] == 1, "the second waits")
            second.sendall(b"hello?")
            second.shutdown(socket.SHUT_WR)
            reset(first)
            assert read_to_end(second) == (b"", RST)
        m.wait_closed(downstream_left=1, fault=1)


def test_slow_is_slow_each_way(mesh: Factory) -> None:
    data = make_bytes(300_000)
    with Server(echo) as server:
        m = mesh(faulty(server, {"slow": "500kB/s"}, bandwidth_per_connection={"to_upstream": "100MB/s"}))
        with connect(m.port()) as client, at_least(0.5):
            sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            sender.start()
            assert read_to_end(client) == (data, FIN)
            sender.join()
        check_told(m, "slow", "downstream_closed")


def test_a_stall_begins_after_its_bytes_and_passes(mesh: Factory) -> None:
    data, script = pours(200_000)
    with Server(script) as server:
        faults = {str(after): {"stall": {"for": "300ms"} | ({"after": f"{after}B"} if after else {})} for after in (0, 1, 100_000)}
        m = mesh(several(server, faults))
        for name in faults:
            with connect(m.port(name)) as client:
                begin = time.monotonic()
                client.sendall(b"?")
                client.shutdown(socket.SHUT_WR)
                head = read_exactly(client, int(name))
                following = client.recv(1)
                assert time.monotonic() - begin >= 0.29
                rest, end = read_to_end(client)
            assert (digest(head + following + rest), end) == (digest(data), FIN)
            check_told(m, "stall", "downstream_closed", name)


def test_a_stalled_connection_is_as_idle_as_one_whose_peer_is_silent(mesh: Factory) -> None:
    data, script = pours(200_000)
    with Server(script) as server:
        m = mesh(faulty(server, {"stall": {"for": "1h", "after": "1000B"}}, timeouts={"idle": "300ms"}))
        with connect(m.port()) as client:
            client.sendall(b"?")
            assert read_to_end(client) == (data[:1000], RST)
        check_told(m, "stall", "idle_timeout")


def test_a_client_may_leave_a_stalled_connection(mesh: Factory) -> None:
    _, script = pours(20_000)
    with Server(script) as server:
        m = mesh(faulty(server, {"stall": {"for": "1s", "after": "1B"}}))
        client = connect(m.port())
        client.sendall(b"?")
        read_exactly(client, 1)
        reset(client)
        m.wait_closed(downstream_reset=1)
        check_told(m, "stall", "downstream_reset")


def test_what_an_endpoint_does_after_a_fault_is_not_held_against_it(mesh: Factory) -> None:
    """It resets connections unanswered, which counts; after a stall of its request, or when we reset, it doesn't."""

    def script(peer: socket.socket) -> None:
        read_exactly(peer, 3)
        reset(peer)

    outlier = {"enforce": "0%", "signals": {"early_reset": "60s", "no_answer": "60s"}}
    counted = {"after": "3B", "direction": "to_upstream"}
    with Server(script) as server:
        config = several(
            server, {"stall": {"stall": {"for": "200ms"} | counted}, "reset": {"reset": counted}}, outlier_detection=outlier
        )
        config["listeners"].append({"name": "sound", "bind": "127.0.0.1:0", "cluster": "sound"})
        config["clusters"].append({"name": "sound", "endpoints": [server.address], "outlier_detection": outlier})
        m = mesh(config)
        for name, failures in (("sound", {"early_reset": 1}), ("stall", {}), ("reset", {})):
            with connect(m.port(name)) as client:
                client.sendall(b"hello")
                assert read_to_end(client) == (b"", RST)
            wait_until(lambda name=name: m.cluster(name)["closed"], "it has ended")  # type: ignore[misc]
            assert m.cluster(name)["endpoints"][0]["failures"] == failures
            assert injected(m, name, name) == (name != "sound")


# -- with TLS -------------------------------------------------------------------------------------------------------------


def test_faults_come_after_the_handshake(mesh: Factory, web: Files, redis: Files) -> None:
    faults: dict[str, Config] = {"delay": {"delay": "200ms"}, "refuse": {"refuse": True}, "stall": {"stall": {"for": "200ms"}}}
    with Server(echo) as server:
        config = inbound(redis, server.address) | several(server, faults)
        config["listeners"] = [one | {"tls": {"identity": "redis"}} for one in config["listeners"]]
        m = mesh(config)
        for name in faults:
            with contextlib.suppress(OSError), secure(client_context(web, web.bundle), m.port(name)) as client:
                client.sendall(b"hello")
                assert client.recv(5) == b"hello"
                assert name != "refuse"
                client.unwrap()
            check_told(m, name, "fault" if name == "refuse" else "downstream_closed", name)
            assert records(m)[-1]["downstream_tls"].startswith("1.3")


# -- whom they are for ------------------------------------------------------------------------------------------------------


def answer(peer: socket.socket) -> None:
    if peer.recv(1):
        peer.sendall(b"ok")


def test_shares_lie_side_by_side(mesh: Factory) -> None:
    """400 connections: a quarter is refused, a quarter reset after a byte; six standard deviations either way."""
    with Server(answer) as server:
        m = mesh(faulty(server, {"share": "25%", "refuse": True}, {"share": "25%", "reset": {"after": "1B"}}))
        port = m.port()
        answers = []
        for _ in range(400):
            try:
                with connect(port) as client:
                    client.sendall(b"?")
                    answers.append(read_to_end(client))
            except ConnectionError:
                answers.append((b"", RST))
        counts = {one: answers.count(one) for one in set(answers)}
        assert counts.keys() == {(b"ok", FIN), (b"o", RST), (b"", RST)}
        assert abs(counts[b"ok", FIN] - 200) <= 60
        assert abs(counts[b"o", RST] - 100) <= 52
        wait_until(lambda: injected(m, "refuse") == counts[b"", RST], "all are counted")
        assert injected(m, "reset") == counts[b"o", RST]


def test_sources_choose_and_the_faults_of_a_route_come_first(mesh: Factory) -> None:
    refuse = [{"share": "100%", "sources": ["127.0.0.2/32", "127.0.1.0/24"], "refuse": True}]
    with Server(answer) as server:
        config = faulty(server, {"reset": {"after": "1B"}})
        route = {"match": {"sources": ["127.0.0.0/16"]}, "cluster": "web", "faults": refuse}
        other = {"match": {"sources": ["127.2.0.0/16"]}, "cluster": "sound"}
        config["listeners"] = [{"name": "web", "bind": "127.0.0.1:0", "routes": [route, other], "default": "web"}]
        config["clusters"].append({"name": "sound", "endpoints": [server.address]})
        m = mesh(config)
        for source, expected in (
            ("127.0.0.2", (b"", RST)), ("127.0.1.77", (b"", RST)), ("127.0.0.3", (b"o", RST)), ("127.1.0.1", (b"o", RST)),
            ("127.2.0.1", (b"ok", FIN)),
        ):  # fmt: skip
            if expected == (b"", RST):
                assert is_refused(m.port(), source=source)
                continue
            with connect(m.port(), source=source) as client:
                client.sendall(b"?")
                assert read_to_end(client) == expected


# -- that they can't be left on unseen ---------------------------------------------------------------------------------------


def test_without_being_enabled_they_do_nothing_and_that_is_said(mesh: Factory) -> None:
    with Server(echo) as server:
        config = faulty(server, {"refuse": True})
        del config["faults"]
        m = mesh(config)
        with connect(m.port()) as client:
            client.sendall(b"hi")
            assert read_exactly(client, 2) == b"hi"
        assert m.status()["faults"] == {"enabled": False, "configured": 1, "injected": {}}
        assert m.metrics()["l4mesh_faults_enabled"] == 0
        assert [event["rules"] for event in m.events() if event["event"] == "faults_not_enabled"] == [1]
        assert "1 faults do nothing" in check(m.file)


def test_a_reload_turns_them_off_for_new_connections_and_each_says_what_is_in_force(mesh: Factory) -> None:
    def warnings() -> list[int]:
        return [event["rules"] for event in m.events() if event["event"] == "faults_enabled"]

    with Server(echo) as server:
        config = faulty(server, {"refuse": True})
        m = mesh(config)
        assert warnings() == [1]
        assert m.metrics()["l4mesh_faults_enabled"] == 1
        assert m.status()["faults"]["enabled"]
        assert "warning: faults are enabled" in check(m.file)
        assert is_refused(m.port())
        m.reload(faulty(server, {"share": "50%", "refuse": True}, {"share": "50%", "refuse": True}))
        wait_until(lambda: warnings() == [1, 2], "the reload says it again")
        assert is_refused(m.port())
        m.reload(config | {"faults": {"enabled": False}})
        assert m.metrics()["l4mesh_faults_enabled"] == 0
        with connect(m.port()) as client:
            client.sendall(b"hi")
            assert read_exactly(client, 2) == b"hi"
        assert warnings() == [1, 2]
        assert injected(m, "refuse") == 2


def check(file: Path) -> str:
    """What the command says of the configuration on standard error; it must be valid."""
    command = [sys.executable, "-m", "l4mesh", "check", "-c", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment_of_ours()).stderr


def test_a_connection_keeps_its_fault_through_a_reload(mesh: Factory) -> None:
    data, script = pours(100_000)
    with Server(script) as server:
        m = mesh(faulty(server, {"stall": {"for": "1s", "after": "10B"}}))
        with connect(m.port()) as client:
            client.sendall(b"?")
            read_exactly(client, 10)
            m.reload(faulty(server) | {"faults": {"enabled": False}})
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == (data[10:], FIN)
        check_told(m, "stall", "downstream_closed")
