"""Endpoints come and go ten times a second under new connections at a fixed rate: which of these fail. l4mesh alone.

One that goes is taken out of the configuration first and stops later, as a pod with a pause before its stop; then its port refuses. Two
more never listen, and are in the list now and then: fewer than a connection has attempts, so each has a live endpoint that it can reach.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from bench.backends import listen, serve_echo
from bench.generator import Void
from bench.proxies import Proxy, scrape
from bench.reload import count_reloads
from bench.stage import Machine, Stage

SECONDS = 10
RATE = 5000
AT_ONCE = 1000
CHANGES_A_SECOND = 10
N_STAYING, N_MOVING, N_DEAD = 3, 16, 2
PAUSE_S = 1.5
"""From when an endpoint is out of the file until it stops: more than a reload takes on a busy machine."""
HOST = "127.80.0"
SHARE_OF_RELOADS_MIN = 0.1


@dataclass(frozen=True, slots=True)
class Churn:
    """``rate``: connections a second; ``failed``: of them, by how; percentiles: from when one was due until its answer, µs.
    ``changes``: times that the file was written; ``reloads``: that a new plan came into force;
    ``refused``: dials, which go on to the next endpoint.
    """

    seconds: float
    connections: int
    rate: float
    failed: dict[str, int]
    changes: int
    reloads: int
    refused: int
    p50: float
    p99: float
    p999: float


def run_churn(machine: Machine, seconds: int, seed: int) -> Churn:
    """Raises Void when nothing changed, or no dial failed: then nothing was shown."""
    with Stage(machine, ["l4mesh"], pinned=False, endpoints=N_STAYING) as stage:
        proxy = stage.proxies["l4mesh"]
        staying = [f"{host}:{port}" for host, port in proxy.services["echo"].endpoints]
        with stage.load("l4mesh", "connects", at_once=AT_ONCE) as load, _Endpoints(machine, seed) as endpoints:
            _write(proxy, [*staying, *endpoints.change()])
            reloads, (refused,) = count_reloads(proxy), scrape(proxy, "connect_failures")
            load.begin(rate=RATE, count=RATE * seconds)
            start = time.monotonic()
            changes = seconds * CHANGES_A_SECOND
            for number in range(changes):
                time.sleep(max(0.0, start + number / CHANGES_A_SECOND - time.monotonic()))
                _write(proxy, [*staying, *endpoints.change()])
            seen = load.end()
            took = time.monotonic() - start
            reloads = count_reloads(proxy) - reloads
            refused = scrape(proxy, "connect_failures")[0] - refused
    if reloads < SHARE_OF_RELOADS_MIN * changes:
        raise Void(f"of {changes} changes only {reloads} came into force")
    if not refused:
        raise Void("no dial was refused")
    return Churn(
        took, RATE * seconds, RATE * seconds / took, seen["failed"], changes, reloads, int(refused),
        seen["p50"], seen["p99"], seen["p99.9"],
    )  # fmt: skip


def _write(proxy: Proxy, endpoints: Sequence[str]) -> None:
    file = proxy.folder / "config" / "node.yaml"
    config: dict[str, Any] = json.loads(file.read_text())
    config["clusters"][0]["endpoints"] = endpoints
    new = file.with_name(".node")
    new.write_text(json.dumps(config, indent=1))
    new.rename(file)


class _Endpoints:
    """Those that come and go, each a process while it listens. A context."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self._cpus = machine.other_cpus
        self._choose = random.Random(seed).choice
        self._addresses = [(f"{HOST}.{1 + i}", machine.ports.take()) for i in range(N_MOVING + N_DEAD)]
        self._dead = set(self._addresses[N_MOVING:])
        self._listed: set[tuple[str, int]] = set()
        self._stops: dict[tuple[str, int], float] = {}
        self._running: dict[tuple[str, int], BaseProcess] = {}

    def __enter__(self) -> _Endpoints:
        return self

    def change(self) -> list[str]:
        """Adds or removes one, and gives those that are to be in the file."""
        now = time.monotonic()
        for address in [address for address, at in self._stops.items() if at <= now]:
            del self._stops[address]
            self._stop(address)
        address = self._choose([address for address in self._addresses if address not in self._stops])
        if address in self._listed:
            self._listed.remove(address)
            if address not in self._dead:
                self._stops[address] = now + PAUSE_S
        else:
            if address not in self._dead:
                self._start(address)
            self._listed.add(address)
        return [f"{host}:{port}" for host, port in sorted(self._listed)]

    def _start(self, address: tuple[str, int]) -> None:
        # Forked: a program of its own would take longer to start than an endpoint lives.
        with listen(*address) as listener:
            process = multiprocessing.get_context("fork").Process(target=self._serve, args=(listener,), daemon=True)
            process.start()
        self._running[address] = process

    def _serve(self, listener: socket.socket) -> None:
        os.sched_setaffinity(0, self._cpus)
        serve_echo(listener)

    def _stop(self, address: tuple[str, int]) -> None:
        process = self._running.pop(address)
        process.kill()
        process.join()

    def __exit__(self, *error: object) -> None:
        for address in list(self._running):
            self._stop(address)
