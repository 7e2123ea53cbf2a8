"""What one process has counted, as the next one goes on from it: a scrape after an upgrade never falls behind one before.

Only what is counted crosses, and the live connections that stay behind; names tell what belongs together.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from l4mesh.errors import CloseReason
from l4mesh.snapshot import ClusterSnapshot, EndpointSnapshot, ListenerSnapshot, Snapshot, TlsSnapshot, WorkerSnapshot

T = TypeVar("T")

_COUNTED: Mapping[type, tuple[str, ...]] = {
    WorkerSnapshot: (
        "active", "accepted", "accept_pauses", "records_dropped", "turns", "bytes_copied", "bytes_spliced", "holds", "throttles",
        "put_aside",
    ),
    ListenerSnapshot: ("active", "opened", "closed"),
    ClusterSnapshot: (
        "active", "opened", "closed", "bytes_to_upstream", "bytes_to_downstream", "connect_attempts", "connect_failures",
        "connect_seconds_sum", "connect_seconds_buckets", "faults", "queued", "queued_seconds", "retries_refused",
    ),
    EndpointSnapshot: ("active", "opened", "connect_failures", "bytes_to_upstream", "bytes_to_downstream", "failures"),
    TlsSnapshot: ("handshakes", "failures", "dry_run_denials"),
}  # fmt: skip
"""The fields that add up over processes. One that is left out starts anew with each."""
_NAMES: Mapping[type, tuple[str, ...]] = {
    WorkerSnapshot: ("worker",),
    ListenerSnapshot: ("name",),
    ClusterSnapshot: ("name",),
    EndpointSnapshot: ("cluster", "address"),
}


class Count(NamedTuple):
    """Of what the control loop counts, as the metric tells it."""

    metric: str
    labels: dict[str, str]
    value: float

    def encode(self) -> list[Any]:
        return [self.metric, _encode(self.labels), self.value]

    @classmethod
    def decode(cls, data: Any) -> Count:
        """Raises TypeError or ValueError."""
        metric, labels, value = data
        return cls(decode(str, metric), decode(dict[str, str], labels), decode(float, value))


@dataclass(frozen=True, slots=True)
class Totals:
    """The counters of a process and of those before it."""

    workers: tuple[WorkerSnapshot, ...]
    listeners: tuple[ListenerSnapshot, ...]
    clusters: tuple[ClusterSnapshot, ...]
    endpoints: tuple[EndpointSnapshot, ...]
    retired: ClusterSnapshot
    retired_listeners: ListenerSnapshot
    tls: TlsSnapshot

    @classmethod
    def of(cls, snapshot: Snapshot, endpoints: Iterable[EndpointSnapshot]) -> Totals:
        """Connections that were handed over are left out of those that ended: they end in the process that has them."""
        return cls(
            snapshot.workers,
            tuple(_without_handed_over(listener) for listener in snapshot.listeners),
            tuple(_without_handed_over(cluster) for cluster in snapshot.clusters),
            tuple(one for one in endpoints if one.opened or one.connect_failures or any(one.failures.values())),
            _without_handed_over(snapshot.retired),
            _without_handed_over(snapshot.retired_listeners),
            snapshot.tls,
        )

    def encode(self) -> dict[str, Any]:
        """As JSON has it."""
        return {field.name: _encode(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def decode(cls, data: object) -> Totals:
        """What ``encode`` gave, by this version or another: what that one did not count is 0, what only it counts is left out.
        Raises ValueError for anything else."""
        try:
            return cls(**{name: decode(hint, dict_of(data).get(name)) for name, hint in get_type_hints(cls).items()})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not the counters of a process: {error}") from error

    def at_rest(self) -> Totals:
        """The same with nothing live: the process is gone."""
        return replace(
            self,
            workers=tuple(replace(worker, active=0) for worker in self.workers),
            listeners=tuple(replace(listener, active=0) for listener in self.listeners),
            clusters=tuple(replace(cluster, active=0) for cluster in self.clusters),
            endpoints=tuple(replace(endpoint, active=0) for endpoint in self.endpoints),
            retired=replace(self.retired, active=0),
            retired_listeners=replace(self.retired_listeners, active=0),
        )

    def add_to(self, snapshot: Snapshot, gone_clusters: Collection[str], gone_listeners: Collection[str]) -> Snapshot:
        """``snapshot`` on top of these. What it does not name, and what was gone in between, counts among the removed."""
        workers = list(snapshot.workers)
        for before in self.workers:
            # One that this process does not have still counts in the sum.
            index = before.worker % len(workers)
            workers[index] = add(workers[index], before)
        clusters = {cluster.name: cluster for cluster in snapshot.clusters}
        retired = add(snapshot.retired, self.retired)
        for cluster in self.clusters:
            if cluster.name in clusters and cluster.name not in gone_clusters:
                clusters[cluster.name] = add(clusters[cluster.name], cluster)
            else:
                retired = add(retired, cluster)
        listeners = {listener.name: listener for listener in snapshot.listeners}
        retired_listeners = add(snapshot.retired_listeners, self.retired_listeners)
        for listener in self.listeners:
            if listener.name in listeners and listener.name not in gone_listeners:
                listeners[listener.name] = add(listeners[listener.name], listener)
            else:
                retired_listeners = add(retired_listeners, listener)
        return replace(
            snapshot,
            workers=tuple(workers),
            listeners=tuple(listeners.values()),
            clusters=tuple(clusters.values()),
            retired=retired,
            retired_listeners=retired_listeners,
            tls=add(snapshot.tls, self.tls),
        )


def add(own: T, other: T) -> T:
    """``own`` with what ``other`` has counted on top."""
    return replace(own, **{name: _sum(getattr(own, name), getattr(other, name)) for name in _COUNTED[type(own)]})  # type: ignore[type-var]


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in (*one, *(key for key in other if key not in one))}
    if isinstance(one, tuple):
        # Of another length in a version with other buckets: those can't be told apart any more.
        return tuple(map(sum, zip(one, other, strict=True))) if len(one) == len(other) else one
    return one + other


S = TypeVar("S", ListenerSnapshot, ClusterSnapshot)


def _without_handed_over(snapshot: S) -> S:
    return replace(snapshot, closed={reason: count for reason, count in snapshot.closed.items() if reason != CloseReason.HANDED_OVER})


def dict_of(data: object) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TypeError("must be a mapping")
    return data


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = type(value)
        return {name: _encode(getattr(value, name)) for name in (*_NAMES.get(kind, ()), *_COUNTED[kind])}
    if isinstance(value, dict):
        return [[_encode(key), count] for key, count in value.items()]
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def decode(hint: Any, data: Any) -> Any:
    """``data``, from JSON, as the type ``hint``; None is its zero. Raises TypeError or ValueError for anything else."""
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, types.GenericAlias) and origin is dict:
        known = [(_decode_key(args[0], key), count) for key, count in data or ()]
        return {key: decode(args[1], count) for key, count in known if key is not None}
    if origin is tuple and args[-1] is ...:
        return tuple(decode(args[0], item) for item in data or ())
    if dataclasses.is_dataclass(hint):
        fields = _hints_of(hint)  # type: ignore[arg-type]
        given = {} if data is None else dict_of(data)
        return hint(**{name: decode(fields[name], given.get(name)) for name in fields})  # type: ignore[operator]
    if data is None:
        return hint()
    if hint is float and isinstance(data, int):
        return float(data)
    if not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool):
        raise TypeError(f"{data!r} is not of type {hint.__name__}")
    return data


@functools.cache
def _hints_of(kind: type) -> dict[str, Any]:
    # Reading them takes longer than all the rest, and clusters may be thousands.
    return get_type_hints(kind)


def _decode_key(hint: Any, key: Any) -> Any:
    """None: another version's word."""
    if get_origin(hint) is tuple:
        parts = tuple(_decode_key(part, item) for part, item in zip(get_args(hint), key, strict=True))
        return None if None in parts else parts
    if issubclass(hint, Enum):
        return hint.__members__.get(key)
    return decode(hint, key)
