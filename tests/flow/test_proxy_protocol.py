"""The PROXY protocol: sent to endpoints, accepted from listed sources only, and never trusted further than its bytes go."""

import contextlib
import socket
import struct

import pytest

from tests.conftest import Factory
from tests.flow.test_fairness import at_once
from tests.support.mesh import Mesh, simple
from tests.support.peers import RST, Server, black_hole, connect, echo, read_exactly, read_to_end, talk
from tests.support.waiting import wait_until

V2 = b"\r\n\r\n\0\r\nQUIT\n"
V1_LINE = b"PROXY TCP4 192.0.2.1 198.51.100.1 4000 443\r\n"


def v2(command: int = 1, family: int = 0x11, body: bytes | None = None, length: int | None = None) -> bytes:
    if body is None:
        body = socket.inet_aton("192.0.2.7") + socket.inet_aton("198.51.100.7") + struct.pack("!HH", 4007, 443)
    return V2 + bytes([0x20 | command, family]) + struct.pack("!H", len(body) if length is None else length) + body


def test_version_1_is_sent_before_anything_else(mesh: Factory) -> None:
    heads: list[bytes] = []

    def serve(peer: socket.socket) -> None:
        heads.append(b"")
        while not heads[-1].endswith(b"\r\n"):
            heads[-1] += read_exactly(peer, 1)
        peer.sendall(b"banner")
        echo(peer)

    with Server(serve) as server:
        m = mesh(simple(server.address, proxy_protocol="v1"))
        port = m.port()
        with connect(port) as client:
            # A server that speaks first waits for the header, not for the client.
            assert read_exactly(client, 6) == b"banner"
            ours = client.getsockname()[1]
            client.sendall(b"data")
            assert read_exactly(client, 4) == b"data"
    assert heads == [b"PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n" % (ours, port)]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_version_2_is_sent_for_both_families(mesh: Factory, host: str) -> None:
    heads: list[bytes] = []
    size = 28 if host == "127.0.0.1" else 52

    def serve(peer: socket.socket) -> None:
        heads.append(read_exactly(peer, size))
        echo(peer)

    with Server(serve) as server:
        bind = f"{host}:0" if host == "127.0.0.1" else f"[{host}]:0"
        m = mesh(simple(server.address, listener={"bind": bind}, proxy_protocol="v2"))
        with connect(m.port(), host) as client:
            client.sendall(b"data")
            assert read_exactly(client, 4) == b"data"
            ours, theirs = client.getsockname()[1], client.getpeername()[1]
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    expected = V2 + bytes([0x21, 0x11 if size == 28 else 0x21, 0, size - 16]) + packed * 2 + struct.pack("!HH", ours, theirs)
    assert heads == [expected]


def accepting(mesh: Factory, server: Server, **options: object) -> Mesh:
    proxy = {"from": ["127.0.0.0/30"], "timeout": "300ms"} | options
    return mesh(simple(server.address, listener={"proxy_protocol": proxy}, proxy_protocol="v1"))


def heads_of(server_lines: list[bytes]) -> "Server":
    def serve(peer: socket.socket) -> None:
        line = b""
        while not line.endswith(b"\r\n"):
            line += read_exactly(peer, 1)
        server_lines.append(line)
        echo(peer)

    return Server(serve)


