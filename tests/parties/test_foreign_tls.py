"""Foreign ends of TLS: Envoy, OpenSSL and curl against l4mesh's own; PostgreSQL's and Redis's passed through untouched."""

import contextlib
import datetime
import json
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Factory
from tests.flow.test_tls import handshakes, inbound, outbound, wait_records
from tests.parties.test_parties import need, nginx, postgresql, run, running
from tests.support.certificates import REDIS, WEB, Authority, Files, hostile
from tests.support.mesh import Config, Mesh, simple
from tests.support.peers import FIN, Server, connect, digest, echo, make_bytes, read_exactly, read_to_end
from tests.support.proxies import find_envoy, free_port
from tests.support.waiting import wait_until

OTHER = "spiffe://example.org/ns/shop/sa/other"
HOUR = datetime.timedelta(hours=1)
MB = 1 << 20


# -- Envoy ---------------------------------------------------------------------------------------------------------------


def envoy_tls(kind: str, files: Files, peer: str) -> Config:
    """One side's TLS, with the peer's SPIFFE ID pinned."""
    matcher = {"san_type": "URI", "matcher": {"exact": peer}}
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"filename": str(files.certificate)}, "private_key": {"filename": str(files.key)}}],
        "validation_context": {"trusted_ca": {"filename": str(files.bundle)}, "match_typed_subject_alt_names": [matcher]},
    }
    context: Config = {"@type": f"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}", "common_tls_context": common}
    if kind == "DownstreamTlsContext":
        context["require_client_certificate"] = True
    return {"name": "tls", "typed_config": context}


