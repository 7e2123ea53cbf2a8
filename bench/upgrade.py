"""l4mesh replaced by a new process of itself, again and again, under new connections, live requests and idle connections: what is lost,
what stalls. l4mesh alone.

One connection that fails makes the run void: there is no share of losses to report.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.generator import Load, Void
from bench.stage import Machine, Stage
from l4mesh.runtime.upgrade import Account, request_upgrade

UPGRADES = 200
CONNECT_RATE = 2000
AT_ONCE = 16
TICK_S = 0.05
REQUEST_RATE = 1000
LIVE = 50
IDLE = 1000
WINDOW_S = 1.0
CALM_WINDOWS = 3
END_S = 20.0


@dataclass(frozen=True, slots=True)
class Upgrades:
    """``connections``: short ones that were made, asked, answered and closed meanwhile, ``rate`` a second; none failed.
    ``handed_over``: live ones that crossed at each upgrade. ``switch``: from when the new process accepts until it serves alone, ms.
    ``stall``: the latest answer of a live connection around each upgrade, ms; ``calm_stall``: the same without one.
    """

    upgrades: int
    connections: int
    rate: float
    handed_over: float
    left: float
    switch_p50_ms: float
    switch_max_ms: float
    calm_stall_ms: float
    stall_p50_ms: float
    stall_max_ms: float


def run_upgrades(machine: Machine, count: int) -> Upgrades:
    """``count`` upgrades in a row. Raises Void when a connection fails or an upgrade does."""
    accounts: list[Account] = []
    try:
        with Stage(machine, ["l4mesh"], pinned=False) as stage:
            path = str(stage.proxies["l4mesh"].folder / "upgrade.sock")
            with (
                stage.load("l4mesh", "connects", at_once=AT_ONCE) as connects,
                stage.load("l4mesh", "pace", connections=LIVE) as live,
                stage.load("l4mesh", "hold", connections=IDLE),
                _Storm(connects) as storm,
            ):
                calm = max(_latest_ms(live, machine.folder) for _ in range(CALM_WINDOWS))
                stalls = [_stall_ms(live, machine.folder, lambda: accounts.append(request_upgrade(path))) for _ in range(count)]
                done, seconds = storm.stop()
    finally:
        if accounts:
            _end(accounts[-1].new)
    switches = [account.seconds * 1000 for account in accounts]
    return Upgrades(
        count, done, done / seconds,
        statistics.mean(account.handed_over for account in accounts), statistics.mean(account.left for account in accounts),
        statistics.median(switches), max(switches), calm, statistics.median(stalls), max(stalls),
    )  # fmt: skip


class _Storm:
    """New connections at a steady rate, until stopped. Raises Void there when one failed."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._done = 0
        self._failure: Void | None = None
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._began = time.monotonic()

    def _run(self) -> None:
        try:
            while not self._enough.is_set():
                due = int((time.monotonic() - self._began) * CONNECT_RATE) - self._done
                if due < AT_ONCE:
                    time.sleep(AT_ONCE / CONNECT_RATE)
                    continue
                self._load.run(count=due)
                self._done += due
        except Void as failure:
            self._failure = failure

    def __enter__(self) -> _Storm:
        self._thread.start()
        return self

    def stop(self) -> tuple[int, float]:
        """How many were made, in how many seconds."""
        self._enough.set()
        self._thread.join()
        if self._failure:
            raise self._failure
        return self._done, time.monotonic() - self._began

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()


def _latest_ms(live: Load, folder: Path) -> float:
    """Requests on live connections for a while: how late the latest answer was."""
    path = folder / "latencies"
    live.run(rate=REQUEST_RATE, count=int(REQUEST_RATE * WINDOW_S), path=str(path))
    return max(array.array("q", path.read_bytes())) / 1e6


def _stall_ms(live: Load, folder: Path, work: Callable[[], object]) -> float:
    """The latest answer while ``work`` is done. Raises what it raises."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as failure:
            failures.append(failure)

    working = threading.Thread(target=run)
    working.start()
    latest = 0.0
    while working.is_alive():
        latest = max(latest, _latest_ms(live, folder))
    if failures:
        raise failures[0]
    return latest


def _end(pid: int) -> None:
    """Ends the last process, which is nobody's child any more."""
    deadline = time.monotonic() + END_S
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
