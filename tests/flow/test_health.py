"""Health checks of a real process against endpoints that refuse, fall silent, talk nonsense or do not stop to talk."""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Factory, skip_or_fail
from tests.flow.test_tls import inbound, outbound, server_context
from tests.flow.test_tls_trust import certificates
from tests.support.certificates import REDIS, Authority, Files, hostile, revocation_list
from tests.support.mesh import Config, Mesh, simple
from tests.support.peers import RST, Server, black_hole, closed_port, connect, echo, read_exactly, read_to_end, reset, talk
from tests.support.proxies import free_port
from tests.support.waiting import wait_until

CHECK: Config = {"interval": "100ms", "fast_interval": "20ms", "timeout": "500ms"}
"""The timeout is long for a busy machine, and short for whoever waits for it."""
OTHER = "spiffe://example.org/ns/shop/sa/other"
SWITCHED_TO_TLS = b"\x15\x03\x01\0\x02\x02\x28"
"""An alert, handshake_failure."""


def health(m: Mesh, address: str, cluster: str = "web") -> Any:
    return next(one for one in m.cluster(cluster)["endpoints"] if one["address"] == address)["health"]


def wait_health(m: Mesh, address: str, state: str, cluster: str = "web", why: str | None = None) -> Any:
    """``why``: waits for that reason as well, which is the newest failure's: on a busy machine others may come before."""

    def found() -> Any:
        # None: of an endpoint that a reload has just brought.
        seen = health(m, address, cluster)
        return seen if seen and seen["state"] == state and why in (None, seen["why"]) else None

    try:
        wait_until(found, f"{address} is {state}")
    except AssertionError:
        print(cluster, address, health(m, address, cluster))
        raise
    return health(m, address, cluster)


def checks(m: Mesh, result: str, cluster: str = "web") -> float:
    return sum(
        value
        for name, value in m.metrics().items()
        if name.startswith(f'l4mesh_health_check_total{{cluster="{cluster}",result="{result}"')
    )


class Moody:
    """An HTTP server whose mood changes: what it says to each request, or nothing."""

    def __init__(self) -> None:
        self.says: bytes | None = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
        self.asked: list[bytes] = []
        self.silent = threading.Event()
        self.server = Server(self._serve)

    def _serve(self, peer: socket.socket) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked:
            part = peer.recv(4096)
            if not part:
                return
            asked += part
        self.asked.append(asked)
        if self.says is None:
            self.silent.set()
            read_to_end(peer)
        else:
            peer.sendall(self.says)

    def __enter__(self) -> "Moody":
        self.server.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.__exit__(*error)


def ask(port: int) -> bytes:
    with connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        return read_to_end(client)[0]


def test_a_connect_tells_who_is_there(mesh: Factory) -> None:
    with Server(echo) as server, Server(echo, "::1") as six, black_hole() as hole:
        gone = f"127.0.0.1:{closed_port()}"
        m = mesh(
            simple(server.address, six.address, gone, f"127.0.0.1:{hole}", health_check=CHECK, panic_threshold="off")
            | {"access_log": {"when": "always"}}
        )
        wait_health(m, server.address, "healthy", why="")
        wait_health(m, six.address, "healthy")
        wait_health(m, gone, "unhealthy", why="connect: refused")
        wait_health(m, f"127.0.0.1:{hole}", "unhealthy", why="timeout after 500ms in connect")
        shown = m.cluster()["endpoints"][2]
        assert [out["cause"] for out in shown["out"]] == ["unhealthy"]
        # None of those two is dialled.
        for _ in range(20):
            with connect(m.port()) as client:
                client.sendall(b"hi")
                assert read_exactly(client, 2) == b"hi"
        assert m.opened()[gone] == m.opened()[f"127.0.0.1:{hole}"] == 0
        assert m.total("l4mesh_connect_failures_total") == 0
        metrics = m.metrics()
        assert metrics['l4mesh_endpoints_out{cause="unhealthy",cluster="web"}'] == 2
        assert metrics[f'l4mesh_endpoint_healthy{{cluster="web",endpoint="{gone}"}}'] == 0
        assert metrics[f'l4mesh_endpoint_healthy{{cluster="web",endpoint="{server.address}"}}'] == 1
        assert checks(m, "not_made") == 0
        events = [event for event in m.events() if event["event"] == "endpoint_unhealthy"]
        assert {(event["endpoint"], event["why"]) for event in events} >= {
            (gone, "connect: refused"),
            (f"127.0.0.1:{hole}", "timeout after 500ms in connect"),
        }
        status = subprocess.run(
            [sys.executable, "-m", "l4mesh", "status", "--admin", f"unix:{m.folder}/admin.sock"],
            capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "250"},
        ).stdout  # fmt: skip
        assert "connect: refused" in status
        assert "healthy since" in status
        # The server's program has not heard of any check.
        accepted = server.accepted
        passed = checks(m, "passed")
        wait_until(lambda: checks(m, "passed") > passed + 10, "more checks have been made")
        assert server.accepted == accepted


