"""Peers that must not get in. Each ends with its cause, and none of them costs an upstream connection (invariant 5).

The cases of TLS in the fault catalogue, and where each is tested:

| no. | case | test |
|---|---|---|
| 17 | certificate expires in mid-connection | test_tls_trust: established goes on, or ends by ``close_expired``; tickets die with it |
| 18 | trust bundle rotated | test_tls_trust: overlap without an outage; test_tls: tickets end |
| 19 | garbage, plaintext to TLS and back | what_is_no_handshake, tls_to_a_plaintext_endpoint |
| 20 | hello truncated, FIN in a record, record of 65535, 2000 empty records | what_is_no_handshake, a_hello_cut_at_every_byte, a_flight_cut |
| 21 | TLS 1.0 and 1.1 | what_is_no_handshake (alert 70) |
| 22 | renegotiation, key updates, heartbeat, compression, early data | renegotiation, key_updates, an_endpoint_updates_keys, early_data, what_is_no_handshake |
| 23 | certificates: wrong CA, dates, usage, CA flag, names, chain, none | a_bad_client_certificate, another_ca, a_refusal_after_the_handshake |
| 24 | a ticket under another identity, bundle, policy | a_ticket_of_another_listener; test_tls: a_change_of_trust_ends_resumption |
"""

import contextlib
import datetime
import signal
import socket
import ssl
import struct
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.conftest import Factory
from tests.flow.test_tls import client_context, handshakes, inbound, outbound, secure, server_context, wait_records
from tests.support.certificates import REDIS, WEB, Authority, Files, hostile
from tests.support.mesh import Mesh
from tests.support.openssl import TLS1_2, TLS1_3, TlsEnd, TlsError, make_hello
from tests.support.peers import DEADLINE_S, RST, Server, connect, echo, is_refused, make_bytes, read_exactly, read_to_end, reset
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
    "a certificate of 64 KiB": ({"dns": [f"{n}.{'x' * 60}.example.org" for n in range(800)]}, "bad_record"),
}


def test_a_bad_client_certificate_is_refused_with_its_cause(mesh: Factory, ca: Authority, redis: Files, tmp_path: Path) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address))
        for number, (kind, (arguments, cause)) in enumerate(BAD.items(), 1):
            files = hostile(ca, tmp_path, "bad", **arguments) if arguments is not None else None  # type: ignore[arg-type]
            assert is_turned_away(m, files, redis.bundle), kind
            assert wait_records(m, number)[-1].get("tls_error") == cause, kind
        m.wait_closed(downstream_tls=len(BAD))
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


