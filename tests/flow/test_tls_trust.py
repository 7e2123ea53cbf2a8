"""Trust that changes while connections live: certificates run out, roots are rotated, revocation lists grow old."""

import contextlib
import datetime
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.conftest import Factory
from tests.flow.test_tls import client_context, handshakes, inbound, outbound, ping, secure, server_context, wait_records
from tests.flow.test_tls_hostile import is_cut, is_turned_away
from tests.support.certificates import REDIS, WEB, Authority, Files, hostile, revocation_list
from tests.support.mesh import Mesh
from tests.support.openssl import TlsEnd, TlsError
from tests.support.peers import RST, Server, connect, echo, read_exactly, read_to_end
from tests.support.waiting import wait_until

HOUR = datetime.timedelta(hours=1)
SHORT = datetime.timedelta(seconds=4)


def certificates(files: Files) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(files.certificate.read_bytes())


def wait_expired(files: Files) -> None:
    end = certificates(files)[0].not_valid_after_utc.timestamp()
    wait_until(lambda: time.time() > end, "the certificate has expired")


def wait_generation(m: Mesh, before: int) -> None:
    wait_until(lambda: m.status()["generation"] > before, "the change is in force")


def talk(client: ssl.SSLSocket) -> None:
    client.sendall(b"hello")
    assert client.recv(5) == b"hello"


# -- certificates run out ------------------------------------------------------------------------------------------------


def test_what_the_end_of_a_client_certificate_ends(mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path) -> None:
    """Handshakes and tickets always; established connections where ``close_expired`` says so, each at a time of its own."""
    with Server(echo) as server, contextlib.ExitStack() as stack:
        config = inbound(redis, server.address, {"close_expired": "on"}, workers=1)
        config["listeners"].append({"name": "keeps", "bind": "127.0.0.1:0", "cluster": "app", "tls": {"identity": "redis"}})
        m = mesh(config)
        port, keeps = m.port(), m.port("keeps")
        short = hostile(ca, tmp_path, "short", ends=SHORT)
        ends = certificates(short)[0].not_valid_after_utc
        context = client_context(short, redis.bundle)
        closed = [stack.enter_context(secure(context, port)) for _ in range(30)]
        kept = stack.enter_context(secure(context, keeps))
        long = stack.enter_context(secure(client_context(web, redis.bundle), port))
        for client in (*closed, kept, long):
            talk(client)
        sessions = []
        for session in (0, 1):
            # The second one shows that the first one's ticket is good, as long as the certificate is.
            client = stack.enter_context(TlsEnd(connect(keeps), short, session=sessions[0] if session else 0))
            client.handshake()
            client.write(b"hello")
            assert client.read(5) == b"hello"
            assert client.resumed == bool(session)
            sessions.append(client.session)
        wait_expired(short)
        m.wait_closed(peer_certificate=len(closed))
        assert all(is_cut(client) for client in closed)
        times = [datetime.datetime.fromisoformat(str(line["time"])) for line in wait_records(m, len(closed))]
        assert min(times) >= ends
        assert len(set(times)) > 1
        # The other listener's go on, and so does a peer whose certificate is good.
        talk(kept)
        talk(long)
        # The holder of the ticket has a new certificate by now. The ticket is not good for more than the old one was.
        fresh = ca.files(tmp_path, "short", WEB)
        client = stack.enter_context(TlsEnd(connect(keeps), fresh, session=sessions[0]))
        client.handshake()
        client.write(b"hello")
        assert client.read(5) == b"hello"
        assert not client.resumed
        assert handshakes(m, "downstream") == (len(closed) + 4, 1)


def test_a_session_with_a_server_ends_with_its_certificate(mesh: Factory, ca: Authority, web: Files, tmp_path: Path) -> None:
    """The server would take the ticket; we don't offer it."""
    resumed: list[bool | None] = []
    # Made now; its certificate is loaded when l4mesh runs, because its life is short.
    context = server_context(ca.files(tmp_path, "server", REDIS))

    def serve(peer: object) -> None:
        with context.wrap_socket(peer, server_side=True) as secured:  # type: ignore[arg-type]
            resumed.append(secured.session_reused)
            while data := secured.recv(100):
                secured.sendall(data)
            secured.unwrap()

    with Server(serve) as server:
        far = mesh(outbound(web, server.address, workers=1))
        short = hostile(ca, tmp_path, "short", uris=[REDIS], ends=SHORT)
        context.load_cert_chain(short.certificate, short.key)
        ping(far, 2)
        wait_expired(short)
        fresh = ca.files(tmp_path, "server", REDIS)
        context.load_cert_chain(fresh.certificate, fresh.key)
        ping(far, 2)
        assert resumed == [False, True, False, True]