def trickle(peer: socket.socket) -> None:
    for _ in range(100_000):
        peer.sendall(b"x")


def endless(peer: socket.socket) -> None:
    while True:
        peer.sendall(b"a" * 65536)


def says(answer: bytes, then: Callable[[socket.socket], object] = read_to_end) -> Callable[[socket.socket], None]:
    def script(peer: socket.socket) -> None:
        peer.sendall(answer)
        then(peer)

    return script


def answers(answer: bytes, then: Callable[[socket.socket], object] = read_to_end) -> Callable[[socket.socket], None]:
    def script(peer: socket.socket) -> None:
        peer.recv(4096)
        says(answer, then)(peer)

    return script


CASES: list[tuple[Config, Callable[[socket.socket], object], str]] = [
    ({"expect": {"text": "220 "}}, says(b"220 mail.example\r\n"), ""),
    ({"send": {"hex": "0001"}, "expect": {"hex": "ff00"}}, answers(b"\xff\0"), ""),
    ({"send": {"text": "QUIT\r\n"}, "expect": {"regex": "^221 .*bye"}}, answers(b"221 good\r\nbye"), ""),
    ({"type": "http"}, answers(b"HTTP/1.1 204 No Content\r\n\r\n"), ""),
    ({"type": "redis"}, answers(b"-NOAUTH Authentication required.\r\n"), ""),
    ({"expect": {"text": "220 "}}, says(b"554 no\r\n"), "timeout after 500ms in expect after 554 no\\x0d\\x0a"),
    ({"expect": {"text": "220 "}}, says(b"554 no\r\n", socket.socket.close), "closed after 554 no\\x0d\\x0a"),
    ({"expect": {"text": "220 "}}, says(b"22", reset), "expect: reset after 22"),
    ({"expect": {"text": "220 "}}, socket.socket.close, "closed without an answer"),
    ({"expect": {"text": "220 "}}, read_to_end, "timeout after 500ms in expect"),
    ({"expect": {"text": "220 "}}, endless, "not in the first 65536 bytes after " + "a" * 60 + "..."),
    ({"expect": {"regex": "(a+)+$x"}}, endless, "not in the first 65536 bytes after " + "a" * 60 + "..."),
    ({"type": "http"}, answers(b"HTTP/1.1 503 Busy\r\n\r\n"), "status 503"),
    ({"type": "http"}, answers(b"SSH-2.0-x\r\n"), "expected an HTTP status, got SSH-2.0-x"),
    ({"type": "http"}, endless, "expected an HTTP status, got " + "a" * 60),
    ({"type": "redis"}, answers(b"-LOADING\r\n"), "expected +PONG, got -LOADING"),
    ({"type": "redis"}, answers(b"+PO", reset), "expect: reset after +PO"),
    ({"type": "postgresql"}, answers(b"HTTP/1.1 400\r\n"), "expected an answer of PostgreSQL, got HTTP/1.1 400\\x0d\\x0a"),
    ({"type": "mysql"}, says(b"\xff" * 600), "expected a greeting of MySQL, got " + "\\xff" * 60 + "..."),
    ({"type": "tls"}, answers(b"HTTP/1.1 400\r\n"), "tls: wrong version number"),
    ({"type": "tls"}, answers(SWITCHED_TO_TLS), "tls: sslv3 alert handshake failure"),
    ({"type": "tls"}, answers(b"", socket.socket.close), "tls: closed in the handshake"),
    ({"type": "tls"}, read_to_end, "timeout after 500ms in tls"),
]  # fmt: skip