class Envoy:
    """TCP proxies in one Envoy: ``add`` them, then ``run`` it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._admin = free_port()
        self._listeners: list[Config] = []
        self._clusters: list[Config] = []

    def add(self, name: str, endpoint: int, downstream: Config | None = None, upstream: Config | None = None) -> int:
        """The port of a proxy in front of a local one."""
        port = free_port()
        proxy = {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": name, "cluster": name,
        }  # fmt: skip
        chain: Config = {"filters": [{"name": "tcp", "typed_config": proxy}]}
        cluster: Config = {"name": name, "connect_timeout": "5s", "load_assignment": {"cluster_name": name, "endpoints": [
            {"lb_endpoints": [{"endpoint": {"address": self._address(endpoint)}}]}]}}  # fmt: skip
        if downstream:
            chain["transport_socket"] = downstream
        if upstream:
            cluster["transport_socket"] = upstream
        self._listeners.append({"name": name, "stat_prefix": name, "address": self._address(port), "filter_chains": [chain]})
        self._clusters.append(cluster)
        return port

    @staticmethod
    def _address(port: int) -> Config:
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        config = {
            "admin": {"address": self._address(self._admin)},
            "static_resources": {"listeners": self._listeners, "clusters": self._clusters},
        }
        envoy = find_envoy()
        assert envoy
        command = [envoy, "--config-yaml", json.dumps(config), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]
        with running(command, self._admin, self._folder):
            wait_until(lambda: self._fetch("/ready").startswith("LIVE"), "Envoy is live", 30)
            yield

    def _fetch(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._admin}{path}", timeout=10) as answer:
                return answer.read().decode()
        except OSError:
            return ""

    def stat(self, name: str) -> int:
        lines = dict(line.split(": ", 1) for line in self._fetch("/stats").splitlines() if ": " in line)
        return int(lines.get(name, 0))


def exchange(port: int) -> None:
    """3 MB through an echo behind the port, byte for byte, with a half-close."""
    data = make_bytes(3 * MB, 11)
    with connect(port) as client:
        sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sender.start()
        got, end = read_to_end(client)
        sender.join()
    assert (digest(got), end) == (digest(data), FIN)


def gets_nothing(port: int) -> None:
    with contextlib.suppress(ConnectionResetError), connect(port) as client:
        client.sendall(b"secret")
        assert read_to_end(client)[0] == b""


@pytest.mark.peers
def test_envoy_as_the_client(mesh: Factory, ca: Authority, redis: Files, web: Files, tmp_path: Path) -> None:
    elsewhere = hostile(ca, tmp_path, "elsewhere", uris=["spiffe://else.org/ns/shop/sa/web"])
    envoy = Envoy(tmp_path)
    with Server(echo) as server:
        policy = {"name": "only-web", "action": "allow", "from": [{"identities": [WEB]}]}
        near = mesh(inbound(redis, server.address, policies=[policy]))
        files = {"good": web, "doubts": web, "elsewhere": elsewhere, "denied": ca.files(tmp_path, "other", OTHER)}
        ports = {
            name: envoy.add(name, near.port(), upstream=envoy_tls("UpstreamTlsContext", own, OTHER if name == "doubts" else REDIS))
            for name, own in files.items()
        }
        with envoy.run():
            exchange(ports["good"])
            line = wait_records(near, 1)[0]
            assert (line["downstream_identity"], line["downstream_tls"], line["reason"]) == (WEB, "1.3", "downstream_closed")
            # Envoy expects somebody else: it refuses, and tells us.
            gets_nothing(ports["doubts"])
            line = wait_records(near, 2)[1]
            assert (line["reason"], line["tls_error"]) == ("downstream_tls", "peer_alert")
            assert envoy.stat("cluster.doubts.ssl.fail_verify_san") == 1
            # Envoy is somebody else: we refuse, by its trust domain and by the policy.
            gets_nothing(ports["elsewhere"])
            assert wait_records(near, 3)[2]["tls_error"] == "wrong_identity"
            gets_nothing(ports["denied"])
            line = wait_records(near, 4)[3]
            assert (line["reason"], line["downstream_identity"]) == ("denied", OTHER)
            assert envoy.stat("cluster.elsewhere.ssl.fail_verify_san") == envoy.stat("cluster.denied.ssl.fail_verify_san") == 0
        assert server.accepted == 1


@pytest.mark.peers
def test_envoy_as_the_server(mesh: Factory, ca: Authority, redis: Files, web: Files, tmp_path: Path) -> None:
    envoy = Envoy(tmp_path)
    with Server(echo) as server:
        others = {"good": (redis, WEB), "doubts": (redis, OTHER), "impostor": (ca.files(tmp_path, "other", OTHER), WEB)}
        ports = {
            name: envoy.add(name, server.port, downstream=envoy_tls("DownstreamTlsContext", own, peer))
            for name, (own, peer) in others.items()
        }
        config = outbound(web, "", workers=1)
        config["clusters"] = [
            {"name": name, "endpoints": [f"127.0.0.1:{port}"], "tls": {"peers": [REDIS]}, "connect": {"attempts": 1}}
            for name, port in ports.items()
        ]
        config["listeners"] = [{"name": name, "bind": "127.0.0.1:0", "cluster": name} for name in ports]
        with envoy.run():
            far = mesh(config)
            exchange(far.port("good"))
            exchange(far.port("good"))
            lines = wait_records(far, 2)
            assert [(line["upstream_identity"], line["upstream_tls"]) for line in lines] == [(REDIS, "1.3"), (REDIS, "1.3 resumed")]
            # Envoy expects somebody else: TLS 1.3 tells us after our handshake.
            gets_nothing(far.port("doubts"))
            line = wait_records(far, 3)[2]
            assert (line["reason"], line["tls_error"]) == ("upstream_tls", "peer_alert")
            assert envoy.stat("listener.doubts.ssl.fail_verify_san") == 1
            # Envoy is somebody else.
            gets_nothing(far.port("impostor"))
            line = wait_records(far, 4)[3]
            assert (line["reason"], line["tls_error"]) == ("upstream_tls", "wrong_identity")


# -- openssl -------------------------------------------------------------------------------------------------------------


def s_client(m: Mesh, files: Files | None, *options: str, data: bytes = b"") -> tuple[int, bytes, str]:
    """Sends and reads to the end. Exit status, output, and what it says on standard error."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{m.port()}", "-ign_eof", *options]
    if files:
        command += ["-cert", str(files.certificate), "-cert_chain", str(files.certificate), "-key", str(files.key)]
        command += ["-CAfile", str(files.bundle), "-verify_return_error"]
    done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


