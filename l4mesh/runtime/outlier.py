"""Outlier detection at work: feeds the decisions of ``policy.outlier`` with what workers count, and carries them out.

A worker that sees an endpoint fail for the last time that its cluster puts up with wakes the control loop, which decides at once; the
other detectors look at every interval.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import ipaddress
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from l4mesh.model import Cluster, Config, Endpoint
from l4mesh.policy.outlier import ClusterOutliers, Counts, Detection, Outcome, Past
from l4mesh.runtime.endpoints import EndpointRegistry, OutCause

log = structlog.get_logger()


class Counters(Protocol):
    """What this asks of the data path."""

    def outlier_counts(self, cluster: str) -> dict[str, Counts]: ...

    def outlier_count(self, cluster: str, address: str) -> Counts | None: ...

    def endpoint_ids(self, cluster: str) -> dict[int, str]: ...

    def forget_failures(self, cluster: str, address: str) -> None: ...


Probe = Callable[[Endpoint, int, int], Awaitable[bool]]
"""Whether an endpoint can be connected within so many ms, by a socket with this mark (0: none)."""


@dataclass(frozen=True, slots=True)
class EjectionView:
    """An endpoint's past and present as ``/clusters`` shows it."""

    times: int
    """Ejections since the start of the process or since the endpoint joined."""
    detector: str
    """"" while it is not ejected; then the next two are 0."""
    since_unix_s: float = 0.0
    until_unix_s: float = 0.0


@dataclass(slots=True)
class _Watched:
    cluster: Cluster
    node_zone: str
    outliers: ClusterOutliers
    endpoints: dict[str, Endpoint]
    ids: dict[int, str]
    due_ms: int = 0
    """Its place in the queue."""