def test_what_is_said_decides(mesh: Factory) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(script)) for _, script, _ in CASES]
        config = simple(servers[0].address)
        config["clusters"] = [
            {"name": f"c{i}", "endpoints": [server.address], "health_check": {"interval": "1s", "timeout": "500ms"} | check}
            for i, (server, (check, _, _)) in enumerate(zip(servers, CASES, strict=True))
        ]
        config["listeners"][0]["cluster"] = "c0"
        m = mesh(config)
        for i, (server, (check, _, why)) in enumerate(zip(servers, CASES, strict=True)):
            found = wait_health(m, server.address, "unhealthy" if why else "healthy", f"c{i}", why)
            assert found["check"] == check.get("type", "tcp")


def test_an_answer_in_very_many_pieces_is_given_up(mesh: Factory) -> None:
    with Server(trickle) as server:
        m = mesh(simple(server.address, health_check=CHECK | {"timeout": "10s", "expect": {"regex": "y"}}))
        assert wait_health(m, server.address, "unhealthy")["why"].startswith("not in the first ")


def test_a_server_that_stops_answering_gets_no_more_connections_until_it_answers(mesh: Factory) -> None:
    with Moody() as bad, Moody() as good:
        m = mesh(
            simple(bad.server.address, good.server.address, balance="round_robin", slow_start="1ms",
                   health_check=CHECK | {"type": "http", "path": "/ready", "host": "web", "status": [200]}) | {"workers": 1}
        )  # fmt: skip
        wait_health(m, bad.server.address, "healthy")
        wait_health(m, good.server.address, "healthy")
        assert bad.asked[0].startswith(b"GET /ready HTTP/1.1\r\nHost: web\r\n")
        for _ in range(10):
            assert ask(m.port()).endswith(b"hi")
        assert m.opened()[bad.server.address] == 5
        failed = checks(m, "failed")
        bad.says = None
        wait_health(m, bad.server.address, "unhealthy")
        # `fall` checks have decided it.
        assert checks(m, "failed") - failed >= 3
        for _ in range(40):
            assert ask(m.port()).endswith(b"hi")
        opened = m.opened()
        assert (opened[bad.server.address], opened[good.server.address]) == (5, 45)
        bad.says = good.says
        wait_health(m, bad.server.address, "healthy")
        for _ in range(20):
            assert ask(m.port()).endswith(b"hi")
        assert m.opened()[bad.server.address] >= 9
        changes = [event["event"] for event in m.events() if event.get("endpoint") == bad.server.address]
        assert changes == ["endpoint_unhealthy", "endpoint_healthy"]


