"""Of 20 endpoints 3 turn bad: how many client connections fail, and for how long, until each proxy has seen it.

The proxies are set as well as we know how for this: connect timeouts of 400 ms, four attempts, ejection at the first
failure that they can see; for HAProxy and Envoy also an active check every second that sends and expects. l4mesh has no check here: it
goes by what its connections tell. All balance round robin, so that all meet the same endpoints as often.

Proxies and clients are in one network namespace, endpoints in another. The three that turn bad are behind a wire of its own, a pair of
TUN devices with a program between them that can delay and drop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import heapq
import json
import os
import random
import select
import socket
import statistics
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.generator import Helper, Void
from bench.process import Place
from bench.proxies import KINDS, Kind, Service, start_process
from bench.stage import Machine
from l4mesh.lab import Lab
from l4mesh.netns import run_in_namespace

ENTRIES = ("haproxy", "envoy", "l4mesh")
TROUBLES = ("refuse", "black_hole", "reset", "slow")
"""Refuses dials; answers nothing at all; takes a connection and resets it at the first bytes; 150 ms away in each direction."""
N_GOOD, N_BAD = 17, 3
RATE = 400
CALM_S, TROUBLE_S = 1.5, 6.0
REPEATS = 3
TRIES = 8
LATE_S = 0.2
DIRECT_EVERY = 10
"""Beside so many clients goes one straight to an endpoint that stays good: it shows what is not the proxy's doing."""
CONNECT_MS = 400
PATIENCE_MS = 550
"""A client waits so long for its answer: more than one connect timeout, less than two round trips of a slow endpoint."""
CHECK_MS = 1000
ANSWER_MS = 250
"""A check waits so long for its answer, Envoy's also for being connected: less than a slow endpoint takes."""
ATTEMPTS = 4
DELAY_S = 0.15
PORT = 7000
GOOD_NETWORK, BAD_NETWORK = "10.78.0", "10.79.0"
NEAR = 254
MESSAGE = b"a request of clients and of checks alike"


@dataclass(frozen=True, slots=True)
class Ejection:
    """``failed``: connections, by how; ``until_s``: the last of them, seconds after the trouble began."""

    entry: str
    trouble: str
    connections: int
    failed: dict[str, int]
    until_s: float

    @property
    def total(self) -> int:
        return sum(self.failed.values())


def run_ejection(machine: Machine, proxies: Sequence[str], repeats: int, seed: int) -> list[Ejection]:
    """Rounds that the machine was too busy for are left out. Raises Void when none is left of one kind."""
    entries = [entry for entry in ENTRIES if entry in proxies]
    shuffle = random.Random(seed).shuffle
    seen: list[Ejection] = []
    missing: dict[tuple[str, str], str] = {}
    with _Network(machine) as network:
        for _ in range(repeats):
            for trouble in TROUBLES:
                shuffle(entries)
                for entry in entries:
                    try:
                        seen.append(_measure(machine, network, entry, trouble))
                    except Void as error:
                        missing[entry, trouble] = str(error)
    for one in seen:
        missing.pop((one.entry, one.trouble), None)
    if missing:
        raise Void("; ".join(f"{entry}, {trouble}: {error}" for (entry, trouble), error in missing.items()))
    return seen


def summarize_ejection(seen: Sequence[Ejection]) -> dict[str, Any]:
    """``entries``: by trouble the median of failed connections and of how long they went on; ``met``: l4mesh's sum is the lowest."""
    entries: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(one.entry for one in seen):
        own = {trouble: [one for one in seen if (one.entry, one.trouble) == (name, trouble)] for trouble in TROUBLES}
        entries[name] = {
            trouble: {"failed": statistics.median(one.total for one in ones), "until_s": statistics.median(one.until_s for one in ones)}
            for trouble, ones in own.items()
            if ones
        }
    sums = {name: sum(of_one["failed"] for of_one in troubles.values()) for name, troubles in entries.items()}
    met = "l4mesh" in sums and all(sums["l4mesh"] < total for name, total in sums.items() if name != "l4mesh")
    return {"entries": entries, "sums": sums, "met": met, "rounds": [dataclasses.asdict(one) for one in seen]}