def test_openssl_as_the_client(mesh: Factory, web: Files, redis: Files, tmp_path: Path) -> None:
    need("openssl")
    up, down = make_bytes(2 * MB, 3), make_bytes(MB, 4)
    seen: list[str] = []

    def serve(peer: socket.socket) -> None:
        seen.append(digest(read_exactly(peer, len(up))))
        peer.sendall(down)

    with Server(serve) as server:
        m = mesh(inbound(redis, server.address, workers=1))
        status, out, said = s_client(m, web, "-quiet", data=up)
        assert (status, digest(out)) == (0, digest(down)), said
        assert seen == [digest(up)]
        session = tmp_path / "session.pem"
        for option, word in (("-sess_out", b"New, TLSv1.3"), ("-sess_in", b"Reused, TLSv1.3"), ("-sess_in", b"Reused, TLSv1.3")):
            status, out, said = s_client(m, web, option, str(session), data=up)
            assert status == 0, said
            assert word in out
            assert down in out
            assert b"Verify return code: 0 (ok)" in out
        assert handshakes(m, "downstream") == (2, 2)
        accepted = server.accepted
        # Without a certificate, and with a version that is too old.
        for files, option, error, told in (
            (None, "-tls1_3", "no_certificate", "certificate required"),
            (web, "-tls1_2", "protocol_version", "protocol version"),
        ):
            status, out, said = s_client(m, files, option)
            assert told in said
            assert wait_records(m, len(seen) + 1)[-1]["tls_error"] == error
            seen.append("refused")
        assert server.accepted == accepted
        older = mesh(inbound(redis, server.address, {"min_version": "1.2"}))
        status, out, said = s_client(older, web, "-tls1_2", data=up)
        assert status == 0, said
        assert down in out
        assert wait_records(older, 1)[0]["downstream_tls"] == "1.2"


@contextlib.contextmanager
def s_server(folder: Path, files: Files, *options: str) -> Iterator[int]:
    """Turns each line around and sends it back."""
    need("openssl")
    port = free_port()
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-rev", "-Verify", "4", "-verify_return_error"]
    command += ["-cert", str(files.certificate), "-cert_chain", str(files.certificate), "-key", str(files.key)]
    folder.mkdir()
    with running([*command, *options], port, folder):
        yield port


def test_openssl_as_the_server(mesh: Factory, ca: Authority, web: Files, redis: Files, tmp_path: Path) -> None:
    elsewhere = Authority.new(tmp_path / "elsewhere")
    line = make_bytes(6000, 5).hex().encode()

    def turn(m: Mesh) -> None:
        with connect(m.port()) as client:
            client.sendall(line + b"\n")
            assert read_exactly(client, len(line) + 1) == line[::-1] + b"\n"

    with s_server(tmp_path / "good", redis, "-CAfile", str(redis.bundle)) as port:
        far = mesh(outbound(web, f"127.0.0.1:{port}", workers=1))
        for _ in range(3):
            turn(far)
        assert wait_records(far, 3)[2]["upstream_identity"] == REDIS
        assert handshakes(far, "upstream") == (1, 2)
    with s_server(tmp_path / "old", redis, "-CAfile", str(redis.bundle), "-tls1_2") as port:
        far = mesh(outbound(web, f"127.0.0.1:{port}"))
        gets_nothing(far.port())
        assert wait_records(far, 1)[0]["tls_alert"] == "protocol_version"
        turn(mesh(outbound(web, f"127.0.0.1:{port}", {"min_version": "1.2"})))
    # The right party refuses, and the log says why.
    with s_server(tmp_path / "impostor", ca.files(tmp_path, "other", OTHER), "-CAfile", str(redis.bundle)) as port:
        far = mesh(outbound(web, f"127.0.0.1:{port}"))
        gets_nothing(far.port())
        assert wait_records(far, 1)[0]["tls_error"] == "wrong_identity"
    with s_server(tmp_path / "doubts", redis, "-CAfile", str(elsewhere.bundle_path)) as port:
        far = mesh(outbound(web, f"127.0.0.1:{port}"))
        gets_nothing(far.port())
        shown = wait_records(far, 1)[0]
        assert (shown["reason"], shown["tls_error"], shown["tls_alert"]) == ("upstream_tls", "peer_alert", "unknown_ca")


# -- curl ------------------------------------------------------------------------------------------------------------------


def test_curl_with_a_client_certificate_to_nginx(mesh: Factory, ca: Authority, web: Files, tmp_path: Path) -> None:
    need("nginx", "curl")
    data = make_bytes(20_000_000, 6)
    site = hostile(ca, tmp_path, "site", uris=[REDIS], dns=["web.example.org"])
    (tmp_path / "big.bin").write_bytes(data)
    with nginx(tmp_path) as port:
        m = mesh(inbound(site, f"127.0.0.1:{port}"))
        url = f"https://web.example.org:{m.port()}/big.bin"
        curl = ["curl", "-sS", "--resolve", f"web.example.org:{m.port()}:127.0.0.1", "--cacert", str(site.bundle)]
        ours = ["--cert", str(web.certificate), "--key", str(web.key)]
        assert digest(run(*curl, *ours, url)) == digest(data)
        # Several over one connection, and one that curl has to resume.
        ranges = run(*curl, *ours, "-r", "0-99", url, "--next", "-sS", *curl[2:], *ours, "-r", "100-199", url)
        assert ranges == data[:200]
        refused = subprocess.run([*curl, url], capture_output=True, check=False, timeout=60)
        assert refused.returncode
        assert refused.stdout == b""
        assert b"certificate required" in refused.stderr
        lines = wait_records(m, 3)
        assert [line.get("downstream_identity") for line in lines] == [WEB, WEB, None]
        assert lines[2]["tls_error"] == "no_certificate"