# -- roots ---------------------------------------------------------------------------------------------------------------


def test_a_root_is_rotated_without_an_outage(mesh: Factory, tmp_path: Path) -> None:
    authority = Authority.new(tmp_path / "rotating")
    old_bundle = tmp_path / "old-bundle.pem"
    old_bundle.write_bytes(authority.bundle_path.read_bytes())
    ours = authority.files(tmp_path, "redis", REDIS)
    old_files = authority.files(tmp_path, "old", WEB)
    old = client_context(old_files, old_bundle)
    stop = threading.Event()
    troubles: list[Exception] = []
    rounds = 0

    def connect_again_and_again() -> None:
        nonlocal rounds
        while not stop.is_set():
            try:
                with secure(old, m.port()) as client:
                    talk(client)
                    client.unwrap()
            except Exception as trouble:
                troubles.append(trouble)
            rounds += 1

    with Server(echo) as server:
        m = mesh(inbound(ours, server.address))
        with secure(old, m.port()) as live:
            talk(live)
            traffic = threading.Thread(target=connect_again_and_again)
            traffic.start()
            try:
                # Both roots are trusted; then we have a certificate of the new one, which the old one vouches for.
                for step in (authority.rotate, lambda: authority.files(tmp_path, "redis", REDIS)):
                    generation, seen = m.status()["generation"], rounds
                    step()
                    wait_generation(m, generation)
                    wait_until(lambda: rounds > seen + 2, "the old peers go on")
            finally:
                stop.set()
                traffic.join()
            assert troubles == []
            new_bundle = tmp_path / "new-bundle.pem"
            new_bundle.write_bytes(x509.load_pem_x509_certificates(authority.bundle_path.read_bytes())[0].public_bytes(Encoding.PEM))
            new = client_context(authority.files(tmp_path, "new", WEB), new_bundle)
            with secure(new, m.port()) as client:
                talk(client)
                client.unwrap()
            generation = m.status()["generation"]
            authority.drop_old_roots()
            wait_generation(m, generation)
            with secure(new, m.port()) as client:
                talk(client)
                client.unwrap()
            accepted = server.accepted
            assert is_turned_away(m, old_files, old_bundle)
            assert server.accepted == accepted
            # Established under the old root, and untouched by all of it.
            talk(live)
            live.unwrap()
        assert [line["tls_error"] for line in wait_records(m, rounds + 4) if "tls_error" in line] == ["unknown_ca"]


# -- revocation lists ------------------------------------------------------------------------------------------------------


def test_a_root_revokes_an_intermediate_and_all_below_it(
    mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path
) -> None:
    """New connections and live ones, the resumed among them, whose tickets hold no chain of their own."""
    generation = ca._generations()[-1]
    below, beside = (hostile(ca, tmp_path, name, links=2) for name in ("below", "beside"))
    link = certificates(below)[2]
    crl = tmp_path / "crl.pem"
    crl.write_bytes(revocation_list(generation.root, generation.root_key))

    def talk_to(client: TlsEnd) -> None:
        client.write(b"hello")
        assert client.read(5) == b"hello"

    with Server(echo) as server, contextlib.ExitStack() as stack:
        config = inbound(redis, server.address, workers=1) | {"identities": [redis.identity("redis", crl=str(crl))]}
        m = mesh(config)

        def open_(files: Files, session: int = 0) -> TlsEnd:
            client = stack.enter_context(TlsEnd(connect(m.port()), files, session=session))
            client.handshake()
            talk_to(client)
            return client

        full = open_(below)
        resumed = open_(below, full.session)
        assert (full.resumed, resumed.resumed) == (False, True)
        others = [open_(files) for files in (beside, web)]
        before = m.status()["generation"]
        crl.write_bytes(revocation_list(generation.root, generation.root_key, link))
        wait_generation(m, before)
        m.wait_closed(peer_certificate=2)
        for client in (full, resumed):
            with pytest.raises(TlsError):
                client.read(1)
        for client in others:
            talk_to(client)
        assert is_turned_away(m, below, redis.bundle)
        assert wait_records(m, 3)[2]["tls_error"] == "revoked"
        assert server.accepted == 4
        # The ticket is worth nothing, and its holder's new certificate is good.
        assert not open_(beside, full.session).resumed


