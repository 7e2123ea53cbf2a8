"""One source opens connections as fast as it can, hundreds at a time: what another notices that opens few at a fixed rate.

A connection of the other counts from when it was due until its first byte has come back. Both come through one proxy; with mutual TLS
a second one, which has the first one's address for all, is behind it. Each uses a service of its own: with one for both, the queue at
its server is in the figure, which no proxy makes shorter. The storm and its server give way on the load's CPU.
"""

from __future__ import annotations

import itertools
import json
import random
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from bench.backends import ECHO_IDLE
from bench.generator import ROOT, Helper, Target, Void, build, percentile
from bench.mtls import Chain
from bench.process import Place
from bench.rows import PLAIN_PEERS
from bench.stage import DIRECT, Machine, Stage

ENTRIES = (DIRECT, *PLAIN_PEERS, "l4mesh")
RATE = 200
MTLS_RATE = 20
TOGETHER = 20
"""Of the other's connections with mutual TLS, for none to wait for the one before it."""
AT_ONCE = 400
SECONDS = 2
REPEATS = 9
STORM_COUNT = 1000
ANSWER_S = 30.0
OTHER = "127.10.0.2"
SERVICES = ("echo", ECHO_IDLE)


@dataclass(frozen=True, slots=True)
class Fairness:
    """µs of the other's connections, without and beside the storm; connections a second that the storm made."""

    entry: str
    calm_p50: float
    calm_p99: float
    storm_p50: float
    storm_p99: float
    storm_rate: float


def run_fairness(machine: Machine, proxies: Sequence[str], repeats: int, seed: int, *, mtls: bool = False) -> list[Fairness]:
    """Raises Void when a connection fails."""
    entries = [entry for entry in ENTRIES if entry in proxies]
    shuffle = random.Random(seed).shuffle
    measured = []
    with Chain(machine, entries, SERVICES, resumption=True, apart=True) if mtls else Stage(machine, entries, SERVICES) as stage:
        for turn in range(repeats):
            shuffle(entries)
            measured += [_measure(stage, entry, turn, mtls=mtls) for entry in entries]
    return measured


def summarize_fairness(measured: Sequence[Fairness]) -> dict[str, Any]:
    """``entries``: the median of each figure over the rounds."""
    rounds = [asdict(one) for one in measured]
    entries = {}
    for name in dict.fromkeys(one.entry for one in measured):
        own = [taken for taken in rounds if taken["entry"] == name]
        entries[name] = {key: statistics.median(taken[key] for taken in own) for key in Fairness.__slots__ if key != "entry"}
    return {"entries": entries, "rounds": rounds}


def _measure(stage: Stage, entry: str, turn: int, *, mtls: bool) -> Fairness:
    target = stage.target(entry)
    calm = _open_at_rate(stage.load_place, target, mtls=mtls)
    # A source for each round: the ports of the one before are still in TIME_WAIT.
    flooded = stage.target(entry, ECHO_IDLE)
    task = {"host": flooded.host, "port": flooded.port, "source": f"127.11.{turn}.1"}
    with Helper(stage.load_place, "bench.fairness", "storm", json.dumps(task), idle=True) as storm:
        beside = _open_at_rate(stage.load_place, target, mtls=mtls)
        rate = storm.finish()
    return Fairness(entry, *calm, *beside, rate)


def _open_at_rate(place: Place, target: Target, *, mtls: bool) -> tuple[float, float]:
    """p50 and p99 in µs."""
    how = {"rate": MTLS_RATE, "together": TOGETHER} if mtls else {"rate": RATE, "together": 1}
    task = json.dumps({"host": target.host, "port": target.port} | how)
    command = place.command([sys.executable, "-m", "bench.fairness", "rate", task])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise Void("a connection beside the storm failed")
    p50, p99 = json.loads(done.stdout)
    return p50, p99


# ---------------------------------------------------------------- the processes that make it


def _run_rate(host: str, port: int, rate: int, together: int) -> tuple[float, float]:
    took = []
    numbers = itertools.count()
    start = time.monotonic()

    def open_each() -> None:
        while (number := next(numbers)) < rate * SECONDS:
            due = start + number / rate
            time.sleep(max(0.0, due - time.monotonic()))
            with socket.create_connection((host, port), ANSWER_S, (OTHER, 0)) as client:
                client.sendall(b"x")
                if client.recv(1) != b"x":
                    raise ConnectionError("closed before it answered")
            took.append(round((time.monotonic() - due) * 1e9))

    with ThreadPoolExecutor(together) as pool:
        for one in [pool.submit(open_each) for _ in range(together)]:
            one.result()
    took.sort()
    return percentile(took, 0.5) / 1e3, percentile(took, 0.99) / 1e3


def _run_storm(host: str, port: int, source: str) -> float:
    """Until standard input ends."""
    load = build()
    start, made = time.monotonic(), 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        load.connect_each(host, port, STORM_COUNT, AT_ONCE, 64, source, 1, made)
        if made == 0:
            print(flush=True)
        made += STORM_COUNT
    return made / (time.monotonic() - start)


def main() -> None:
    what, task = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(_run_storm(**task) if what == "storm" else _run_rate(**task)), flush=True)


if __name__ == "__main__":
    main()
