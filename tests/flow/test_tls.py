"""TLS as a transport: bytes, ends, modes, resumption. Plain clients and servers around a pair of l4mesh, and Python's ssl as a stranger."""

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

from tests.conftest import Factory
from tests.support.certificates import REDIS, WEB, Authority, Files, hostile
from tests.support.mesh import Config, Mesh
from tests.support.peers import (
    FIN,
    RST,
    Server,
    black_hole,
    connect,
    digest,
    echo,
    is_refused,
    make_bytes,
    read_exactly,
    read_to_end,
    reset,
)
from tests.support.waiting import wait_until

MB = 1 << 20


def inbound(redis: Files, endpoint: str, tls: Config | None = None, **more: object) -> Config:
    return {
        "identities": [redis.identity("redis")],
        "access_log": {"when": "always"},
        "listeners": [{"name": "web", "bind": "127.0.0.1:0", "cluster": "app", "tls": {"identity": "redis"} | (tls or {})}],
        "clusters": [{"name": "app", "endpoints": [endpoint]}],
    } | more


def outbound(web: Files, endpoint: str, tls: Config | None = None, **more: object) -> Config:
    return {
        "identities": [web.identity("web")],
        "node": {"identity": "web"},
        "access_log": {"when": "always"},
        "listeners": [{"name": "web", "bind": "127.0.0.1:0", "cluster": "far"}],
        "clusters": [{"name": "far", "endpoints": [endpoint], "tls": {"peers": [REDIS]} | (tls or {})}],
    } | more


def pair(mesh: Factory, web: Files, redis: Files, endpoint: str) -> tuple[Mesh, Mesh]:
    near = mesh(inbound(redis, endpoint))
    return mesh(outbound(web, f"127.0.0.1:{near.port()}")), near


def client_context(files: Files | None, bundle: Path, maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = maximum
    context.load_verify_locations(bundle)
    if files:
        context.load_cert_chain(files.certificate, files.key)
    return context


def server_context(files: Files) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.bundle)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.contextmanager
def secure(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None = None) -> Iterator[ssl.SSLSocket]:
    with connect(port) as plain, context.wrap_socket(plain, session=session, suppress_ragged_eofs=False) as client:
        yield client


def wait_records(m: Mesh, count: int) -> list[dict[str, object]]:
    wait_until(lambda: len(m.records()) >= count, f"{count} lines in the access log")
    return m.records()


# -- on one node ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypt_local", [True, False])
def test_a_workload_of_this_node_gets_tls_where_it_should_and_its_policy_in_any_case(
    mesh: Factory, web: Files, redis: Files, encrypt_local: bool
) -> None:
    seen: list[object] = []

    def serve(peer: socket.socket) -> None:
        if peer.recv(1, socket.MSG_PEEK) != b"\x16":
            seen.append("plaintext")
            echo(peer)
            return
        with server_context(redis).wrap_socket(peer, server_side=True) as secured:
            seen.append(secured.getpeercert()["subjectAltName"])  # type: ignore[index]
            echo(secured)

    def policies(sources: str) -> Config:
        peers = [{"sources": [sources]}]
        return {"policies": [{"name": "only", "action": "allow", "workloads": {"app": "redis"}, "from": peers}]}

    with Server(serve) as server:
        config = outbound(web, server.address, {"identity": "web", "encrypt_local": encrypt_local}, workers=1)
        config["identities"] = [web.identity("web"), redis.identity("redis")]
        config["workloads"] = [{"name": "r", "labels": {"app": "redis"}, "addresses": ["127.0.0.1"], "identity": "redis"}]
        m = mesh(config | policies("127.0.0.0/8"))
        with connect(m.port()) as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
        assert seen == [(("URI", WEB),) if encrypt_local else "plaintext"]
        assert wait_records(m, 1)[0].get("upstream_tls") == ("1.3" if encrypt_local else None)
        m.reload(config | policies("10.0.0.0/8"))
        assert is_refused(m.port())
        m.wait_closed(denied=1)
        assert server.accepted == 1


def test_a_workload_of_this_node_that_is_another_is_refused_in_tls_as_well(mesh: Factory, web: Files) -> None:
    def serve(peer: socket.socket) -> None:
        with contextlib.suppress(ssl.SSLError), server_context(web).wrap_socket(peer, server_side=True) as secured:
            echo(secured)

    with Server(serve) as server:
        config = outbound(web, server.address, {"encrypt_local": "on"}, workers=1)
        config["workloads"] = [{"name": "r", "addresses": ["127.0.0.1"], "identity": "web"}]
        m = mesh(config)
        with connect(m.port()) as client:
            client.sendall(b"hello")
            assert read_to_end(client) == (b"", RST)
        m.wait_closed(upstream_tls=1)


