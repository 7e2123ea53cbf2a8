"""The rows that compare proxies: what each measures, in which unit, and what l4mesh must reach (design figures)."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from bench.capture import captured_stage
from bench.generator import Void
from bench.mtls import Chain
from bench.proxies import SPLICED
from bench.rounds import AGAIN, Round, Sample, run_rounds
from bench.stage import DIRECT, PEERS, Machine, Stage, kind_of

MESSAGE_BYTES = 64
REQUESTS = 50_000
REQUEST_CONNECTIONS = 16
CONNECTS = 8000
CONNECTS_AT_ONCE = 8
IDLE_CONNECTIONS = 5000
IDLE_TLS_CONNECTIONS = 1000
MEMORY_BLOCKS = 3
PACED_CONNECTIONS = 50
GIB = 1 << 30
ON_ITS_WAY_AT_MOST = 64 << 20
"""So much of a stream may be in buffers (two sockets that receive, of 32 MiB each at most) when iperf3 ends the transfer."""
TOOL_DEADLINE_S = 60

PLAIN_PEERS = tuple(peer for peer in PEERS if peer not in SPLICED)


@dataclass(frozen=True, slots=True)
class Effort:
    """How many blocks, and how much work one measurement is: ``share`` of the full run's."""

    blocks: int
    share: float
    discard_first: bool

    def count(self, full: int) -> int:
        return max(200, int(full * self.share))


@dataclass(frozen=True, slots=True)
class Limit:
    """``of_best``: share of the best peer's figure, or of the figure of the ``peer`` named; ``of_direct``: of the direct one;
    ``absolute``: in the row's unit."""

    of_best: float | None = None
    of_direct: float | None = None
    absolute: float | None = None
    of_peer: float | None = None
    peer: str = ""


Measure = Callable[[Stage, str, Effort], Sample]
MakeStage = Callable[[Machine, Sequence[str]], AbstractContextManager[Stage]]


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    title: str
    unit: str
    measure: Measure
    stage: MakeStage
    peers: tuple[str, ...] = PLAIN_PEERS
    lower_is_better: bool = True
    must: Limit | None = None
    goal: Limit | None = None
    mirrored: bool = True
    controlled: bool = True
    """With the second l4mesh."""
    direct: bool = True
    """Beside the direct one."""
    most_blocks: int = 1000
    """Fewer than the run has, where they all come out alike."""

    @property
    def entries(self) -> tuple[str, ...]:
        return (*((DIRECT,) if self.direct else ()), *self.peers, "l4mesh", *((AGAIN,) if self.controlled else ()))

    def run(self, machine: Machine, proxies: Sequence[str], effort: Effort, seed: int) -> list[Round]:
        entries = [entry for entry in self.entries if kind_of(entry) in proxies]
        with self.stage(machine, entries) as stage:
            return run_rounds(
                entries,
                lambda entry: self.measure(stage, entry, effort),
                min(effort.blocks, self.most_blocks),
                seed,
                discard_first=effort.discard_first,
                mirrored=self.mirrored,
            )


# ---------------------------------------------------------------- our own load


