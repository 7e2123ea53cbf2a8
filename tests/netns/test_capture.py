"""Capture with the real process and real rules: what is captured, what is not, who it looks like, and that it fails closed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from l4mesh.capture.host import apply_rules, check_rules
from l4mesh.capture.rules import build_rules
from l4mesh.config.load import parse_config
from l4mesh.lab import Host, Lab, build_cluster
from tests.conftest import Factory
from tests.support.ca import CaProcess, Node, grant, identity_of
from tests.support.certificates import WEB, Authority
from tests.support.mesh import Mesh
from tests.support.waiting import wait_until

pytestmark = pytest.mark.netns

# Says who it is and whom it talks to, before it is asked: a server that speaks first.
BANNER = """
import socket, sys, threading
def serve(listening):
    while True:
        peer, address = listening.accept()
        peer.sendall(f"{sys.argv[1]} {address[0]}\\n".encode())
        peer.close()
for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    for port in (80, 81):
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((host, port))
        listening.listen(64)
        threading.Thread(target=serve, args=(listening,)).start()
"""
DIAL = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])) as peer:
        print(peer.makefile().read().strip() or "nothing")
except OSError as error:
    print(type(error).__name__)
"""


@dataclass
class Net:
    client: Host
    node: Host
    servers: list[Host]
    mesh: Factory

    def start(self, config: dict[str, Any]) -> Mesh:
        apply_rules(build_rules(parse_config(yaml.safe_dump(config))), self.node.namespace)
        return self.mesh(config, prefix=tuple(self.node.command()))

    def dial(self, host: str, port: int = 80, by: Host | None = None, timeout_s: float = 5) -> str:
        return (by or self.client).run(sys.executable, "-c", DIAL, host, str(port), str(timeout_s)).strip()


@pytest.fixture
def net(mesh: Factory) -> Iterator[Net]:
    with Lab() as lab:
        cluster = build_cluster(lab, nodes=1)
        client, node, servers = cluster.outside, cluster.nodes[0].host, cluster.nodes[0].pods
        for number, server in enumerate(servers, 1):
            server.start(sys.executable, "-c", BANNER, f"server{number}")
        node.start(sys.executable, "-c", BANNER, "node")
        made = Net(client, node, servers, mesh)
        wait_until(lambda: made.dial("10.244.1.11").startswith("server1"), "the servers answer")
        wait_until(lambda: made.dial("fd00:10:244:1::12").startswith("server2"), "the servers answer")
        wait_until(lambda: made.dial("192.168.50.1").startswith("node"), "the node answers")
        yield made
        # While there is a namespace to end in.
        mesh.stack.close()


def outbound(**more: Any) -> dict[str, Any]:
    listener = {
        "name": "out",
        "bind": ["0.0.0.0:15001", "[::]:15001"],
        "capture": "redirect",
        "default": "original_destination",
    }
    return {"listeners": [listener | more]}


def inbound(**more: Any) -> dict[str, Any]:
    listener = {"name": "in", "bind": ["0.0.0.0:15006", "[::]:15006"], "capture": "tproxy", "default": "original_destination"}
    return {"listeners": [listener | more]}


@pytest.mark.parametrize("server", ["10.244.1.11", "fd00:10:244:1::11"])
@pytest.mark.parametrize("capture", ["redirect", "tproxy"])
def test_traffic_through_the_node_is_captured_with_its_destination(net: Net, capture: str, server: str) -> None:
    m = net.start(outbound(capture=capture, direction="outbound"))
    node = "fd00:192:168:50::1" if ":" in server else "192.168.50.1"
    assert net.dial(server) == f"server1 {node}"
    m.wait_closed(upstream_closed=1)


def test_policy_routing_of_others_keeps_no_packet_from_us(net: Net) -> None:
    # As cloud networks route pods: by their addresses, before the main table.
    net.node.run("ip", "rule", "add", "pref", "512", "to", "10.244.1.0/24", "lookup", "main")
    net.node.run("ip", "-6", "rule", "add", "pref", "512", "to", "fd00:10:244:1::/64", "lookup", "main")
    m = net.start(outbound(capture="tproxy", direction="outbound"))
    assert net.dial("10.244.1.11") == "server1 192.168.50.1"
    assert net.dial("fd00:10:244:1::11") == "server1 fd00:192:168:50::1"
    m.wait_closed(upstream_closed=2)