def _measure(machine: Machine, network: _Network, entry: str, trouble: str) -> Ejection:
    """Tries again when the machine was too busy to tell. Raises Void."""
    for left in range(TRIES, 0, -1):
        try:
            return _try(machine, network, entry, trouble)
        except Void:
            if left == 1:
                raise
    raise AssertionError


def _try(machine: Machine, network: _Network, entry: str, trouble: str) -> Ejection:
    service = Service("echo", machine.ports.take(), network.endpoints)
    kind = Kind(KINDS[entry].name, _COMMANDS[entry], KINDS[entry].version)
    folder = machine.folder / f"ejection-{entry}"
    process = start_process(kind, entry, [service], Place((machine.proxy_cpu,), network.near), folder)
    try:
        with Helper(
            Place(machine.other_cpus, network.near), "bench.ejection", "load", str(service.port), network.endpoints[0][0]
        ) as load:
            load.send("go")
            time.sleep(CALM_S)
            began = time.monotonic()
            network.turn(trouble)
            answer = json.loads(load.receive(CALM_S + TROUBLE_S + 5))
    finally:
        network.turn("good")
        process.stop()
    if answer["late_s"] > LATE_S or answer["direct_failures"]:
        raise Void(
            f"clients were {answer['late_s']:.2f} s late, {answer['direct_failures']} failed without a proxy: the machine is busy"
        )
    failures = [(due - began, kind) for due, kind in answer["failures"]]
    if early := [kind for after, kind in failures if after < -PATIENCE_MS / 1000]:
        raise Void(f"{entry}: connections failed before anything was wrong: {dict(Counter(early))}")
    until_s = max((after for after, _ in failures), default=0.0)
    return Ejection(entry, trouble, answer["connections"], dict(Counter(kind for _, kind in failures)), max(0.0, until_s))


