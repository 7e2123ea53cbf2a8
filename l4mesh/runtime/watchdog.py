"""The watchdog of a process: it ends one whose worker is stuck, so that whoever started it starts another.

What it looks for and how is in ``_native/watchdog.pxd``; it runs without the GIL and depends on nothing that could be stuck.
"""

from __future__ import annotations

import asyncio
import faulthandler
import signal
import threading
from typing import Protocol

BEAT_S = 0.25
STACKS_SIGNAL = signal.SIGRTMIN + 6


class Watched(Protocol):
    """What the watchdog needs of the data path."""

    def watch(self, limit_ms: int, stacks_signal: int) -> None: ...

    def end_watch(self) -> None: ...

    def beat(self) -> None: ...

    def rest(self) -> None: ...


class Watchdog:
    """Watches from now until ``stop``. A worker that is stuck for ``limit_ms`` (0: as long as it likes) ends the process with SIGABRT;
    the control loop has ten times as long."""

    def __init__(self, datapath: Watched, limit_ms: int) -> None:
        self._datapath = datapath
        self._thread: threading.Thread | None = None
        if not limit_ms:
            return
        # Both write the stacks of all of Python's threads to standard error, from a signal handler that needs no lock of Python's.
        faulthandler.enable()
        faulthandler.register(STACKS_SIGNAL, all_threads=True)
        self._thread = threading.Thread(target=self._watch, args=(limit_ms,), name="l4mesh-watchdog", daemon=True)
        self._thread.start()

    def _watch(self, limit_ms: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._datapath.watch(limit_ms, STACKS_SIGNAL)

    async def attend(self) -> None:
        """Says that the control loop comes round, as a task of its until cancelled. It does nothing that could keep it waiting."""
        try:
            while True:
                self._datapath.beat()
                await asyncio.sleep(BEAT_S)
        finally:
            self._datapath.rest()

    def stop(self) -> None:
        if self._thread:
            self._datapath.end_watch()
            self._thread.join()