def test_service_addresses_that_nobody_has_are_balanced(net: Net) -> None:
    config = outbound(
        routes=[{"match": {"destinations": ["10.96.0.10", "fd00:10:96::10"], "ports": [80]}, "cluster": "web"}], default="reject"
    )
    config["clusters"] = [{"name": "web", "endpoints": ["10.244.1.11:80", "[fd00:10:244:1::12]:80"], "balance": "round_robin"}]
    m = net.start(config | {"workers": 1})
    for address in ("10.96.0.10", "fd00:10:96::10"):
        assert {net.dial(address).split()[0] for _ in range(4)} == {"server1", "server2"}
    assert net.dial("10.96.0.10", 81) == "ConnectionResetError"
    m.wait_closed(no_route=1, upstream_closed=8)


def test_what_the_host_itself_sends_is_captured_and_what_we_send_is_not(net: Net) -> None:
    m = net.start(outbound())
    assert net.dial("10.244.1.12", by=net.node) == "server2 192.168.50.1"
    assert net.dial("fd00:10:244:1::12", by=net.node) == "server2 fd00:192:168:50::1"
    m.wait_closed(upstream_closed=2)


@pytest.mark.parametrize(
    ("rules", "captured"),
    [
        ({"exclude": {"ports": [80]}}, {80: False, 81: True}),
        ({"include": {"ports": [80]}}, {80: True, 81: False}),
        ({"exclude": {"destinations": ["10.244.1.0/24"]}}, {80: False, 81: False}),
        ({"include": {"destinations": ["10.244.1.11"]}}, {80: True, 81: True}),
        ({"include": {"interfaces": ["eth0"]}}, {80: True, 81: True}),
        ({"exclude": {"interfaces": ["eth0"]}}, {80: False, 81: False}),
    ],
)
def test_include_and_exclude(net: Net, rules: dict[str, Any], captured: dict[int, bool]) -> None:
    m = net.start(outbound(**rules))
    for port in captured:
        assert net.dial("10.244.1.11", port).split()[0] == "server1"
    assert sum(captured.values()) == sum(worker["accepted"] for worker in m.status()["workers"])


def test_a_users_own_traffic_can_be_left_out(net: Net) -> None:
    m = net.start(outbound(exclude={"users": ["0"]}))
    assert net.dial("10.244.1.11", by=net.node) == "server1 192.168.50.1"
    assert sum(worker["accepted"] for worker in m.status()["workers"]) == 0


@pytest.mark.parametrize("server", ["10.244.1.11", "fd00:10:244:1::11"])
@pytest.mark.parametrize("capture", ["redirect", "tproxy"])
def test_the_server_sees_the_clients_own_address_when_asked(net: Net, capture: str, server: str) -> None:
    m = net.start(outbound(capture=capture, direction="outbound", preserve_source=True))
    client = "fd00:192:168:50::100" if ":" in server else "192.168.50.100"
    assert net.dial(server) == f"server1 {client}"
    m.wait_closed(upstream_closed=1)


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("host", ["192.168.50.1", "fd00:192:168:50::1"])
def test_what_arrives_for_the_host_is_captured(net: Net, host: str, preserve: bool) -> None:
    m = net.start(inbound(include={"ports": [80]}, preserve_source=preserve))
    seen_as = ("fd00:192:168:50::100" if ":" in host else "192.168.50.100") if preserve else host
    assert net.dial(host) == f"node {seen_as}"
    m.wait_closed(upstream_closed=1)


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_answers_to_what_others_have_dialled_are_left_alone(net: Net, family: int) -> None:
    pods = [server.addresses[family] for server in net.servers]
    net.client.start(sys.executable, "-c", BANNER, "client")
    wait_until(lambda: net.dial("::1", by=net.client).startswith("client"), "the client's own server answers")
    # All that arrives for the host is captured, and all but port 81 that arrives for its pods.
    config = inbound(name="host", bind=["0.0.0.0:15007", "[::]:15007"])
    config["listeners"] += inbound(include={"destinations": pods}, exclude={"ports": [81]})["listeners"]
    m = net.start(config)
    assert net.dial(pods[0], by=net.node) == f"server1 {net.node.addresses[family]}"
    assert net.dial(net.client.addresses[family], by=net.node) == f"client {net.node.addresses[family]}"
    assert net.dial(net.client.addresses[family], by=net.servers[0]) == f"client {pods[0]}"
    assert net.dial(pods[1], 81, by=net.servers[0]) == f"server2 {pods[0]}"
    assert sum(worker["accepted"] for worker in m.status()["workers"]) == 0