# -- bytes ------------------------------------------------------------------------------------------------------------


def test_both_directions_at_once_are_byte_exact(mesh: Factory, web: Files, redis: Files) -> None:
    up, down = make_bytes(24 * MB, 1), make_bytes(16 * MB, 2)
    seen: list[str] = []

    def serve(peer: socket.socket) -> None:
        sender = threading.Thread(target=lambda: (peer.sendall(down), peer.shutdown(socket.SHUT_WR)))
        sender.start()
        seen.append(digest(read_to_end(peer)[0]))
        sender.join()

    with Server(serve) as server:
        far, near = pair(mesh, web, redis, server.address)
        with connect(far.port()) as client:
            sender = threading.Thread(target=lambda: (client.sendall(up), client.shutdown(socket.SHUT_WR)))
            sender.start()
            data, end = read_to_end(client)
            sender.join()
        wait_until(lambda: seen, "the endpoint has read to the end")
        assert (digest(data), end) == (digest(down), FIN)
        assert seen == [digest(up)]
        line = wait_records(near, 1)[0]
        assert (line["downstream_identity"], line["downstream_tls"]) == (WEB, "1.3")
        line = wait_records(far, 1)[0]
        assert (line["upstream_identity"], line["upstream_tls"], line["bytes_to_upstream"]) == (REDIS, "1.3", len(up))


def test_one_byte_at_a_time_and_a_slow_reader(mesh: Factory, web: Files, redis: Files) -> None:
    with Server(echo) as server:
        far, _ = pair(mesh, web, redis, server.address)
        with connect(far.port(), rcvbuf=4096) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in b"segments":
                client.sendall(bytes([byte]))
                assert read_exactly(client, 1) == bytes([byte])
            data = make_bytes(8 * MB, 5)
            sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            sender.start()
            # Nothing is read until everybody's buffers are full: the sender stands still.
            wait_until(lambda: is_stalled(far), "the stream stands still")
            got, end = read_to_end(client)
            sender.join()
        assert (digest(got), end) == (digest(data), FIN)


def is_stalled(m: Mesh, seen: list[float] = []) -> bool:  # noqa: B006 - remembers the look before
    seen.append(m.total("l4mesh_bytes_total"))
    return len(seen) > 4 and len(set(seen[-4:])) == 1


def test_a_server_that_speaks_first_is_heard(mesh: Factory, web: Files, redis: Files) -> None:
    def greet(peer: socket.socket) -> None:
        peer.sendall(b"220 hello\r\n")
        echo(peer)

    with Server(greet) as server:
        far, _ = pair(mesh, web, redis, server.address)
        with connect(far.port()) as client:
            assert read_exactly(client, 11) == b"220 hello\r\n"


# -- ends: invariants 1 to 3 through TLS --------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["downstream", "upstream"])
def test_half_close_is_kept_through_tls(mesh: Factory, web: Files, redis: Files, first: str) -> None:
    data = make_bytes(100_000, 3)

    def serve(peer: socket.socket) -> None:
        if first == "downstream":
            assert read_to_end(peer) == (b"request", FIN)
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
        else:
            peer.sendall(b"request")
            peer.shutdown(socket.SHUT_WR)
            assert read_to_end(peer) == (data, FIN)

    with Server(serve) as server:
        far, _ = pair(mesh, web, redis, server.address)
        with connect(far.port()) as client:
            if first == "downstream":
                client.sendall(b"request")
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == (data, FIN)
            else:
                assert read_to_end(client) == (b"request", FIN)
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
        far.wait_closed(**{f"{first}_closed": 1})


@pytest.mark.parametrize("who", ["downstream", "upstream"])
def test_a_reset_travels_through_tls(mesh: Factory, web: Files, redis: Files, who: str) -> None:
    seen: list[str] = []

    def serve(peer: socket.socket) -> None:
        read_exactly(peer, 1)
        if who == "upstream":
            reset(peer)
        else:
            peer.sendall(b"x")
            seen.append(read_to_end(peer)[1])

    with Server(serve) as server:
        far, _ = pair(mesh, web, redis, server.address)
        client = connect(far.port())
        client.sendall(b"x")
        if who == "upstream":
            assert read_to_end(client)[1] == RST
            client.close()
        else:
            read_exactly(client, 1)
            reset(client)
            wait_until(lambda: seen == [RST], "the reset has arrived")


