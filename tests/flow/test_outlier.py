"""Outlier detection on the real process: what counts against an endpoint, what doesn't, and what comes of it."""

import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Factory
from tests.support.certificates import REDIS, WEB, Authority, Files
from tests.support.mesh import Config, Mesh, simple
from tests.support.peers import RST, Server, black_hole, closed_port, connect, echo, is_refused, read_to_end, reset
from tests.support.waiting import wait_until

WATCH_ONLY = {"enforce": "0%", "interval": "1h"}
Script = Callable[[socket.socket], None]


def reset_unread(peer: socket.socket) -> None:
    """As a proxy whose own server is gone: takes the request, answers with a reset."""
    peer.recv(1 << 16)
    reset(peer)


def end_unanswered(peer: socket.socket) -> None:
    peer.recv(1 << 16)


def ask(port: int, request: bytes = b"hello") -> tuple[bytes, str]:
    try:
        with connect(port) as client:
            client.sendall(request)
            return read_to_end(client)
    except (ConnectionResetError, BrokenPipeError):
        return b"", RST


def failures(m: Mesh, index: int = 0) -> dict[str, int]:
    return dict(m.cluster()["endpoints"][index]["failures"])


def watching(*endpoints: str, **outlier: Any) -> Config:
    return simple(*endpoints, outlier_detection=WATCH_ONLY | outlier, connect={"attempts": 1}) | {"workers": 1}


# -- signals -----------------------------------------------------------------------------------------------------------------


def test_a_refused_dial_counts(mesh: Factory) -> None:
    m = mesh(watching(f"127.0.0.1:{closed_port()}"))
    for _ in range(3):
        assert is_refused(m.port())
    m.wait_closed(connect_refused=3)
    assert failures(m) == {"connect_failure": 3}


def test_a_dial_into_nothing_counts_when_it_had_its_time(mesh: Factory) -> None:
    with black_hole() as port:
        config = watching(f"127.0.0.1:{port}")
        config["clusters"][0]["connect"] = {"attempts": 1, "timeout": "50ms"}
        m = mesh(config)
        assert is_refused(m.port())
        m.wait_closed(connect_timeout=1)
        assert failures(m) == {"connect_failure": 1}
        # The budget of all attempts ends this one early: it proves nothing.
        config["clusters"][0]["connect"] = {"attempts": 1, "timeout": "10s", "budget": "50ms"}
        m.reload(config)
        assert is_refused(m.port())
        m.wait_closed(connect_timeout=2)
        assert failures(m) == {"connect_failure": 1}


@pytest.mark.parametrize(
    ("script", "reason", "signal"),
    [
        (reset, "upstream_reset", "early_reset"),
        (reset_unread, "upstream_reset", "early_reset"),
        (end_unanswered, "upstream_closed", "no_answer"),
    ],
)
def test_an_end_in_place_of_an_answer_counts(mesh: Factory, script: Script, reason: str, signal: str) -> None:
    with Server(script) as server:
        m = mesh(watching(server.address))
        for _ in range(3):
            assert ask(m.port())[0] == b""
        # A reset that comes with the handshake's last step fails the dial instead.
        wait_until(lambda: sum(failures(m).values()) == 3, "three failures are counted")
        assert set(failures(m)) <= {signal, "connect_failure"}
        if script is not reset:
            assert failures(m) == {signal: 3}
            m.wait_closed(**{reason: 3})