VERSIONS, GROUPS, ALGORITHMS = (43, b"\2\3\4"), (10, b"\0\2\0\x1d"), (13, b"\0\2\4\3")
SHARE = (51, struct.pack("!HHH", 36, 29, 32) + b"\x09" * 32)
HELLO = make_hello(VERSIONS, GROUPS, ALGORITHMS, SHARE)
SUITES_1_0 = (0xC009, 0xC02B)
# What is sent, the alert that answers it (0: none), the cause in the log. All of it begins as TLS does, but for what PLAIN names.
GARBAGE = {
    "record of 65535": (b"\x16\x03\x01\xff\xff" + bytes(100), 22, "bad_record"),
    "2000 empty records": (b"\x16\x03\x01\0\0" * 2000, 10, "bad_record"),
    "heartbeat": (b"\x18\x03\x03\0\3\1\x40\0", 10, "bad_record"),
    "data before the handshake": (b"\x17\x03\x03\0\x10" + bytes(16), 10, "bad_record"),
    "100 change-cipher-specs": (b"\x14\x03\x03\0\1\1" * 100, 10, "bad_record"),
    "100 warning alerts": (b"\x15\x03\x03\0\2\1\0" * 100, 10, "bad_record"),
    "an alert that nobody knows": (b"\x15\x03\x03\0\2\2\xfa", 10, "bad_record"),
    "finished first": (b"\x16\x03\x01\0\x28\x14\0\0\x24" + bytes(36), 10, "bad_record"),
    "a hello of 16 MiB": (b"\x16\x03\x01\x40\0\1\xff\xff\xff" + bytes(16380), 47, "bad_record"),
    "SSL 3.0": (make_hello(version=0x0300, ciphers=(0x2F,)), 40, "protocol_version"),
    "TLS 1.0": (make_hello(GROUPS, ALGORITHMS, version=0x0301, ciphers=SUITES_1_0), 70, "protocol_version"),
    "TLS 1.1": (make_hello(GROUPS, ALGORITHMS, version=0x0302, ciphers=SUITES_1_0), 70, "protocol_version"),
    "TLS 1.1 as an extension": (make_hello((43, b"\2\3\2"), GROUPS, ALGORITHMS, SHARE), 70, "protocol_version"),
    "no cipher in common": (make_hello(VERSIONS, GROUPS, ALGORITHMS, SHARE, ciphers=(0x1304,)), 40, "no_common_parameters"),
    "no group in common": (
        make_hello(VERSIONS, (10, b"\0\2\0\x18"), ALGORITHMS, (51, b"\0\5\0\x18\0\1\1")),
        40,
        "no_common_parameters",
    ),
    "compression": (make_hello(VERSIONS, GROUPS, ALGORITHMS, SHARE, compression=b"\1\0"), 47, "bad_record"),
    "an extension twice": (make_hello(VERSIONS, GROUPS, ALGORITHMS, SHARE, VERSIONS), 47, "bad_record"),
    "a key share of zeros": (make_hello(VERSIONS, GROUPS, ALGORITHMS, (51, SHARE[1][:6] + bytes(32))), 47, "bad_record"),
    "FIN inside a record": (HELLO[:60], 0, "truncated"),
    "half a handshake": (HELLO, 0, "truncated"),
    "text": (b"GET / HTTP/1.0\r\n\r\n", 0, "not_tls"),
    "zeros": (bytes(100), 0, "not_tls"),
}
PLAIN = [kind for kind, (data, _, _) in GARBAGE.items() if data[0] != 22]
# What our own look at a hello refuses, before OpenSSL sees it: nobody is told why.
UNTOLD = {"record of 65535", "2000 empty records", "finished first", "a hello of 16 MiB"}


def alert_in(data: bytes) -> int:
    """The fatal alert that is sent in the clear, or 0."""
    at = 0
    while at + 5 <= len(data):
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at] == 21 and data[at + 5] == 2:
            return data[at + 6]
        at += 5 + length
    return 0


@pytest.mark.parametrize("mode", ["strict", "permissive"])
def test_what_is_no_handshake_ends_at_once_and_reaches_nobody(mesh: Factory, redis: Files, mode: str) -> None:
    kinds = [kind for kind in GARBAGE if mode == "strict" or kind not in PLAIN]
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"mode": mode, "handshake_timeout": "1h"}))
        for number, kind in enumerate(kinds, 1):
            data, alert, cause = GARBAGE[kind]
            with connect(m.port()) as client:
                with contextlib.suppress(OSError):
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                told = alert_in(read_to_end(client)[0])
            assert told == (0 if mode == "permissive" and kind in UNTOLD else alert), kind
            assert wait_records(m, number)[-1].get("tls_error") == cause, kind
        m.wait_closed(downstream_tls=len(kinds))
        assert server.accepted == 0


def test_a_slow_handshake_has_one_deadline(mesh: Factory, redis: Files) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"handshake_timeout": "200ms"}))
        with connect(m.port()) as client:
            client.sendall(b"\x16\x03\x01")
            assert read_to_end(client) == (b"", RST)
        m.wait_closed(downstream_tls=1)
        assert wait_records(m, 1)[0]["tls_error"] == "timeout"


def test_a_silent_endpoint_has_the_time_of_a_handshake_and_not_that_of_a_connect(mesh: Factory, web: Files) -> None:
    with Server(read_to_end) as server:
        config = outbound(web, server.address, {"handshake_timeout": "100ms"})
        config["clusters"][0] |= {"connect": {"attempts": 1, "timeout": "1h"}}
        far = mesh(config)
        with connect(far.port()) as client:
            assert read_to_end(client) == (b"", RST)
        far.wait_closed(upstream_tls=1)
        assert wait_records(far, 1)[0]["tls_error"] == "timeout"


def test_handshakes_of_one_source_are_limited(mesh: Factory, redis: Files) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address) | {"limits": {"handshakes_per_source": 2}})
        first, second = connect(m.port()), connect(m.port())
        wait_until(lambda: m.active() == 2, "two handshakes are under way")
        assert is_refused(m.port())
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


