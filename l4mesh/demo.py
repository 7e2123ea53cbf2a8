"""The main job on something real: unmodified clients dial a service address that no host has; l4mesh captures, balances, forwards
and accounts for them, while a server dies and comes back.

What it prints it has measured; what should have happened and didn't makes it fail.
"""

from __future__ import annotations

import collections
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from l4mesh.errors import CommandError
from l4mesh.lab import Host, Interrupted, Lab, build_cluster, ensure_privileged, raise_interrupted
from l4mesh.runtime.tables import make_table, reason_table, show_bytes, show_ms

WEB = "10.96.0.10"
CACHE = "10.96.0.20"
DEADLINE_S = 10.0

CONFIG = """\
node: {{name: demo}}
admin: {{bind: "unix:{folder}/admin.sock"}}
access_log: {{path: "{folder}/access.log", when: always}}
listeners:
  - name: outbound
    bind: "0.0.0.0:15001"
    capture: redirect
    routes:
      - {{match: {{destinations: [{web}], ports: [80]}}, cluster: web}}
      - {{match: {{destinations: [{cache}], ports: [6379]}}, cluster: cache}}
    default: original_destination
clusters:
  - {{name: web, endpoints: ["10.244.1.11:80", "10.244.1.12:80", "10.244.1.13:80"], balance: round_robin, connect: {{timeout: 300ms}}}}
  - {{name: cache, endpoints: ["10.244.1.11:6379", "10.244.1.12:6379", "10.244.1.13:6379"], connect: {{timeout: 300ms}}}}
"""

SERVER = """\
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = sys.argv[1].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 80), Handler).serve_forever()
"""

TRAFFIC = f"""\
i=0; while [ $i -lt 400 ]; do
  curl -s -o /dev/null -m 5 -w '%{{http_code}} %{{time_total}}\\n' http://{WEB}/ || true
  i=$((i+1))
done
"""