def test_live_connections_of_an_endpoint_that_fails_end_where_that_is_asked(mesh: Factory) -> None:
    with Moody() as doctor, Server(echo) as server, Server(echo) as other:
        config = simple(server.address, health_check=CHECK | {"type": "http", "port": doctor.server.port}, drain={"unhealthy": "200ms"})
        config["clusters"].append(config["clusters"][0] | {"name": "kept", "endpoints": [other.address], "drain": {}})
        config["listeners"].append({"name": "kept", "bind": "127.0.0.1:0", "cluster": "kept"})
        m = mesh(config)
        wait_health(m, server.address, "healthy")
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(m.port())) for _ in range(10)]
            kept = stack.enter_context(connect(m.port("kept")))
            for client in (*clients, kept):
                client.sendall(b"hi")
                assert read_exactly(client, 2) == b"hi"
            doctor.says = b"HTTP/1.1 500 Ill\r\n\r\n"
            wait_health(m, server.address, "unhealthy")
            wait_health(m, other.address, "unhealthy", "kept")
            assert all(read_to_end(client) == (b"", RST) for client in clients)
            m.wait_closed(endpoint_unhealthy=10)
            kept.sendall(b"ho")
            assert read_exactly(kept, 2) == b"ho"


def test_live_connections_leave_an_endpoint_that_fails_and_then_is_removed(mesh: Factory) -> None:
    with Server(echo) as goes, Server(echo) as comes, twenty_live(mesh, goes, {"unhealthy": "2s", "removed": "4s"}) as (m, more):
        m.reload(simple(comes.address, **more))
        wait_until(lambda: m.active() == 0, "all have left")
        assert sum(m.closed().get(reason, 0) for reason in ("endpoint_unhealthy", "endpoint_removed")) == 20


def test_live_connections_leave_an_endpoint_that_fails_whoever_joins(mesh: Factory) -> None:
    with Server(echo) as fails, Server(echo) as joins, twenty_live(mesh, fails, {"unhealthy": "2s", "rebalance": "1h"}) as (m, more):
        m.reload(simple(fails.address, joins.address, **more))
        m.wait_closed(endpoint_unhealthy=20)


@contextlib.contextmanager
def twenty_live(mesh: Factory, server: Server, drain: Config) -> Iterator[tuple[Mesh, Config]]:
    """Connections to an endpoint that has just turned unhealthy, and all of the configuration but the endpoints."""
    with Moody() as doctor, contextlib.ExitStack() as stack:
        more: Config = {
            "listener": {"bind": f"127.0.0.1:{free_port()}"},
            "health_check": CHECK | {"type": "http", "port": doctor.server.port},
            "drain": drain,
        }
        m = mesh(simple(server.address, **more))
        for _ in range(20):
            talk(stack.enter_context(connect(m.port())))
        doctor.says = b"HTTP/1.1 500 Ill\r\n\r\n"
        wait_health(m, server.address, "unhealthy")
        yield m, more


def test_a_proxy_header_goes_before_the_check(mesh: Factory) -> None:
    heads: dict[str, bytes] = {}

    def reader(version: str) -> Callable[[socket.socket], None]:
        def script(peer: socket.socket) -> None:
            got = b""
            while not got.endswith(b"PING\r\n"):
                part = peer.recv(4096)
                if not part:
                    return
                got += part
            heads[version] = got
            peer.sendall(b"+PONG\r\n")

        return script

    with Server(reader("v1")) as one, Server(reader("v2")) as two:
        check = CHECK | {"send": {"text": "PING\r\n"}, "expect": {"text": "+PONG"}}
        config = simple(one.address, health_check=check, proxy_protocol="v1")
        config["clusters"].append({"name": "two", "endpoints": [two.address], "health_check": check, "proxy_protocol": "v2"})
        m = mesh(config)
        wait_health(m, one.address, "healthy")
        wait_health(m, two.address, "healthy", "two")
    assert heads["v1"] == b"PROXY UNKNOWN\r\nPING\r\n"
    assert heads["v2"] == b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0PING\r\n"


# -- with mutual TLS ---------------------------------------------------------------------------------------------------------


def secured(web: Files, address: str, *checks: tuple[str, Config]) -> Config:
    """A cluster "c0" and on for each: whom it expects, and its check."""
    config = outbound(web, address, workers=1)
    config["clusters"] = [
        {"name": f"c{i}", "endpoints": [address], "tls": {"peers": [peers]}, "health_check": CHECK | check}
        for i, (peers, check) in enumerate(checks)
    ]
    config["listeners"] = [{"name": "web", "bind": "127.0.0.1:0", "cluster": "c0"}]
    return config