def test_an_endpoint_that_becomes_local_while_it_is_dialled_still_has_to_show_who_it_is(mesh: Factory, web: Files) -> None:
    with contextlib.ExitStack() as stack:
        # Nobody takes from its queue, which is full: our SYN is dropped, and sent again.
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        fillers = [stack.enter_context(socket.socket()) for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        config = outbound(web, f"127.0.0.1:{listening.getsockname()[1]}")
        config["clusters"][0]["connect"] = {"timeout": "60s", "attempts": 1}
        m = mesh(config)
        client = stack.enter_context(connect(m.port()))
        client.sendall(b"a secret for redis alone")
        wait_until(lambda: m.cluster("far")["connect_attempts"] == 1, "the dial is under way")
        m.reload(config | {"workloads": [{"name": "web-1", "addresses": ["127.0.0.1"], "identity": "web"}]})
        for filler in fillers:
            filler.close()
        listening.settimeout(DEADLINE_S)
        first = b""
        while not first:
            peer = stack.enter_context(listening.accept()[0])
            peer.settimeout(DEADLINE_S)
            first = peer.recv(1)
        assert first == b"\x16"


def test_without_an_identity_to_show_nothing_is_dialled(mesh: Factory, web: Files) -> None:
    with Server(echo) as server:
        m = mesh(outbound(web, server.address, node={"name": "nobody"}))
        assert is_refused(m.port())
        m.wait_closed(no_identity=1)
        assert server.accepted == 0


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


@pytest.mark.parametrize("what", ["an identity without files", "a port that is taken"])
def test_a_configuration_that_can_not_be_taken_into_use_stops_no_rotation(
    mesh: Factory, ca: Authority, redis: Files, tmp_path: Path, what: str
) -> None:
    with Server(echo) as server:
        config = inbound(redis, server.address)
        m = mesh(config)
        if what == "a port that is taken":
            extra = {"listeners": [*config["listeners"], {"name": "two", "bind": server.address, "cluster": "app"}]}
        else:
            ghost = {key: str(tmp_path / "ghost") for key in ("certificate", "private_key", "trust_bundle")}
            extra = {"identities": [*config["identities"], {"name": "ghost"} | ghost]}
        m.write(config | extra)
        wait_until(lambda: m.status()["config"]["last_error"], "the refusal is said")
        before = m.status()["generation"]
        ca.files(tmp_path, "redis", REDIS)
        wait_until(lambda: m.status()["generation"] > before, "the new certificate is in use")
        assert m.status()["config"]["last_error"]


def test_the_files_of_a_configuration_that_is_refused_are_no_rotation(
    mesh: Factory, ca: Authority, redis: Files, tmp_path: Path
) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address))
        other = inbound(ca.files(tmp_path, "other", REDIS), server.address)
        m.write(other | {"listeners": [*other["listeners"], {"name": "two", "bind": server.address, "cluster": "app"}]})
        for looks in (1, 2, 3):
            m.process.send_signal(signal.SIGHUP)
            wait_until(lambda looks=looks: m.status()["config"]["failed"] >= looks, "the files were looked at in vain")  # type: ignore[misc]
        assert m.status()["generation"] == 1
        assert not [event for event in m.events() if event["event"] == "identity_rotated"]


def test_a_key_that_openssl_refuses_holds_up_no_other_identity(
    mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path
) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address) | {"identities": [redis.identity("redis"), web.identity("web")]})
        hostile(ca, tmp_path, "redis", uris=[REDIS], key=rsa.generate_private_key(65537, 1024))
        refused = lambda: any("OpenSSL" in event.get("error", "") for event in m.events() if event["event"] == "identity_refused")  # noqa: E731
        wait_until(refused, "the refusal is said")
        before = m.status()["generation"]
        ca.files(tmp_path, "web", WEB)
        wait_until(lambda: m.status()["generation"] > before, "the other identity's new certificate is in use")
        with connect(m.port()) as plain, client_context(web, web.bundle).wrap_socket(plain) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            client.unwrap()


def test_a_revocation_list_that_is_half_written_changes_nothing(mesh: Factory, ca: Authority, redis: Files, tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    crl.write_bytes(ca.crl_path.read_bytes())
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address) | {"identities": [redis.identity("redis", crl=str(crl))]})
        crl.write_bytes(ca.crl_path.read_bytes()[:200])
        wait_until(lambda: any(event["event"] == "identity_refused" for event in m.events()), "the refusal is said")
        crl.write_bytes(ca.crl_path.read_bytes())
        wait_until(lambda: m.metrics()['l4mesh_identity_healthy{identity="redis"}'] == 1, "the whole list is in use")


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