class OutlierDetector:
    """Call it on the control loop; ``totals`` and ``view`` from any thread."""

    def __init__(
        self,
        counters: Counters,
        registry: EndpointRegistry,
        chance: Callable[[], float],
        probe: Probe | None = None,
        now_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        self._counters = counters
        self._registry = registry
        self._chance = chance
        self._probe = probe or can_connect
        self._now_ms = now_ms
        self._watched: dict[str, _Watched] = {}
        self._ids: dict[int, tuple[str, str]] = {}
        self._queue: list[tuple[int, str]] = []
        """When to look at a cluster next: a heap. Entries that are not the cluster's ``due_ms`` are of the past."""
        self._inherited: dict[str, Sequence[Past]] = {}
        self._totals: Counter[tuple[str, str, str]] = Counter()
        self._mark = 0
        self._woken = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()

    def inherit(self, pasts: Mapping[str, Sequence[Past]]) -> None:
        """What another process knew, by cluster: the first configuration begins with it."""
        self._inherited = dict(pasts)

    def past(self) -> dict[str, list[Past]]:
        """For the process after this one."""
        now_ms = self._now_ms()
        pasts = {name: watched.outliers.past(now_ms) for name, watched in self._watched.items()}
        return {name: past for name, past in pasts.items() if past}

    def configure(self, config: Config) -> None:
        """The configuration in force is another."""
        before, self._watched = self._watched, {}
        self._mark = config.own_mark
        for cluster in config.clusters.values():
            known = before.get(cluster.name)
            if known and known.cluster is cluster and known.node_zone == config.node_zone:
                self._watched[cluster.name] = known
            elif cluster.outlier_detection:
                self._watched[cluster.name] = self._watch(cluster, known, config.node_zone)
        for name, was in before.items():
            now = self._watched.get(name)
            if now is not was:
                for number in was.ids.keys() - (now.ids if now else {}).keys():
                    del self._ids[number]
                for address in self._registry.marked(name, OutCause.EJECTED) - set(now.outliers.ejected if now else ()):
                    self._registry.put_back(name, address, OutCause.EJECTED)
        self._inherited = {}
        for key in [key for key in self._totals if key[0] not in config.clusters]:
            del self._totals[key]

    def _watch(self, cluster: Cluster, known: _Watched | None, node_zone: str) -> _Watched:
        assert cluster.outlier_detection
        now_ms = self._now_ms()
        outliers = known.outliers if known else ClusterOutliers(self._chance, phase=self._chance())
        counts = self._counters.outlier_counts(cluster.name)
        endpoints = {endpoint.address: endpoint for endpoint in cluster.endpoints if endpoint.weight}
        outliers.configure(
            cluster.outlier_detection,
            [(address, endpoint.zone, counts.get(address, Counts())) for address, endpoint in endpoints.items()],
            cluster.panic_threshold,
            now_ms,
            zones_matter=cluster.zone_preference and bool(node_zone),
        )
        for past in self._inherited.pop(cluster.name, ()):
            if outliers.inherit(past, now_ms):
                since_unix_s = time.time() - past.ago_ms / 1000
                self._registry.take_out(cluster.name, past.address, OutCause.EJECTED, past.why, since_unix_s)
        watched = _Watched(cluster, node_zone, outliers, endpoints, self._counters.endpoint_ids(cluster.name))
        self._ids |= {number: (cluster.name, address) for number, address in watched.ids.items()}
        self._schedule(watched)
        return watched

    def _schedule(self, watched: _Watched) -> None:
        due_ms = watched.outliers.next_ms
        if due_ms != watched.due_ms:
            watched.due_ms = due_ms
            heapq.heappush(self._queue, (due_ms, watched.cluster.name))
            if self._queue[0][0] == due_ms:
                self._woken.set()

    async def run(self) -> None:
        """Ends intervals and ejections when they are over, until cancelled."""
        try:
            while True:
                self._woken.clear()
                self.look()
                left_s = max(0, self._queue[0][0] - self._now_ms()) / 1000 if self._queue else None
                # Not wait_for: before Python 3.12 that swallows a cancellation which meets what it waits for.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._woken.wait()
        finally:
            for task in self._probes:
                task.cancel()

    def look(self) -> None:
        """Does what is due by now."""
        now_ms = self._now_ms()
        while self._queue and self._queue[0][0] <= now_ms:
            due_ms, name = heapq.heappop(self._queue)
            watched = self._watched.get(name)
            if watched and watched.due_ms == due_ms:
                watched.due_ms = 0
                self._look_at(name, watched, now_ms)
                self._schedule(watched)

    def _look_at(self, name: str, watched: _Watched, now_ms: int) -> None:
        if now_ms >= watched.outliers.interval_ends_ms:
            counts = self._counters.outlier_counts(name)
            self._carry_out(watched, watched.outliers.end_interval(counts, now_ms, self._unhealthy(name)))
        for address in watched.outliers.due(now_ms):
            if watched.cluster.outlier_detection and watched.cluster.outlier_detection.probe:
                watched.outliers.postpone(address, now_ms)
                task = asyncio.get_running_loop().create_task(self._probe_then_return(name, watched, address))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)
            else:
                self._put_back(name, address)

    def told(self, ids: list[int]) -> None:
        """Workers say that these endpoints have failed as often in a row as their clusters put up with."""
        for number in ids:
            name, address = self._ids.get(number, ("", ""))
            watched = self._watched.get(name)
            counts = self._counters.outlier_count(name, address) if watched else None
            if watched and counts:
                self._carry_out(watched, watched.outliers.failed(address, counts, self._now_ms(), self._unhealthy(name)))
                self._schedule(watched)

    def _unhealthy(self, name: str) -> frozenset[str]:
        return self._registry.marked(name, OutCause.UNHEALTHY)

    def _carry_out(self, watched: _Watched, detections: list[Detection]) -> None:
        name = watched.cluster.name
        for found in detections:
            self._totals[name, found.detector, found.outcome] += 1
            said = {"cluster": name, "endpoint": found.address, "detector": found.detector.value, "why": found.why}
            if found.outcome is Outcome.EJECTED:
                self._registry.take_out(name, found.address, OutCause.EJECTED, found.why)
                for_s = round((found.until_ms - self._now_ms()) / 1000, 1)
                log.warning("endpoint_ejected", **said, for_s=for_s, times=found.times)
            else:
                log.warning("endpoint_not_ejected", **said, because=_BECAUSE[found.outcome])

    def _put_back(self, name: str, address: str) -> None:
        watched = self._watched.get(name)
        if watched is None:
            return
        self._counters.forget_failures(name, address)
        now_ms = self._now_ms()
        ejection = watched.outliers.put_back(address, self._counters.outlier_count(name, address) or Counts(), now_ms)
        if ejection:
            self._registry.put_back(name, address, OutCause.EJECTED)
            log.info("endpoint_returned", cluster=name, endpoint=address, after_s=round((now_ms - ejection.since_ms) / 1000, 1))

    async def _probe_then_return(self, name: str, watched: _Watched, address: str) -> None:
        """``watched`` as it was: the configuration may be another by now."""
        if await self._probe(watched.endpoints[address], watched.cluster.connect_timeout_ms, self._mark):
            self._put_back(name, address)
        else:
            log.info("probe_failed", cluster=name, endpoint=address)

    # -- questions -----------------------------------------------------------------------------------------------------

    def totals(self) -> list[tuple[str, str, str, int]]:
        """Detections by cluster, detector and outcome."""
        return [(*key, count) for key, count in list(self._totals.items())]

    def view(self, cluster: str, address: str) -> EjectionView | None:
        """None where nothing is watched."""
        watched = self._watched.get(cluster)
        if watched is None:
            return None
        ejection = watched.outliers.ejection(address)
        times = watched.outliers.times_ejected(address)
        if ejection is None:
            return EjectionView(times, "")
        unix_s = time.time() - self._now_ms() / 1000
        return EjectionView(times, ejection.detector.value, unix_s + ejection.since_ms / 1000, unix_s + ejection.until_ms / 1000)


_BECAUSE: Mapping[Outcome, str] = {
    Outcome.NOT_ENFORCED: "enforce leaves it out",
    Outcome.MAX_EJECTED: "as many are ejected as max_ejected allows",
    Outcome.LAST_OF_ZONE: "it is the last of its zone",
    Outcome.PANIC: "too few endpoints would be left",
}


async def can_connect(endpoint: Endpoint, within_ms: int, mark: int) -> bool:
    """A probe: connects and closes at once."""
    family = socket.AF_INET6 if ipaddress.ip_address(endpoint.host).version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if mark:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            async with asyncio.timeout(within_ms / 1000):
                await asyncio.get_running_loop().sock_connect(probe, (endpoint.host, endpoint.port))
    except (OSError, TimeoutError):
        return False
    return True