def answer_then_reset(peer: socket.socket) -> None:
    peer.recv(1 << 16)
    peer.sendall(b"answer")
    # Delivered first: the reset would overtake it.
    while struct.unpack("i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR, 4))[0] == 0 and _unacked(peer):
        pass
    reset(peer)


def _unacked(peer: socket.socket) -> bool:
    import fcntl
    import termios

    return bool(struct.unpack("i", fcntl.ioctl(peer.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])


def daytime(peer: socket.socket) -> None:
    peer.sendall(b"Tue Nov 24\r\n")


def end_at_once(peer: socket.socket) -> None:
    """A port that only shows that it is there."""


def sink(peer: socket.socket) -> None:
    """Takes everything, says nothing, resets when the client has ended, as log collectors may."""
    while peer.recv(1 << 16):
        pass
    reset(peer)


@pytest.mark.parametrize(
    ("script", "request_"),
    [(answer_then_reset, b"hello"), (daytime, b""), (end_at_once, None), (echo, b"hello"), (echo, None)],
    ids=["answers and resets", "daytime", "ends at once", "client resets", "client says nothing"],
)
def test_ordinary_ends_count_nothing(mesh: Factory, script: Script, request_: bytes | None) -> None:
    with Server(script) as server:
        m = mesh(watching(server.address))
        for _ in range(3):
            client = connect(m.port())
            if request_ is not None:
                client.sendall(request_)
            if script is echo:
                if request_:
                    client.recv(1)
                # Load testers and PostgreSQL's clients end so.
                reset(client)
            else:
                read_to_end(client)
                client.close()
        wait_until(lambda: m.active() == 0 and sum(m.closed().values()) == 3, "three connections have ended")
        assert failures(m) == {}


def test_a_client_that_ends_first_blames_nobody(mesh: Factory) -> None:
    with Server(sink) as server:
        m = mesh(watching(server.address))
        for _ in range(3):
            with connect(m.port()) as client:
                client.sendall(b"a line of a log\n")
                client.shutdown(socket.SHUT_WR)
                read_to_end(client)
        m.wait_closed(upstream_reset=3)
        assert failures(m) == {}


def test_a_reset_after_the_window_counts_nothing(mesh: Factory) -> None:
    with Server(reset_unread) as server:
        m = mesh(watching(server.address, signals={"early_reset": "1ms", "no_answer": "1ms"}))
        with connect(m.port()) as client:
            wait_until(
                lambda: any(c["age_ms"] > 20 and c["state"] == "relaying" for c in m.get("/connections")["connections"]), "it is old"
            )
            client.sendall(b"hello")
            assert read_to_end(client) == (b"", RST)
        m.wait_closed(upstream_reset=1)
        assert failures(m) == {}


def test_each_signal_can_be_turned_off(mesh: Factory) -> None:
    with Server(reset_unread) as resets, Server(end_unanswered) as ends:
        addresses = {"connect_failure": f"127.0.0.1:{closed_port()}", "early_reset": resets.address, "no_answer": ends.address}
        config = watching(addresses["connect_failure"])
        m = mesh(config)
        for count, (signal, address) in enumerate(addresses.items(), 1):
            config["clusters"][0]["endpoints"] = [address]
            # A reset of a connection that has sent something is also an answer that did not come.
            also = {"no_answer": "off"} if signal == "early_reset" else {}
            config["clusters"][0]["outlier_detection"] = WATCH_ONLY | {"signals": {signal: "off"} | also}
            m.reload(config)
            ask(m.port())
            wait_until(lambda: sum(m.closed().values()) == count, "the connection has ended")
            assert failures(m) == {}


def test_a_network_that_we_have_no_way_to_counts_nothing(mesh: Factory) -> None:
    # The kernel refuses to dial: ENETUNREACH.
    m = mesh(watching("255.255.255.255:9"))
    assert is_refused(m.port())
    m.wait_closed(connect_unreachable=1)
    assert failures(m) == {}


def test_an_injected_fault_counts_nothing(mesh: Factory) -> None:
    def tires(peer: socket.socket) -> None:
        # The stalled request never comes.
        with pytest.raises(TimeoutError):
            peer.settimeout(0.05)
            peer.recv(1)
        reset(peer)

    with Server(echo) as server, Server(tires) as impatient:
        config = watching(server.address) | {"faults": {"enabled": True}}
        m = mesh(config)
        faults: list[tuple[str, Config]] = [
            (server.address, {"refuse": "on"}),
            (server.address, {"reset": {"after": "1B"}}),
            (impatient.address, {"stall": {"for": "300ms"}}),
        ]
        for count, (address, fault) in enumerate(faults, 1):
            config["clusters"][0] |= {"endpoints": [address], "faults": [{"share": "100%"} | fault]}
            m.reload(config)
            ask(m.port())
            wait_until(lambda: sum(m.closed().values()) == count, "the connection has ended")
            assert m.total("l4mesh_faults_injected_total") == count
            assert failures(m) == {}


def secured(own: Files, address: str, bundle: Path | None = None, **outlier: Any) -> Config:
    identity = own.identity("web")
    config = watching(address, **outlier) | {"identities": [identity], "node": {"identity": "web"}}
    if bundle:
        identity["trust_bundle"] = str(bundle)
    config["clusters"][0]["tls"] = {"peers": [REDIS]}
    return config


@pytest.mark.parametrize("on", [True, False])
def test_a_handshake_that_fails_counts(mesh: Factory, web: Files, on: bool) -> None:
    with Server(lambda peer: peer.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")) as server:
        m = mesh(secured(web, server.address, signals={"tls_failure": "on" if on else "off"}))
        for _ in range(3):
            assert ask(m.port()) == (b"", RST)
        m.wait_closed(upstream_tls=3)
        assert failures(m) == ({"tls_failure": 3} if on else {})


def test_a_refusal_that_comes_after_the_handshake_counts(mesh: Factory, redis: Files, ca: Authority, tmp_path: Path) -> None:
    stranger = Authority.new(tmp_path / "other").files(tmp_path, "stranger", WEB)
    with Server(echo) as server:
        near = mesh(
            simple(server.address, listener={"tls": {"identity": "redis"}}) | {"identities": [redis.identity("redis")]},
        )
        m = mesh(secured(stranger, f"127.0.0.1:{near.port()}", ca.bundle_path))
        for _ in range(3):
            assert ask(m.port())[0] == b""
        m.wait_closed(upstream_tls=3)
        assert failures(m) == {"tls_refusal": 3}


def test_a_server_that_is_down_behind_its_node_counts(mesh: Factory, web: Files, redis: Files) -> None:
    near = mesh(
        simple(f"127.0.0.1:{closed_port()}", listener={"tls": {"identity": "redis"}}) | {"identities": [redis.identity("redis")]},
    )
    m = mesh(secured(web, f"127.0.0.1:{near.port()}"))
    for _ in range(3):
        assert ask(m.port()) == (b"", RST)
    wait_until(lambda: sum(m.closed().values()) == 3, "three connections have ended")
    assert failures(m) == {"early_reset": 3}


# -- ejection ----------------------------------------------------------------------------------------------------------------


def bad_and_good(stack: ExitStack, n_bad: int, n_good: int, script: Script) -> tuple[list[Server], list[Server]]:
    bad = [stack.enter_context(Server(script)) for _ in range(n_bad)]
    return bad, [stack.enter_context(Server(echo)) for _ in range(n_good)]


def round_trip(port: int) -> bool:
    return ask_once(port) == b"hello"


def ask_once(port: int) -> bytes:
    """The first bytes of the answer; none when the connection fails."""
    try:
        with connect(port) as client:
            client.sendall(b"hello")
            return client.recv(5)
    except (ConnectionResetError, BrokenPipeError):
        return b""


@pytest.mark.parametrize("script", [reset_unread, end_unanswered])
def test_no_connection_meets_an_endpoint_after_its_last_failure(mesh: Factory, script: Script) -> None:
    with ExitStack() as stack:
        bad, good = bad_and_good(stack, 3, 17, script)
        m = mesh(simple(*(s.address for s in (*bad, *good)), balance="round_robin", outlier_detection={"consecutive_failures": 3}))
        port = m.port()
        failed = 0
        while len([e for e in m.cluster()["endpoints"] if e["ejection"]["detector"]]) < 3:
            failed += not round_trip(port)
        assert failed == 9
        assert all(round_trip(port) for _ in range(100))
        assert [server.accepted for server in bad] == [3, 3, 3]
        ejected = [e for e in m.cluster()["endpoints"] if e["out"]]
        assert {e["address"] for e in ejected} == {s.address for s in bad}
        for endpoint in ejected:
            (out,) = endpoint["out"]
            assert out["cause"] == "ejected"
            assert out["why"] == "connections in a row that ended before an answer: 3"
            assert endpoint["ejection"]["times"] == 1
            assert 25 < endpoint["ejection"]["until_unix_s"] - endpoint["ejection"]["since_unix_s"] < 31
        events = [event for event in m.events() if event["event"] == "endpoint_ejected"]
        assert {event["endpoint"] for event in events} == {s.address for s in bad}
        assert m.total("l4mesh_outlier_ejections_total") == 3


def test_dials_that_fail_eject_and_clients_notice_nothing(mesh: Factory) -> None:
    with ExitStack() as stack:
        _, good = bad_and_good(stack, 0, 3, echo)
        dead = f"127.0.0.1:{closed_port()}"
        m = mesh(simple(dead, *(s.address for s in good), balance="round_robin", outlier_detection={}))
        port = m.port()
        wait_until(lambda: round_trip(port) and m.cluster()["endpoints"][0]["ejection"]["detector"], "it is ejected")
        assert m.cluster()["endpoints"][0]["connect_failures"] == 5
        assert all(round_trip(port) for _ in range(30))
        assert m.cluster()["endpoints"][0]["connect_failures"] == 5


def test_of_three_one_can_be_ejected_and_only_one(mesh: Factory) -> None:
    with ExitStack() as stack:
        bad, good = bad_and_good(stack, 2, 1, reset_unread)
        m = mesh(simple(*(s.address for s in (*bad, *good)), balance="round_robin", outlier_detection={"consecutive_failures": 2}))
        port = m.port()
        for _ in range(40):
            round_trip(port)
        wait_until(lambda: m.total("l4mesh_outlier_ejections_total") >= 2, "both were found out")
        assert m.metrics()['l4mesh_outlier_ejections_total{cluster="web",detector="consecutive_failures",result="ejected"}'] == 1
        assert m.metrics()['l4mesh_outlier_ejections_total{cluster="web",detector="consecutive_failures",result="max_ejected"}'] == 1
        assert len([e for e in m.cluster()["endpoints"] if e["out"]]) == 1
        assert "as many are ejected" in next(e for e in m.events() if e["event"] == "endpoint_not_ejected")["because"]


def test_enforce_0_only_says_what_it_would_do(mesh: Factory) -> None:
    with ExitStack() as stack:
        bad, good = bad_and_good(stack, 1, 2, reset_unread)
        config = simple(
            *(s.address for s in (*bad, *good)), balance="round_robin", outlier_detection={"consecutive_failures": 2, "enforce": "0%"}
        ) | {"workers": 1}
        m = mesh(config)
        for _ in range(30):
            round_trip(m.port())
        wait_until(lambda: m.total("l4mesh_outlier_ejections_total") == 1, "it was found out")
        assert [e["because"] for e in m.events() if e["event"] == "endpoint_not_ejected"] == ["enforce leaves it out"]
        assert bad[0].accepted == 10
        assert not any(e["out"] for e in m.cluster()["endpoints"])


def test_an_endpoint_returns_when_its_time_is_over_and_a_probe_passes(mesh: Factory) -> None:
    with ExitStack() as stack:
        _, good = bad_and_good(stack, 0, 2, echo)
        port = closed_port()
        outlier = {"consecutive_failures": 2, "base_ejection": "100ms", "interval": "100ms", "probe": "on"}
        m = mesh(simple(f"127.0.0.1:{port}", good[0].address, good[1].address, balance="round_robin", outlier_detection=outlier))
        wait_until(lambda: round_trip(m.port()) and any(e["event"] == "endpoint_ejected" for e in m.events()), "it is ejected")
        wait_until(lambda: len([e for e in m.events() if e["event"] == "probe_failed"]) >= 2, "probes fail")
        assert not any(e["event"] == "endpoint_returned" for e in m.events())
        assert m.cluster()["endpoints"][0]["out"]
        # SO_REUSEADDR does not help beside a bound socket that does not share: the holder must go.
        from tests.support import peers

        holder = next(h for h in peers._HOLDERS if h.getsockname()[1] == port)
        peers._HOLDERS.remove(holder)
        holder.close()
        revived = stack.enter_context(Server(echo, port=port))
        wait_until(lambda: any(e["event"] == "endpoint_returned" for e in m.events()), "it returns")
        assert m.cluster()["endpoints"][0]["warming"]
        before = revived.accepted
        wait_until(lambda: round_trip(m.port()) and revived.accepted > before, "it serves again")
        assert m.cluster()["endpoints"][0]["ejection"] == {"times": 1, "detector": "", "since_unix_s": 0.0, "until_unix_s": 0.0}


def test_without_its_configuration_nobody_stays_ejected(mesh: Factory) -> None:
    with ExitStack() as stack:
        bad, good = bad_and_good(stack, 1, 2, reset_unread)
        config = simple(*(s.address for s in (*bad, *good)), balance="round_robin", outlier_detection={"consecutive_failures": 1})
        m = mesh(config)
        wait_until(lambda: not round_trip(m.port()), "it fails")
        wait_until(lambda: m.cluster()["endpoints"][0]["out"], "it is ejected")
        # A reload that keeps the endpoint keeps what is held against it.
        config["clusters"][0]["connect"] = {"timeout": "2s"}
        m.reload(config)
        assert m.cluster()["endpoints"][0]["out"]
        del config["clusters"][0]["outlier_detection"]
        m.reload(config)
        wait_until(lambda: not m.cluster()["endpoints"][0]["out"], "it is back")
        assert m.cluster()["endpoints"][0]["ejection"] is None


def test_an_endpoint_that_is_removed_while_it_is_told_of_harms_nobody(mesh: Factory) -> None:
    with ExitStack() as stack:
        bad, good = bad_and_good(stack, 1, 2, reset_unread)
        outlier = {"consecutive_failures": 1, "base_ejection": "1ms", "interval": "100ms"}
        both = simple(*(s.address for s in (*bad, *good)), balance="round_robin", outlier_detection=outlier)
        without = simple(*(s.address for s in good), balance="round_robin", outlier_detection=outlier)
        m = mesh(both)
        for config in (without, both) * 5:
            for _ in range(6):
                round_trip(m.port())
            m.reload(config)
        assert m.process.poll() is None
