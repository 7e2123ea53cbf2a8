"""Two nodes with real rules and mutual TLS between them: who gets through, as whom, who he looks like, and what the wire shows.

Node N has the captured pods ``web-N``, ``redis-N`` and ``other-N``, each with an identity of its own, and ``bare-N``, which is excluded
from capture both ways. ``outside`` is a host without l4mesh.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from l4mesh.capture.host import apply_rules
from l4mesh.capture.rules import build_rules
from l4mesh.config.load import parse_config
from l4mesh.lab import Cluster, Host, Lab, build_cluster
from l4mesh.netns import run_in_namespace
from l4mesh.tap import Tap, is_tls13
from tests.support.certificates import DOMAIN, REDIS, WEB, Authority
from tests.support.mesh import Mesh
from tests.support.waiting import wait_until

pytestmark = pytest.mark.netns

OTHER = f"spiffe://{DOMAIN}/ns/shop/sa/other"
IDENTITIES = {"web": WEB, "redis": REDIS, "other": OTHER}
ROLES = ("web", "redis", "other", "bare")
SERVICES = {"redis-1": 11, "redis-2": 12, "bare-1": 13, "bare-2": 14}
PORT = 80
MARKER = b"in-the-clear-"
DEADLINE_S = 10.0
SILENCE_S = 0.2
"""How long one waits who expects that nothing is answered. Too short a time could only hide a reply that the server counts."""


class PodServer:
    """In a pod: answers a line with its name, whom it sees, and the line; after "end" it closes. Counts what reaches it."""

    def __init__(self, name: str, host: Host) -> None:
        self.name = name
        self.accepted = 0
        self._listening = [
            run_in_namespace(host.path, lambda f=family: self._listen(f)) for family in (socket.AF_INET, socket.AF_INET6)
        ]
        for listening in self._listening:
            threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    @staticmethod
    def _listen(family: socket.AddressFamily) -> socket.socket:
        return socket.create_server(("", PORT), family=family, backlog=64)

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, address = listening.accept()
                self.accepted += 1
                threading.Thread(target=self._serve, args=(peer, address[0]), daemon=True).start()

    def _serve(self, peer: socket.socket, seen: str) -> None:
        with contextlib.suppress(OSError), peer, peer.makefile("rb") as lines:
            for line in lines:
                if line == b"end\n":
                    return
                peer.sendall(f"{self.name} {seen} ".encode() + line)

    def close(self) -> None:
        for listening in self._listening:
            listening.shutdown(socket.SHUT_RDWR)
            listening.close()


def dial(host: Host, address: str, timeout_s: float = DEADLINE_S, source_port: int = 0) -> socket.socket:
    def make() -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        client = socket.socket(family)
        try:
            client.settimeout(timeout_s)
            if source_port:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.bind(("", source_port))
            client.connect((address, PORT))
        except OSError:
            client.close()
            raise
        return client

    return run_in_namespace(host.path, make)


def ask(host: Host, address: str, text: bytes, timeout_s: float = DEADLINE_S) -> tuple[str, str] | None:
    """The server's name and whom it saw; None when there was no answer."""
    with contextlib.suppress(OSError), dial(host, address, timeout_s) as client, client.makefile("rb") as lines:
        client.sendall(text + b"\n")
        answer = lines.readline().split()
        if len(answer) == 3 and answer[2] == text:
            return answer[0].decode(), answer[1].decode()
    return None


@dataclass
class World:
    cluster: Cluster
    hosts: dict[str, Host]
    servers: dict[str, PodServer]
    settings: list[dict[str, Any]]
    """Of each node, from which variants are made."""
    meshes: list[Mesh] = field(default_factory=list)
    variant: tuple[str, bool] = ("", False)
    asked: int = 0

    def config(self, at: int, mode: str, preserve: bool) -> dict[str, Any]:
        outbound, inbound = self.settings[at]["listeners"]
        listeners = [outbound | {"preserve_source": preserve}, inbound | {"preserve_source": preserve, "tls": {"mode": mode}}]
        return self.settings[at] | {"listeners": listeners}

    def use(self, mode: str = "strict", preserve: bool = False) -> None:
        """Makes both nodes run like this, if they don't already."""
        if self.variant == (mode, preserve):
            return
        self.variant = (mode, preserve)
        for at, mesh in enumerate(self.meshes):
            config = self.config(at, mode, preserve)
            apply_rules(build_rules(parse_config(yaml.safe_dump(config))), self.cluster.nodes[at].host.namespace)
            mesh.write(config)
            # Looks at once, not when the watch has seen it.
            os.kill(mesh.process.pid, signal.SIGHUP)
            wait_until(lambda mesh=mesh, want=config["listeners"][1]: self._in_force(mesh, want), "the variant is in force")

    @staticmethod
    def _in_force(mesh: Mesh, want: dict[str, Any]) -> bool:
        inbound = next(one for one in mesh.get("/config")["listeners"].values() if one["name"] == "inbound")
        return bool(inbound["preserve_source"] == want["preserve_source"] and inbound["tls"]["mode"] == want["tls"]["mode"])

    def address(self, server: str, by: str, is_v6: bool) -> str:
        if by == "service":
            return f"fd00:10:96::{SERVICES[server]}" if is_v6 else f"10.96.0.{SERVICES[server]}"
        return self.hosts[server].addresses[is_v6]

    def next_text(self) -> bytes:
        self.asked += 1
        return MARKER + str(self.asked).encode()

    def records(self, node: int) -> list[dict[str, Any]]:
        return self.meshes[node - 1].records()


