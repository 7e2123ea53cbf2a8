"""Which endpoints take no connections, why and since when; and the panic, in which all of them do again.

Health checks and outlier detection say what they think of an endpoint; here it becomes what the workers see, at once and without a new
plan. An endpoint serves when nobody speaks against it. Panic as in Envoy: when the share of a cluster's endpoints that serve falls
below its ``panic_threshold``, it is likelier that the judgement is wrong than that all the others fail, and a dead endpoint costs less
than none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Protocol

import structlog

from l4mesh.errors import CloseReason
from l4mesh.model import Cluster, Config

log = structlog.get_logger()

RETURN_OVER_MS = 10_000
"""Slow start of an endpoint that comes back, in a cluster that has none of its own."""


class OutCause(IntFlag):
    EJECTED = 1
    """By outlier detection."""
    UNHEALTHY = 2
    """By its health check."""

    @property
    def label(self) -> str:
        return "+".join(cause.name.lower() for cause in OutCause if cause in self and cause.name)


class Marks(Protocol):
    """What this asks of the data path."""

    def set_endpoint_out(self, cluster: str, address: str, causes: int) -> bool: ...

    def warm_endpoint(self, cluster: str, address: str, over_ms: int) -> None: ...

    def close_endpoint(self, cluster: str, address: str, reason: CloseReason, over_ms: int) -> None: ...

    def keep_endpoint(self, cluster: str, address: str) -> None: ...

    def set_panic(self, cluster: str, panic: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Out:
    """Why an endpoint takes no connections."""

    cause: OutCause
    since_unix_s: float
    why: str


@dataclass(frozen=True, slots=True)
class ClusterState:
    cluster: str
    endpoints: int
    """With a weight above 0."""
    ejected: int
    unhealthy: int
    panic: bool


class EndpointRegistry:
    """Call it on the control loop; ``out`` and ``states`` from any thread."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._clusters: Mapping[str, Cluster] = {}
        self._out: dict[str, dict[str, tuple[Out, ...]]] = {}
        self._weighted: dict[str, tuple[Cluster, frozenset[str]]] = {}
        self._weighted_out: dict[str, int] = {}
        self._panic: set[str] = set()

    def configure(self, config: Config) -> None:
        """The configuration in force is another. States of endpoints that stay, stay."""
        before, self._clusters = self._clusters, config.clusters
        self._weighted = {name: known for name, known in self._weighted.items() if name in config.clusters}
        for name in list(self._out):
            cluster = config.clusters.get(name)
            drains_anew = cluster is not None and name in before and cluster.drain.unhealthy_ms != before[name].drain.unhealthy_ms
            addresses = {endpoint.address for endpoint in cluster.endpoints} if cluster else set()
            kept = {address: outs for address, outs in self._out[name].items() if address in addresses}
            if kept:
                self._out[name] = kept
                self._weighted_out[name] = sum(1 for address in self._addresses(name) if address in kept)
                for address in self.marked(name, OutCause.UNHEALTHY) if drains_anew else ():
                    self._marks.keep_endpoint(name, address)
                    self._drain(name, address)
            else:
                del self._out[name]
                self._weighted_out.pop(name, None)
            self._judge(name)

    def take_out(self, cluster: str, address: str, cause: OutCause, why: str, since_unix_s: float | None = None) -> bool:
        """Workers pick it no more; where its cluster drains unhealthy endpoints, its connections end gradually. False: there is no such
        endpoint. ``since_unix_s``: None: from now on, or as this cause has said before."""
        outs = self._out.get(cluster, {}).get(address, ())
        kept = tuple(out for out in outs if out.cause is not cause)
        since = since_unix_s or next((out.since_unix_s for out in outs if out.cause is cause), time.time())
        if cause is OutCause.UNHEALTHY and cluster in self._clusters:
            self._drain(cluster, address)
        return self._set(cluster, address, (*kept, Out(cause, since, why)))

    def _drain(self, cluster: str, address: str) -> None:
        """The connections of an unhealthy endpoint end gradually, where its cluster has it so."""
        over_ms = self._clusters[cluster].drain.unhealthy_ms
        if over_ms:
            self._marks.close_endpoint(cluster, address, CloseReason.ENDPOINT_UNHEALTHY, over_ms)

    def put_back(self, cluster: str, address: str, cause: OutCause) -> bool:
        """Takes back what this cause said; with nothing else against it the endpoint serves again, by slow start."""
        outs = self._out.get(cluster, {}).get(address, ())
        kept = tuple(out for out in outs if out.cause is not cause)
        if len(kept) == len(outs):
            return False
        if cause is OutCause.UNHEALTHY:
            self._marks.keep_endpoint(cluster, address)
        if not kept and cluster in self._clusters:
            self._marks.warm_endpoint(cluster, address, self._clusters[cluster].slow_start_ms or RETURN_OVER_MS)
        return self._set(cluster, address, kept)

    def _set(self, cluster: str, address: str, outs: tuple[Out, ...]) -> bool:
        causes = 0
        for out in outs:
            causes |= out.cause
        if not self._marks.set_endpoint_out(cluster, address, causes):
            return False
        # Other threads look single endpoints up, and walk over none of this.
        known = self._out.setdefault(cluster, {})
        change = bool(outs) - (address in known)
        if outs:
            known[address] = outs
        else:
            known.pop(address, None)
        if not known:
            del self._out[cluster]
        if change and address in self._addresses(cluster):
            self._weighted_out[cluster] = self._weighted_out.get(cluster, 0) + change
            self._judge(cluster)
        return True

    def _addresses(self, name: str) -> frozenset[str]:
        """Of the cluster's endpoints with a weight. Kept: thousands of them may go out one by one."""
        cluster = self._clusters.get(name)
        if cluster is None:
            self._weighted.pop(name, None)
            return frozenset()
        known = self._weighted.get(name)
        if known is None or known[0] is not cluster:
            known = self._weighted[name] = (cluster, frozenset(one.address for one in cluster.endpoints if one.weight))
        return known[1]

    def _judge(self, name: str) -> None:
        """Begins a panic, or ends it."""
        cluster = self._clusters.get(name)
        endpoints = len(self._addresses(name))
        serving = self.serving(name)
        panic = cluster is not None and serving < cluster.panic_threshold * endpoints
        if panic == (name in self._panic):
            return
        self._marks.set_panic(name, panic)
        if panic:
            self._panic.add(name)
            means = "all endpoints serve, those that are out included"
            log.warning("panic_begins", cluster=name, serving=serving, endpoints=endpoints, means=means)
        else:
            self._panic.discard(name)
            log.warning("panic_ends", cluster=name, serving=serving, endpoints=endpoints)

    # -- questions -----------------------------------------------------------------------------------------------------

    def out(self, cluster: str, address: str) -> tuple[Out, ...]:
        """What is said against an endpoint; empty: it serves."""
        return self._out.get(cluster, {}).get(address, ())

    def marked(self, cluster: str, cause: OutCause) -> frozenset[str]:
        """Endpoints against which this cause speaks."""
        known = self._out.get(cluster, {})
        return frozenset(address for address, outs in known.items() if any(out.cause is cause for out in outs))

    def serving(self, cluster: str) -> int:
        """How many endpoints with a weight nobody speaks against."""
        return len(self._addresses(cluster)) - self._weighted_out.get(cluster, 0)

    def is_panicking(self, cluster: str) -> bool:
        return cluster in self._panic

    def states(self) -> list[ClusterState]:
        """Of the clusters some of whose endpoints are out."""
        clusters = self._clusters
        return [self._state(clusters[name]) for name in list(self._out) if name in clusters]

    def _state(self, cluster: Cluster) -> ClusterState:
        known = self._out.get(cluster.name, {})
        weighted = [endpoint for endpoint in cluster.endpoints if endpoint.weight]
        causes = [{out.cause for out in known.get(endpoint.address, ())} for endpoint in weighted]
        return ClusterState(
            cluster.name,
            len(weighted),
            sum(OutCause.EJECTED in of_one for of_one in causes),
            sum(OutCause.UNHEALTHY in of_one for of_one in causes),
            cluster.name in self._panic,
        )
