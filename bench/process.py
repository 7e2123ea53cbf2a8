"""Processes of a run: where they run, what CPU they have used, what memory they hold."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ALL_CPUS = os.sched_getaffinity(0)
READY_S = 60.0
STOP_S = 10.0
LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Place:
    """CPUs (none: wherever the kernel puts it), and the network namespace ("" is this one), that a process runs in."""

    cpus: tuple[int, ...]
    netns: str = ""

    def command(self, arguments: Sequence[str]) -> list[str]:
        cpus = self.cpus or sorted(ALL_CPUS)
        pinned = ["taskset", "-c", ",".join(map(str, cpus)), *arguments]
        return ["ip", "netns", "exec", self.netns, *pinned] if self.netns else pinned


class Programs(ABC):
    """What is counted as one: a program, or several."""

    @abstractmethod
    def pids(self) -> list[int]:
        """Of all processes that count."""

    @abstractmethod
    def stop(self) -> None: ...

    def cpu_s(self) -> float:
        """Seconds of CPU that all threads have used so far, those that have ended included, with ns resolution.

        Reads the processes' CPU clocks (clock_getcpuclockid(3): the complement of the pid, and 2 for scheduler time).
        """
        return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in self.pids()) / 1e9

    def settled_cpu_s(self) -> float:
        """As ``cpu_s``, once the programs have come to rest."""
        used = self.cpu_s()
        for _ in range(50):
            time.sleep(0.01)
            before, used = used, self.cpu_s()
            if used - before < 0.0002:
                break
        return used

    def memory_kib(self) -> dict[str, int]:
        """User memory by the kernel's account, pages of files left out (other processes come and go with them): KiB."""
        total = {"Pss_Anon": 0, "Pss_Shmem": 0}
        for pid in self.pids():
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            for name in total:
                match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
                total[name] += int(match[1]) if match else 0
        return total


class Process(Programs):
    """A started program with its children."""

    def __init__(self, name: str, place: Place, arguments: Sequence[str], log: Path, cwd: Path | None = None) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._popen = subprocess.Popen(place.command(arguments), stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd)

    def wait_until_listening(self, ports: Iterable[int]) -> None:
        """Returns when the program listens on every port. Raises RuntimeError."""
        wanted = set(ports)
        deadline = time.monotonic() + READY_S
        while not wanted <= self._listening_ports():
            if self._popen.poll() is not None or time.monotonic() > deadline:
                text = self._log.read_text(errors="replace").strip()
                raise RuntimeError(f"{self.name} does not listen; the end of {self._log}:\n{text[-2000:]}")
            time.sleep(0.02)

    def _listening_ports(self) -> set[int]:
        """Those of its own: a port may be another program's as well, with SO_REUSEPORT or by mistake."""
        own = set()
        for pid in self.pids():
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    own.add(os.readlink(descriptor))
        return {port for port, inode in _listening_sockets(self._popen.pid) if f"socket:[{inode}]" in own}

    def pids(self) -> list[int]:
        """The program and all its descendants."""
        found = [self._popen.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        return found

    def stop(self) -> None:
        self._popen.terminate()
        try:
            self._popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


class Group(Programs):
    """Several programs that are stopped together, those first that were started last; only ``counted`` counts."""

    def __init__(self, processes: Sequence[Process], counted: Sequence[Process]) -> None:
        self._processes = processes
        self._counted = counted

    def pids(self) -> list[int]:
        return [pid for process in self._counted for pid in process.pids()]

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.stop()


def _listening_sockets(pid: int) -> set[tuple[int, str]]:
    """(port, inode) of all in the process's network namespace."""
    found = set()
    for family in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if state == LISTEN:
                found.add((int(local.rpartition(":")[2], 16), inode))
    return found


class Ports:
    """Port numbers that nothing listens on, below those that the kernel gives to clients, and other ones in each run."""

    def __init__(self) -> None:
        self._next = random.randrange(20000, 30000)

    def take(self) -> int:
        while True:
            self._next += 1
            with socket.socket() as probe:
                try:
                    probe.bind(("0.0.0.0", self._next))
                except OSError:
                    continue
            return self._next