# -- cut short, slow, deaf ----------------------------------------------------------------------------------------------


def leave(client: socket.socket, cut: int) -> None:
    """Half of them with a FIN, and to the end; half with a reset."""
    with contextlib.suppress(OSError):
        if cut % 2:
            reset(client)
        else:
            client.shutdown(socket.SHUT_WR)
            read_to_end(client)
            client.close()


def test_a_hello_cut_at_every_byte_leaves_nothing(mesh: Factory, redis: Files) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"handshake_timeout": "1h"}))
        for cut in range(len(HELLO)):
            client = connect(m.port())
            client.sendall(HELLO[:cut])
            leave(client, cut)
        wait_until(lambda: sum(m.closed().values()) == len(HELLO), "all have ended")
        assert set(m.closed()) <= {"downstream_left", "downstream_tls", "downstream_reset"}
        assert server.accepted == 0


def test_a_flight_cut_at_every_byte_leaves_nothing(mesh: Factory, web: Files, redis: Files) -> None:
    """The client's last flight, with its certificate: whatever is missing of it, nobody is dialled."""
    context = client_context(web, web.bundle)
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"handshake_timeout": "1h"}))
        port, cut, length = m.port(), 0, 1
        while cut < length:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            engine = context.wrap_bio(incoming, outgoing)
            client = connect(port)
            while True:
                try:
                    engine.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    client.sendall(outgoing.read())
                    incoming.write(client.recv(1 << 16))
            flight = outgoing.read()
            client.sendall(flight[:cut])
            leave(client, cut)
            # A signature is a byte longer or shorter each time.
            length = len(flight) - 2
            cut += 1
        wait_until(lambda: sum(m.closed().values()) == cut, "all have ended")
        assert set(m.closed()) <= {"downstream_left", "downstream_tls", "downstream_reset"}
        assert server.accepted == 0


def test_an_answer_cut_at_every_byte_is_a_failed_dial(mesh: Factory, web: Files, redis: Files) -> None:
    """The server's flight, which we are the client of."""
    context = server_context(redis)
    cuts = iter(range(1 << 20))
    lengths: list[int] = []

    def serve(peer: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        engine = context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(peer.recv(1 << 16))
        with contextlib.suppress(ssl.SSLWantReadError):
            engine.do_handshake()
        flight, cut = outgoing.read(), next(cuts)
        peer.sendall(flight[:cut])
        lengths.append(len(flight) - 2)
        leave(peer, cut)

    with Server(serve) as server:
        tls = {"handshake_timeout": "1h"}
        config = outbound(web, server.address, tls)
        config["clusters"][0] |= {"connect": {"attempts": 1}}
        far = mesh(config)
        port, count = far.port(), 0
        while not lengths or count < min(lengths):
            with contextlib.suppress(ConnectionResetError), connect(port) as client:
                assert read_to_end(client) == (b"", RST)
            count += 1
            wait_until(lambda: len(lengths) >= count, "the server has answered")
        wait_until(lambda: sum(far.closed().values()) == count, "all have ended")
        assert set(far.closed()) <= {"upstream_tls", "upstream_reset", "connect_failed"}, far.closed()


def test_slow_handshakes_from_many_sources_end_and_hold_nobody_up(mesh: Factory, web: Files, redis: Files) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"handshake_timeout": "1s"}))
        slow = [connect(m.port(), source=f"127.0.9.{n}") for n in range(1, 101)]
        for client in slow:
            client.sendall(HELLO[:10])
        wait_until(lambda: m.active() == 100, "a hundred handshakes are under way")
        with secure(client_context(web, web.bundle), m.port()) as good:
            good.sendall(b"hello")
            assert good.recv(5) == b"hello"
            good.unwrap()

        def is_over() -> bool:
            # A byte now and then does not prolong what one deadline ends.
            for client in slow:
                with contextlib.suppress(OSError):
                    client.sendall(b"\0")
            return m.active() == 0

        wait_until(is_over, "all slow handshakes have ended")
        for client in slow:
            client.close()
        assert m.closed()["downstream_tls"] == 100
        assert {line.get("tls_error") for line in wait_records(m, 101)} <= {None, "timeout", "bad_record"}
        assert server.accepted == 1


