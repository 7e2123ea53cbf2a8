"""A small network of namespaces on this machine: for the demo, the tests and the benchmark. It removes all that it made.

As root, or without root inside a user namespace of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from subprocess import DEVNULL
from types import FrameType, TracebackType
from typing import IO, NoReturn, Self

from l4mesh.errors import CommandError

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that want us to stop; the last is of a terminal that goes away."""
_INSIDE = "L4MESH_IN_USER_NAMESPACE"


def ensure_privileged() -> None:
    """Returns as root. Without root it starts this very command anew inside a user namespace. Raises CommandError."""
    missing = [tool for tool in ("ip", "iptables-restore", "unshare") if not shutil.which(tool)]
    if missing:
        raise CommandError(f"{', '.join(missing)} not found: install the packages iproute2, iptables and util-linux")
    if os.geteuid() == 0:
        return
    if os.environ.get(_INSIDE) or subprocess.run(["unshare", "-Urnm", "true"], capture_output=True, check=False).returncode:
        raise CommandError("network namespaces need root, or a kernel that lets users make user namespaces: run it with sudo")
    os.environ[_INSIDE] = "1"
    # `ip netns` keeps its names in /run, and iptables its lock.
    script = 'mount -t tmpfs tmpfs /run && exec "$0" "$@"'
    command = ["unshare", "-Urnm", "sh", "-c", script, sys.executable, *sys.orig_argv[1:]]
    os.execvp("unshare", command)


class Interrupted(BaseException):
    """The user or a supervisor wants us to stop: everything is taken down on the way out, whatever is being handled on it."""


def raise_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)


def run(command: Sequence[str], stdin: str = "") -> str:
    """Standard output of a command that must succeed. Raises CommandError with what it said."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CommandError(f"{' '.join(command)}: {'; '.join(said[-2:]) or f'exit code {done.returncode}'}")
    return done.stdout


@dataclass(slots=True)
class Host:
    """One network namespace and the processes in it."""

    name: str
    namespace: str
    addresses: tuple[str, str] = ("", "")
    """IPv4 and IPv6, where it has one of its own."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Of its namespace, for ``run_in_namespace``."""
        return f"/run/netns/{self.namespace}"

    @property
    def v4(self) -> str:
        return self.addresses[0]

    @property
    def v6(self) -> str:
        return self.addresses[1]

    def command(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]

    def run(self, *command: str) -> str:
        """Raises CommandError."""
        return run(self.command(*command))

    def ip(self, *lines: str) -> None:
        """Arguments of `ip`, a line each, in one call. Raises CommandError."""
        run(["ip", "-netns", self.namespace, "-batch", "-"], stdin="\n".join(lines))

    def start(
        self, *command: str, stdin: int = DEVNULL, stdout: int | IO[bytes] = DEVNULL, stderr: int | IO[bytes] = DEVNULL
    ) -> subprocess.Popen[bytes]:
        """A process that the lab ends when it is taken down."""
        process = subprocess.Popen(self.command(*command), stdin=stdin, stdout=stdout, stderr=stderr)
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """Ends everything that was started here, at once."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self.processes:
            process.wait()
        self.processes.clear()


class Lab:
    """Namespaces and the wires between them; a context manager that leaves nothing behind."""

    def __init__(self) -> None:
        self._prefix = f"l4m{os.getpid() % 100000}"
        self._hosts: dict[str, Host] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def host(self, name: str) -> Host:
        """A new namespace with its loopback up, or the one of that name."""
        if name not in self._hosts:
            namespace = f"{self._prefix}-{name}"
            self._hosts[name] = host = Host(name, namespace)
            run(["ip", "netns", "add", namespace])
            host.ip("link set lo up")
            # Addresses are used at once, not after a second of asking around for duplicates.
            host.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0")
        return self._hosts[name]

    def link(self, a: Host, a_name: str, b: Host, b_name: str) -> None:
        """A wire between two namespaces, its ends up and named."""
        run(["ip", "link", "add", a_name, "netns", a.namespace, "type", "veth", "peer", "name", b_name, "netns", b.namespace])
        for host, name in ((a, a_name), (b, b_name)):
            host.ip(f"link set {name} up")

    def remove(self) -> None:
        """Ends every process in the namespaces, and the namespaces. Not to be interrupted: a signal waits until it is done."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            for host in self._hosts.values():
                host.kill()
            for host in self._hosts.values():
                # Children of those that were started, too.
                listed = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True, check=False)
                for pid in map(int, listed.stdout.split()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)
            self._hosts.clear()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