def test_a_revoked_peer_is_not_waited_for_while_a_fault_delays_it(mesh: Factory, ca: Authority, redis: Files, tmp_path: Path) -> None:
    bad = hostile(ca, tmp_path, "bad")
    generation = ca._generations()[-1]
    crl = tmp_path / "crl.pem"
    crl.write_bytes(ca.crl_path.read_bytes())
    with Server(echo) as server:
        config = inbound(redis, server.address) | {"identities": [redis.identity("redis", crl=str(crl))], "faults": {"enabled": True}}
        config["clusters"][0]["faults"] = [{"share": "100%", "delay": "60s"}]
        m = mesh(config)
        with connect(m.port()) as plain, client_context(bad, redis.bundle).wrap_socket(plain):
            wait_until(lambda: handshakes(m, "downstream") == (1, 0), "the peer is known")
            signer = generation.intermediate
            listed = revocation_list(signer, generation.intermediate_key, certificates(bad)[0])
            crl.write_bytes(signer.public_bytes(Encoding.PEM) + listed)
            m.wait_closed(peer_certificate=1)
        assert server.accepted == 0


def test_a_session_that_is_not_resumed_leaves_nothing_of_its_chain(
    mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path
) -> None:
    """Neither with the connection nor with what is remembered of another's chain, which its sender need not have the key of."""
    generation = ca._generations()[-1]
    deep = hostile(ca, tmp_path, "deep", links=3)
    link = certificates(deep)[3]
    crl = tmp_path / "crl.pem"
    crl.write_bytes(revocation_list(generation.root, generation.root_key))
    with Server(echo) as server, contextlib.ExitStack() as stack:
        identities = [redis.identity("redis", crl=str(crl)), ca.files(tmp_path, "other", REDIS).identity("other")]
        config = inbound(redis, server.address, workers=1) | {"identities": identities}
        config["listeners"].append({"name": "two", "bind": "127.0.0.1:0", "cluster": "app", "tls": {"identity": "other"}})
        m = mesh(config)

        def open_(files: Files, listener: str, session: int = 0) -> TlsEnd:
            client = stack.enter_context(TlsEnd(connect(m.port(listener)), files, session=session))
            client.handshake()
            client.write(b"hello")
            assert client.read(5) == b"hello"
            return client

        client = open_(web, "two", open_(deep, "web").session)
        assert not client.resumed
        before = m.status()["generation"]
        crl.write_bytes(revocation_list(generation.root, generation.root_key, link))
        wait_generation(m, before)
        m.wait_closed(peer_certificate=1)
        client.write(b"hello")
        assert client.read(5) == b"hello"
        open_(web, "two")


def test_an_endpoint_below_a_revoked_intermediate_is_left(mesh: Factory, ca: Authority, web: Files, tmp_path: Path) -> None:
    """The same where we are the client."""
    generation = ca._generations()[-1]
    below = hostile(ca, tmp_path, "below", uris=[REDIS], links=2)
    context = server_context(below)
    crl = tmp_path / "crl.pem"
    crl.write_bytes(revocation_list(generation.root, generation.root_key))

    def serve(peer: socket.socket) -> None:
        with context.wrap_socket(peer, server_side=True) as secured:
            while data := secured.recv(100):
                secured.sendall(data)

    with Server(serve) as server, contextlib.ExitStack() as stack:
        far = mesh(outbound(web, server.address, workers=1) | {"identities": [web.identity("web", crl=str(crl))]})
        live = []
        for _ in range(2):
            live.append(stack.enter_context(connect(far.port())))
            live[-1].sendall(b"hello")
            assert read_exactly(live[-1], 5) == b"hello"
        assert handshakes(far, "upstream") == (1, 1)
        before = far.status()["generation"]
        crl.write_bytes(revocation_list(generation.root, generation.root_key, certificates(below)[2]))
        wait_generation(far, before)
        far.wait_closed(peer_certificate=2)
        assert [read_to_end(client) for client in live] == [(b"", RST)] * 2


def test_a_list_that_is_out_of_date_counts_and_is_warned_of_once(
    mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path
) -> None:
    generation = ca._generations()[-1]
    gone = ca.files(tmp_path, "gone", WEB)
    crl = tmp_path / "crl.pem"
    crl.write_bytes(
        generation.intermediate.public_bytes(Encoding.PEM)
        + revocation_list(generation.intermediate, generation.intermediate_key, certificates(gone)[0], next_update=-HOUR)
    )

    def warnings() -> list[str]:
        return [event["event"] for event in m.events() if event["event"] in ("identity_warning", "crl_out_of_date")]

    with Server(echo) as server:
        config = inbound(redis, server.address) | {"identities": [redis.identity("redis", crl=str(crl))]}
        m = mesh(config)
        assert is_turned_away(m, gone, redis.bundle)
        assert wait_records(m, 1)[0]["tls_error"] == "revoked"
        with secure(client_context(web, redis.bundle), m.port()) as client:
            talk(client)
            client.unwrap()
        m.reload(config | {"policies": [{"name": "all", "action": "allow"}]})
        assert is_turned_away(m, gone, redis.bundle)
        assert warnings() == ["crl_out_of_date"]
        assert server.accepted == 1