# -- their own TLS, passed through -----------------------------------------------------------------------------------------


def test_postgresql_keeps_its_own_tls(mesh: Factory, ca: Authority, tmp_path: Path) -> None:
    """It asks for TLS in its own protocol, after the first bytes: to us it is a stream like any other."""
    files = hostile(ca, tmp_path, "db", uris=[REDIS], dns=["db.example.org"])
    with postgresql(files) as (tools, port):
        m = mesh(simple(f"127.0.0.1:{port}") | {"access_log": {"when": "always"}})
        where = f"host=db.example.org hostaddr=127.0.0.1 port={m.port()} user=mesh dbname=postgres sslmode=verify-full"
        psql = [str(tools / "psql"), f"{where} sslrootcert={files.bundle}", "-At", "-c"]
        assert run(*psql, "SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()") == b"t|TLSv1.3\n"
        text = run(*psql, "SELECT string_agg(md5(i::text), '') FROM generate_series(1, 100000) i").strip()
        shown = run(*psql, "SELECT md5(string_agg(md5(i::text), '')) FROM generate_series(1, 100000) i").strip()
        assert len(text) == 3_200_000
        assert run("md5sum", stdin=text).split()[0] == shown
        stranger = Authority.new(tmp_path / "stranger").bundle_path
        done = subprocess.run(
            [str(tools / "psql"), f"{where} sslrootcert={stranger}", "-c", "SELECT 1"], capture_output=True, check=False, timeout=60
        )
        assert b"certificate verify failed" in done.stderr
        assert all("downstream_tls" not in line for line in wait_records(m, 4))


def test_redis_keeps_its_own_tls_and_is_found_by_its_name(mesh: Factory, ca: Authority, web: Files, tmp_path: Path) -> None:
    need("redis-server", "redis-cli", "openssl")
    files = hostile(ca, tmp_path, "kv", uris=[REDIS], dns=["redis.example.org"])
    port = free_port()
    server = ["redis-server", "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    server += ["--tls-cert-file", str(files.certificate), "--tls-key-file", str(files.key), "--tls-ca-cert-file", str(files.bundle)]
    with Server(echo) as elsewhere, running(server, port, tmp_path):
        config: dict[str, Any] = {
            "access_log": {"when": "always"},
            "listeners": [
                {
                    "name": "web", "bind": "127.0.0.1:0", "default": "rest",
                    "routes": [{"match": {"sni": ["redis.example.org"]}, "cluster": "redis"}],
                }
            ],
            "clusters": [
                {"name": "redis", "endpoints": [f"127.0.0.1:{port}"]}, {"name": "rest", "endpoints": [elsewhere.address]},
            ],
        }  # fmt: skip
        m = mesh(config)
        ours = ["--cert", str(web.certificate), "--key", str(web.key), "--cacert", str(web.bundle)]
        cli = ["redis-cli", "-h", "127.0.0.1", "-p", str(m.port()), "--tls", *ours, "--sni", "redis.example.org"]
        value = make_bytes(10_000_000, 8)
        assert run(*cli, "-x", "SET", "big", stdin=value) == b"OK\n"
        assert run(*cli, "--raw", "GET", "big") == value + b"\n"
        status, out, said = s_client(m, web, "-servername", "redis.example.org", "-quiet", data=b"PING\r\nQUIT\r\n")
        assert (status, out) == (0, b"+PONG\r\n+OK\r\n"), said
        assert elsewhere.accepted == 0
        # Another name, and none, go elsewhere, and what is there speaks no TLS.
        for sni in (["-servername", "web.example.org"], ["-noservername"]):
            assert s_client(m, web, *sni)[0] != 0
        assert elsewhere.accepted == 2
        lines = wait_records(m, 5)
        assert [line["cluster"] for line in lines] == ["redis"] * 3 + ["rest"] * 2
        assert all("downstream_tls" not in line for line in lines)