class _Network:
    """The two namespaces, the endpoints and the wire. A context."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._stack = ExitStack()
        addresses = [f"{GOOD_NETWORK}.{i}" for i in range(1, N_GOOD + 1)] + [f"{BAD_NETWORK}.{i}" for i in range(1, N_BAD + 1)]
        self.endpoints = tuple((address, PORT) for address in addresses)
        self.near = ""

    def __enter__(self) -> _Network:
        with ExitStack() as stack:
            lab = stack.enter_context(Lab())
            near, far = lab.host("near"), lab.host("far")
            self.near = near.namespace
            lab.link(near, "veth", far, "veth")
            place = Place(self._machine.other_cpus)
            self._wire = stack.enter_context(Helper(place, "bench.ejection", "wire", near.path, far.path))
            near.ip(
                f"address add {GOOD_NETWORK}.{NEAR}/24 dev veth", "link set wire up", f"address add {BAD_NETWORK}.{NEAR}/24 dev wire"
            )
            far.ip(
                "link set wire up",
                *(f"address add {host}/24 dev {'wire' if host.startswith(BAD_NETWORK) else 'veth'}" for host, _ in self.endpoints),
            )
            self._servers = stack.enter_context(Helper(Place(self._machine.other_cpus, far.namespace), "bench.ejection", "endpoints"))
            self._stack = stack.pop_all()
        return self

    def turn(self, trouble: str) -> None:
        """Makes the bad endpoints so, or good again."""
        self._wire.ask({"black_hole": "drop", "slow": "delay"}.get(trouble, "pass"))
        self._servers.ask(trouble if trouble in ("refuse", "reset") else "good")

    def __exit__(self, *error: object) -> None:
        self._stack.close()


# ---------------------------------------------------------------- the proxies


def _l4mesh(folder: Path, services: Sequence[Service], workers: int) -> list[str]:
    (service,) = services
    config = {
        "workers": workers,
        "admin": {"bind": f"unix:{folder}/admin.sock"},
        "access_log": {"path": f"{folder}/access.log", "when": "errors"},
        "listeners": [{"name": "echo", "bind": f"127.0.0.1:{service.port}", "cluster": "echo"}],
        "clusters": [
            {
                "name": "echo",
                "endpoints": [f"{host}:{port}" for host, port in service.endpoints],
                "balance": "round_robin",
                "connect": {"timeout": f"{CONNECT_MS}ms", "attempts": ATTEMPTS},
                "outlier_detection": {
                    "consecutive_failures": 1,
                    "interval": "100ms",
                    "latency": {"factor": 5, "floor": "20ms", "minimum_endpoints": 5, "minimum_connections": 1},
                },
            }
        ],
    }
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / "node.yaml").write_text(json.dumps(config))
    return [sys.executable, "-m", "l4mesh", "run", "-c", str(folder / "config")]


def _haproxy(folder: Path, services: Sequence[Service], workers: int) -> list[str]:
    (service,) = services
    lines = ["global", " maxconn 7000", f" nbthread {workers}", "defaults", " mode tcp", " balance roundrobin"]
    lines += [f" timeout connect {CONNECT_MS}ms", f" timeout check {ANSWER_MS}ms", " timeout client 1h", " timeout server 1h"]
    lines += [f" retries {ATTEMPTS - 1}", " option redispatch 1", "frontend echo", f" bind 127.0.0.1:{service.port} backlog 4096"]
    lines += [" default_backend echo", "backend echo", " option tcp-check", " tcp-check connect"]
    sent = MESSAGE.decode().replace(" ", "\\ ")
    lines += [f" tcp-check send {sent}", f" tcp-check expect string {sent}"]
    lines += [f" default-server check inter {CHECK_MS}ms fall 1 rise 2 observe layer4 error-limit 1 on-error mark-down"]
    lines += [f" server e{i} {host}:{port}" for i, (host, port) in enumerate(service.endpoints)]
    (folder / "haproxy.cfg").write_text("\n".join(lines) + "\n")
    return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]


def _envoy(folder: Path, services: Sequence[Service], workers: int) -> list[str]:
    from bench.proxies import _envoy_binary

    (service,) = services

    def address(host: str, port: int) -> dict[str, Any]:
        return {"socket_address": {"address": host, "port_value": port}}

    proxy = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "s",
        "cluster": "echo",
        "max_connect_attempts": ATTEMPTS,
    }
    text = {"text": MESSAGE.hex()}
    cluster = {
        "name": "echo",
        "type": "STATIC",
        "connect_timeout": f"{CONNECT_MS / 1000}s",
        "lb_policy": "ROUND_ROBIN",
        "circuit_breakers": {"thresholds": [dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 100000)]},
        "outlier_detection": {
            "interval": f"{CONNECT_MS / 1000}s",
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 1,
            "enforcing_consecutive_local_origin_failure": 100,
            "consecutive_5xx": 1,
            "max_ejection_percent": 50,
            "always_eject_one_host": True,
            "successful_active_health_check_uneject_host": False,
        },
        "health_checks": [
            {
                "timeout": f"{ANSWER_MS / 1000}s",
                "interval": f"{CHECK_MS / 1000}s",
                "no_traffic_interval": f"{CHECK_MS / 1000}s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 2,
                "reuse_connection": False,
                "tcp_health_check": {"send": text, "receive": [text]},
            }
        ],
        "load_assignment": {
            "cluster_name": "echo",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(*endpoint)}} for endpoint in service.endpoints]}],
        },
    }
    listener = {
        "name": "echo",
        "address": address("127.0.0.1", service.port),
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}],
    }
    config = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
    (folder / "envoy.json").write_text(json.dumps(config))
    quiet = ["--log-level", "error", "--disable-hot-restart"]
    return [_envoy_binary(), "-c", str(folder / "envoy.json"), "--concurrency", str(workers), *quiet]


_COMMANDS: dict[str, Callable[[Path, Sequence[Service], int], list[str]]] = {"haproxy": _haproxy, "envoy": _envoy, "l4mesh": _l4mesh}


# ---------------------------------------------------------------- the processes


def _lines() -> Iterator[str]:
    """Commands; each is answered when the loop comes round for the next."""
    print(flush=True)
    for line in sys.stdin:
        yield line.strip()
        print(flush=True)


class _Endpoint(asyncio.Protocol):
    resets = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self.resets:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
        else:
            self._transport.write(data)


class _BadEndpoint(_Endpoint):
    pass


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    for i in range(1, N_GOOD + 1):
        await loop.create_server(_Endpoint, f"{GOOD_NETWORK}.{i}", PORT, backlog=4096)
    bad = [f"{BAD_NETWORK}.{i}" for i in range(1, N_BAD + 1)]
    servers = [await loop.create_server(_BadEndpoint, host, PORT, backlog=4096) for host in bad]
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    print(flush=True)
    while line := (await commands.readline()).decode().strip():
        _BadEndpoint.resets = line == "reset"
        if line == "refuse":
            for server in servers:
                server.close()
            servers = []
        elif not servers:
            servers = [await loop.create_server(_BadEndpoint, host, PORT, backlog=4096) for host in bad]
        print(flush=True)


def _open_tun(path: str) -> int:
    """A TUN device named "wire" in the network namespace."""
    tunsetiff, tun, no_packet_information = 0x400454CA, 1, 0x1000

    def make() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, tunsetiff, struct.pack("16sH22x", b"wire", tun | no_packet_information))
        return fd

    return run_in_namespace(path, make)


def _carry(near: str, far: str) -> None:
    """The wire: passes packets on, later or never, as it is told."""
    ends = [_open_tun(near), _open_tun(far)]
    mode = "pass"
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    print(flush=True)
    while True:
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for fd in select.select([*ends, sys.stdin], [], [], left)[0]:
            if fd is sys.stdin:
                mode = sys.stdin.readline().strip()
                if not mode:
                    return
                print(flush=True)
                continue
            while True:
                try:
                    packet = os.read(fd, 2048)
                except BlockingIOError:
                    break
                if mode != "drop":
                    number += 1
                    later = DELAY_S if mode == "delay" else 0.0
                    heapq.heappush(waiting, (time.monotonic() + later, number, ends[fd == ends[0]], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):
                os.write(end, packet)


async def _ask(host: str, port: int) -> str:
    """One client; how it failed, or nothing."""
    try:
        async with asyncio.timeout(PATIENCE_MS / 1000):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(MESSAGE)
                return "" if await reader.readexactly(len(MESSAGE)) == MESSAGE else "wrong"
            finally:
                writer.close()
    except TimeoutError:
        return "timed_out"
    except asyncio.IncompleteReadError:
        return "closed"
    except OSError:
        return "reset"


async def _load(port: int, good: str) -> None:
    loop = asyncio.get_running_loop()
    print(flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    start = time.monotonic()
    count = int(RATE * (CALM_S + TROUBLE_S))
    late_s = 0.0
    tasks, direct = [], []
    for number in range(count):
        due = start + number / RATE
        if (left := due - time.monotonic()) > 0:
            await asyncio.sleep(left)
        late_s = max(late_s, time.monotonic() - due)
        tasks.append((due, loop.create_task(_ask("127.0.0.1", port))))
        if number % DIRECT_EVERY == 0:
            direct.append(loop.create_task(_ask(good, PORT)))
    failures = [(due, kind) for due, task in tasks if (kind := await task)]
    failed_direct = sum([bool(await task) for task in direct])
    print(json.dumps({"connections": count, "failures": failures, "late_s": late_s, "direct_failures": failed_direct}), flush=True)


def main() -> None:
    match sys.argv[1:]:
        case ["wire", near, far]:
            _carry(near, far)
        case ["endpoints"]:
            asyncio.run(_serve())
        case ["load", port, good]:
            asyncio.run(_load(int(port), good))


if __name__ == "__main__":
    main()