def test_a_peer_that_never_reads_our_flight_has_the_same_deadline(mesh: Factory, redis: Files) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"handshake_timeout": "300ms"}))
        deaf = [connect(m.port(), rcvbuf=1) for _ in range(20)]
        for client in deaf:
            client.sendall(HELLO)
        m.wait_closed(downstream_tls=20)
        for client in deaf:
            client.close()
        assert {line["tls_error"] for line in wait_records(m, 20)} == {"timeout"}
        assert server.accepted == 0


# -- after the handshake --------------------------------------------------------------------------------------------------


def test_a_refusal_is_heard_though_a_write_meets_the_reset_first(mesh: Factory, web: Files, redis: Files, tmp_path: Path) -> None:
    """The endpoint refuses our certificate with an alert and a reset, while the downstream's bytes are on their way to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(redis.certificate, redis.key)
    context.load_verify_locations(Authority.new(tmp_path / "elsewhere").bundle_path)
    context.verify_mode = ssl.CERT_REQUIRED
    judge, judged = threading.Event(), threading.Event()

    def serve(peer: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        engine = context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(peer.recv(1 << 16))
        with contextlib.suppress(ssl.SSLWantReadError):
            engine.do_handshake()
        peer.sendall(outgoing.read())
        incoming.write(peer.recv(1 << 16))
        judge.wait(DEADLINE_S)
        with contextlib.suppress(ssl.SSLError):
            engine.do_handshake()
        peer.sendall(outgoing.read())
        reset(peer)
        judged.set()

    with Server(serve) as server:
        far = mesh(outbound(web, server.address))
        with connect(far.port()) as client:
            wait_until(lambda: handshakes(far, "upstream") == (1, 0), "our handshake is over")
            far.process.send_signal(signal.SIGSTOP)
            client.sendall(b"hello")
            judge.set()
            assert judged.wait(DEADLINE_S)
            far.process.send_signal(signal.SIGCONT)
            assert read_to_end(client) == (b"", RST)
        far.wait_closed(upstream_tls=1)
        line = wait_records(far, 1)[0]
        assert (line["tls_error"], line["tls_alert"]) == ("peer_alert", "unknown_ca")


def test_key_updates_at_an_ordinary_pace_do_no_harm(mesh: Factory, web: Files, redis: Files) -> None:
    data = make_bytes(3_000_000, 7)
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address))
        with TlsEnd(connect(m.port()), web) as client:
            client.handshake()
            for number, at in enumerate(range(0, len(data), 100_000)):
                # Every other one asks for new keys in the other direction as well, while its data is on the way.
                part = data[at : at + 100_000]
                client.write(part[:50_000])
                client.update_key(request=number % 2 == 0)
                client.write(part[50_000:])
                assert client.read(len(part)) == part
        m.wait_closed(downstream_tls=1)
        assert wait_records(m, 1)[0]["tls_error"] == "truncated"


@pytest.mark.parametrize("request_theirs", [False, True])
def test_a_flood_of_key_updates_ends_the_connection(mesh: Factory, web: Files, redis: Files, request_theirs: bool) -> None:
    seen: list[tuple[bytes, str]] = []
    with Server(lambda peer: seen.append(read_to_end(peer))) as server:
        m = mesh(inbound(redis, server.address))
        with TlsEnd(connect(m.port()), web) as client:
            client.handshake()
            client.write(b"hello")
            with pytest.raises(TlsError):
                # Our answers to them are not read.
                for _ in range(100_000):
                    client.update_key(request_theirs)
        m.wait_closed(downstream_tls=1)
        assert wait_records(m, 1)[0]["tls_error"] == "key_updates"
        wait_until(lambda: seen == [(b"hello", RST)], "the endpoint has what came before, and a reset")


def test_an_endpoint_updates_keys_in_moderation_or_not_at_all(mesh: Factory, web: Files, redis: Files) -> None:
    """The same from the other side: we are the client."""

    def serve(peer: socket.socket) -> None:
        with TlsEnd(peer, redis, server=True) as end:
            end.handshake()
            for number in range(20):
                end.update_key(request=number % 2 == 0)
                end.write(end.read(1000))
            with contextlib.suppress(TlsError):
                for _ in range(100_000):
                    end.update_key(request=True)

    with Server(serve) as server:
        far = mesh(outbound(web, server.address))
        with connect(far.port()) as client:
            for number in range(20):
                part = make_bytes(1000, number)
                client.sendall(part)
                assert read_exactly(client, 1000) == part
            assert read_to_end(client) == (b"", RST)
        far.wait_closed(upstream_tls=1)
        assert wait_records(far, 1)[0]["tls_error"] == "key_updates"


def test_renegotiation_is_refused(mesh: Factory, web: Files, redis: Files) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"min_version": "1.2"}))
        with TlsEnd(connect(m.port()), web, TLS1_2) as client:
            client.handshake()
            client.write(b"hello")
            assert client.read(5) == b"hello"
            with pytest.raises(TlsError, match="no renegotiation"):
                client.renegotiate()
        m.wait_closed(downstream_tls=1)
        # OpenSSL's client takes the refusal for the end, and says so.
        assert wait_records(m, 1)[0]["tls_error"] == "peer_alert"
        assert handshakes(m, "downstream") == (1, 0)


def test_early_data_is_ignored_and_the_connection_works(mesh: Factory, web: Files, redis: Files) -> None:
    """A client that believes it may: what it sends early reaches nobody, now or later."""
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, workers=1))
        with TlsEnd(connect(m.port()), web) as client:
            client.handshake()
            client.write(b"first")
            assert client.read(5) == b"first"
            session = client.session
        with TlsEnd(connect(m.port()), web, session=session, early_data=16384) as client:
            client.write_early(b"EARLY" * 100)
            client.handshake()
            assert client.early_data == "rejected"
            client.write(b"late")
            assert client.read(4) == b"late"
        assert m.total("l4mesh_bytes_total") == 2 * len(b"firstlate")


@pytest.mark.parametrize("version", [TLS1_2, TLS1_3])
def test_a_session_outlives_connections_that_break_off(mesh: Factory, web: Files, redis: Files, version: int) -> None:
    """OpenSSL spoils the session of a connection that ends without close_notify, in whatever cache that is."""
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"min_version": "1.2"}, workers=1))
        session, resumed = 0, []
        for _ in range(4):
            with TlsEnd(connect(m.port()), web, version, session=session) as client:
                client.handshake()
                client.write(b"hello")
                assert client.read(5) == b"hello"
                resumed.append(client.resumed)
                session = session or client.session
        assert resumed == [False, True, True, True]
        assert handshakes(m, "downstream") == (1, 3)


def test_a_ticket_of_another_listener_is_worth_nothing(mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path) -> None:
    """Two identities of one process: a session made under one is not resumed under the other (CVE-2025-23419)."""
    other = ca.files(tmp_path, "other", "spiffe://example.org/ns/shop/sa/other")
    with Server(echo) as server:
        config = inbound(redis, server.address, workers=1)
        config["identities"].append(other.identity("other"))
        config["listeners"].append({"name": "two", "bind": "127.0.0.1:0", "cluster": "app", "tls": {"identity": "other"}})
        m = mesh(config)
        resumed = []
        session = 0
        for listener in ("web", "two", "web"):
            with TlsEnd(connect(m.port(listener)), web, session=session) as client:
                client.handshake()
                client.write(b"hello")
                assert client.read(5) == b"hello"
                resumed.append(client.resumed)
                session = session or client.session
        assert resumed == [False, False, True]
        assert handshakes(m, "downstream") == (2, 1)


def test_a_refusal_after_the_handshake_is_no_clean_end(mesh: Factory, redis: Files, tmp_path: Path) -> None:
    """A TLS 1.3 client is done before the server has judged its certificate. Ours tells the refusal from a connection that came to be."""
    stranger = Authority.new(tmp_path / "stranger").files(tmp_path, "stranger", WEB)
    # It trusts the right CA, and is trusted by nobody.
    stranger = Files(stranger.certificate, stranger.key, redis.bundle)
    with Server(echo) as server:
        near = mesh(inbound(redis, server.address))
        far = mesh(outbound(stranger, f"127.0.0.1:{near.port()}"))
        with contextlib.suppress(ConnectionResetError), connect(far.port()) as client:
            client.sendall(b"hello")
            assert read_to_end(client) == (b"", RST)
        far.wait_closed(upstream_tls=1)
        near.wait_closed(downstream_tls=1)
        assert wait_records(near, 1)[0]["tls_error"] == "unknown_ca"
        line = wait_records(far, 1)[0]
        assert (line["tls_error"], line["tls_alert"]) == ("peer_alert", "unknown_ca")
        assert server.accepted == 0