def test_a_check_speaks_as_the_cluster_does_and_refuses_whom_it_refuses(mesh: Factory, web: Files, redis: Files) -> None:
    with Moody() as server:
        near = mesh(inbound(redis, server.server.address, workers=1) | {"access_log": {"when": "errors"}})
        address = f"127.0.0.1:{near.port()}"
        http: Config = {"type": "http"}
        far = mesh(secured(web, address, (REDIS, {"type": "tls"}), (REDIS, http), (REDIS, http | {"tls": "off"}), (OTHER, http)))
        wait_health(far, address, "healthy", "c0")
        wait_health(far, address, "healthy", "c1")
        assert wait_health(far, address, "unhealthy", "c2")["why"] in ("closed without an answer", "expect: reset")
        wait_health(far, address, "unhealthy", "c3", f"tls: the other end is {REDIS}, which is not among the peers")
        # What is behind the other end's proxy counts as well.
        server.says = b"HTTP/1.1 500 Ill\r\n\r\n"
        wait_health(far, address, "unhealthy", "c1", "status 500")
        assert health(far, address, "c0")["state"] == "healthy"
    failures = {name for name in near.metrics() if name.startswith("l4mesh_tls_failures_total")}
    # The plaintext check's; the others have ended as TLS wants it.
    assert failures <= {'l4mesh_tls_failures_total{cause="not_tls",side="downstream"}'}


def test_a_workload_of_this_node_is_checked_in_plaintext_as_connections_speak_to_it(mesh: Factory, web: Files) -> None:
    with Moody() as server:
        address = server.server.address
        config = secured(web, address, (REDIS, {"type": "http"}), (REDIS, {"type": "tls"}), (REDIS, {"type": "http"}))
        config["clusters"][2]["tls"]["encrypt_local"] = "on"
        m = mesh(config | {"workloads": [{"name": "r", "addresses": ["127.0.0.1"], "identity": "web"}]})
        wait_health(m, address, "healthy", "c0")
        wait_health(m, address, "healthy", "c1")
        wait_health(m, address, "unhealthy", "c2", "timeout after 500ms in tls")
        # It moves to another node: connections to it are mutual TLS from now on.
        m.reload(config)
        wait_health(m, address, "unhealthy", "c0", "timeout after 500ms in tls")


def test_a_check_refuses_who_hangs_on_a_revoked_ca(mesh: Factory, ca: Authority, web: Files, tmp_path: Path) -> None:
    generation = ca._generations()[-1]
    below = hostile(ca, tmp_path, "below", uris=[REDIS], links=2)
    crl = tmp_path / "crl.pem"
    crl.write_bytes(revocation_list(generation.root, generation.root_key))
    context = server_context(below)

    def serve(peer: socket.socket) -> None:
        with context.wrap_socket(peer, server_side=True) as secured:
            read_to_end(secured)

    with Server(serve) as server:
        config = secured(web, server.address, (REDIS, {"type": "tls"})) | {"identities": [web.identity("web", crl=str(crl))]}
        m = mesh(config)
        wait_health(m, server.address, "healthy", "c0")
        crl.write_bytes(revocation_list(generation.root, generation.root_key, certificates(below)[2]))
        wait_health(m, server.address, "unhealthy", "c0", f"tls: a CA above the certificate of {REDIS} is revoked")


# -- reload and trouble of ours ----------------------------------------------------------------------------------------------


