"""Pressure becomes shedding, in steps: first idle connections, then the worst sources' new ones, then everybody's.

What to do is decided by pure functions and ``Shedder``, which is told the time; ``OverloadMonitor`` reads the figures and does it.
The steps are those of Envoy's overload manager (reduce_timeouts, stop_accepting_connections), with thresholds that have a gap between
entering and leaving, and a step of their own for those who cause it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import structlog

from l4mesh.model import Config, Overload
from l4mesh.snapshot import ShedSnapshot

RESOURCES = ("connections", "descriptors", "memory", "cpu", "accept_queue")
ENDS_IDLE = frozenset({"connections", "descriptors", "memory"})
"""To end idle connections gives neither CPU back nor a place in an accept queue."""
ACCEPTS_FEWER = frozenset({"connections", "descriptors", "memory", "cpu"})
"""To accept fewer only fills the queue."""
STEP_S = 1.0
COUNT_ONLY = 1 << 62
"""A share that nobody has: sources are counted and none is refused."""
LEAST_ACCEPTS_PER_S = 10
PAUSES_PER_S = 10
"""A worker's pause is a tenth of a second."""
SHARE_OF_ALL = 0.8
"""What is left to share out among the sources when the largest are cut back."""
CPU_WINDOW_S = 2.0
QUEUE_SAMPLES = 4
TRIM_EVERY_S = 2.0
FILE_BYTES_MAX = 1 << 16

log = structlog.get_logger()


# -- decisions ---------------------------------------------------------------------------------------------------------------


def next_level(level: int, pressure: float, first: float) -> int:
    """The step (0 to 3) after ``level`` at this pressure, a share of what there is; ``first``: where step 1 begins.

    The other steps begin half and four fifths of the way from there to all of it; each is left a third of that way lower, and no
    lower than three quarters of ``first``.
    """
    room = 1 - first
    gap = min(room / 3, first / 4)
    enter = (first, first + room / 2, first + room * 0.8)
    rises_to = sum(pressure >= at for at in enter)
    falls_to = sum(pressure >= at - gap for at in enter)
    return max(rises_to, min(level, falls_to))


def fair_share(sources: Sequence[tuple[int, int]]) -> int:
    """Live connections that one source may have, from (connections, sources that have as many), ascending.

    The max-min fair share of four fifths of all of them, so that it is the largest that are cut back; and never less than twice the
    median source's, so that nobody is who is like the others. ``COUNT_ONLY`` where that refuses nobody.
    """
    n = sum(count for _, count in sources)
    if n == 0:
        return COUNT_ONLY
    left = SHARE_OF_ALL * sum(active * count for active, count in sources)
    median, seen = 0, 0
    for active, count in sources:
        seen += count
        if 2 * seen >= n:
            median = active
            break
    level, below = 0.0, 0
    for active, count in sources:
        step = (active - level) * (n - below)
        if step > left:
            level += left / (n - below)
            break
        left -= step
        level, below = float(active), below + count
    share = max(1, int(level), 2 * median)
    return share if share < sources[-1][0] else COUNT_ONLY


@dataclass(frozen=True, slots=True)
class Orders:
    """What the workers are told. 0: nothing of the kind."""

    idle_cap_ms: int = 0
    source_share: int = 0
    accepts_per_s: int = 0
    sweep: bool = False
    """Look at the live connections now."""


