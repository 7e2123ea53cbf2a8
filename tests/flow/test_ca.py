"""`l4mesh ca serve` and the nodes that live from it: fetching, renewing, refusals, a CA that is away, a root that is rotated."""

import contextlib
import http.client
import json
import socket
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding

from l4mesh.identity.ca import make_request
from tests.conftest import Factory
from tests.flow.test_reload import BOUNDED
from tests.flow.test_tls import inbound, outbound, ping
from tests.support.ca import NODE_A, NODE_B, SERVER, CaProcess, Node, grant, identity_of
from tests.support.certificates import DOMAIN, REDIS, WEB, Authority, Files
from tests.support.clock import DAY_S, WrongClock
from tests.support.mesh import Config, Mesh, simple
from tests.support.peers import Server, closed_port, connect, echo, is_refused, read_exactly, read_to_end
from tests.support.waiting import wait_until


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One of its own: these tests change it."""
    authority = Authority.new(tmp_path / "ca")
    grant(authority, a=[WEB, REDIS], b=[REDIS])
    return authority


def client(node: Node, address: str, endpoint: str, *, ca: Config | None = None) -> Config:
    listeners = [{"name": "web", "bind": "127.0.0.1:0", "cluster": "far"}]
    clusters = [{"name": "far", "endpoints": [endpoint], "tls": {"peers": [REDIS], "identity": "web"}}]
    return node.config(address, ca=ca, web=WEB) | {"listeners": listeners, "clusters": clusters}


def server(node: Node, address: str, endpoint: str, *, ca: Config | None = None) -> Config:
    listeners = [{"name": "web", "bind": "127.0.0.1:0", "cluster": "app", "tls": {"identity": "redis"}}]
    return node.config(address, ca=ca, redis=REDIS) | {"listeners": listeners, "clusters": [{"name": "app", "endpoints": [endpoint]}]}


def wait_in_use(m: Mesh, *names: str) -> None:
    wait_until(lambda: all(identity_of(m, name)["in_use"] for name in names), f"{names} are in use")


def use_endpoint(m: Mesh, config: Config) -> None:
    """Other processes have other ports."""
    m.write(config)
    [address] = config["clusters"][0]["endpoints"]
    wait_until(lambda: m.cluster("far")["endpoints"][0]["address"] == address, "the new port is known")


def leaf(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


# -- fetching and renewing --------------------------------------------------------------------------------------------------


def test_two_nodes_fetch_what_they_need_and_speak_to_each_other(mesh: Factory, authority: Authority, tmp_path: Path) -> None:
    a, b = Node(tmp_path / "a", authority), Node(tmp_path / "b", authority, NODE_B)
    with CaProcess(tmp_path, authority) as ca, Server(echo) as app:
        near = mesh(server(b, ca.address, app.address))
        far = mesh(client(a, ca.address, f"127.0.0.1:{near.port()}"))
        wait_in_use(near, "redis")
        wait_in_use(far, "web")
        ping(far, 2)
        # The nodes' own keys are new as well: the one that came with the folder was used once.
        issued = ca.events("certificate_issued")
        assert [(e["node"], e["spiffe_id"]) for e in issued] == [(NODE_B, NODE_B), (NODE_B, REDIS), (NODE_A, NODE_A), (NODE_A, WEB)]
        assert [f"{leaf(path).serial_number:x}" for path in (a.credential(), a.credential("web"))] == [e["serial"] for e in issued[2:]]
        assert stat.S_IMODE(a.credential("web").stat().st_mode) == 0o600
        [event] = [e for e in far.events() if e["event"] == "identity_issued"]
        assert (event["identity"], event["spiffe_id"]) == ("web", WEB)
        shown = identity_of(far, "web")
        assert (shown["source"], shown["renewals"], shown["error"]) == ("ca", 1, "")
        assert shown["expires_unix_s"] == leaf(a.credential("web")).not_valid_after_utc.timestamp()
        metrics = far.metrics()
        assert metrics['l4mesh_identity_renewals_total{identity="web",result="succeeded"}'] == 1
        assert metrics['l4mesh_trust_fetches_total{result="succeeded"}'] >= 1


def test_certificates_and_the_node_s_own_are_renewed_each_with_a_new_key(mesh: Factory, authority: Authority, tmp_path: Path) -> None:
    node = Node(tmp_path / "a", authority)
    first = node.credential().read_bytes()
    with CaProcess(tmp_path, authority, life="5s") as ca, Server(echo) as app:
        near = mesh(server(node, ca.address, app.address))
        wait_in_use(near, "redis")
        seen: set[bytes] = set()

        def renewed() -> bool:
            seen.add(node.credential("redis").read_bytes().partition(b"-----END PRIVATE KEY")[0])
            return len(seen) >= 3 and identity_of(near, "node")["renewals"] >= 2

        wait_until(renewed, "both are renewed several times")
        assert node.credential().read_bytes().splitlines()[1] != first.splitlines()[1]
        # Traffic goes by the newest, long after the first has expired.
        with connect(near.port()) as plain, ssl_client(authority, tmp_path).wrap_socket(plain) as peer:
            der = peer.getpeercert(True)
            assert der is not None
            serial = x509.load_der_x509_certificate(der).serial_number
            peer.sendall(b"x")
            assert peer.recv(1) == b"x"
            peer.unwrap()
        assert f"{serial:x}" in [event["serial"] for event in ca.events("certificate_issued")]
        assert [e["event"] for e in near.events() if e["event"] in ("identity_refused", "identity_renewal_failed")] == []


def ssl_client(authority: Authority, folder: Path) -> ssl.SSLContext:
    files = authority.files(folder, "stranger", f"spiffe://{DOMAIN}/ns/x/sa/x")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.bundle)
    context.load_cert_chain(files.certificate, files.key)
    return context


def test_a_configuration_that_is_wrong_stops_no_renewal(mesh: Factory, authority: Authority, tmp_path: Path) -> None:
    node = Node(tmp_path / "a", authority)
    with CaProcess(tmp_path, authority, life="5s") as ca:
        m = mesh(server(node, ca.address, "127.0.0.1:1"))
        wait_in_use(m, "redis")
        m.file.write_text("listeners: many\n")
        wait_until(lambda: m.status()["config"]["last_error"], "the configuration is refused")
        loads = m.metrics()['l4mesh_identity_loads_total{identity="redis"}']
        wait_until(lambda: m.metrics()['l4mesh_identity_loads_total{identity="redis"}'] >= loads + 2, "new certificates are in use")
        assert m.status()["config"]["last_error"]
        assert len([e for e in m.events() if e["event"] == "config_refused"]) == 1


# -- refusals ---------------------------------------------------------------------------------------------------------------


def test_what_a_node_may_not_have_is_refused_and_holds_up_nothing_else(mesh: Factory, authority: Authority, tmp_path: Path) -> None:
    node = Node(tmp_path / "b", authority, NODE_B)
    with CaProcess(tmp_path, authority) as ca, Server(echo) as app:
        config = server(node, ca.address, app.address)
        config["identities"] = [{"name": "web", "spiffe_id": WEB}, *config["identities"]]
        config["listeners"].append({"name": "other", "bind": "127.0.0.1:0", "cluster": "app", "tls": {"identity": "web"}})
        m = mesh(config)
        wait_in_use(m, "redis")
        reason = f"the CA refuses: {NODE_B} may not ask for {WEB}"
        wait_until(lambda: identity_of(m, "web")["error"] == reason, "the refusal is shown")
        assert is_refused(m.port("other"))
        m.wait_closed(no_identity=1)
        assert app.accepted == 0
        wait_until(lambda: m.metrics()['l4mesh_identity_renewals_total{identity="web",result="failed"}'] >= 3, "it is tried again")
        assert [e["error"] for e in m.events() if e["event"] == "identity_renewal_failed"] == [reason]
        refused = ca.events("request_refused")[0]
        assert (refused["node"], refused["reason"]) == (NODE_B, f"{NODE_B} may not ask for {WEB}")
        # The file is read again; an unusable one changes nothing.
        authority.nodes_path.write_text("nodes:\n  - {identity: b}\n")
        said = wait_until(lambda: ca.events("nodes_refused"), "the file is refused")[0]["problems"]
        assert said == [
            f"{authority.nodes_path}:2: nodes[0].identity: must be a SPIFFE ID such as spiffe://example.org/ns/shop/sa/web; got 'b'"
        ]
        assert node.ask(ca.address)[0] == 200
        grant(authority, b=[f"spiffe://{DOMAIN}/ns/shop/*"])
        wait_in_use(m, "web")


def test_a_revoked_node_and_one_that_is_no_node_are_refused_at_once(authority: Authority, tmp_path: Path) -> None:
    node, workload = Node(tmp_path / "a", authority), Node(tmp_path / "w", authority, WEB)
    with CaProcess(tmp_path, authority) as ca:
        assert node.ask(ca.address)[0] == 200
        assert workload.ask(ca.address) == (403, {"error": f"{WEB} is not among the nodes"})
        # Also on a connection that was made before.
        with node.connection(ca.address) as open_before:
            kept = http.client.HTTPConnection("ca")
            kept.sock = open_before
            kept.request("GET", "/v1/trust")
            assert kept.getresponse().read()
            authority.revoke(node.credential().read_bytes())
            kept.request("GET", "/v1/trust")
            answer = kept.getresponse()
            assert (answer.status, answer.read()) == (403, b'{"error": "the certificate is revoked"}')
        assert node.ask(ca.address) == (403, {"error": "the certificate is revoked"})
        assert [e["reason"] for e in ca.events("request_refused")][1:] == ["the certificate is revoked"] * 2


def request(key: CertificateIssuerPrivateKeyTypes, *uris: str, ca: bool = False, dns: str = "") -> bytes:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [x509.DNSName(dns)] if dns else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(x509.KeyUsage(True, False, False, False, False, True, True, False, False), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_requests_that_no_node_would_make(authority: Authority, tmp_path: Path) -> None:
    node = Node(tmp_path / "a", authority)
    key = ec.generate_private_key(ec.SECP256R1())
    der = bytearray(x509.load_pem_x509_csr(request(key, WEB)).public_bytes(Encoding.DER))
    der[-1] ^= 1
    forged = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()
    one_name = "the request must ask for exactly one name, a SPIFFE ID"
    # A name of a kind that the library does not know: ediPartyName.
    names = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), bytes.fromhex("3004a5020400"))
    strange = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=False)
    cases = [
        (b"", 400, "the request can't be read as a CSR in PEM"),
        (b"\0" * 1000, 400, "the request can't be read as a CSR in PEM"),
        (forged, 400, "the request is not signed by its own key"),
        (request(key), 400, one_name),
        (strange.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), 400, one_name),
        (request(key, WEB, REDIS), 400, one_name),
        (request(key, WEB, dns="shop.example"), 400, one_name),
        (request(key, "https://example.org/"), 400, one_name),
        (request(ec.generate_private_key(ec.SECP384R1()), WEB), 400, "the request's key must be ECDSA P-256"),
        (request(rsa.generate_private_key(65537, 2048), WEB), 400, "the request's key must be ECDSA P-256"),
        (request(key, "spiffe://elsewhere.org/ns/shop/sa/web"), 403, f"{NODE_A} may not ask for spiffe://elsewhere.org/ns/shop/sa/web"),
        (request(key, NODE_B), 403, f"{NODE_B} is another node"),
        (request(key, SERVER), 403, f"{SERVER} is kept for the CA"),
    ]
    grant(authority, a=[f"spiffe://{DOMAIN}/*"], b=[])
    with CaProcess(tmp_path, authority) as ca:
        for body, status, reason in cases:
            answer = node.ask(ca.address, "POST", "/v1/certificates", body)
            assert answer[0] == status, (reason, answer)
            assert answer[1]["error"].startswith(reason), answer
        assert node.ask(ca.address, "POST", "/v1/certificates", b"x" * (1 << 20))[0] == 413
        assert node.ask(ca.address, "GET", "/v1/certificates")[0] == 405
        assert node.ask(ca.address, "GET", "/")[0] == 404
        # What is asked for beside the name is not granted.
        status, granted = node.ask(ca.address, "POST", "/v1/certificates", request(key, WEB, ca=True))
        assert status == 200
        certificate = x509.load_pem_x509_certificates(granted["certificates"].encode())[0]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        assert not usage.key_cert_sign
        assert not usage.crl_sign
        assert len(ca.events("certificate_issued")) == 1


def test_strangers_and_slow_clients_hold_up_nobody(authority: Authority, tmp_path: Path) -> None:
    node = Node(tmp_path / "a", authority)
    other = Authority.new(tmp_path / "other")
    with CaProcess(tmp_path, authority, timeout="700ms") as ca:
        host, port = ca.address.split(":")
        silent = connect(int(port), host)
        with node.connection(ca.address) as slow_head, node.connection(ca.address) as slow_body:
            slow_head.sendall(b"POST /v1/certificates HTTP/1.1\r\nHost: ca\r\nX-Slow: ")
            slow_body.sendall(b"POST /v1/certificates HTTP/1.1\r\nHost: ca\r\nContent-Length: 1000\r\n\r\nabc")
            for bytes_ in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(100), bytes(range(256))):
                with connect(int(port), host) as plain:
                    plain.sendall(bytes_)
                    assert b"HTTP" not in read_to_end(plain)[0]
            for files in (None, other.files(tmp_path, "other", NODE_A)):
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname = False
                context.load_verify_locations(authority.bundle_path)
                if files:
                    context.load_cert_chain(files.certificate, files.key)
                # In TLS 1.3 the client learns of it with its first read.
                with connect(int(port), host) as plain, pytest.raises(OSError), context.wrap_socket(plain) as refused:  # noqa: PT011
                    refused.sendall(b"GET /v1/trust HTTP/1.1\r\nHost: ca\r\n\r\n")
                    if not refused.recv(1):
                        raise ConnectionResetError
            assert node.ask(ca.address)[0] == 200
            for slow in (slow_head, slow_body):
                assert b" 200 " not in read_to_close(slow)
        assert read_to_end(silent)[0] == b""
        silent.close()
        assert node.ask(ca.address)[0] == 200
        wait_until(lambda: ca.events("handshakes_failed"), "strangers are counted")


def test_strangers_who_take_all_descriptors_are_said_and_gone_after_their_time(authority: Authority, tmp_path: Path) -> None:
    node = Node(tmp_path / "a", authority)
    with CaProcess(tmp_path, authority, timeout="2s", prefix=("prlimit", "--nofile=64:64")) as ca, contextlib.ExitStack() as strangers:
        host, port = ca.address.split(":")
        for _ in range(100):
            strangers.enter_context(connect(int(port), host))
        wait_until(lambda: ca.events("descriptors_short"), "it is said")
        # They are still there; their time is over.
        wait_until(lambda: answers(node, ca), "a node is served again")


def answers(node: Node, ca: CaProcess) -> bool:
    try:
        return bool(node.ask(ca.address)[0] == 200)
    except OSError:
        return False


def read_to_close(peer: ssl.SSLSocket) -> bytes:
    """Whatever comes before the end, clean or not."""
    got = b""
    try:
        while part := peer.recv(4096):
            got += part
    except TimeoutError:
        raise
    except OSError:
        pass
    return got


def test_one_node_that_asks_without_end_is_held_back(authority: Authority, tmp_path: Path) -> None:
    node, other = Node(tmp_path / "a", authority), Node(tmp_path / "b", authority, NODE_B)
    with CaProcess(tmp_path, authority) as ca, node.connection(ca.address) as secured:
        kept = http.client.HTTPConnection("ca")
        kept.sock = secured

        def status() -> int:
            kept.request("GET", "/v1/trust")
            answer = kept.getresponse()
            answer.read()
            return answer.status

        assert 429 in [status() for _ in range(600)]
        assert other.ask(ca.address)[0] == 200


# -- whom the node believes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["another CA", "a workload of ours", "a revoked CA certificate"])
def test_a_node_tells_nothing_to_who_is_not_the_ca(mesh: Factory, authority: Authority, tmp_path: Path, who: str) -> None:
    if who == "another CA":
        files = Authority.new(tmp_path / "other").files(tmp_path, "impostor", SERVER)
    else:
        files = authority.files(tmp_path, "impostor", WEB if who == "a workload of ours" else SERVER)
    if who == "a revoked CA certificate":
        authority.revoke(files.certificate.read_bytes())
    node = Node(tmp_path / "a", authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    heard: list[bytes] = []

    def listen(peer: socket.socket) -> None:
        with context.wrap_socket(peer, server_side=True) as secured:
            heard.append(read_to_close(secured))

    with Server(listen) as impostor:
        m = mesh(node.config(impostor.address, web=WEB) | simple("127.0.0.1:1"))
        reason = {
            "another CA": "certificate verify failed",
            "a workload of ours": f"the other end is {WEB}, not {SERVER}",
            "a revoked CA certificate": f"the certificate of {SERVER} is revoked",
        }[who]
        wait_until(lambda: reason in identity_of(m, "web")["error"], "the failure is shown")
        wait_until(lambda: impostor.accepted >= 3, "it is tried again")
    assert set(heard) <= {b""}
    assert not node.credential("web").exists()


def test_an_answer_that_can_not_be_used_is_not_taken(mesh: Factory, authority: Authority, tmp_path: Path) -> None:
    """The CA's own certificate, and a server behind it that answers whatever the test wants."""
    node = Node(tmp_path / "a", authority)
    files = authority.files(tmp_path, "server", SERVER)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    bundle, crl = (part.decode() for part in authority.trust())
    script = [
        (
            {"certificates": authority.issue(WEB).certificates.decode(), "bundle": bundle, "crl": crl},
            "does not belong to the certificate",
        ),
        ({"certificates": "", "bundle": bundle, "crl": crl}, "holds no certificate in PEM"),
        ({"certificates": 7, "bundle": bundle, "crl": crl}, "the answer has no certificates"),
        ({"certificates": "\ud800", "bundle": 7, "crl": crl}, "the answer has no certificates"),
        ({"certificates": "", "bundle": "\ud800", "crl": crl}, "the answer has no bundle"),
        (["a"], "something that is no answer"),
        ("{", "something that is no answer"),
        ("x" * (5 << 20), "larger than 4 MiB"),
        ("[" * (1 << 20), "something that is no answer"),
    ]
    current = [0]

    def answer(peer: socket.socket) -> None:
        with context.wrap_socket(peer, server_side=True) as secured:
            head = b""
            while b"\r\n\r\n" not in head:
                head += secured.recv(4096)
            body = script[current[0]][0]
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            secured.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
            read_to_close(secured)

    with Server(answer) as fake:
        m = mesh(node.config(fake.address, web=WEB, ca={"retry": "20ms"}) | simple("127.0.0.1:1"))
        for index, (_, reason) in enumerate(script):
            current[0] = index
            wait_until(lambda reason=reason: reason in identity_of(m, "web")["error"], f"the node says: {reason}")
        assert not identity_of(m, "web")["in_use"]
        assert not node.credential("web").exists()
        assert (node.folder / "bundle.pem").read_text() == bundle


