"""The main job on something real: two nodes whose pods speak plaintext and dial addresses that no host has, while between the nodes
it is mutual TLS, a policy decides, a server dies and comes back, l4mesh is upgraded, a certificate renewed and the policy changed.

What it prints it has measured; what should have happened and didn't makes it fail.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import datetime
import http.client
import json
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from rich.console import Console

from l4mesh.errors import CommandError
from l4mesh.identity.ca import CertificateAuthority, write_identity
from l4mesh.lab import STOPS, Host, Interrupted, Lab, Node, build_cluster, ensure_privileged, raise_interrupted
from l4mesh.netns import run_in_namespace
from l4mesh.runtime.tables import make_table, show_bytes, show_ms
from l4mesh.tap import Tap, is_tls13

CATALOG, REDIS, REDIS_V6 = "10.96.0.10", "10.96.0.20", "fd00:10:96::20"
PODS = (("web", "batch", "catalog-1"), ("redis", "catalog-2", "catalog-3"))
SECRET = "4111-1111-1111-1111"
DEADLINE_S = 10.0
TRUST_DOMAIN = "shop.example"
PR_SET_CHILD_SUBREAPER = 36

NODE = """\
node: {{name: {node}}}
admin: {{bind: "unix:{folder}/admin.sock"}}
upgrade: {{socket: "{folder}/upgrade.sock"}}
access_log: {{path: "{folder}/access.log", when: always}}
identities:
{identities}
workloads:
{workloads}
listeners:
  - name: outbound                      # what this node's pods send
    bind: ["0.0.0.0:15001", "[::]:15001"]
    capture: redirect
    include: {{sources: {networks}}}
    routes:
      - {{match: {{destinations: ["{catalog}"], ports: [80]}}, cluster: catalog}}
      - {{match: {{destinations: ["{redis}"], ports: [6379]}}, cluster: redis}}
      - {{match: {{destinations: ["{redis_v6}"], ports: [6379]}}, cluster: redis-v6}}
    default: original_destination
  - name: inbound                       # what others send to them
    bind: ["0.0.0.0:15006", "[::]:15006"]
    capture: tproxy
    include: {{destinations: {networks}}}
    tls: {{mode: strict}}
    default: original_destination
clusters:
  - name: catalog
    endpoints: ["10.244.1.13:80", "10.244.2.12:80", "10.244.2.13:80"]
    balance: round_robin
    outlier_detection: {{consecutive_failures: 3, base_ejection: 2s}}
    slow_start: 1s
    tls: {{peers: ["spiffe://{domain}/ns/shop/sa/catalog"]}}
  - {{name: redis, endpoints: ["10.244.2.11:6379"], tls: &redis {{peers: ["spiffe://{domain}/ns/shop/sa/redis"]}}}}
  - {{name: redis-v6, endpoints: ["[fd00:10:244:2::11]:6379"], tls: *redis}}