@dataclass(slots=True)
class Shedder:
    """Turns levels into orders. Both the idle time and the rate of accepting are halved every second for as long as the pressure
    lasts, so that no more is shed than has to be, the longest idle first."""

    _orders: Orders = Orders()
    _stepped_s: float = float("-inf")

    def decide(
        self,
        now_s: float,
        levels: Mapping[str, int],
        longest_idle_ms: int,
        least_idle_ms: int,
        accepts_per_s: float,
        sources: Callable[[], Sequence[tuple[int, int]] | None],
    ) -> Orders:
        """``longest_idle_ms``: of all idle timeouts. ``accepts_per_s``: as it is now. ``sources``: as ``fair_share`` wants them, or
        None while not all are counted."""
        level = max(levels.values(), default=0)
        idle = max((levels.get(name, 0) for name in ENDS_IDLE), default=0)
        fewer = max((levels.get(name, 0) for name in ACCEPTS_FEWER), default=0)
        before = self._orders
        steps = now_s >= self._stepped_s + STEP_S
        if steps and level:
            self._stepped_s = now_s
        cap, rate, share = 0, 0, 0
        if idle >= 1:
            cap = before.idle_cap_ms or longest_idle_ms
            if steps:
                cap = max(least_idle_ms, cap // 2)
        if fewer >= 3:
            rate = before.accepts_per_s or max(LEAST_ACCEPTS_PER_S, round(accepts_per_s))
            if steps:
                rate = max(LEAST_ACCEPTS_PER_S, rate // 2)
        if level >= 1:
            share = before.source_share or COUNT_ONLY
            counted = sources() if level >= 2 else ()
            if counted is not None:
                share = fair_share(counted)
        self._orders = Orders(cap, share, rate, sweep=bool(steps and level))
        return self._orders


# -- figures -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    used: float
    limit: float

    @property
    def pressure(self) -> float:
        return self.used / self.limit if self.limit > 0 else 0.0


class MemoryGauge:
    """Memory of the control groups that this process is in, version 2 or 1, each against its own limit; the tightest counts. What
    the kernel could give back at once (inactive files) is not in use. Without a limit there: the resident set against the machine's.

    ``root``: for tests, in the place of ``/``.
    """

    _NAMES = (
        ("memory.current", "memory.max", "inactive_file"),
        ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
    )

    def __init__(self, root: Path = Path("/")) -> None:
        self._statm = os.fspath(root / "proc/self/statm")
        self._groups = [
            [os.fspath(group / name) for name in (current, most, "memory.stat")] + [inactive]
            for group in control_groups(root)
            for current, most, inactive in self._NAMES
            if (group / most).exists()
        ]
        self._total = _read_fields(root / "proc/meminfo").get("MemTotal", 0) * 1024
        self._resident = 0

    def read(self, limit: int, unused: int) -> Reading:
        """``limit``: bytes of the resident set, or 0 for what is found. ``unused``: bytes of it that are free to us already."""
        # Without a descriptor left it is what it was.
        with contextlib.suppress(OSError):
            self._resident = int(_read(self._statm).split()[1]) * os.sysconf("SC_PAGE_SIZE")
        resident = max(0, self._resident - unused)
        if limit:
            return Reading(resident, limit)
        readings = [self._read_group(*group) for group in self._groups]
        limited = [reading for reading in readings if reading]
        return max(limited, key=lambda reading: reading.pressure, default=Reading(resident, self._total))

    def _read_group(self, current: str, most: str, stat: str, inactive: str) -> Reading | None:
        """None: it has no limit, for which version 1 has a very large number, or is gone."""
        try:
            limit = _read(most).strip()
            if limit == "max" or int(limit) >= self._total > 0:
                return None
            return Reading(max(0, int(_read(current)) - _read_fields(stat).get(inactive, 0)), int(limit))
        except (OSError, ValueError):
            return None


def control_groups(root: Path) -> list[Path]:
    """Folders of the control groups that this process is in, up to the outermost; of version 1 those for memory."""
    groups: list[Path] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return groups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        for mount in mounts:
            # In a container the path may be the host's, and the mount our own group.
            folder = mount / path.lstrip("/")
            while folder != mount and folder.is_relative_to(mount):
                groups.append(folder)
                folder = folder.parent
            groups.append(mount)
    return [group for group in groups if group.exists()]


def _read(file: str) -> str:
    """Of one of the kernel's files. Several times a second, for which a file object is a lot of work."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, FILE_BYTES_MAX).decode()
    finally:
        os.close(descriptor)


def _read_fields(file: str | Path) -> dict[str, int]:
    """Of lines such as ``name 12`` or ``name: 12 kB``."""
    try:
        lines = [line.split() for line in _read(os.fspath(file)).splitlines()]
    except OSError:
        return {}
    return {fields[0].rstrip(":"): int(fields[1]) for fields in lines if len(fields) > 1 and fields[1].isdigit()}


def count_descriptors(estimate: int) -> int:
    """Open descriptors. Linux tells since 6.2; before, counting tens of thousands four times a second would cost more than they are
    worth, and the estimate is taken."""
    return os.stat("/proc/self/fd").st_size or estimate


def accept_queue(listening: socket.socket) -> Reading:
    """Connections that wait to be accepted, and how many may. A socket that a reload has closed meanwhile has none."""
    try:
        info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    except OSError:
        return Reading(0, 1)
    # tcpi_unacked and tcpi_sacked, which mean this on a listening socket (tcp_diag).
    waiting, most = struct.unpack_from("=II", info, 24)
    return Reading(waiting, most)


class Sheds(Protocol):
    """What is asked of the data path."""

    @property
    def active(self) -> int: ...

    @property
    def max_connections(self) -> int: ...

    def shed(self, idle_cap_ms: int, source_share: int, accepts_per_s: int, sweep: bool) -> None: ...

    def read_shed(self) -> ShedSnapshot: ...

    def measure_sources(self) -> list[tuple[int, int]] | None: ...


@dataclass(frozen=True, slots=True)
class ResourceStatus:
    name: str
    level: int
    used: float
    limit: float
    pressure: float


@dataclass(frozen=True, slots=True)
class OverloadStatus:
    level: int = 0
    resources: tuple[ResourceStatus, ...] = ()
    idle_cap_ms: int = 0
    source_share: int = 0
    """0: no source is refused."""
    accepts_per_s: int = 0
    shed: ShedSnapshot = field(default_factory=ShedSnapshot)


class OverloadMonitor:
    """Watches the process and sheds. Call ``look`` a few times a second on the control loop."""

    def __init__(
        self, datapath: Sheds, listening: Callable[[], list[socket.socket]], cpus: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._datapath = datapath
        self._listening = listening
        self._cpus = cpus
        self._clock = clock
        self._memory = MemoryGauge()
        self._shedder = Shedder()
        self._levels: dict[str, int] = {}
        self._cpu: deque[tuple[float, float]] = deque()
        self._queue: deque[Reading] = deque(maxlen=QUEUE_SAMPLES)
        self._accepted: deque[tuple[float, int]] = deque()
        self._trimmed_s = 0.0
        self._status = OverloadStatus()

    @property
    def status(self) -> OverloadStatus:
        """As of the last look; what was shed, as of now."""
        return replace(self._status, shed=self._datapath.read_shed())

    def look(self, config: Config) -> None:
        overload = config.overload
        now_s = self._clock()
        shed = self._datapath.read_shed()
        readings = self._read(now_s, overload, shed)
        levels = {
            name: next_level(self._levels.get(name, 0), reading.pressure, getattr(overload, name)) for name, reading in readings.items()
        }
        self._accepted.append((now_s, shed.accepted))
        while now_s - self._accepted[0][0] > STEP_S and len(self._accepted) > 1:
            self._accepted.popleft()
        since_s, before = self._accepted[0]
        rate = (shed.accepted - before) / (now_s - since_s) if now_s > since_s else 0.0
        longest_ms = max((cluster.idle_timeout_ms for cluster in config.clusters.values()), default=0)
        orders = self._shedder.decide(
            now_s, levels, max(longest_ms, overload.idle_ms), overload.idle_ms, rate, self._datapath.measure_sources
        )
        if levels or self._levels:
            self._datapath.shed(orders.idle_cap_ms, orders.source_share, orders.accepts_per_s, orders.sweep)
        self._tell(levels, readings)
        self._levels = levels
        if levels.get("memory") and now_s >= self._trimmed_s + TRIM_EVERY_S:
            self._trimmed_s = now_s
            give_memory_back()
        self._status = OverloadStatus(
            max(levels.values(), default=0),
            tuple(
                ResourceStatus(name, levels[name], reading.used, reading.limit, round(reading.pressure, 4))
                for name, reading in readings.items()
            ),
            orders.idle_cap_ms,
            orders.source_share if orders.source_share != COUNT_ONLY else 0,
            orders.accepts_per_s,
        )

    def stop(self) -> None:
        """Calls all orders off: whoever drains takes everybody that waits."""
        self._datapath.shed(0, 0, 0, False)

    def _read(self, now_s: float, overload: Overload, shed: ShedSnapshot) -> dict[str, Reading]:
        readings: dict[str, Reading] = {}
        active = self._datapath.active
        if overload.connections:
            readings["connections"] = Reading(active, self._datapath.max_connections)
        if overload.descriptors:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            readings["descriptors"] = Reading(count_descriptors(2 * (active + shed.pipes)), limit)
        if overload.memory:
            readings["memory"] = self._memory.read(overload.memory_limit_bytes, shed.unused_bytes)
        if overload.cpu:
            self._cpu.append((now_s, time.process_time()))
            while now_s - self._cpu[0][0] > CPU_WINDOW_S and len(self._cpu) > 1:
                self._cpu.popleft()
            wall_s = now_s - self._cpu[0][0]
            if wall_s >= CPU_WINDOW_S / 2:
                readings["cpu"] = Reading(round(self._cpu[-1][1] - self._cpu[0][1], 3), round(wall_s * self._cpus, 3))
        if overload.accept_queue:
            # What is full for a moment is not overload: the least of the last second.
            fullest = max(map(accept_queue, self._listening()), key=lambda reading: reading.pressure, default=Reading(0, 1))
            self._queue.append(fullest)
            readings["accept_queue"] = min(self._queue, key=lambda reading: reading.pressure)
        return readings

    def _tell(self, levels: Mapping[str, int], readings: Mapping[str, Reading]) -> None:
        for name in RESOURCES:
            before, after = self._levels.get(name, 0), levels.get(name, 0)
            if before == after:
                continue
            reading = readings.get(name, Reading(0, 0))
            say = log.warning if after > before else log.info
            say("overload", resource=name, step=after, before=before, used=reading.used, limit=reading.limit, does=MEANS[after])


MEANS = (
    "nothing is shed any more",
    "idle timeouts are shortened",
    "and the worst sources are refused",
    "and fewer connections are accepted",
)


def give_memory_back() -> None:
    """Returns to the kernel what the C library keeps of freed memory, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