V6_BODY = socket.inet_pton(socket.AF_INET6, "2001:db8::1") * 2 + struct.pack("!HH", 1, 2)
GOOD = [
    ("v1", V1_LINE, b"PROXY TCP4 192.0.2.1 198.51.100.1 4000 443\r\n"),
    ("v1 IPv6", b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n", b"PROXY TCP6 2001:db8:0:0:0:0:0:1 2001:db8:0:0:0:0:0:2 1 65535\r\n"),
    ("v1 unknown", b"PROXY UNKNOWN whatever\r\n", None),
    ("v2", v2(), b"PROXY TCP4 192.0.2.7 198.51.100.7 4007 443\r\n"),
    ("v2 IPv6", v2(family=0x21, body=V6_BODY), b"PROXY TCP6 2001:db8:0:0:0:0:0:1 2001:db8:0:0:0:0:0:1 1 2\r\n"),
    ("v2 with TLVs", v2(body=socket.inet_aton("192.0.2.7") * 2 + struct.pack("!HH", 1, 2) + b"\x04\0\x03abc" * 20), b"PROXY TCP4 192.0.2.7 192.0.2.7 1 2\r\n"),
    ("v2 LOCAL", v2(command=0, family=0, body=b""), None),
    ("v2 UNSPEC", v2(family=0, body=b"\1" * 9), None),
    ("v2 unix", v2(family=0x31, body=b"/" * 216), None),
]  # fmt: skip


@pytest.mark.parametrize("split", ["fused", "bytewise"])
def test_good_headers_give_the_addresses_and_leave_the_payload_alone(mesh: Factory, split: str) -> None:
    lines: list[bytes] = []
    with heads_of(lines) as server:
        m = accepting(mesh, server, timeout="10s")
        port = m.port()
        for name, header, expected in GOOD:
            with connect(port) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if split == "fused":
                    client.sendall(header + b"payload")
                else:
                    for byte in header + b"payload":
                        client.sendall(bytes([byte]))
                assert read_exactly(client, 7) == b"payload", name
                kept = b"PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n" % (client.getsockname()[1], port)
                assert lines[-1] == (kept if expected is None else expected), name


BAD = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 4000\r\n",
    b"PROXY TCP4 192.0.2.256 198.51.100.1 4000 443\r\n",
    b"PROXY TCP4 192.0.2.01 198.51.100.1 4000 443\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 4000 65536\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 4000 443 \r\n",
    b"PROXY TCP6 2001:db8:::1 ::1 1 2\r\n",
    b"PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 1 2\r\n",
    b"PROXY TCP6 ::1: ::1 1 2\r\n",
    b"PROXY TCP9 ::1 ::1 1 2\r\n",
    b"PROXY " + b"x" * 300,
    V2[:11] + b"X",
    V2 + b"\x11\x11\0\x0c" + b"\0" * 12,
    V2 + b"\x22\x11\0\x0c" + b"\0" * 12,
    V2 + b"\x21\x41\0\x0c" + b"\0" * 12,
    v2(length=65535),
    v2(body=b"\0" * 11),
    b"\0" * 64,
]


def test_bad_headers_are_refused_before_anything_is_dialled(mesh: Factory) -> None:
    with Server(echo) as server:
        m = accepting(mesh, server)
        port = m.port()
        for header in BAD:
            with connect(port) as client:
                client.sendall(header)
                assert read_to_end(client) == (b"", RST), header
        m.wait_closed(proxy_protocol_invalid=len(BAD))
        assert server.accepted == 0


def test_a_header_that_never_comes_or_never_ends_times_out(mesh: Factory) -> None:
    with Server(echo) as server:
        m = accepting(mesh, server)
        port = m.port()
        for part in (b"", b"PROXY TC", V2, v2()[:-1]):
            with connect(port) as client:
                client.sendall(part)
                assert read_to_end(client) == (b"", RST)
        m.wait_closed(proxy_protocol_timeout=4)
        with connect(port) as client:
            client.sendall(b"PROXY TC")
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == (b"", RST)
        m.wait_closed(proxy_protocol_invalid=1)
        assert server.accepted == 0


def test_a_header_from_an_unlisted_source_is_payload(mesh: Factory) -> None:
    lines: list[bytes] = []
    with heads_of(lines) as server:
        m = accepting(mesh, server)
        with connect(m.port(), source="127.0.0.9") as client:
            client.sendall(V1_LINE)
            assert read_exactly(client, len(V1_LINE)) == V1_LINE
        wait_until(lambda: lines, "the endpoint has its header")
        assert lines[0].startswith(b"PROXY TCP4 127.0.0.9 ")


@pytest.mark.parametrize("waits", [False, True], ids=["dials", "waits for a place"])
def test_a_client_that_left_right_behind_its_header_is_waited_for_no_longer_than_others(mesh: Factory, waits: bool) -> None:
    with Server(echo) as server, black_hole() as hole, contextlib.ExitStack() as stack:
        limits = {"limits": {"connections": 1, "queue": {"size": 5, "timeout": "1m"}}} if waits else {}
        endpoint = server.address if waits else f"127.0.0.1:{hole}"
        m = mesh(simple(endpoint, listener={"proxy_protocol": {"from": ["127.0.0.0/30"]}}, connect={"timeout": "30s"}, **limits))
        if waits:
            talk(stack.enter_context(connect(m.port(), source="127.0.0.9")))
        client = stack.enter_context(connect(m.port()))
        with at_once(m):
            client.sendall(V1_LINE)
            client.shutdown(socket.SHUT_WR)
        m.wait_closed(downstream_left=1)
