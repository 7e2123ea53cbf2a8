"""Peers that must not get in. Each ends with its cause, and none of them costs an upstream connection (invariant 5)."""

import contextlib
import datetime
import ssl
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.conftest import Factory
from tests.flow.test_tls import client_context, inbound, outbound, server_context, wait_records
from tests.support.certificates import REDIS, WEB, Authority, Files, hostile
from tests.support.mesh import Mesh
from tests.support.peers import RST, Server, connect, echo, read_to_end
from tests.support.waiting import wait_until

HOUR = datetime.timedelta(hours=1)


def is_turned_away(m: Mesh, files: Files | None, bundle: Path) -> bool:
    """Whether a client with this certificate gets an error. In TLS 1.3 it sees success first; what follows is an alert."""
    with connect(m.port()) as plain:
        try:
            with client_context(files, bundle).wrap_socket(plain) as client:
                client.recv(1)
        except OSError:
            return True
    return False


def is_cut(client: ssl.SSLSocket) -> bool:
    """Whether the connection ends without close_notify. Python shows a reset as the end of the stream or as an error."""
    try:
        data = client.recv(1)
    except OSError:
        return True
    return data == b"" and client.pending() == 0


BAD = {
    "none": (None, "no_certificate"),
    "expired": ({"ends": -HOUR / 2}, "expired"),
    "not yet": ({"starts": HOUR / 2}, "not_yet_valid"),
    "server only": ({"purposes": [ExtendedKeyUsageOID.SERVER_AUTH]}, "bad_certificate"),
    "a CA as a leaf": ({"ca": True}, "bad_certificate"),
    "may sign": ({"key_cert_sign": True}, "bad_certificate"),
    "two IDs": ({"uris": [WEB, REDIS]}, "bad_certificate"),
    "no ID": ({"uris": [], "dns": ["web.example.org"]}, "bad_certificate"),
    "the ID as a DNS name": ({"uris": [], "dns": ["example.org"], "common_name": WEB}, "bad_certificate"),
    "NUL in the ID": ({"raw_uri": WEB.encode() + b"\0.evil"}, "bad_certificate"),
    "another trust domain": ({"uris": ["spiffe://example.org.evil/ns/shop/sa/web"]}, "wrong_identity"),
    "not a SPIFFE ID": ({"uris": ["https://example.org/web"]}, "bad_certificate"),
    "a trust domain without a path": ({"uris": ["spiffe://example.org"]}, "bad_certificate"),
    "an intermediate that is no CA": ({"links": 1, "link_is_ca": False}, "bad_certificate"),
    "a chain that is too long": ({"links": 7}, "bad_certificate"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_client_certificate_is_refused_with_its_cause(
    mesh: Factory,
    ca: Authority,
    redis: Files,
    tmp_path: Path,
    kind: str,
) -> None:
    arguments, cause = BAD[kind]
    files = hostile(ca, tmp_path, "bad", **arguments) if arguments is not None else None  # type: ignore[arg-type]
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address))
        assert is_turned_away(m, files, redis.bundle)
        m.wait_closed(downstream_tls=1)
        assert wait_records(m, 1)[0]["tls_error"] == cause
        assert server.accepted == 0


def test_another_ca_is_refused_and_so_is_a_revoked_peer(
    mesh: Factory,
    ca: Authority,
    web: Files,
    redis: Files,
    tmp_path: Path,
) -> None:
    stranger = Authority.new(tmp_path / "stranger").files(tmp_path, "stranger", WEB)
    crl = tmp_path / "crl.pem"
    crl.write_bytes(ca.crl_path.read_bytes())
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address) | {"identities": [redis.identity("redis", crl=str(crl))]})
        assert is_turned_away(m, stranger, redis.bundle)
        assert wait_records(m, 1)[0]["tls_error"] == "unknown_ca"
        assert server.accepted == 0
        with connect(m.port()) as plain, client_context(web, web.bundle).wrap_socket(plain) as live:
            live.sendall(b"x")
            assert live.recv(1) == b"x"
            ca.revoke(web.certificate.read_bytes())
            crl.write_bytes(ca.crl_path.read_bytes())
            # The live connection ends,
            assert is_cut(live)
        m.wait_closed(peer_certificate=1)
        # and no new one begins.
        assert is_turned_away(m, web, web.bundle)
        assert wait_records(m, 3)[2]["tls_error"] == "revoked"
        assert server.accepted == 1


GARBAGE = {
    "truncated hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "record of 65535": b"\x16\x03\x01\xff\xff" + b"\0" * 100,
    "not a handshake": b"\x17\x03\x03\x00\x10" + b"\0" * 16,
    "2000 empty records": b"\x16\x03\x01\x00\x00" * 2000,
    "heartbeat": b"\x18\x03\x03\x00\x03\x01\x40\x00",
    "text": b"GET / HTTP/1.0\r\n\r\n",
}


