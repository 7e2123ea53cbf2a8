"""Limits of bandwidth: how exact they are, what they cost, and how the connections of a workload share one. l4mesh alone."""

from __future__ import annotations

import dataclasses
import json
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from bench.generator import Void
from bench.proxies import scrape
from bench.stage import Machine, Stage

MB = 1_000_000
RATES = (MB, 10 * MB, 100 * MB, 1000 * MB)
SHARED_RATE = 100 * MB
SHARED_BY = 8
WORKLOAD = "127.10.3.1"
WARM_S = 1
SECONDS = 3
RELOAD_DEADLINE_S = 20.0
LISTENER = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Flow:
    """``rate``: bytes a second that were asked for, 0: as many as can be; ``measured``: that the receiver got once it ran.
    ``spliced``: share of the bytes. ``least`` and ``most``: of a connection, over the mean."""

    name: str
    rate: int
    measured: float
    cpu_s_per_gb: float
    spliced: float
    least: float
    most: float


def run_bandwidth(machine: Machine, repeats: int) -> list[Flow]:
    """Raises Void when a transfer fails."""
    flows = []
    with Stage(machine, ["l4mesh"], ("iperf3",)) as stage:
        ports = _limit(machine, stage)
        for _ in range(repeats):
            flows += [_measure(stage, f"{rate // MB:,} MB/s", rate, port, 1) for rate, port in ports.items()]
            flows.append(
                _measure(stage, f"{SHARED_BY} connections of a workload, {SHARED_RATE // MB:,} MB/s", SHARED_RATE, ports[0], SHARED_BY)
            )
    return flows


def summarize_bandwidth(flows: Sequence[Flow]) -> dict[str, Any]:
    """Medians by name."""
    rounds = [dataclasses.asdict(flow) for flow in flows]
    entries = {}
    for name in dict.fromkeys(flow.name for flow in flows):
        own = [taken for taken in rounds if taken["name"] == name]
        entries[name] = {key: statistics.median(taken[key] for taken in own) for key in own[0] if key != "name"}
    return {"entries": entries, "rounds": rounds}


def _limit(machine: Machine, stage: Stage) -> dict[int, int]:
    """Adds a listener for each rate, and none (0), to the running proxy: the port of each."""
    proxy = stage.proxies["l4mesh"]
    ports = {rate: machine.ports.take() for rate in (0, *RATES)}
    cluster = {"name": "limited", "endpoints": [f"127.64.9.1:{stage.backends.port('iperf3')}"]}
    listeners = []
    for rate, port in ports.items():
        limit = f"{rate}B/s" if rate else "off"
        bandwidth = {"to_upstream": limit, "to_downstream": limit}
        listeners.append(
            {"name": f"at-{rate}", "bind": f"{LISTENER}:{port}", "cluster": "limited", "bandwidth_per_connection": bandwidth}
        )
    workload = {"name": "shared", "addresses": [WORKLOAD], "bandwidth": {"send": f"{SHARED_RATE}B/s"}}
    new = proxy.folder / "config" / ".bandwidth"
    new.write_text(yaml.safe_dump({"listeners": listeners, "clusters": [cluster], "workloads": [workload]}))
    new.rename(proxy.folder / "config" / "bandwidth.yaml")
    deadline = time.monotonic() + RELOAD_DEADLINE_S
    while not all(_answers(port) for port in ports.values()):
        if time.monotonic() > deadline:
            raise Void("the limits were not in force in time")
        time.sleep(0.05)
    return ports


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LISTENER, port)) == 0


def _measure(stage: Stage, name: str, rate: int, port: int, streams: int) -> Flow:
    proxy = stage.proxies["l4mesh"]
    source = WORKLOAD if streams > 1 else "127.10.4.1"
    command = ["iperf3", "-J", "-c", LISTENER, "-p", str(port), "-B", source, "-P", str(streams), "-O", str(WARM_S), "-t", str(SECONDS)]
    before, cpu = scrape(proxy, "bytes_spliced", "bytes_copied"), proxy.process.settled_cpu_s()
    done = subprocess.run(stage.load_place.command(command), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Void(f"iperf3: {(done.stderr or done.stdout).strip()[-300:]}")
    after, cpu = scrape(proxy, "bytes_spliced", "bytes_copied"), proxy.process.settled_cpu_s() - cpu
    spliced, copied = after[0] - before[0], after[1] - before[1]
    ended = json.loads(done.stdout)["end"]
    each = [stream["receiver"]["bytes"] / stream["receiver"]["seconds"] for stream in ended["streams"]]
    return Flow(
        name if rate else "no limit",
        rate,
        sum(each),
        cpu / (spliced + copied) * 1e9,
        spliced / (spliced + copied),
        min(each) / statistics.mean(each),
        max(each) / statistics.mean(each),
    )