def test_an_end_without_close_notify_is_a_reset(mesh: Factory, web: Files, redis: Files) -> None:
    seen: list[tuple[bytes, str]] = []
    with Server(lambda peer: seen.append(read_to_end(peer))) as server:
        near = mesh(inbound(redis, server.address))
        with secure(client_context(web, web.bundle), near.port()) as client:
            client.sendall(b"all?")
            wait_until(lambda: near.total("l4mesh_bytes_total") == 4, "the bytes are through")
            socket.socket(fileno=os.dup(client.fileno())).shutdown(socket.SHUT_WR)
            wait_until(lambda: seen, "the endpoint has seen the end")
        assert seen == [(b"all?", RST)]
        near.wait_closed(downstream_tls=1)
        assert wait_records(near, 1)[0]["tls_error"] == "truncated"


def test_close_notify_is_a_clean_end_for_a_stranger(mesh: Factory, web: Files, redis: Files) -> None:
    with Server(echo) as server:
        near = mesh(inbound(redis, server.address))
        with secure(client_context(web, web.bundle), near.port()) as client:
            client.sendall(b"hello")
            assert client.recv(10) == b"hello"
            assert client.version() == "TLSv1.3"
            assert client.cipher()[0] == "TLS_AES_128_GCM_SHA256"
            # Sends ours and waits for theirs, which follows the end of the echo.
            client.unwrap()
        near.wait_closed(downstream_closed=1)


def test_a_request_behind_the_handshake_is_still_dialled_for_when_the_client_ends_its_half(
    mesh: Factory, web: Files, redis: Files
) -> None:
    asked: list[tuple[bytes, str]] = []
    with Server(lambda peer: asked.append(read_to_end(peer))) as server, black_hole() as hole:
        config = inbound(redis, server.address, node={"name": "n", "zone": "z"})
        endpoints = [{"address": f"127.0.0.1:{hole}", "zone": "z"}, {"address": server.address, "zone": "far"}]
        config["clusters"] = [{"name": "app", "endpoints": endpoints, "connect": {"timeout": "500ms"}}]
        m = mesh(config)
        with connect(m.port()) as plain:
            comes, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = client_context(web, web.bundle).wrap_bio(comes, goes)
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            plain.sendall(goes.read())
            while client.version() is None or not goes.pending:
                comes.write(plain.recv(1 << 16))
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.do_handshake()
            # All in one piece, which the other end's handshake reads: what it has is to be asked of its TLS, and no more of the socket.
            client.write(b"question")
            with pytest.raises(ssl.SSLWantReadError):
                client.unwrap()
            plain.sendall(goes.read())
            wait_until(lambda: [c["state"] for c in m.get("/connections")["connections"]] == ["dialling"], "the dial is under way")
            plain.shutdown(socket.SHUT_WR)
            read_to_end(plain)
        m.wait_closed(downstream_closed=1)
        assert asked == [(b"question", FIN)]


# -- resumption ---------------------------------------------------------------------------------------------------------


def ping(m: Mesh, count: int = 1) -> None:
    for _ in range(count):
        with connect(m.port()) as client:
            client.sendall(b"ping")
            assert read_exactly(client, 4) == b"ping"
            client.shutdown(socket.SHUT_WR)
            read_to_end(client)


def handshakes(m: Mesh, side: str) -> tuple[int, int]:
    """Full and resumed."""
    found = m.metrics()
    return tuple(int(found[f'l4mesh_tls_handshakes_total{{resumed="{r}",side="{side}"}}']) for r in ("false", "true"))  # type: ignore[return-value]


def test_a_second_connection_resumes(mesh: Factory, web: Files, redis: Files) -> None:
    with Server(echo) as server:
        near = mesh(inbound(redis, server.address, workers=1))
        far = mesh(outbound(web, f"127.0.0.1:{near.port()}", workers=1))
        ping(far, 5)
        assert handshakes(far, "upstream") == (1, 4)
        assert handshakes(near, "downstream") == (1, 4)