@pytest.mark.parametrize("mode", ["strict", "permissive"])
@pytest.mark.parametrize("kind", [kind for kind in GARBAGE if kind not in ("text", "heartbeat", "not a handshake")])
def test_garbage_ends_at_once_and_reaches_nobody(
    mesh: Factory,
    redis: Files,
    kind: str,
    mode: str,
) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"mode": mode, "handshake_timeout": "300ms"}))
        with connect(m.port()) as client, contextlib.suppress(OSError):
            client.sendall(GARBAGE[kind])
            read_to_end(client)
        m.wait_closed(downstream_tls=1)
        assert server.accepted == 0


def test_a_slow_handshake_has_one_deadline(mesh: Factory, redis: Files) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"handshake_timeout": "200ms"}))
        with connect(m.port()) as client:
            client.sendall(b"\x16\x03\x01")
            assert read_to_end(client) == (b"", RST)
        m.wait_closed(downstream_tls=1)
        assert wait_records(m, 1)[0]["tls_error"] == "timeout"


def test_handshakes_of_one_source_are_limited(mesh: Factory, redis: Files) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address) | {"limits": {"handshakes_per_source": 2}})
        first, second = connect(m.port()), connect(m.port())
        wait_until(lambda: m.active() == 2, "two handshakes are under way")
        with connect(m.port()) as third:
            assert read_to_end(third) == (b"", RST)
        m.wait_closed(limit_handshakes=1)
        first.close()
        second.close()


def test_a_server_that_is_somebody_else_gets_no_byte(mesh: Factory, web: Files) -> None:
    """The cluster expects redis; the endpoint shows a sound certificate of web's."""
    errors: list[str] = []

    def serve(peer: object) -> None:
        try:
            with server_context(web).wrap_socket(peer, server_side=True) as secured:  # type: ignore[arg-type]
                errors.append(f"got {secured.recv(10)!r}")
        except ssl.SSLError as error:
            errors.append(error.reason or "")

    with Server(serve) as server:
        far = mesh(outbound(web, server.address))
        with contextlib.suppress(ConnectionResetError), connect(far.port()) as client:
            client.sendall(b"secret")
            assert read_to_end(client) == (b"", RST)
        far.wait_closed(upstream_tls=1)
        assert wait_records(far, 1)[0]["tls_error"] == "wrong_identity"
        wait_until(lambda: errors, "the server has seen the end")
        assert "got" not in errors[0]


def test_a_policy_decides_and_its_change_ends_what_it_no_longer_allows(
    mesh: Factory,
    web: Files,
    redis: Files,
) -> None:
    def policies(identity: str, **more: object) -> dict[str, object]:
        return {"policies": [{"name": "only", "action": "allow", "from": [{"identities": [identity]}]} | more]}

    with Server(echo) as server:
        m = mesh(inbound(redis, server.address) | policies(WEB))
        with connect(m.port()) as plain, client_context(web, web.bundle).wrap_socket(plain) as live:
            live.sendall(b"x")
            assert live.recv(1) == b"x"
            m.reload(inbound(redis, server.address) | policies(REDIS, dry_run=True))
            live.sendall(b"y")
            assert live.recv(1) == b"y"
            m.reload(inbound(redis, server.address) | policies(REDIS))
            assert is_cut(live)
        accepted = server.accepted
        with contextlib.suppress(OSError), connect(m.port()) as plain, client_context(web, web.bundle).wrap_socket(plain) as client:
            client.recv(1)
        m.wait_closed(denied=2)
        assert server.accepted == accepted


def test_an_unusable_rotation_keeps_the_old_certificate(
    mesh: Factory,
    web: Files,
    redis: Files,
    ca: Authority,
    tmp_path: Path,
) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address))
        redis.certificate.write_text("not a certificate")
        wait_until(lambda: any(event["event"] == "identity_refused" for event in m.events()), "the refusal is said")
        with connect(m.port()) as plain, client_context(web, web.bundle).wrap_socket(plain) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            client.unwrap()
        assert m.metrics()['l4mesh_identity_healthy{identity="redis"}'] == 0
        ca.files(tmp_path, "redis", REDIS)
        wait_until(lambda: m.metrics()['l4mesh_identity_healthy{identity="redis"}'] == 1, "the new certificate is in use")


def test_tls_to_a_plaintext_endpoint_and_back(mesh: Factory, web: Files) -> None:
    def chat(peer: object) -> None:
        peer.sendall(b"220 plaintext\r\n")  # type: ignore[attr-defined]
        read_to_end(peer)  # type: ignore[arg-type]

    with Server(chat) as server:
        far = mesh(outbound(web, server.address))
        with contextlib.suppress(ConnectionResetError), connect(far.port()) as client:
            assert read_to_end(client) == (b"", RST)
        far.wait_closed(upstream_tls=1)
        assert wait_records(far, 1)[0]["tls_error"] == "not_tls"