def test_a_folder_that_takes_no_new_file_holds_up_no_certificate(authority: Authority, tmp_path: Path) -> None:
    node, folder = Node(tmp_path / "a", authority), authority.bundle_path.parent
    often = "import l4mesh.runtime.ca_server as it; it.CRL_REFRESH_S = 0; from l4mesh.cli import main; main()"
    with CaProcess(tmp_path, authority, prefix=BOUNDED, program=("-c", often)) as ca:
        folder.chmod(0o500)
        try:
            wait_until(lambda: ca.events("maintenance_failed"), "the revocation list can't be dated anew")
            assert node.ask(ca.address)[0] == 200
            assert node.ask(ca.address, "POST", "/v1/certificates", make_request(WEB)[1])[0] == 200
        finally:
            folder.chmod(0o700)


def test_a_clock_that_is_set_right_costs_the_ca_no_day(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(tmp_path / "a", authority)
    clock = WrongClock(tmp_path, monkeypatch)
    clock.set_wrong_by(-3 * DAY_S)
    monkeypatch.setenv("LD_PRELOAD", str(clock.shim))
    with CaProcess(tmp_path, authority) as ca:
        monkeypatch.delenv("LD_PRELOAD")

        def answers() -> bool:
            try:
                return node.ask(ca.address)[0] == 200
            except OSError:
                return False

        assert not answers()
        clock.set_wrong_by(0)
        wait_until(answers, "it shows a certificate that is valid by now")
        clock.set_wrong_by(3 * DAY_S)
        wait_until(lambda: not answers(), "it shows one that is not valid yet")
        clock.set_wrong_by(0)
        wait_until(answers, "it shows another one")


# -- a CA that is away --------------------------------------------------------------------------------------------------------


def test_a_node_starts_without_the_ca_and_refuses_until_it_comes(mesh: Factory, authority: Authority, tmp_path: Path) -> None:
    a, b = Node(tmp_path / "a", authority), Node(tmp_path / "b", authority, NODE_B)
    with CaProcess(tmp_path, authority) as ca, Server(echo) as app:
        ca.stop()
        near = mesh(server(b, ca.address, app.address))
        far = mesh(client(a, ca.address, app.address))
        wait_until(lambda: "can't be asked" in identity_of(far, "web")["error"], "the failure is shown")
        for m in (near, far):
            assert is_refused(m.port())
            m.wait_closed(no_identity=1)
        use_endpoint(far, client(a, ca.address, f"127.0.0.1:{near.port()}"))
        ca.start()
        wait_in_use(near, "redis")
        wait_in_use(far, "web")
        ping(far)
        # Once in the log, however often it was tried.
        failed = [e for e in far.events() if e["event"] == "identity_renewal_failed"]
        assert len({e["error"] for e in failed}) == len(failed)
        # Kept files are enough for a start.
        ca.stop()
        for m in (near, far):
            m.check_invariants()
            m.stop()
            m.start()
        use_endpoint(far, client(a, ca.address, f"127.0.0.1:{near.port()}"))
        ping(far)


def test_the_last_good_certificate_serves_while_the_ca_is_away(mesh: Factory, authority: Authority, tmp_path: Path) -> None:
    a, b = Node(tmp_path / "a", authority), Node(tmp_path / "b", authority, NODE_B)
    # Long enough that nothing expires while the CA is away, and renewed at once after a start: by their dates they are half used up.
    with CaProcess(tmp_path, authority, life="50s") as ca, Server(echo) as app:
        near = mesh(server(b, ca.address, app.address, ca={"trust_interval": "100ms"}))
        far = mesh(client(a, ca.address, f"127.0.0.1:{near.port()}", ca={"trust_interval": "100ms"}))
        wait_in_use(near, "redis")
        wait_in_use(far, "web")
        ca.stop()
        for m in (near, far):
            m.check_invariants()
            m.stop()
            m.start()
        use_endpoint(far, client(a, ca.address, f"127.0.0.1:{near.port()}", ca={"trust_interval": "100ms"}))
        failing = [(far, "web"), (near, "redis")]
        wait_until(lambda: all("can't be asked" in identity_of(m, name)["error"] for m, name in failing), "renewal fails")
        ping(far)
        ca.start()
        wait_until(lambda: all(identity_of(m, name)["renewals"] for m, name in failing), "they are renewed")
        assert identity_of(far, "web")["error"] == ""
        ping(far)


def test_a_node_without_a_certificate_says_what_it_needs(mesh: Factory, authority: Authority, tmp_path: Path) -> None:
    node = Node(tmp_path / "a", authority)
    first = node.credential().read_bytes()
    node.credential().unlink()
    with CaProcess(tmp_path, authority) as ca:
        m = mesh(node.config(ca.address, web=WEB) | simple("127.0.0.1:1"))
        wait_until(lambda: "l4mesh ca enroll" in identity_of(m, "web")["error"], "the failure is shown")
        new = node.folder / "new"
        new.write_bytes(first)
        new.rename(node.credential())
        wait_in_use(m, "node", "web")


# -- rotation -------------------------------------------------------------------------------------------------------------------


def test_a_root_is_rotated_under_traffic(mesh: Factory, authority: Authority, tmp_path: Path) -> None:
    a, b = Node(tmp_path / "a", authority), Node(tmp_path / "b", authority, NODE_B)
    ask_often = {"trust_interval": "200ms"}
    with CaProcess(tmp_path, authority) as ca, Server(echo) as app:
        near = mesh(server(b, ca.address, app.address, ca=ask_often))
        far = mesh(client(a, ca.address, f"127.0.0.1:{near.port()}", ca=ask_often))
        wait_in_use(near, "redis")
        wait_in_use(far, "web")
        stop = threading.Event()
        rounds: list[int] = []
        failures: list[BaseException] = []
        port = far.port()

        def traffic() -> None:
            while not stop.is_set():
                try:
                    with connect(port) as peer:
                        peer.sendall(b"ping")
                        assert read_exactly(peer, 4) == b"ping"
                        peer.shutdown(socket.SHUT_WR)
                        read_to_end(peer)
                    rounds.append(1)
                except (OSError, AssertionError) as error:
                    failures.append(error)

        def wait_rounds() -> None:
            count = len(rounds)
            wait_until(lambda: len(rounds) >= count + 20, "traffic goes on")

        identities = [(far, a, "node"), (far, a, "web"), (near, b, "node"), (near, b, "redis")]

        def is_of(generation: int, m: Mesh, node: Node, name: str) -> bool:
            """Not in its file only, but in use."""
            shown = leaf(node.credential() if name == "node" else node.credential(name))
            is_new = f"intermediate {generation}" in shown.issuer.rfc4514_string()
            return is_new and identity_of(m, name)["serial"] == f"{shown.serial_number:X}"

        def all_of(generation: int) -> bool:
            return all(is_of(generation, m, node, name) for m, node, name in identities)

        def roots(node: Node) -> int:
            return (node.folder / "bundle.pem").read_text().count("BEGIN CERTIFICATE")

        sender = threading.Thread(target=traffic)
        sender.start()
        try:
            wait_rounds()
            authority.rotate()
            wait_until(lambda: all_of(2) and roots(a) == roots(b) == 2, "all certificates are of the new root")
            wait_rounds()
            generations = [m.status()["generation"] for m in (near, far)]
            assert authority.drop_old_roots() == 1
            wait_until(lambda: roots(a) == roots(b) == 1, "the old root is gone")
            wait_until(
                lambda: all(m.status()["generation"] > before for m, before in zip((near, far), generations, strict=True)), "in force"
            )
            wait_rounds()
        finally:
            stop.set()
            sender.join()
        assert failures == []
        # A new node, which knows only the new root, can ask; one from before the rotation can't.
        assert Node(tmp_path / "c", authority).ask(ca.address)[0] == 200
        for m in (near, far):
            assert [e for e in m.events() if e["event"] in ("identity_refused", "identity_renewal_failed")] == []


# -- files of others --------------------------------------------------------------------------------------------------------------


def openssl(folder: Path, *words: str, stdin: str = "") -> None:
    done = subprocess.run(["openssl", *words], cwd=folder, capture_output=True, text=True, input=stdin, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_certificates_made_by_openssl_alone_serve_in_both_roles(mesh: Factory, tmp_path: Path, kind: str) -> None:
    new_key = ["-newkey", "rsa:2048"] if kind == "rsa" else ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    openssl(
        tmp_path, "req", "-x509", *new_key, "-nodes", "-keyout", "root.key", "-out", "root.pem", "-days", "2", "-subj", "/CN=a root",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip

    def signed(name: str, issuer: str, extensions: str) -> None:
        openssl(tmp_path, "req", "-new", *new_key, "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (tmp_path / f"{name}.ext").write_text(extensions)
        openssl(
            tmp_path, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{issuer}.pem", "-CAkey", f"{issuer}.key", "-CAcreateserial",
            "-days", "1", "-extfile", f"{name}.ext", "-out", f"{name}.pem",
        )  # fmt: skip

    signed("middle", "root", "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n")
    usage = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n"
    files = {}
    for name, spiffe_id in (("web", WEB), ("redis", REDIS)):
        signed(name, "middle", f"{usage}subjectAltName=URI:{spiffe_id}\n")
        chain = tmp_path / f"{name}-chain.pem"
        chain.write_bytes((tmp_path / f"{name}.pem").read_bytes() + (tmp_path / "middle.pem").read_bytes())
        files[name] = Files(chain, tmp_path / f"{name}.key", tmp_path / "root.pem")
    with Server(echo) as app:
        near = mesh(inbound(files["redis"], app.address))
        far = mesh(outbound(files["web"], f"127.0.0.1:{near.port()}"))
        ping(far, 2)
        # Rotated by the same means: what cert-manager and SPIRE's helper do to files.
        loads = far.metrics()['l4mesh_identity_loads_total{identity="web"}']
        signed("web", "middle", f"{usage}subjectAltName=URI:{WEB}\n")
        new = tmp_path / "new"
        new.write_bytes((tmp_path / "web.pem").read_bytes() + (tmp_path / "middle.pem").read_bytes())
        new.rename(files["web"].certificate)
        wait_until(lambda: far.metrics()['l4mesh_identity_loads_total{identity="web"}'] > loads, "the new certificate is in use")
        ping(far, 2)


def test_the_ca_that_can_not_begin_says_why(authority: Authority, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "l4mesh", "ca", "serve", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert done.returncode == 1, done
        return done.stderr

    assert "is no CA: make one with: l4mesh ca init" in run(str(tmp_path / "nowhere"))
    folder = str(authority.bundle_path.parent)
    assert "--bind must be an IP address with a port" in run(folder, "--bind", "localhost:1")
    address = f"127.0.0.1:{closed_port()}"
    assert f"can't listen on {address}: Address already in use; --bind" in run(folder, "--bind", address)
    authority.nodes_path.write_text("nodes:\n  - identity: spiffe://other.org/node/a\n    workloads: ['spiffe://example.org*']\n")
    assert run(folder).splitlines() == [
        f"l4mesh: {authority.nodes_path}:3: nodes[0].workloads[0]: must be a SPIFFE ID such as spiffe://example.org/ns/shop/sa/web, "
        "or the beginning of one and a *; got 'spiffe://example.org*'"
    ]