@pytest.mark.parametrize("what", ["certificate", "bundle", "policy", "revocation", "node"])
def test_a_change_of_trust_ends_resumption(mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path, what: str) -> None:
    """On the server's side: each of what a session was made under, changed, makes the next handshake a full one."""
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(redis.bundle.read_bytes())
    crl = tmp_path / "crl.pem"
    crl.write_bytes(ca.crl_path.read_bytes())
    ours = Files(redis.certificate, redis.key, bundle)
    with Server(echo) as server:

        def config(**more: object) -> Config:
            return inbound(ours, server.address, workers=1, **more) | {"identities": [ours.identity("redis", crl=str(crl))]} | more

        near = mesh(config())
        far = mesh(outbound(web, f"127.0.0.1:{near.port()}", workers=1))
        ping(far, 2)
        assert handshakes(near, "downstream") == (1, 1)
        generation = near.status()["generation"]
        if what == "certificate":
            ca.files(tmp_path, "redis", REDIS)
        elif what == "bundle":
            bundle.write_bytes(redis.bundle.read_bytes() + Authority.new(tmp_path / "other", "other.org").bundle_path.read_bytes())
        elif what == "policy":
            near.write(config(policies=[{"name": "all", "action": "allow"}]))
        elif what == "revocation":
            ca.revoke(ca.issue("spiffe://example.org/ns/x/sa/y").certificates)
            crl.write_bytes(ca.crl_path.read_bytes())
        else:
            near.write(config(node={"identity": "redis"}))
        wait_until(lambda: near.status()["generation"] > generation, "the change is in force")
        # The one after it has a session of its own.
        ping(far, 2)
        assert handshakes(near, "downstream") == (2, 2)


@pytest.mark.parametrize("side", ["client", "server"])
def test_resumption_can_be_switched_off_on_either_side(mesh: Factory, web: Files, redis: Files, side: str) -> None:
    """Also for sessions that were made before: a ticket that the other side still holds is worth nothing."""
    off = {"resumption": "off"}
    with Server(echo) as server:
        near = mesh(inbound(redis, server.address, workers=1))
        endpoint = f"127.0.0.1:{near.port()}"
        far = mesh(outbound(web, endpoint, workers=1))
        ping(far, 2)
        assert handshakes(near, "downstream") == (1, 1)
        changed = near if side == "server" else far
        changed.reload(inbound(redis, server.address, off, workers=1) if side == "server" else outbound(web, endpoint, off, workers=1))
        ping(far, 3)
        assert handshakes(near, "downstream") == handshakes(far, "upstream") == (4, 1)


def test_a_client_forgets_its_sessions_with_its_certificate(
    mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path
) -> None:
    with Server(echo) as server:
        near = mesh(inbound(redis, server.address, workers=1))
        far = mesh(outbound(web, f"127.0.0.1:{near.port()}", workers=1))
        ping(far, 2)
        generation = far.status()["generation"]
        ca.files(tmp_path, "web", WEB)
        wait_until(lambda: far.status()["generation"] > generation, "the certificate is rotated")
        ping(far, 1)
        assert handshakes(far, "upstream") == (2, 1)


# -- modes ----------------------------------------------------------------------------------------------------------------


def test_strict_refuses_plaintext_and_permissive_takes_both(mesh: Factory, web: Files, redis: Files) -> None:
    with Server(echo) as server:
        strict = mesh(inbound(redis, server.address))
        with connect(strict.port()) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"GET" not in read_to_end(client)[0]
        strict.wait_closed(downstream_tls=1)
        assert wait_records(strict, 1)[0]["tls_error"] == "not_tls"
        assert server.accepted == 0
        both = mesh(inbound(redis, server.address, {"mode": "permissive"}))
        with connect(both.port()) as client:
            client.sendall(b"plain")
            assert read_exactly(client, 5) == b"plain"
        with secure(client_context(web, web.bundle), both.port()) as secured:
            secured.sendall(b"tls")
            assert secured.recv(3) == b"tls"
            secured.unwrap()


def test_permissive_waits_for_nobody_where_the_server_speaks_first(mesh: Factory, redis: Files) -> None:
    def greet(peer: socket.socket) -> None:
        peer.sendall(b"hello\n")
        read_to_end(peer)

    with Server(greet) as server:
        config = inbound(redis, server.address, {"mode": "permissive", "server_first": ["1-65535"], "handshake_timeout": "1h"})
        with connect(mesh(config).port()) as client:
            assert read_exactly(client, 6) == b"hello\n"
        # Elsewhere the silence lasts as long as the timeout, and then it is plaintext all the same.
        late = mesh(inbound(redis, server.address, {"mode": "permissive", "handshake_timeout": "50ms"}))
        with connect(late.port()) as client:
            assert read_exactly(client, 6) == b"hello\n"