def measure_requests(full: int = REQUESTS) -> Measure:
    def measure(stage: Stage, entry: str, effort: Effort) -> Sample:
        count = effort.count(full)
        with stage.load(entry, "requests", connections=REQUEST_CONNECTIONS, size=MESSAGE_BYTES) as load:
            load.run(count=count // 10)
            return stage.cpu_sample(entry, lambda: (count, load.run(count=count)["seconds"]), 1e6)

    return measure


def measure_connects(full: int = CONNECTS) -> Measure:
    def measure(stage: Stage, entry: str, effort: Effort) -> Sample:
        count = effort.count(full)
        with stage.load(entry, "connects", at_once=CONNECTS_AT_ONCE, size=MESSAGE_BYTES) as load:
            load.run(count=count // 10)
            seen = stage.check_connections(entry, load)
            sample = stage.cpu_sample(entry, lambda: (count, load.run(count=count)["seconds"]), 1e6)
        return dataclasses.replace(sample, detail=sample.detail | seen)

    return measure


def measure_latency(rate: int, seconds: int = 2) -> Measure:
    def measure(stage: Stage, entry: str, effort: Effort) -> Sample:
        with stage.load(entry, "pace", connections=PACED_CONNECTIONS, size=MESSAGE_BYTES) as load:
            load.run(rate=rate, count=rate // 10)
            seen = load.run(rate=rate, count=effort.count(seconds * rate))
        return Sample(seen["p99"], rate, {name: seen[name] for name in ("p50", "p99", "p99.9", "late_us")})

    return measure


def measure_idle(count: int, ends: int = 1) -> Measure:
    """A proxy that has just been started and has served a few connections, without and with the idle ones; for each of the ``ends``
    of a connection that are its own."""

    def measure(stage: Stage, entry: str, effort: Effort) -> Sample:
        proxy = stage.start(entry)
        try:
            with stage.load(entry, "requests", connections=REQUEST_CONNECTIONS, size=MESSAGE_BYTES) as load:
                load.run(count=2000)
            proxy.process.settled_cpu_s()
            before = proxy.process.memory_kib()
            with stage.load(entry, "hold", connections=count, size=MESSAGE_BYTES):
                proxy.process.settled_cpu_s()
                after = proxy.process.memory_kib()
        finally:
            stage.proxies.pop(entry).process.stop()
        grown = {name: (after[name] - before[name]) / count / ends for name in after}
        return Sample(sum(grown.values()), None, {**grown, "connections": count, "before_kib": before, "after_kib": after})

    return measure


# ---------------------------------------------------------------- other people's load


def run_tool(stage: Stage, *command: str) -> str:
    done = subprocess.run(stage.load_place.command(command), capture_output=True, text=True, timeout=TOOL_DEADLINE_S, check=False)
    if done.returncode:
        raise Void(f"{command[0]}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def measure_wrk(stage: Stage, entry: str, effort: Effort) -> Sample:
    target = stage.target(entry, "http")
    seconds = max(1, round(effort.share))

    def work() -> tuple[float, float]:
        url = f"http://{target.host}:{target.port}/"
        said = run_tool(stage, "wrk", "-t1", f"-c{REQUEST_CONNECTIONS}", f"-d{seconds}s", url)
        found = re.search(r"(\d+) requests in ([\d.]+)(m?s)", said)
        if found is None or "Socket errors" in said or "Non-2xx" in said:
            raise Void(f"wrk: {said.strip()[-300:]}")
        return int(found[1]), float(found[2]) / (1000 if found[3] == "ms" else 1)

    return stage.cpu_sample(entry, work, 1e6)


def measure_redis(stage: Stage, entry: str, effort: Effort) -> Sample:
    target = stage.target(entry, "redis")
    count = effort.count(40_000)

    def work() -> tuple[float, float]:
        where = ["-h", target.host, "-p", str(target.port), "-c", str(REQUEST_CONNECTIONS)]
        said = run_tool(stage, "redis-benchmark", *where, "-n", str(count), "-t", "get", "-d", "64", "--csv")
        found = re.search(r'^"GET","([\d.]+)"', said, re.MULTILINE)
        if found is None:
            raise Void(f"redis-benchmark: {said.strip()[-300:]}")
        return count, count / float(found[1])

    return stage.cpu_sample(entry, work, 1e6)


def run_iperf3(stage: Stage, entry: str, *options: str, streams: int = 1) -> tuple[float, float]:
    """Gives bytes that arrived and seconds. Raises Void when more is missing than can be on its way at the end."""
    target = stage.target(entry, "iperf3")
    said = run_tool(stage, "iperf3", "-J", "-c", target.host, "-p", str(target.port), "-P", str(streams), *options)
    ended = json.loads(said)["end"]
    sent, arrived = ended["sum_sent"]["bytes"], ended["sum_received"]["bytes"]
    if not 0 <= sent - arrived <= ON_ITS_WAY_AT_MOST * streams:
        raise Void(f"iperf3: {sent} bytes sent, {arrived} arrived")
    return arrived, ended["sum_received"]["seconds"]


def check_bytes(stage: Stage, entry: str) -> None:
    """4 MiB in large messages there and back, every byte compared. Raises Void."""
    with stage.load(entry, "requests", connections=1, size=1 << 16) as load:
        load.run(count=64)


def measure_bulk(*options: str, full: int = GIB) -> Measure:
    def measure(stage: Stage, entry: str, effort: Effort) -> Sample:
        check_bytes(stage, entry)
        size = str(effort.count(full))
        return stage.cpu_sample(entry, lambda: run_iperf3(stage, entry, "-n", size, *options), 1e9)

    return measure


def measure_streams(stage: Stage, entry: str, effort: Effort) -> Sample:
    check_bytes(stage, entry)
    arrived, seconds = run_iperf3(stage, entry, "-t", "1", streams=8)
    return Sample(arrived * 8 / seconds / 1e9, None, {"units": arrived, "seconds": seconds})


# ---------------------------------------------------------------- the stages


def stage_of(*services: str, pinned: bool = True) -> MakeStage:
    return lambda machine, entries: Stage(machine, entries, services, pinned=pinned)


def chain_of(*services: str, resumption: bool = True, inbound_only: bool = False) -> MakeStage:
    return lambda machine, entries: Chain(machine, entries, services, resumption=resumption, inbound_only=inbound_only)


def idle_stage(make: MakeStage) -> MakeStage:
    """Backends only: each measurement starts a proxy of its own."""

    @contextmanager
    def stage(machine: Machine, entries: Sequence[str]) -> Iterator[Stage]:
        with make(machine, [DIRECT]) as made:
            made.entries = entries
            yield made

    return stage


AT_MOST_BEST = Limit(of_best=1.0)

ROWS = (
    Row(
        "request", "keep-alive request, 64 B", "µs CPU", measure_requests(), stage_of("echo"),
        must=AT_MOST_BEST, goal=Limit(of_best=0.8),
    ),
    Row(
        "connect", "connect, request, close", "µs CPU", measure_connects(), stage_of("echo"),
        must=AT_MOST_BEST, goal=Limit(of_best=0.85),
    ),
    Row(
        "bulk-up", "bulk, 1 stream, to the server", "CPU s/GB", measure_bulk(), stage_of("iperf3", "echo"),
        PEERS, must=Limit(of_best=0.6), goal=Limit(of_best=0.5),
    ),
    Row(
        "bulk-down", "bulk, 1 stream, to the client", "CPU s/GB", measure_bulk("-R"), stage_of("iperf3", "echo"),
        PEERS, must=Limit(of_best=0.6), goal=Limit(of_best=0.5),
    ),
    Row(
        "streams", "bulk, 8 streams, all on both CPUs", "Gbit/s", measure_streams, stage_of("iperf3", "echo", pinned=False),
        PEERS, lower_is_better=False, must=Limit(of_best=1.4), goal=Limit(of_direct=0.95), mirrored=False,
    ),
    Row(
        "idle", f"idle connection, {IDLE_CONNECTIONS:,} of them: user memory", "KiB",
        measure_idle(IDLE_CONNECTIONS), idle_stage(stage_of("echo")),
        must=Limit(absolute=1.0), goal=Limit(absolute=0.3),
        mirrored=False, controlled=False, direct=False, most_blocks=MEMORY_BLOCKS,
    ),
    Row(
        "request-captured", "keep-alive request, 64 B, transparent", "µs CPU", measure_requests(), captured_stage,
        must=AT_MOST_BEST, goal=Limit(of_best=0.8),
    ),
    Row(
        "connect-captured", "connect, request, close, transparent", "µs CPU", measure_connects(), captured_stage,
        must=AT_MOST_BEST, goal=Limit(of_best=0.85),
    ),
    Row("wrk", "HTTP request (wrk, nginx behind)", "µs CPU", measure_wrk, stage_of("http"), mirrored=False),
    Row("redis", "Redis GET (redis-benchmark)", "µs CPU", measure_redis, stage_of("redis"), mirrored=False),
    Row(
        "latency-2k", "p99 at 2,000 requests/s", "µs", measure_latency(2000), stage_of("echo"), mirrored=False,
    ),
    Row(
        "latency-10k", "p99 at 10,000 requests/s", "µs", measure_latency(10_000), stage_of("echo"), mirrored=False,
    ),
    Row(
        "mtls-request", "mTLS, two proxies: keep-alive request, 64 B", "µs CPU", measure_requests(12_000), chain_of("echo"),
        direct=False, must=AT_MOST_BEST, goal=Limit(of_best=0.8),
    ),
    Row(
        "mtls-connect-full", "mTLS, two proxies: connect, full handshake, request, close", "µs CPU", measure_connects(400),
        chain_of("echo", resumption=False), direct=False,
        must=Limit(of_peer=0.65, peer="haproxy"), goal=Limit(of_peer=0.5, peer="envoy"),
    ),
    Row(
        "mtls-connect-resumed", "mTLS, two proxies: connect, resumed handshake, request, close", "µs CPU", measure_connects(600),
        chain_of("echo"), direct=False,
        must=Limit(of_peer=0.65, peer="haproxy"), goal=Limit(of_peer=0.5, peer="envoy"),
    ),
    Row(
        "mtls-bulk-up", "mTLS, two proxies: bulk, 1 stream, to the server", "CPU s/GB", measure_bulk(full=GIB // 4),
        chain_of("iperf3", "echo"), direct=False, mirrored=False,
        must=Limit(of_peer=1.0, peer="envoy"), goal=Limit(of_peer=0.7, peer="envoy"),
    ),
    Row(
        "mtls-bulk-down", "mTLS, two proxies: bulk, 1 stream, to the client", "CPU s/GB", measure_bulk("-R", full=GIB // 4),
        chain_of("iperf3", "echo"), direct=False, mirrored=False,
        must=Limit(of_peer=1.0, peer="envoy"), goal=Limit(of_peer=0.7, peer="envoy"),
    ),
    Row(
        "mtls-idle", f"mTLS: idle connection, {IDLE_TLS_CONNECTIONS:,} of them: user memory of a TLS end", "KiB",
        measure_idle(IDLE_TLS_CONNECTIONS, ends=2), idle_stage(chain_of("echo", resumption=False)),
        must=Limit(absolute=24.0), mirrored=False, controlled=False, direct=False, most_blocks=MEMORY_BLOCKS,
    ),
    Row(
        "handshake", "mTLS, the server's proxy: connect, full handshake, request, close", "µs CPU", measure_connects(400),
        chain_of("echo", resumption=False, inbound_only=True), direct=False, mirrored=False,
    ),
    Row(
        "mtls-latency-2k", "mTLS, two proxies: p99 at 2,000 requests/s", "µs", measure_latency(2000, 1), chain_of("echo"),
        direct=False, mirrored=False,
    ),
)  # fmt: skip