@pytest.mark.parametrize("server", ["10.244.1.11", "fd00:10:244:1::11"])
def test_what_nobody_named_is_not_let_past_an_inbound_listener(net: Net, server: str) -> None:
    pods = ["10.244.1.0/24", "fd00:10:244:1::/64"]
    config = outbound(exclude={"ports": [81]})
    config["listeners"] += inbound(include={"destinations": pods})["listeners"]
    m = net.start(config)
    for port in (80, 81):
        assert net.dial(server, port).startswith("server1")
    assert {listener["name"]: listener["opened"] for listener in m.status()["listeners"]} == {"in": 2, "out": 0}


def test_a_bridge_that_calls_iptables_is_no_way_past_an_inbound_listener(net: Net) -> None:
    if not Path("/proc/sys/net/bridge").exists():
        pytest.skip("needs the module br_netfilter")
    bridge = [
        "link add bridge0 type bridge",
        "link set bridge0 up",
        *(f"link set pod{number} master bridge0" for number in (1, 2)),
    ]
    net.node.ip(*bridge)
    for server, other in (net.servers, net.servers[::-1]):
        server.ip(f"route add {other.v4} dev eth0 scope link")
    net.node.run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1")
    assert net.dial(net.servers[0].v4, by=net.servers[1]) == f"server1 {net.servers[1].v4}"
    net.start(inbound(include={"destinations": ["10.244.1.0/24"]}))
    assert net.dial(net.servers[0].v4, by=net.servers[1], timeout_s=0.5) == "TimeoutError"


def test_malicious_calls_end_in_counted_refusals_and_never_in_a_loop(net: Net) -> None:
    # Every way to our own listeners, through ourselves or straight at them.
    m = net.start({"listeners": outbound()["listeners"] + inbound(include={"ports": [80, 15006]})["listeners"]})
    calls = [
        (net.node, "127.0.0.1", 15001),
        (net.node, "127.9.9.9", 15001),
        (net.node, "::1", 15001),
        (net.node, "192.168.50.1", 15001),
        (net.node, "::ffff:127.0.0.1", 15001),
        (net.node, "::ffff:192.168.50.1", 15006),
        (net.node, "169.254.1.1", 15006),
        (net.client, "192.168.50.1", 15001),
        (net.servers[0], "169.254.1.1", 15001),
        (net.client, "192.168.50.1", 15006),
        (net.client, "fd00:192:168:50::1", 15001),
        (net.client, "fd00:192:168:50::1", 15006),
    ]
    for by, host, port in calls:
        assert net.dial(host, port, by) in ("ConnectionResetError", "ConnectionRefusedError"), (host, port)
    m.wait_closed(self_call=len(calls))
    assert m.total("l4mesh_connect_attempts_total") == 0
    assert sum(worker["accepted"] for worker in m.status()["workers"]) == len(calls)


def test_a_crash_fails_closed_and_a_restart_takes_over(net: Net) -> None:
    config = outbound()
    m = net.start(config)
    assert net.dial("10.244.1.11") == "server1 192.168.50.1"
    m.kill()
    assert net.dial("10.244.1.11") == "ConnectionRefusedError"
    assert net.dial("10.244.1.11", by=net.node) == "ConnectionRefusedError"
    assert check_rules(build_rules(parse_config(yaml.safe_dump(config))), net.node.namespace) == []
    m.start()
    assert net.dial("10.244.1.11") == "server1 192.168.50.1"


def test_the_command_line_does_the_same(net: Net) -> None:
    m = net.start(outbound())
    command = [sys.executable, "-m", "l4mesh", "redirect"]
    where = ["--netns", net.node.namespace]
    done = subprocess.run([*command, "check", "-c", str(m.file), *where], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    subprocess.run([*command, "remove", *where], check=True, capture_output=True)
    done = subprocess.run([*command, "check", "-c", str(m.file), *where], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "`l4mesh redirect apply` repairs them" in done.stderr
    assert net.dial("10.244.1.11") == "server1 192.168.50.100"
    assert json.loads(m.fetch("/ready")[1])["ready"]


def test_the_way_to_the_ca_is_never_captured(net: Net, tmp_path: Path) -> None:
    authority = Authority.new(tmp_path / "ca")
    grant(authority, a=[WEB])
    node = Node(tmp_path / "a", authority)
    with CaProcess(tmp_path, authority, host="10.244.1.11", prefix=net.servers[0].command()) as ca:
        m = net.start(outbound(default="reject") | node.config(ca.address, web=WEB))
        wait_until(lambda: identity_of(m, "web")["in_use"], "the certificate is there")
        # Others on the node are captured on the way to the same port.
        port = int(ca.address.rpartition(":")[2])
        assert net.dial("10.244.1.11", port, by=net.node) in ("nothing", "ConnectionResetError")
        m.wait_closed(no_route=1)