def test_a_port_has_a_mode_of_its_own(mesh: Factory, web: Files, redis: Files) -> None:
    with Server(echo) as server:
        m = mesh(inbound(redis, server.address, {"mode": "strict", "ports": [{"ports": ["1-65535"], "mode": "off"}]}))
        with connect(m.port()) as client:
            client.sendall(b"plain")
            assert read_exactly(client, 5) == b"plain"


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()],
    ids=["RSA", "P-384", "Ed25519"],
)
def test_a_certificate_may_have_a_key_of_another_kind(
    mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path, key: CertificateIssuerPrivateKeyTypes
) -> None:
    client, server_side = (hostile(ca, tmp_path, name, uris=[uri], key=key) for name, uri in (("client", WEB), ("server", REDIS)))
    with Server(echo) as server:
        ping(pair(mesh, client, redis, server.address)[0])
        ping(pair(mesh, web, server_side, server.address)[0])


def test_tls_1_2_is_opt_in(mesh: Factory, web: Files, redis: Files) -> None:
    context = client_context(web, web.bundle, ssl.TLSVersion.TLSv1_2)
    with Server(echo) as server:
        modern = mesh(inbound(redis, server.address))
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION|protocol version"), secure(context, modern.port()):
            pass
        modern.wait_closed(downstream_tls=1)
        assert wait_records(modern, 1)[0]["tls_error"] == "protocol_version"
        older = mesh(inbound(redis, server.address, {"min_version": "1.2"}))
        with secure(context, older.port()) as client:
            client.sendall(b"old")
            assert client.recv(3) == b"old"
            assert client.version() == "TLSv1.2"
            client.unwrap()
        assert wait_records(older, 1)[0]["downstream_tls"] == "1.2"


# -- SNI and ALPN --------------------------------------------------------------------------------------------------------


def test_routes_by_sni_and_alpn_pass_tls_through(mesh: Factory, web: Files, redis: Files) -> None:
    def answer(name: bytes) -> Server:
        def serve(peer: socket.socket) -> None:
            with server_context(redis).wrap_socket(peer, server_side=True) as secured:
                secured.sendall(name)
                secured.unwrap()

        return Server(serve)

    with answer(b"one") as one, answer(b"two") as two, answer(b"http2") as http2, answer(b"rest") as rest:
        config = {
            "listeners": [
                {
                    "name": "web", "bind": "127.0.0.1:0", "default": "rest",
                    "routes": [
                        {"match": {"alpn": ["h2"]}, "cluster": "http2"},
                        {"match": {"sni": ["one.example.org"]}, "cluster": "one"},
                        {"match": {"sni": ["*.example.org"]}, "cluster": "two"},
                    ],
                }
            ],
            "clusters": [
                {"name": name, "endpoints": [server.address]}
                for name, server in (("one", one), ("two", two), ("http2", http2), ("rest", rest))
            ],
        }  # fmt: skip
        port = mesh(config).port()

        def ask(sni: str | None, alpn: str = "") -> bytes:
            context = client_context(web, web.bundle)
            if alpn:
                context.set_alpn_protocols([alpn, "http/1.1"])
            with connect(port) as plain, context.wrap_socket(plain, server_hostname=sni) as client:
                data = client.recv(10)
                client.unwrap()
                return data

        assert ask("ONE.example.org") == b"one"
        assert ask("deep.two.example.org") == b"two"
        assert ask("example.org") == b"rest"
        assert ask(None) == b"rest"
        assert ask("one.example.org", "h2") == b"http2"


def test_a_hello_in_pieces_is_put_together(mesh: Factory, web: Files, redis: Files) -> None:
    """One byte a segment, and the hello spread over many records."""
    context = client_context(web, web.bundle)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    engine = context.wrap_bio(incoming, outgoing, server_hostname="one.example.org")
    with contextlib.suppress(ssl.SSLWantReadError):
        engine.do_handshake()
    hello = outgoing.read()
    body = hello[5:]
    split = b"".join(b"\x16\x03\x01" + len(body[i : i + 7]).to_bytes(2, "big") + body[i : i + 7] for i in range(0, len(body), 7))
    seen: list[bytes] = []

    def serve(peer: socket.socket) -> None:
        seen.append(read_exactly(peer, len(split)))

    with Server(serve) as server:
        config = {
            "listeners": [
                {"name": "web", "bind": "127.0.0.1:0", "routes": [{"match": {"sni": ["one.example.org"]}, "cluster": "one"}]}
            ],
            "clusters": [{"name": "one", "endpoints": [server.address]}],
        }
        with connect(mesh(config).port()) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in split:
                client.sendall(bytes([byte]))
            wait_until(lambda: seen, "the endpoint has the hello")
        assert seen == [split]