def run_demo() -> int:
    """Runs the demo. Returns 0 when everything that it shows happened. Raises CommandError."""
    ensure_privileged()
    for tool, package in (("curl", "curl"), ("redis-server", "redis-server"), ("redis-cli", "redis-tools")):
        if not shutil.which(tool):
            raise CommandError(f"the demo needs {tool}: install the package {package}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, raise_interrupted)
    console = Console(highlight=False, width=100)
    try:
        with tempfile.TemporaryDirectory(prefix="l4mesh-demo-") as folder, Lab() as lab:
            return Demo(console, lab, Path(folder)).run()
    except Interrupted as signal_name:
        console.print(f"stopped by {signal_name}: everything that was made is removed")
        return 130


class Demo:
    def __init__(self, console: Console, lab: Lab, folder: Path) -> None:
        self._console = console
        self._lab = lab
        self._folder = folder
        self._failures: list[str] = []

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            self._failures.append(what)
            self._console.print(f"  NOT AS IT SHOULD BE: {what}")

    def run(self) -> int:
        started = time.monotonic()
        self._say("1. Five network namespaces: a client, a node that is its gateway, three servers behind the node.")
        cluster = build_cluster(self._lab, nodes=1, pods=3)
        client, node, servers = cluster.outside, cluster.nodes[0].host, cluster.nodes[0].pods
        for server in servers:
            _start_server(server)
        self._start_node(node)
        self._say(f"2. On the node: iptables rules applied, l4mesh running. No host has the addresses {WEB} and {CACHE}.")
        _wait_until(lambda: all(_is_serving(server) for server in servers), "the servers answer")
        self._show_balancing(client)
        self._show_failure(client, servers[1])
        self._show_account()
        self._stop_node(node)
        took = time.monotonic() - started
        if self._failures:
            self._say(f"Failed after {took:.0f} s: {'; '.join(self._failures)}")
            return 1
        self._say(f"Done in {took:.0f} s; the namespaces, rules and processes are removed.")
        return 0

    def _start_node(self, node: Host) -> None:
        config = self._folder / "l4mesh.yaml"
        config.write_text(CONFIG.format(folder=self._folder, web=WEB, cache=CACHE))
        node.run(sys.executable, "-m", "l4mesh", "redirect", "apply", "-c", str(config))
        with (self._folder / "events.log").open("wb") as events:
            self._process = node.start(sys.executable, "-m", "l4mesh", "run", "-c", str(config), stderr=events)
        _wait_until(self._is_ready, "l4mesh is ready")

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise CommandError(f"l4mesh ended: {(self._folder / 'events.log').read_text().strip()}")
        return bool(self._ask("/ready").get("ready"))

    def _ask(self, path: str) -> dict[str, Any]:
        socket = str(self._folder / "admin.sock")
        url = urllib.parse.urljoin("http://l4mesh", path)
        done = subprocess.run(["curl", "-s", "-m", "5", "--unix-socket", socket, url], capture_output=True, check=False)
        answer: dict[str, Any] = json.loads(done.stdout or b"{}")
        return answer

    def _show_balancing(self, client: Host) -> None:
        answers = collections.Counter(client.run("curl", "-s", "-m", "5", f"http://{WEB}/") for _ in range(30))
        shown = ", ".join(f"{name} {count}" for name, count in sorted(answers.items()))
        self._say(f"3. The client runs `curl http://{WEB}/` 30 times. Answered by: {shown}.")
        self._expect(len(answers) == 3 and sum(answers.values()) == 30, "all three servers answer curl")
        pongs = [client.run("redis-cli", "-h", CACHE, "PING").strip() for _ in range(6)]
        bench = client.run("redis-benchmark", "-h", CACHE, "-n", "3000", "-c", "30", "-t", "set,get", "-q")
        rates = " ".join(part.strip() for part in bench.replace("\r", "\n").splitlines() if "requests per second" in part)
        self._say(f"   redis-cli to {CACHE}: {pongs.count('PONG')} of 6 PONG. redis-benchmark: {rates}")
        self._expect(pongs == ["PONG"] * 6, "Redis answers through the service address")

    def _show_failure(self, client: Host, victim: Host) -> None:
        traffic = client.start("sh", "-c", TRAFFIC, stdout=subprocess.PIPE)
        output = traffic.stdout
        assert output is not None
        lines = [output.readline() for _ in range(60)]
        victim.kill()
        self._say(f"4. While curl goes on, every process of {victim.name} is killed (kill -9).")
        lines += [output.readline() for _ in range(120)]
        _start_server(victim)
        _wait_until(lambda: _is_serving(victim), f"{victim.name} is back")
        self._say(f"   {victim.name} is started again.")
        lines += output.readlines()
        traffic.wait()
        codes = collections.Counter(line.split()[0].decode() for line in lines if line.strip())
        slowest_ms = max(float(line.split()[1]) for line in lines if line.strip()) * 1000
        failed = sum(count for code, count in codes.items() if code != "200")
        self._say(
            f"   {sum(codes.values())} requests: {codes['200']} succeeded, {failed} failed; the slowest took {show_ms(slowest_ms)}."
        )
        self._expect(codes["200"] >= 390, "requests go on when a server dies")

    def _show_account(self) -> None:
        _wait_until(lambda: all(c["active"] == 0 for c in self._ask("/clusters")["clusters"]), "all connections have ended")
        clusters = self._ask("/clusters")["clusters"]
        closed = self._ask("/status")["closed"]
        table = make_table(
            "What went where", "cluster", "endpoint", ">connections", ">failed dials", ">sent", ">received", ">mean connect"
        )
        for cluster in clusters:
            for endpoint in cluster["endpoints"]:
                table.add_row(
                    cluster["name"], endpoint["address"], str(endpoint["opened"]), str(endpoint["connect_failures"]),
                    show_bytes(endpoint["bytes_to_upstream"]), show_bytes(endpoint["bytes_to_downstream"]),
                    show_ms(cluster["connect_ms_mean"]),
                )  # fmt: skip
                self._expect(endpoint["opened"] > 0, f"{endpoint['address']} got connections")
        self._console.print(table)
        self._console.print(reason_table(closed))
        web = next(cluster for cluster in clusters if cluster["name"] == "web")
        self._expect(web["connect_failures"] > 0, "the dead server was noticed")
        lines = (self._folder / "access.log").read_text().splitlines()
        self._say(f"5. The access log has {len(lines)} lines, one a connection. The last:")
        self._console.print(f"   {lines[-1]}", soft_wrap=True, markup=False)

    def _stop_node(self, node: Host) -> None:
        self._process.terminate()
        self._expect(self._process.wait() == 0, "l4mesh stops cleanly")
        node.run(sys.executable, "-m", "l4mesh", "redirect", "remove")


def _start_server(server: Host) -> None:
    server.start(sys.executable, "-c", SERVER, server.name)
    server.start("redis-server", "--save", "", "--protected-mode", "no", "--bind", "0.0.0.0", "--dir", "/")


def _is_serving(server: Host) -> bool:
    probe = "import socket; [socket.create_connection(('127.0.0.1', port), 1).close() for port in (80, 6379)]"
    return subprocess.run(server.command(sys.executable, "-c", probe), capture_output=True, check=False).returncode == 0


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise CommandError(f"waited {DEADLINE_S:.0f} s in vain until {what}")
        time.sleep(0.05)