def test_a_reload_keeps_what_is_known(mesh: Factory) -> None:
    with Server(echo) as server, Server(echo) as third:
        gone = f"127.0.0.1:{closed_port()}"
        m = mesh(simple(server.address, gone, health_check=CHECK))
        before = wait_health(m, gone, "unhealthy")
        wait_health(m, server.address, "healthy")
        m.reload(simple(server.address, gone, third.address, health_check=CHECK))
        assert health(m, gone) == before
        wait_health(m, third.address, "healthy")
        m.reload(simple(server.address, gone, third.address, health_check=CHECK | {"rise": 5}))
        assert health(m, gone)["since_unix_s"] == before["since_unix_s"]
        assert [out["cause"] for out in m.cluster()["endpoints"][1]["out"]] == ["unhealthy"]
        passed = checks(m, "passed")
        wait_until(lambda: checks(m, "passed") > passed, "checks go on")
        m.reload(simple(server.address, gone, third.address))
        wait_until(lambda: m.cluster()["endpoints"][1]["out"] == [], "nobody speaks against it any more")
        wait_until(lambda: health(m, gone) is None, "it is not checked any more")
        assert checks(m, "failed") == 0


def test_a_check_that_may_not_be_made_is_not_counted_and_is_said(mesh: Factory) -> None:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        skip_or_fail("needs root and setpriv")
    with Server(echo) as server:
        config = simple(server.address, health_check=CHECK, listener={"capture": "redirect"})
        # What captures, marks its own connections; and that needs a capability, one of two.
        m = mesh(config, prefix=("setpriv", "--bounding-set", "-net_admin,-net_raw"))
        wait_until(lambda: checks(m, "not_made") > 5, "checks were not made")
        assert health(m, server.address)["state"] == "unchecked"
        assert checks(m, "failed") == 0
        assert m.cluster()["endpoints"][0]["out"] == []
        said = [event for event in m.events() if event["event"] == "health_check_not_made"]
        assert [event["error"] for event in said] == ["EPERM (Operation not permitted)"]
        said = [event for event in m.events() if event["event"] == "mark_not_permitted"]
        assert [event["means"] for event in said] == ["no connection can be made: capture needs CAP_NET_ADMIN"]


def test_equal_checks_are_made_once(mesh: Factory) -> None:
    with Moody() as server:
        config = simple(server.server.address, health_check=CHECK | {"type": "http"})
        config["clusters"] += [config["clusters"][0] | {"name": f"c{i}"} for i in range(20)]
        m = mesh(config)
        wait_until(lambda: checks(m, "passed", "c7") >= 5, "it was checked a few times")
        asked = len(server.asked)
        for name in ("web", *(f"c{i}" for i in range(20))):
            assert health(m, server.server.address, name)["state"] == "healthy"
            # All of them but one that may be under way.
            assert checks(m, "passed", name) >= asked - 1


@pytest.fixture
def flood() -> Iterator[list[str]]:
    """300 addresses, of which every third refuses and every third is a black hole."""
    with Server(echo, "0.0.0.0") as server, black_hole_on_all() as hole:
        ports = itertools.cycle((server.port, closed_port("0.0.0.0"), hole))
        yield [f"127.7.{i // 200}.{1 + i % 200}:{next(ports)}" for i in range(300)]


@contextlib.contextmanager
def black_hole_on_all() -> Iterator[int]:
    listening = socket.socket()
    listening.bind(("0.0.0.0", 0))
    listening.listen(0)
    fillers = [socket.socket() for _ in range(8)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", listening.getsockname()[1]))
    try:
        yield listening.getsockname()[1]
    finally:
        for filler in fillers:
            filler.close()
        listening.close()


def test_many_dead_endpoints_do_not_delay_the_checks_of_the_living(mesh: Factory, flood: list[str]) -> None:
    # 16 checks at once, for 300 endpoints of which 100 hold one each until its timeout.
    m = mesh(simple(*flood, health_check={"interval": "500ms", "timeout": "100ms", "rise": 1, "fall": 1}), nofile=1024)
    wait_until(lambda: all(one["health"]["state"] != "unchecked" for one in m.cluster()["endpoints"]), "all have been checked", 30)
    states = [one["health"]["state"] for one in m.cluster()["endpoints"]]
    assert states == ["healthy", "unhealthy", "unhealthy"] * 100