def node_settings(cluster: Cluster, at: int, hosts: dict[str, Host], authority: Authority, folder: Path) -> dict[str, Any]:
    node, number = cluster.nodes[at], at + 1
    bare = list(hosts[f"bare-{number}"].addresses)
    networks = list(node.pod_networks)
    clusters = []
    routes = []
    for name, last in SERVICES.items():
        server = hosts[name]
        service = {"name": name, "endpoints": [f"{server.v4}:{PORT}"], "connect": {"attempts": 1}}
        if name.startswith("redis"):
            service["tls"] = {"peers": [REDIS]}
        clusters += [service, service | {"name": f"{name}-v6", "endpoints": [f"[{server.v6}]:{PORT}"]}]
        routes += [
            {"match": {"destinations": [f"10.96.0.{last}"], "ports": [PORT]}, "cluster": name},
            {"match": {"destinations": [f"fd00:10:96::{last}"], "ports": [PORT]}, "cluster": f"{name}-v6"},
        ]
    return {
        "access_log": {"when": "always"},
        "identities": [authority.files(folder, role, spiffe_id).identity(role) for role, spiffe_id in IDENTITIES.items()],
        "workloads": [
            {
                "name": f"{role}-{number}",
                "namespace": "shop",
                "addresses": list(hosts[f"{role}-{number}"].addresses),
                "identity": role,
                "labels": {"app": role},
            }
            for role in IDENTITIES
        ],
        "policies": [{"name": "only-web", "action": "allow", "workloads": {"app": "redis"}, "from": [{"identities": [WEB]}]}],
        "listeners": [
            {
                "name": "outbound",
                "bind": ["0.0.0.0:15001", "[::]:15001"],
                "capture": "redirect",
                "include": {"sources": networks},
                "exclude": {"sources": bare},
                "routes": routes,
                "default": "original_destination",
            },
            {
                "name": "inbound",
                "bind": ["0.0.0.0:15006", "[::]:15006"],
                "capture": "tproxy",
                "include": {"destinations": networks},
                "exclude": {"destinations": bare},
                "default": "original_destination",
            },
        ],
        "clusters": clusters,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Lab() as lab, contextlib.ExitStack() as stack:
        cluster = build_cluster(lab, pods=len(ROLES))
        hosts = {f"{role}-{n}": pod for n, node in enumerate(cluster.nodes, 1) for role, pod in zip(ROLES, node.pods, strict=True)}
        hosts |= {"outside": cluster.outside} | {f"node-{n}": node.host for n, node in enumerate(cluster.nodes, 1)}
        servers = {name: PodServer(name, hosts[name]) for name in hosts if name[:-2] in ROLES}
        for server in servers.values():
            stack.callback(server.close)
        authority = Authority.new(tmp_path_factory.mktemp("ca") / "ca")
        folders = [tmp_path_factory.mktemp("n") for _ in cluster.nodes]
        made = World(cluster, hosts, servers, [node_settings(cluster, at, hosts, authority, folders[at]) for at in range(2)])
        for at, node in enumerate(cluster.nodes):
            config = made.config(at, "strict", False)
            apply_rules(build_rules(parse_config(yaml.safe_dump(config))), node.host.namespace)
            made.meshes.append(stack.enter_context(Mesh(folders[at], config, prefix=tuple(node.host.command()))))
        made.variant = ("strict", False)
        yield made


@dataclass(frozen=True)
class Case:
    client: str
    server: str
    by: str
    """The address that is dialled: the "service"'s, or the "pod"'s own."""
    outcome: str
    """"passes", or the close reason at the node that refuses."""
    wire: str
    """What is on the wire at the server's node: "tls", "plain" or "nothing"."""
    seen_as: str
    """Whose address the server sees; "" when it sees nobody."""
    identity: str
    """That the server's node saw in a certificate."""
    captured: tuple[int, ...]
    """Nodes that have it in their access log, the one that decides last."""


STRICT = [
    # Captured to captured: one hop within the node, mutual TLS between two. The policy lets web in and nobody else.
    Case("web-1", "redis-1", "service", "passes", "nothing", "node-1", "", (1,)),
    Case("web-1", "redis-2", "service", "passes", "tls", "node-2", WEB, (1, 2)),
    Case("web-2", "redis-1", "service", "passes", "tls", "node-1", WEB, (2, 1)),
    Case("other-1", "redis-1", "service", "denied", "nothing", "", "", (1,)),
    Case("other-1", "redis-2", "service", "denied", "tls", "", OTHER, (1, 2)),
    Case("web-1", "redis-1", "pod", "passes", "nothing", "node-1", "", (1,)),
    Case("other-1", "redis-1", "pod", "denied", "nothing", "", "", (1,)),
    # No cluster says that TLS is spoken there.
    Case("web-1", "redis-2", "pod", "downstream_tls", "plain", "", "", (1, 2)),
    # Captured to not captured: plaintext.
    Case("web-1", "bare-1", "service", "passes", "nothing", "node-1", "", (1,)),
    Case("web-1", "bare-2", "service", "passes", "plain", "node-1", "", (1,)),
    Case("web-1", "bare-2", "pod", "passes", "plain", "node-1", "", (1,)),
    # Not captured to captured: refused.
    Case("bare-1", "redis-1", "pod", "downstream_tls", "nothing", "", "", (1,)),
    Case("bare-1", "redis-2", "pod", "downstream_tls", "plain", "", "", (2,)),
    Case("outside", "redis-1", "pod", "downstream_tls", "plain", "", "", (1,)),
    Case("node-1", "redis-2", "pod", "downstream_tls", "plain", "", "", (2,)),
    # What the host of a pod sends to it is not captured: health checks.
    Case("node-1", "redis-1", "pod", "passes", "nothing", "node-1", "", ()),
    # Not captured to not captured: as if we weren't there.
    Case("bare-1", "bare-1", "pod", "passes", "nothing", "bare-1", "", ()),
    Case("bare-1", "bare-2", "pod", "passes", "plain", "bare-1", "", ()),
    Case("outside", "bare-1", "pod", "passes", "plain", "outside", "", ()),
    Case("bare-1", "web-1", "pod", "downstream_tls", "nothing", "", "", (1,)),
]
PERMISSIVE = [
    Case("web-1", "redis-2", "service", "passes", "tls", "node-2", WEB, (1, 2)),
    Case("bare-1", "other-1", "pod", "passes", "nothing", "node-1", "", (1,)),
    Case("bare-1", "other-2", "pod", "passes", "plain", "node-2", "", (2,)),
    Case("outside", "other-1", "pod", "passes", "plain", "node-1", "", (1,)),
    Case("web-1", "other-2", "pod", "passes", "plain", "node-2", "", (1, 2)),
    # In the clear there is no identity, and the policy asks for one.
    Case("outside", "redis-1", "pod", "denied", "plain", "", "", (1,)),
    Case("web-1", "redis-2", "pod", "denied", "plain", "", "", (1, 2)),
]
PRESERVED = [
    Case("web-1", "redis-1", "service", "passes", "nothing", "web-1", "", (1,)),
    Case("web-1", "redis-2", "service", "passes", "tls", "web-1", WEB, (1, 2)),
    Case("web-2", "redis-1", "service", "passes", "tls", "web-2", WEB, (2, 1)),
    Case("other-1", "redis-2", "service", "denied", "tls", "", OTHER, (1, 2)),
    Case("web-1", "bare-2", "service", "passes", "plain", "web-1", "", (1,)),
    Case("bare-1", "redis-2", "pod", "downstream_tls", "plain", "", "", (2,)),
    Case("bare-1", "bare-2", "pod", "passes", "plain", "bare-1", "", ()),
]
VARIANTS = {
    "strict": (("strict", False), STRICT),
    "permissive": (("permissive", False), PERMISSIVE),
    "preserved": (("strict", True), PRESERVED),
}


def show(value: object) -> str:
    return f"{value.client}_{value.by}_{value.server}" if isinstance(value, Case) else ""


@pytest.mark.parametrize("is_v6", [False, True], ids=["v4", "v6"])
@pytest.mark.parametrize(
    ("variant", "case"), [pytest.param(v, case, id=f"{name}-{show(case)}") for name, (v, cases) in VARIANTS.items() for case in cases]
)
def test_matrix(world: World, variant: tuple[str, bool], case: Case, is_v6: bool) -> None:
    world.use(*variant)
    text = world.next_text()
    before = {node: len(world.records(node)) for node in (1, 2)}
    reached = world.servers[case.server].accepted
    place = case.server[-1]
    with Tap(world.cluster.wire.path, f"node-{place}") as tap:
        answer = ask(world.hosts[case.client], world.address(case.server, case.by, is_v6), text)
        for node in (1, 2):
            wanted = before[node] + case.captured.count(node)
            wait_until(lambda node=node, wanted=wanted: len(world.records(node)) >= wanted, f"node {node} logs the connection")
        streams = tap.streams()
    passes = case.outcome == "passes"
    assert answer == ((case.server, world.hosts[case.seen_as].addresses[is_v6]) if passes else None)
    assert world.servers[case.server].accepted - reached == passes
    assert wire_shows(streams, text) == case.wire
    new = {node: world.records(node)[before[node] :] for node in (1, 2)}
    assert {node: len(lines) for node, lines in new.items()} == {node: case.captured.count(node) for node in (1, 2)}
    if case.captured:
        decided = new[case.captured[-1]][0]
        assert decided["reason"] == ("downstream_closed" if passes else case.outcome)
        assert decided.get("downstream_identity", "") == case.identity
        assert decided.get("downstream_tls", "")[:3] == ("1.3" if case.wire == "tls" else "")
        assert decided.get("policy", "") == ("only-web" if passes and case.server.startswith("redis") else "")
    if len(case.captured) == 2 and case.wire == "tls" and passes:
        assert new[case.captured[0]][0]["upstream_identity"] == REDIS


def wire_shows(streams: dict[tuple[str, str], bytes], text: bytes) -> str:
    if not any(streams.values()):
        return "nothing"
    if any(text in stream for stream in streams.values()):
        return "plain"
    # One of the two directions is the server's.
    pairs = [(streams[ends], streams.get((ends[1], ends[0]), b"")) for ends in streams]
    return "tls" if all(is_tls13(a, b) or is_tls13(b, a) for a, b in pairs) else "something else"


@pytest.mark.parametrize("is_v6", [False, True], ids=["v4", "v6"])
def test_old_addresses_and_ports_serve_again_at_once(world: World, is_v6: bool) -> None:
    """The node ends first and keeps the old connection in TIME_WAIT, transparent as it is: the first packet of a new one finds it."""
    world.use("permissive")
    address = world.address("other-1", "pod", is_v6)
    source_port = 0
    for _ in range(3):
        text = world.next_text()
        with dial(world.hosts["outside"], address, source_port=source_port) as client, client.makefile("rb") as lines:
            source_port = client.getsockname()[1]
            client.sendall(text + b"\nend\n")
            assert lines.read().endswith(text + b"\n")
            assert int.from_bytes(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:104], "little") == 0


def test_a_dead_node_lets_nothing_in(world: World) -> None:
    world.use("strict")
    dead = world.meshes[1]
    reached = {name: server.accepted for name, server in world.servers.items()}
    dead.kill()
    for is_v6 in (False, True):
        for client, server, by in (
            ("web-1", "redis-2", "service"),
            ("web-1", "redis-2", "pod"),
            ("bare-1", "redis-2", "pod"),
            ("outside", "web-2", "pod"),
        ):
            with Tap(world.cluster.wire.path, "node-2") as tap:
                text = world.next_text()
                assert ask(world.hosts[client], world.address(server, by, is_v6), text, SILENCE_S) is None
                # Not even the first packet is answered.
                assert wire_shows(tap.streams(), text) == "nothing"
        # And what its pods dial goes nowhere either.
        assert ask(world.hosts["web-2"], world.address("redis-1", "service", is_v6), world.next_text()) is None
    assert {name: server.accepted for name, server in world.servers.items()} == reached
    assert ask(world.hosts["bare-1"], world.address("bare-2", "pod", False), world.next_text())
    dead.start()
    assert ask(world.hosts["web-1"], world.address("redis-2", "service", True), world.next_text())