"""
IDENTITY = "  - {{name: {name}, certificate: tls/{name}.pem, private_key: tls/{name}.key, trust_bundle: {bundle}}}"
WORKLOAD = '  - {{name: {name}, namespace: shop, addresses: [{v4}, "{v6}"], identity: {service}, labels: {{app: {service}}}}}'
POLICY = 'policies: [{{name: redis-for-{who}, action: allow, workloads: {{app: redis}}, from: [{{identities: ["{identity}"]}}]}}]\n'

SERVER = """\
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = ("%s:%d" % self.client_address if self.path == "/client" else sys.argv[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 80), Handler).serve_forever()
"""


def run_demo() -> int:
    """Runs the demo. Returns 0 when everything that it shows happened. Raises CommandError."""
    ensure_privileged()
    for tool, package in (("curl", "curl"), ("redis-server", "redis-server"), ("redis-cli", "redis-tools")):
        if not shutil.which(tool):
            raise CommandError(f"the demo needs {tool}: install the package {package}")
    for number in STOPS:
        signal.signal(number, raise_interrupted)
    # What an upgrade has started outlives its parent: then it is a child of this process.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    console = Console(highlight=False, markup=False, width=116)
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
        self._meshes: list[Mesh] = []
        self._pods: dict[str, Host] = {}
        self._steps = 0

    def run(self) -> int:
        started = time.monotonic()
        for step in (
            self._build,
            self._start,
            self._show_the_wire,
            self._show_identities,
            self._show_refusal,
            self._show_balancing,
            self._show_failure,
            self._show_upgrade,
            self._show_rotation,
            self._show_policy_change,
            self._show_account,
            self._stop,
        ):
            step()
        took_s = time.monotonic() - started
        if self._failures:
            self._say(f"Failed after {took_s:.0f} s: {'; '.join(self._failures)}")
            return 1
        self._say(f"Done in {took_s:.0f} s. The namespaces, rules, processes and files of the demo are gone.")
        return 0

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self._step("Two nodes on one wire, with pods in network namespaces. They speak plaintext and know nothing of l4mesh.")
        cluster = build_cluster(self._lab, pods=len(PODS[0]))
        self._wire = cluster.wire
        for node, names in zip(cluster.nodes, PODS, strict=True):
            self._pods |= dict(zip(names, node.pods, strict=True))
            shown = ", ".join(f"{name} {pod.v4}" for name, pod in zip(names, node.pods, strict=True))
            self._say(f"    {node.host.name} {node.host.v4}: {shown}")
        self._nodes = cluster.nodes
        for name, pod in self._pods.items():
            _start_server(name, pod)
        _wait_until(lambda: all(map(_is_serving, self._pods, self._pods.values())), "the servers answer")

    def _start(self) -> None:
        self._authority = CertificateAuthority.create(self._folder / "ca", TRUST_DOMAIN)
        for node, names in zip(self._nodes, PODS, strict=True):
            folder = self._folder / node.host.name
            folder.mkdir()
            for service in {_service(name) for name in names}:
                self._issue(folder, service)
            (folder / "node.yaml").write_text(self._node_config(node, names, folder))
            (folder / "policies.yaml").write_text(POLICY.format(who="web", identity=_spiffe_id("web")))
            self._meshes.append(Mesh(node.host, folder))
        for mesh in self._meshes:
            _wait_until(mesh.is_ready, f"l4mesh is ready on {mesh.host.name}")
        self._step("A CA has issued a certificate to each service. On each node the rules are in place and l4mesh runs.")
        self._say(f"    Services have addresses that no host has: catalog {CATALOG} with three endpoints, redis {REDIS} with one.")

    def _show_the_wire(self) -> None:
        web, redis = self._pods["web"], self._pods["redis"]
        places = {"at web": (web, "eth0"), "between the nodes": (self._wire, "node-2"), "at redis": (redis, "eth0")}
        taps = {place: Tap(host.path, device) for place, (host, device) in places.items()}
        answer = web.run("redis-cli", "-h", REDIS, "SET", "card", SECRET).strip()
        self._step(f"web runs `redis-cli -h {REDIS} SET card {SECRET}`: {answer}. A capture of the packets meanwhile:")
        for place, tap in taps.items():
            with tap:
                streams = tap.streams()
            readable = any(SECRET.encode() in stream for stream in streams.values())
            tls = any(is_tls13(stream, streams.get(ends[::-1], b"")) for ends, stream in streams.items())
            kind = "TLS 1.3" if tls else "plaintext"
            size = show_bytes(sum(map(len, streams.values())))
            self._say(f"    {place + ':':18} {size:>7} of {kind}; the number can{'' if readable else 'not'} be read")
            self._expect(len(streams) == 2, f"one connection {place}")
            self._expect((tls, readable) == ((True, False) if place == "between the nodes" else (False, True)), f"what is read {place}")
        self._expect(answer == "OK", "Redis takes the value")
        back = web.run("redis-cli", "-h", REDIS_V6, "GET", "card").strip()
        self._say(f"    By IPv6, `redis-cli -h {REDIS_V6} GET card` gives it back: {back}.")
        self._expect(back == SECRET, "Redis gives the value back")

    def _show_identities(self) -> None:
        self._session = Session(self._pods["web"], REDIS)
        self._expect(self._session.ask("PING") == "PONG", "Redis answers")
        self._step("web keeps a connection to redis open. `/connections` on both nodes tells who speaks with whom:")
        for mesh, side, peer in zip(self._meshes, ("upstream", "downstream"), ("redis", "web"), strict=True):
            (live,) = mesh.ask("/connections")["connections"]
            identity, tls = live[f"{side}_identity"], live[f"{side}_tls"]
            self._say(f"    {mesh.host.name}: {live['source']} → {live['endpoint']}, TLS {tls} with {identity}")
            self._expect((identity, tls) == (_spiffe_id(peer), "1.3"), f"{mesh.host.name} knows {peer}")

    def _show_refusal(self) -> None:
        before = self._redis_connections()
        said = _first_line(self._pods["batch"], "redis-cli", "-h", REDIS, "PING")
        self._step(f"A policy lets only web use redis. batch runs `redis-cli -h {REDIS} PING`: {said}")
        _wait_until(lambda: self._meshes[1].last_record("denied"), "the refusal is logged")
        who = self._meshes[1].last_record("denied").get("downstream_identity")
        reached = self._redis_connections() - before - 1
        self._say(f"    node-2 logs that it denied {who}. Connections that redis has seen of it: {reached}.")
        self._expect(said != "PONG" and who == _spiffe_id("batch"), "batch is refused as batch")
        self._expect(reached == 0, "a refusal costs no connection")
        plain = _first_line(self._lab.host("outside"), "redis-cli", "-h", self._pods["redis"].v4, "PING")
        _wait_until(lambda: self._meshes[1].last_record("downstream_tls"), "the plaintext is logged")
        cause = self._meshes[1].last_record("downstream_tls").get("tls_error")
        self._say(f"    An outsider dials the redis pod itself, in plaintext: {plain} (node-2 logs {cause})")
        self._expect(plain != "PONG" and cause == "not_tls", "plaintext is refused")

    def _show_balancing(self) -> None:
        web = self._pods["web"]
        answers = collections.Counter(web.run("curl", "-s", "-m", "5", f"http://{CATALOG}/") for _ in range(30))
        shown = ", ".join(f"{name} {count}" for name, count in sorted(answers.items()))
        self._step(f"web runs `curl http://{CATALOG}/` 30 times. catalog-1 is on its own node, the others are not.")
        self._say(f"    Answers from {shown}.")
        self._expect(len(answers) == 3 and sum(answers.values()) == 30, "all three servers answer curl")

    def _show_failure(self) -> None:
        victim, mesh = self._pods["catalog-1"], self._meshes[0]
        traffic = Traffic(self._pods["web"], self._folder / "stop-failure")
        traffic.wait(60)
        killed_s = time.time()
        victim.kill()
        _wait_until(lambda: mesh.last_event("endpoint_ejected"), "catalog-1 is ejected")
        ejected = mesh.last_event("endpoint_ejected")
        self._step("While curl goes on in web, catalog-1 is killed (kill -9), and started again as soon as node-1 has ejected it.")
        after_ms = (_unix_s(ejected) - killed_s) * 1000
        self._say(f"    After {after_ms:.0f} ms it logs: {ejected['endpoint']} ejected for {ejected['for_s']} s, {ejected['why']}.")
        first = last = self._catalog_1()
        since, passed_by = traffic.count, 0
        _start_server("catalog-1", victim)
        _wait_until(lambda: _is_serving("catalog-1", victim), "catalog-1 is back")
        while (now := self._catalog_1())["out"]:
            last, passed_by = now, traffic.count - since
            time.sleep(0.05)
        returned = mesh.last_event("endpoint_returned")
        early = traffic.wait(30)["catalog-1"]
        _wait_until(lambda: not self._catalog_1()["warming"], "slow start is over")
        late = traffic.wait(30)["catalog-1"]
        causes = [out["cause"] for out in first["out"]]
        dials = sum(last[name] - first[name] for name in ("opened", "connect_failures"))
        self._say(
            f"    `/clusters` says {', '.join(causes)} meanwhile: {passed_by} requests went by, {dials} of them were tried there."
        )
        self._say(
            f"    After {returned.get('after_s')} s it is back by itself: it answers {early} of the first 30 requests, "
            f"{late} of 30 when slow start is over."
        )
        self._say(f"    {traffic.stop()}{' It is the one that catalog-1 was answering.' if traffic.failed == 1 else ''}")
        self._expect(causes == ["ejected"] and dials == 0, "nothing is sent to an endpoint that is ejected")
        self._expect(returned.get("endpoint") == ejected["endpoint"], "what was ejected returns")
        self._expect(late >= 7, "what has returned gets its share again")
        self._expect(traffic.failed <= 1, "requests go on when a server on the same node dies")

    def _show_upgrade(self) -> None:
        mesh = self._meshes[0]
        traffic = Traffic(self._pods["web"], self._folder / "stop-upgrade")
        kept = self._keep_alive("catalog-1")
        seen, client = _get(kept, "/client"), self._session.ask("CLIENT ID")
        traffic.wait(30)
        started = time.monotonic()
        said = mesh.upgrade()
        took_s = time.monotonic() - started
        traffic.wait(30)
        live = [(row["source"], row["endpoint"]) for row in mesh.ask("/connections")["connections"]]
        seen_now, client_now = _get(kept, "/client"), self._session.ask("CLIENT ID")
        source, catalog_1 = "{}:{}".format(*kept.sock.getsockname()), f"{self._pods['catalog-1'].v4}:80"
        kept.close()
        old = mesh.process
        self._step(f"While curl goes on in web, `l4mesh upgrade` replaces the process of node-1. It takes {took_s:.1f} s, and says:")
        self._say(f"    {said}")
        self._say(f"    Plaintext goes over: catalog-1 sees web's connection from {seen} before and {seen_now} now.")
        self._say(
            f"    TLS does not: process {old.pid} keeps the connection of step 4, redis client {client} before and {client_now} now."
        )
        self._say(f"    {traffic.stop()}")
        self._expect((source, catalog_1) in live, "the new process has the plaintext connection")
        redis = f"{self._pods['redis'].v4}:6379"
        self._expect(redis not in dict(live).values() and old.poll() is None, "the old process keeps the TLS connection")
        self._expect(seen == seen_now, "a plaintext connection outlives an upgrade")
        self._expect(client == client_now and client.isdigit(), "a TLS connection outlives an upgrade")
        self._expect(traffic.failed == 0, "an upgrade disturbs nobody")

    def _show_rotation(self) -> None:
        self._traffic = Traffic(self._pods["web"], self._folder / "stop-changes")
        connection = self._session.ask("CLIENT ID")
        before = self._shown_serial("redis")
        self._issue(self._meshes[1].folder, "redis")
        _wait_until(lambda: self._shown_serial("redis") != before, "the new certificate is shown")
        after = self._shown_serial("redis")
        self._step("While curl goes on in web, the files of redis's certificate are replaced. Who dials redis is shown one whose")
        self._say(f"    serial number ended in {before & 0xFFFFFFFF:08x} before, and ends in {after & 0xFFFFFFFF:08x} now.")
        still = self._session.ask("CLIENT ID")
        self._say(f"    The connection of step 4 goes on: redis called it client {connection} before, and calls it client {still} now.")
        self._expect(connection == still and still.isdigit(), "a live connection outlives a rotation")
        fresh = self._pods["web"].run("redis-cli", "-h", REDIS, "PING").strip()
        self._expect(fresh == "PONG", "new connections are made under the new certificate")

    def _show_policy_change(self) -> None:
        new = self._meshes[1].folder / "policies.new"
        new.write_text(POLICY.format(who="batch", identity=_spiffe_id("batch")))
        new.rename(new.with_name("policies.yaml"))
        _wait_until(lambda: self._session.ask("PING") != "PONG", "web's connection is cut")
        web = _first_line(self._pods["web"], "redis-cli", "-h", REDIS, "PING")
        batch = _first_line(self._pods["batch"], "redis-cli", "-h", REDIS, "PING")
        self._step("The policy of node-2 changes: redis is for batch now. The connection of step 4 is cut off, and PING gets")
        self._say(f"    in web: {web}")
        self._say(f"    in batch: {batch}")
        self._expect(web != "PONG" and batch == "PONG", "the new policy holds")
        old = self._meshes[0].process
        _wait_until(lambda: old.poll() is not None, "the old process of node-1 ends")
        self._say(f"    With it process {old.pid} has ended, the one before the upgrade: exit code {old.returncode}.")
        self._expect(old.returncode == 0, "the old process ends with its last connection")
        self._say(f"    curl went on through both changes: {self._traffic.stop()}")
        self._expect(self._traffic.failed == 0, "changes disturb nobody else")

    def _show_account(self) -> None:
        for mesh in self._meshes:
            _wait_until(mesh.is_quiet, "all connections have ended")
        self._step("What went where, as the nodes counted it:")
        table = make_table("", "node", "cluster", "endpoint", "over", ">connections", ">failed", ">sent", ">received")
        for mesh in self._meshes:
            for cluster in mesh.ask("/clusters")["clusters"]:
                for row in cluster["endpoints"] or [cluster | {"address": ""}]:
                    if row["opened"]:
                        table.add_row(
                            mesh.host.name, cluster["name"], row["address"] or "where it was sent to",
                            mesh.carried_over(cluster["name"], row["address"]), str(row["opened"]), str(row["connect_failures"]),
                            show_bytes(row["bytes_to_upstream"]), show_bytes(row["bytes_to_downstream"]),
                        )  # fmt: skip
        self._console.print(table)
        catalog = self._meshes[0].ask("/clusters?name=catalog")["clusters"][0]
        self._expect(all(row["opened"] for row in catalog["endpoints"]), "every endpoint got connections")
        self._expect(catalog["connect_failures"] > 0, "the dead server was noticed")
        self._say("    Each connection has a line in the access log of every node that it passed. The last one of node-2:")
        self._say(f"    {json.dumps(self._meshes[1].records()[-1])}")

    def _stop(self) -> None:
        for mesh in self._meshes:
            self._expect(mesh.stop() == 0, f"l4mesh stops cleanly on {mesh.host.name}")

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)

    def _step(self, text: str) -> None:
        self._steps += 1
        self._say(f"{self._steps:>2}. {text}")

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            self._failures.append(what)
            self._say(f"  NOT AS IT SHOULD BE: {what}")

    def _issue(self, folder: Path, service: str) -> None:
        issued = self._authority.issue(_spiffe_id(service))
        write_identity(folder / "tls", service, issued.certificates, issued.private_key)

    def _node_config(self, node: Node, names: tuple[str, ...], folder: Path) -> str:
        services = sorted({_service(name) for name in names})
        workloads = zip(names, node.pods, strict=True)
        return NODE.format(
            node=node.host.name, folder=folder, domain=TRUST_DOMAIN, catalog=CATALOG, redis=REDIS, redis_v6=REDIS_V6,
            networks=json.dumps(node.pod_networks),
            identities="\n".join(IDENTITY.format(name=name, bundle=self._authority.bundle_path) for name in services),
            workloads="\n".join(WORKLOAD.format(name=name, service=_service(name), v4=pod.v4, v6=pod.v6) for name, pod in workloads),
        )  # fmt: skip

    def _catalog_1(self) -> dict[str, Any]:
        """What node-1 tells about it."""
        endpoints = self._meshes[0].ask("/clusters?name=catalog")["clusters"][0]["endpoints"]
        found: dict[str, Any] = next(row for row in endpoints if row["address"] == f"{self._pods['catalog-1'].v4}:80")
        return found

    def _keep_alive(self, answering: str) -> http.client.HTTPConnection:
        """web's connection to the catalog that this endpoint of it answers. Whose turn it is, the traffic meanwhile decides too."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            connection = http.client.HTTPConnection(CATALOG, timeout=DEADLINE_S)
            connection.auto_open = 0
            run_in_namespace(self._pods["web"].path, connection.connect)
            if _get(connection, "/") == answering:
                return connection
            connection.close()
        raise CommandError(f"waited {DEADLINE_S:.0f} s in vain until {answering} answers a connection")

    def _redis_connections(self) -> int:
        """That Redis has accepted so far, the one that asks included."""
        info = self._pods["redis"].run("redis-cli", "INFO", "stats")
        return int(info.partition("total_connections_received:")[2].split()[0])

    def _shown_serial(self, name: str) -> int:
        """Serial number of the certificate that the pod's node shows to one who dials it, with web's certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self._authority.bundle_path)
        tls = self._meshes[0].folder / "tls"
        context.load_cert_chain(tls / "web.pem", tls / "web.key")
        host, address = self._lab.host("outside"), (self._pods[name].v4, 6379)
        plain = run_in_namespace(host.path, lambda: socket.create_connection(address, DEADLINE_S))
        with plain, context.wrap_socket(plain) as peer:
            shown = peer.getpeercert(binary_form=True)
        assert shown
        return x509.load_der_x509_certificate(shown).serial_number


class Mesh:
    """l4mesh on one node, and what it tells."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder
        host.run(sys.executable, "-m", "l4mesh", "redirect", "apply", "-c", str(folder))
        with (folder / "events.log").open("wb") as events:
            self.process = host.start(sys.executable, "-m", "l4mesh", "run", "-c", str(folder), stderr=events)
            """The first one, before an upgrade."""
        self._successor = 0

    def is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise CommandError(f"l4mesh ended: {(self.folder / 'events.log').read_text().strip()}")
        return bool(self.ask("/ready").get("ready"))

    def ask(self, path: str) -> dict[str, Any]:
        command = ["curl", "-s", "-m", "5", "--unix-socket", str(self.folder / "admin.sock"), f"http://l4mesh{path}"]
        done = subprocess.run(command, capture_output=True, check=False)
        answer: dict[str, Any] = json.loads(done.stdout or b"{}")
        return answer

    def is_quiet(self) -> bool:
        return all(cluster["active"] == 0 for cluster in self.ask("/clusters")["clusters"])

    def carried_over(self, cluster: str, endpoint: str) -> str:
        """How the access log has it: "TLS 1.3" or "plaintext"; of connections to the endpoint, or of all to the cluster for ""."""
        made = [
            one for one in self.records() if one["cluster"] == cluster and endpoint in ("", one["endpoint"]) and "connect_ms" in one
        ]
        return ", ".join(sorted({f"TLS {one['upstream_tls'][:3]}" if "upstream_tls" in one else "plaintext" for one in made}))

    def records(self) -> list[dict[str, Any]]:
        """The access log; without a line that is being written."""
        return [json.loads(line) for line in (self.folder / "access.log").read_text().split("\n")[:-1]]

    def last_record(self, reason: str) -> dict[str, Any]:
        return next((record for record in reversed(self.records()) if record["reason"] == reason), {})

    def last_event(self, event: str) -> dict[str, Any]:
        """Of the event log; without a line that is being written."""
        events = map(json.loads, (self.folder / "events.log").read_text().split("\n")[:-1])
        return next((told for told in reversed(list(events)) if told["event"] == event), {})

    def upgrade(self) -> str:
        """What the command says."""
        said = self.host.run(sys.executable, "-m", "l4mesh", "upgrade", "-c", str(self.folder)).strip()
        self._successor = self.ask("/status")["pid"]
        return said

    def stop(self) -> int:
        """Its exit code, or that of the process before it when that failed."""
        self.process.terminate()
        code = self.process.wait()
        if self._successor:
            os.kill(self._successor, signal.SIGTERM)
            code = code or os.waitstatus_to_exitcode(os.waitpid(self._successor, 0)[1])
        self.host.run(sys.executable, "-m", "l4mesh", "redirect", "remove")
        return code


