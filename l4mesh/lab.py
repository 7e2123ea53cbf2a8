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


class Interrupted(Exception):
    """The user or a supervisor wants us to stop: everything is taken down on the way out."""


def raise_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(signal.Signals(number).name)


def run(command: Sequence[str]) -> str:
    """Standard output of a command that must succeed. Raises CommandError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CommandError(f"{' '.join(command)}: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout


@dataclass(slots=True)
class Host:
    """One network namespace and the processes in it."""

    name: str
    namespace: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]

    def run(self, *command: str) -> str:
        """Raises CommandError."""
        return run(self.command(*command))

    def start(self, *command: str, stdout: int | IO[bytes] = DEVNULL, stderr: int | IO[bytes] = DEVNULL) -> subprocess.Popen[bytes]:
        """A process that the lab ends when it is taken down."""
        process = subprocess.Popen(self.command(*command), stdin=DEVNULL, stdout=stdout, stderr=stderr)
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
        self._links = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def host(self, name: str) -> Host:
        """A new namespace with its loopback up, or the one of that name."""
        if name not in self._hosts:
            namespace = f"{self._prefix}-{name}"
            run(["ip", "netns", "add", namespace])
            self._hosts[name] = Host(name, namespace)
            self._hosts[name].run("ip", "link", "set", "lo", "up")
            # Addresses are used at once, not after a second of asking around for duplicates.
            self._hosts[name].run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0")
        return self._hosts[name]

    def link(self, a: Host, a_name: str, b: Host, b_name: str) -> None:
        """A wire between two namespaces, its ends up and named."""
        self._links += 1
        ends = f"{self._prefix}a{self._links}", f"{self._prefix}b{self._links}"
        run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
        for host, end, name in ((a, ends[0], a_name), (b, ends[1], b_name)):
            run(["ip", "link", "set", end, "netns", host.namespace])
            host.run("ip", "link", "set", end, "name", name, "up")

    def address(self, host: Host, device: str, *addresses: str) -> None:
        for address in addresses:
            extra = ("nodad",) if ":" in address else ()
            host.run("ip", "address", "add", address, "dev", device, *extra)

    def remove(self) -> None:
        for host in self._hosts.values():
            host.kill()
        for host in self._hosts.values():
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)
        self._hosts.clear()


def build_node_lab(lab: Lab, servers: int = 3) -> tuple[Host, Host, list[Host]]:
    """A client, a node that is its gateway, and servers behind the node.

    Client 10.90.0.2 and fd90::2; node 10.90.0.1, fd90::1 and 10.91.0.1, fd91::1; servers 10.91.0.11 and fd91::11 onwards.
    """
    client, node = lab.host("client"), lab.host("node")
    lab.link(client, "eth0", node, "client0")
    lab.address(client, "eth0", "10.90.0.2/24", "fd90::2/64")
    lab.address(node, "client0", "10.90.0.1/24", "fd90::1/64")
    client.run("ip", "route", "add", "default", "via", "10.90.0.1")
    client.run("ip", "-6", "route", "add", "default", "via", "fd90::1")
    node.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    node.run("ip", "link", "add", "servers", "type", "bridge")
    node.run("ip", "link", "set", "servers", "up")
    lab.address(node, "servers", "10.91.0.1/24", "fd91::1/64")
    hosts = []
    for number in range(1, servers + 1):
        server = lab.host(f"server{number}")
        lab.link(server, "eth0", node, f"server{number}")
        node.run("ip", "link", "set", f"server{number}", "master", "servers")
        lab.address(server, "eth0", f"10.91.0.{10 + number}/24", f"fd91::{10 + number}/64")
        server.run("ip", "route", "add", "default", "via", "10.91.0.1")
        server.run("ip", "-6", "route", "add", "default", "via", "fd91::1")
        hosts.append(server)
    return client, node, hosts
