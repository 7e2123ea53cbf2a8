"""What the load ends at: the echo server, and the servers of the real loads. All bound to every loopback address."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from bench.generator import ROOT, build
from bench.process import Place, Ports, Process

HTTP_BODY = "x" * 64
ECHO_IDLE = "echo-idle"
"""An echo server that runs when the load, with which it shares a CPU, has nothing to do."""
NGINX = """user root;
daemon off;
worker_processes 1;
pid {folder}/http.pid;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  server {{
    listen {port} reuseport;
    keepalive_requests 1000000000;
    location / {{ default_type text/plain; return 200 "{body}"; }}
  }}
}}
"""


class Backends:
    """Starts each server when its port is first asked for, in one place; stops them all."""

    def __init__(self, place: Place, ports: Ports, folder: Path) -> None:
        self._place = place
        self._ports = ports
        self._folder = folder
        self._running: dict[str, tuple[Process, int]] = {}

    def port(self, name: str) -> int:
        """Port of ``echo``, ``echo-idle``, ``http``, ``redis``, ``iperf3`` or ``iperf3-everywhere`` (not pinned)."""
        if name not in self._running:
            port = self._ports.take()
            place = Place((), self._place.netns) if name == "iperf3-everywhere" else self._place
            process = Process(name, place, self._command(name, port), self._folder / f"{name}.log", ROOT)
            self._running[name] = process, port
            process.wait_until_listening([port])
        return self._running[name][1]

    def _command(self, name: str, port: int) -> list[str]:
        match name:
            case "echo":
                return [sys.executable, "-m", "bench.backends", str(port)]
            case name if name == ECHO_IDLE:
                return ["chrt", "--idle", "0", *self._command("echo", port)]
            case "http":
                config = self._folder / "http.conf"
                config.write_text(NGINX.format(folder=self._folder, port=port, body=HTTP_BODY))
                return ["nginx", "-p", str(self._folder), "-e", "stderr", "-c", str(config)]
            case "redis":
                options = {"--port": port, "--bind": "0.0.0.0", "--protected-mode": "no", "--save": "", "--appendonly": "no"}
                return ["redis-server", *(str(word) for option in options.items() for word in option)]
            case _:
                return ["iperf3", "-s", "-p", str(port)]

    def stop(self) -> None:
        for process, _ in self._running.values():
            process.stop()
        self._running.clear()


def listen(host: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind((host, port))
    listener.listen(4096)
    listener.setblocking(False)
    return listener


def serve_echo(listener: socket.socket) -> None:
    """Never returns."""
    build().serve_echo(listener.fileno())


if __name__ == "__main__":
    serve_echo(listen("0.0.0.0", int(sys.argv[1])))