class Session:
    """redis-cli on one connection that stays open."""

    def __init__(self, pod: Host, address: str) -> None:
        self._process = pod.start("redis-cli", "-h", address, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def ask(self, command: str) -> str:
        """What it prints first, "" when it has ended."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], DEADLINE_S)[0]:
            raise CommandError(f"redis-cli has not answered {command} for {DEADLINE_S:.0f} s")
        return self._process.stdout.readline().decode().strip()


class Traffic:
    """curl after curl in a pod until it is told to stop, each a connection of its own."""

    def __init__(self, pod: Host, stop_file: Path) -> None:
        self._stop_file = stop_file
        curl = f"curl -s -m 5 -w ' %{{http_code}} %{{time_total}}\\n' http://{CATALOG}/"
        script = f"while [ ! -e {stop_file} ]; do {curl}; done"
        self._process = pod.start("sh", "-c", script, stdout=subprocess.PIPE)
        self._lines: list[list[str]] = []
        self._reader = threading.Thread(target=self._read, name="traffic", daemon=True)
        self._reader.start()
        self.failed = 0

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.append(line.decode().split())

    @property
    def count(self) -> int:
        """Of the requests so far."""
        return len(self._lines)

    def wait(self, count: int) -> collections.Counter[str]:
        """For so many requests more. Who answered them."""
        first = len(self._lines)
        while len(self._lines) < first + count:
            if not self._reader.is_alive():
                raise CommandError("curl goes on no more")
            time.sleep(0.01)
        return collections.Counter(line[0] for line in self._lines[first : first + count])

    def stop(self) -> str:
        """What came of it, in words."""
        self._stop_file.touch()
        self._reader.join()
        codes = [line[-2] for line in self._lines]
        slowest_ms = max(float(line[-1]) for line in self._lines) * 1000
        self.failed = len(codes) - codes.count("200")
        return f"{len(codes)} requests, {self.failed} failed; the slowest took {show_ms(slowest_ms)}."


def _service(pod: str) -> str:
    return pod.partition("-")[0]


def _spiffe_id(service: str) -> str:
    return f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/{service}"


def _unix_s(event: dict[str, Any]) -> float:
    return datetime.datetime.fromisoformat(event["time"]).timestamp()


def _get(connection: http.client.HTTPConnection, path: str) -> str:
    """Raises CommandError."""
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise CommandError(f"GET {path} on a connection that stays open: {error!r}") from error


def _first_line(host: Host, *command: str) -> str:
    """What a command says first, whether it succeeds or not."""
    done = subprocess.run(host.command(*command), capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    return ((done.stdout + done.stderr).strip().splitlines() or ["nothing"])[0]


def _start_server(name: str, pod: Host) -> None:
    if _service(name) == "redis":
        pod.start("redis-server", "--save", "", "--protected-mode", "no", "--bind", "*", "-::*", "--dir", "/")
    elif _service(name) == "catalog":
        pod.start(sys.executable, "-c", SERVER, name)


def _is_serving(name: str, pod: Host) -> bool:
    port = {"redis": 6379, "catalog": 80}.get(_service(name))
    if port is None:
        return True
    try:
        run_in_namespace(pod.path, lambda: socket.create_connection(("127.0.0.1", port), 1).close())
    except OSError:
        return False
    return True


def _wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise CommandError(f"waited {DEADLINE_S:.0f} s in vain until {what}")
        time.sleep(0.05)
