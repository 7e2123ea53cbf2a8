"""A storm of TLS connections with a certificate of another CA, beside good traffic: what that notices, and what refusing costs.

The good traffic is requests at a fixed rate over mTLS connections that nginx, beside the load, holds to the proxy under test. The
storm goes to the same port. Every one of its connections must be refused.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import random
import socket
import ssl
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from bench.certificates import Credentials, make_credentials
from bench.generator import Helper, Load, Void
from bench.mtls import Chain
from bench.rows import PLAIN_PEERS
from bench.stage import Machine

ENTRIES = (*PLAIN_PEERS, "l4mesh")
RATE = 1000
CONNECTIONS = 20
STORM_RATE = 300
STORM_AT_ONCE = 16
SECONDS = 2
REPEATS = 5
TURN_S = 60
"""So that a machine which is slower for some minutes is so for all."""
CALM_S_MAX = 10
ANSWER_S = 5.0
SHARE_OF_RATE_MIN = 0.8


@dataclass(frozen=True, slots=True)
class Window:
    """µs from when a request was due."""

    p50: float
    p99: float
    p999: float


@dataclass(frozen=True, slots=True)
class Storm:
    """``refused_rate``: connections a second; ``refused_cpu_us``: CPU of the proxy for each, above what the good traffic costs."""

    entry: str
    calm: Window
    storm: Window
    refused: int
    refused_rate: float
    refused_cpu_us: float


def run_storm(machine: Machine, proxies: Sequence[str], seconds: int | None, repeats: int, seed: int) -> list[Storm]:
    """``seconds``: of storm for each proxy, in turns of ``TURN_S`` at most; None: ``repeats`` short ones. Raises Void when a check fails."""
    entries = [entry for entry in ENTRIES if entry in proxies]
    stranger = make_credentials(Path(mkdtemp(prefix="stranger-", dir=machine.folder)), "client")[0]
    storms = []
    shuffle = random.Random(seed).shuffle
    with Chain(machine, entries, resumption=True, inbound_only=True) as stage:
        turns = math.ceil(seconds / TURN_S) if seconds else repeats
        for _ in range(turns):
            shuffle(entries)
            storms += [_measure(stage, entry, stranger, seconds // turns if seconds else SECONDS) for entry in entries]
    return storms


def summarize_storm(storms: Sequence[Storm]) -> dict[str, Any]:
    """``entries``: the median of each figure over the rounds."""

    def median(rounds: Sequence[dict[str, Any]], *keys: str) -> float:
        values = []
        for taken in rounds:
            value: Any = taken
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    rounds = [dataclasses.asdict(one) for one in storms]
    entries = {}
    for name in dict.fromkeys(one.entry for one in storms):
        own = [taken for taken in rounds if taken["entry"] == name]
        entries[name] = {
            **{f"{when}_{key}": median(own, when, key) for when in ("calm", "storm") for key in Window.__slots__},
            **{key: median(own, key) for key in ("refused", "refused_rate", "refused_cpu_us")},
        }
    return {"entries": entries, "rounds": rounds}


def _measure(stage: Chain, entry: str, stranger: Credentials, seconds: int) -> Storm:
    process = stage.proxies[entry].process
    with stage.load(entry, "pace", connections=CONNECTIONS) as load:
        _window(load, 1)
        calm_s = min(seconds, CALM_S_MAX)
        before = process.cpu_s()
        calm = _window(load, calm_s)
        calm_cpu = (process.cpu_s() - before) / calm_s
        files = {"port": stage.tls_ports[entry], "certificate": str(stranger.certificate), "key": str(stranger.private_key)}
        with Helper(stage.load_place, "bench.storm", json.dumps(files), idle=True) as storm:
            before, started = process.cpu_s(), time.monotonic()
            beside = _window(load, seconds)
            ends: dict[str, int] = storm.finish()
            used, took = process.cpu_s() - before, time.monotonic() - started
    refused = ends.pop("refused", 0)
    if ends or refused < SHARE_OF_RATE_MIN * STORM_RATE * seconds:
        raise Void(f"{entry}: the storm had {refused} connections refused in {took:.1f} s; others: {ends}")
    return Storm(entry, calm, beside, refused, refused / took, (used - calm_cpu * took) / refused * 1e6)


def _window(load: Load, seconds: int) -> Window:
    seen = load.run(rate=RATE, count=RATE * seconds)
    return Window(seen["p50"], seen["p99"], seen["p99.9"])


# ---------------------------------------------------------------- the process that makes it


def _attempt(context: ssl.SSLContext, port: int, number: int) -> str:
    """One connection, from one of many addresses, and how it ended. A TLS 1.3 client learns only afterwards what is thought of it."""
    source = (f"127.20.{number // 250 % 250}.{1 + number % 250}", 0)
    try:
        with (
            socket.create_connection(("127.0.0.1", port), ANSWER_S, source) as plain,
            context.wrap_socket(plain) as secure,
        ):
            secure.sendall(b"let me in")
            return "accepted" if secure.recv(1) else "refused"
    except TimeoutError:
        return "timed out"
    except (ssl.SSLError, ConnectionError):
        return "refused"


def main() -> None:
    task = json.loads(sys.argv[1])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(task["certificate"], task["key"])
    numbers, begun, ended = itertools.count(), threading.Event(), threading.Event()
    counts: collections.Counter[str] = collections.Counter()
    start = time.monotonic()

    def attack() -> None:
        while True:
            number = next(numbers)
            if ended.wait(max(0.0, start + number / STORM_RATE - time.monotonic())):
                return
            counts[_attempt(context, task["port"], number)] += 1
            begun.set()

    threads = [threading.Thread(target=attack) for _ in range(STORM_AT_ONCE)]
    for thread in threads:
        thread.start()
    begun.wait(ANSWER_S)
    print(flush=True)
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