SERVICES = ("10.96.0.0/12", "fd00:10:96::/112")
"""Where service addresses are from: no host has one, and they are routed to the nearest node."""
GATEWAY = ("169.254.1.1", "fe80::1")
"""What every pod has its default route by: its node's end of the wire."""


@dataclass(slots=True)
class Node:
    """A node and its pods, each wired to its node alone, as Calico, kind and GKE have it: what it sends passes the node's rules.

    On a bridge, pods of one node would talk past them.
    """

    host: Host
    pods: list[Host]
    pod_networks: tuple[str, str]
    """IPv4 and IPv6."""


@dataclass(slots=True)
class Cluster:
    """Nodes and a host outside of the mesh, on one Ethernet: ``wire`` is its switch, where everything between them can be seen."""

    wire: Host
    nodes: list[Node]
    outside: Host

    @property
    def pods(self) -> list[Host]:
        return [pod for node in self.nodes for pod in node.pods]


def build_cluster(lab: Lab, nodes: int = 2, pods: int = 2) -> Cluster:
    """Nodes with pods, and an outsider; every address can be reached from everywhere while nobody captures.

    ======== ====================================== ===================================================
    host     IPv4                                   IPv6
    ======== ====================================== ===================================================
    node N   192.168.50.N                           fd00:192:168:50::N
    pod P    10.244.N.(10+P), named ``pod-N-P``     fd00:10:244:N::(10+P)
    outside  192.168.50.100, service by node 1      fd00:192:168:50::100
    ======== ====================================== ===================================================

    On its node a pod's wire is the interface ``podP``; towards the others a node has ``eth0``.
    """
    wire = lab.host("wire")
    wire.ip("link add lan type bridge", "link set lan up")
    made = [_add_node(lab, wire, number, pods) for number in range(1, nodes + 1)]
    outside = lab.host("outside")
    _plug_in(lab, wire, outside, 100)
    outside.ip(*(f"route add {network} via {address}" for network, address in zip(SERVICES, made[0].host.addresses, strict=True)))
    for host in (*(node.host for node in made), outside):
        host.ip(
            *(
                f"route add {network} via {address}"
                for node in made
                if node.host is not host
                for network, address in zip(node.pod_networks, node.host.addresses, strict=True)
            )
        )
    return Cluster(wire, made, outside)


def _plug_in(lab: Lab, wire: Host, host: Host, number: int) -> None:
    lab.link(host, "eth0", wire, host.name)
    wire.ip(f"link set {host.name} master lan")
    host.addresses = (f"192.168.50.{number}", f"fd00:192:168:50::{number}")
    host.ip(f"addr add {host.v4}/24 dev eth0", f"addr add {host.v6}/64 dev eth0 nodad")


def _add_node(lab: Lab, wire: Host, number: int, pods: int) -> Node:
    host = lab.host(f"node-{number}")
    _plug_in(lab, wire, host, number)
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    made = []
    for pod_number in range(1, pods + 1):
        pod = lab.host(f"pod-{number}-{pod_number}")
        device = f"pod{pod_number}"
        lab.link(pod, "eth0", host, device)
        pod.addresses = (f"10.244.{number}.{10 + pod_number}", f"fd00:10:244:{number}::{10 + pod_number}")
        pod.ip(
            f"addr add {pod.v4}/32 dev eth0",
            f"addr add {pod.v6}/128 dev eth0 nodad",
            f"route add {GATEWAY[0]} dev eth0 scope link",
            f"route add default via {GATEWAY[0]}",
            f"route add default via {GATEWAY[1]} dev eth0",
        )
        host.ip(
            f"addr add {GATEWAY[0]}/32 dev {device}",
            f"addr add {GATEWAY[1]}/64 dev {device} nodad",
            f"route add {pod.v4} dev {device} src {host.v4}",
            f"route add {pod.v6} dev {device} src {host.v6}",
        )
        made.append(pod)
    return Node(host, made, (f"10.244.{number}.0/24", f"fd00:10:244:{number}::/64"))
