"""A large configuration, loaded and reloaded while traffic runs: CPU, and what the traffic notices. l4mesh alone."""

from __future__ import annotations

import array
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from bench.generator import Load, Void, percentile
from bench.proxies import Proxy
from bench.stage import Machine, Stage

FILES = 50
CLUSTERS_A_FILE = 100
ENDPOINTS_A_CLUSTER = 10
RATE = 2000
CONNECTIONS = 50
BEFORE_S = 4.0
RELOAD_DEADLINE_S = 40.0
AFTER_S = 0.2
RELOADED = '"config_reloaded"'


@dataclass(frozen=True, slots=True)
class Reload:
    """``added_*``: all files come beside a small configuration; ``full_*``: every cluster changes; ``one_*``: those of a file.

    CPU is the process's, less what the traffic costs; seconds are from the first write to the log line; p99 in µs.
    """

    added_cpu_s: float
    before_p99: float
    full_cpu_s: float
    full_s: float
    full_p99: float
    one_cpu_s: float
    one_s: float
    one_p99: float


def run_reload(machine: Machine, repeats: int) -> list[Reload]:
    """Raises Void when traffic or a reload fails."""
    return [_measure(machine) for _ in range(repeats)]


def median_reload(reloads: list[Reload]) -> Reload:
    return Reload(*(statistics.median(getattr(one, name) for one in reloads) for name in Reload.__slots__))


def write_clusters(folder: Path, number: int, weight: int) -> None:
    """One file of clusters; the ``weight`` of each one's first endpoint is what changes."""
    clusters = []
    for at in range(CLUSTERS_A_FILE):
        base = number * CLUSTERS_A_FILE + at
        addresses = [f"10.{base >> 8}.{base & 255}.{1 + i}:80" for i in range(ENDPOINTS_A_CLUSTER)]
        first = f'{{address: "{addresses[0]}", weight: {weight}}}'
        rest = ", ".join(f'"{address}"' for address in addresses[1:])
        clusters.append(f"  - name: c{base}\n    endpoints: [{first}, {rest}]\n")
    new = folder / f".{number:02}"
    new.write_text("clusters:\n" + "".join(clusters))
    new.rename(folder / f"{number:02}.yaml")


def _measure(machine: Machine) -> Reload:
    with Stage(machine, ["l4mesh"]) as stage:
        proxy = stage.proxies["l4mesh"]
        small = proxy.process.settled_cpu_s()
        config = proxy.folder / "config"
        shown = count_reloads(proxy)
        for number in range(FILES):
            write_clusters(config, number, 1)
        _wait_for_reload(proxy, shown)
        added_cpu_s = proxy.process.settled_cpu_s() - small
        with stage.load("l4mesh", "pace", connections=CONNECTIONS) as load:
            before = _traffic(load, proxy, machine.folder, BEFORE_S, [], 0)
            idle_cpu = before.cpu_s / before.seconds
            full = _traffic(load, proxy, machine.folder, 8.0, list(range(FILES)), 2)
            one = _traffic(load, proxy, machine.folder, 4.0, [FILES // 2], 3)
    return Reload(
        added_cpu_s,
        before.p99,
        full.cpu_s - idle_cpu * full.seconds,
        full.seconds,
        full.p99,
        one.cpu_s - idle_cpu * one.seconds,
        one.seconds,
        one.p99,
    )


@dataclass(frozen=True, slots=True)
class _Window:
    cpu_s: float
    seconds: float
    p99: float


def _traffic(load: Load, proxy: Proxy, folder: Path, seconds: float, files: list[int], weight: int) -> _Window:
    """Requests for ``seconds``, and after half a second new contents for ``files``: what happened until they were in force."""
    path = folder / "latencies"
    load.begin(rate=RATE, count=int(RATE * seconds), path=str(path))
    time.sleep(0.5)
    shown = count_reloads(proxy)
    start_ns, start_cpu = time.monotonic_ns(), proxy.process.cpu_s()
    if files:
        for number in files:
            write_clusters(proxy.folder / "config", number, weight)
        _wait_for_reload(proxy, shown)
    else:
        time.sleep(seconds - 1)
    end_ns, end_cpu = time.monotonic_ns(), proxy.process.cpu_s()
    answer = load.end()
    latencies = array.array("q", path.read_bytes())
    first = max(0, int((start_ns - answer["start_ns"]) / 1e9 * RATE))
    last = math.ceil(((end_ns - answer["start_ns"]) / 1e9 + AFTER_S) * RATE)
    seen = sorted(latencies[first:last])
    if not seen:
        raise Void("the reload began after the traffic had ended")
    return _Window(end_cpu - start_cpu, (end_ns - start_ns) / 1e9, percentile(seen, 0.99) / 1e3)


def count_reloads(proxy: Proxy) -> int:
    """New plans that have come into force so far."""
    return (proxy.folder / "output.log").read_text().count(RELOADED)


def _wait_for_reload(proxy: Proxy, shown: int) -> None:
    deadline = time.monotonic() + RELOAD_DEADLINE_S
    while count_reloads(proxy) <= shown:
        if time.monotonic() > deadline:
            raise Void("the configuration was not reloaded in time")
        time.sleep(0.005)
