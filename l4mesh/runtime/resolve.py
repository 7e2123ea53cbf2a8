"""Endpoints given by name: each address that the name has becomes an endpoint.

A name is looked up when a configuration first mentions it and again when its answer's time to live is over. A name that can't be
resolved keeps the addresses it had; one that never could has no endpoints, and the configuration still loads: a name service that is
down must not keep the rest of the node from starting.

c-ares asks, because the C library's resolver does not tell how long an answer is good for; like it, c-ares reads /etc/hosts first, then
asks the servers of /etc/resolv.conf.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import pycares
import structlog

from l4mesh.model import Cluster, Config, Endpoint

TTL_MIN_S = 1.0
"""Also of answers that may not be kept at all, and of /etc/hosts."""
TTL_MAX_S = 3600.0
RETRY_S = 5.0
"""After a failure."""
PATIENCE_S = 5.0
"""For all names together; what has no answer by then has failed."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Answer:
    """``addresses`` in order; ``ttl_s``: how long they are good for. ``error``: why there are none."""

    addresses: tuple[str, ...] = ()
    ttl_s: float = RETRY_S
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Known:
    addresses: tuple[str, ...]
    due_s: float
    error: str


LookUp = Callable[[Collection[str]], Mapping[str, Answer]]


class Resolver:
    """Turns names into addresses and keeps a cluster's object while its addresses stay the same.

    ``look_up`` answers for all names that it is given, and may block; ``clock``: monotonic seconds.
    """

    def __init__(self, look_up: LookUp | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._look_up = look_up or look_up_names
        self._clock = clock
        self._names: dict[str, _Known] = {}
        self._resolved: dict[str, tuple[Cluster, Cluster]] = {}

    @property
    def is_due(self) -> bool:
        """Whether a name's time is over: then ``resolve`` may give something else than before."""
        now_s = self._clock()
        return any(known.due_s <= now_s for known in list(self._names.values()))

    def resolve(self, config: Config) -> Config:
        """``config`` with IP literals only. Blocks while it asks: call it off the loop."""
        named = [cluster for cluster in config.clusters.values() if any(is_name(endpoint.host) for endpoint in cluster.endpoints)]
        self._ask({endpoint.host for cluster in named for endpoint in cluster.endpoints if is_name(endpoint.host)})
        if not named:
            self._resolved.clear()
            return config
        self._resolved = {cluster.name: (cluster, self._resolve_cluster(cluster)) for cluster in named}
        return replace(config, clusters={**config.clusters, **{name: after for name, (_, after) in self._resolved.items()}})

    def _ask(self, names: set[str]) -> None:
        now_s = self._clock()
        known = {name: entry for name, entry in self._names.items() if name in names}
        due = sorted(name for name in names if name not in known or known[name].due_s <= now_s)
        for name, answer in self._look_up(due).items() if due else ():
            before = known.get(name, _Known((), 0.0, ""))
            ttl_s = min(max(answer.ttl_s, TTL_MIN_S), TTL_MAX_S)
            known[name] = _Known(before.addresses if answer.error else answer.addresses, now_s + ttl_s, answer.error)
            if answer.error and answer.error != before.error:
                log.warning("name_not_resolved", name=name, error=answer.error, keeps=list(before.addresses))
        self._names = known

    def _resolve_cluster(self, cluster: Cluster) -> Cluster:
        endpoints: dict[str, Endpoint] = {}
        for endpoint in cluster.endpoints:
            for host in self._names[endpoint.host].addresses if is_name(endpoint.host) else (endpoint.host,):
                resolved = replace(endpoint, host=host)
                endpoints.setdefault(resolved.address, resolved)
        before = self._resolved.get(cluster.name)
        if before and before[0] is cluster and before[1].endpoints == tuple(endpoints.values()):
            return before[1]
        return replace(cluster, endpoints=tuple(endpoints.values()))


def look_up_names(names: Collection[str]) -> dict[str, Answer]:
    """Asks for all of them at once, IPv4 and IPv6."""
    answers = dict.fromkeys(names, Answer(error="no answer in time"))
    arrived: queue.SimpleQueue[tuple[str, Answer]] = queue.SimpleQueue()

    def note(name: str) -> Callable[[pycares.AddrInfoResult | None, int | None], None]:
        return lambda result, error: arrived.put((name, _read_answer(result, error)))

    give_up_s = time.monotonic() + PATIENCE_S
    try:
        channel = pycares.Channel(timeout=PATIENCE_S / 4, tries=2)
    except pycares.AresError as error:
        # It has descriptors and a thread of its own.
        return dict.fromkeys(names, Answer(error=str(error)))
    try:
        for name in names:
            channel.getaddrinfo(name, None, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM, callback=note(name))
        for _ in names:
            name, answer = arrived.get(timeout=max(0.0, give_up_s - time.monotonic()))
            answers[name] = answer
    except queue.Empty:
        pass
    finally:
        channel.close()
    return answers


def _read_answer(result: pycares.AddrInfoResult | None, error: int | None) -> Answer:
    if error or result is None or not result.nodes:
        return Answer(error=_text(pycares.errno.strerror(error)) if error else "the name has no address")
    # Sorted: servers rotate their answers, and an order is no change.
    addresses = sorted({_text(node.addr[0]).partition("%")[0] for node in result.nodes})
    times = [node.ttl for node in result.nodes] + [alias.ttl for alias in result.cnames]
    return Answer(tuple(addresses), min(times))


def _text(address: str | bytes) -> str:
    return address.decode("ascii") if isinstance(address, bytes) else address


def is_name(host: str) -> bool:
    return ":" not in host and not host.replace(".", "").isdigit()
