"""What the data path reports upwards: counters, live connections and the record of each connection that ended.

All times are nanoseconds or milliseconds as named, all counts since the start of the process. The clusters, listeners and
endpoints of a snapshot are those of the current plan; what was counted for others stays in ``retired``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from l4mesh.errors import CloseReason, Fault, TlsCause

CONNECT_BUCKETS_S: tuple[float, ...] = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds of the connect-time histogram, seconds; one more bucket, +Inf, follows."""


SIGNALS = ("connect_failure", "tls_failure", "early_reset", "no_answer", "tls_refusal")
"""What outlier detection counts against an endpoint; the places are those of ``SIGNAL_*`` in ``_native/stats.pxd``. The last is a
refusal by a TLS 1.3 endpoint, which comes when the handshake is over."""


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    worker: int
    active: int
    """Live connections."""
    accepted: int
    accept_pauses: int
    """Times that accepting paused because descriptors or the connection limit ran out."""
    paused: bool
    records_dropped: int
    pipes: int
    """Pipes open, in use or pooled."""
    turns: int
    """Turns of the event loop."""
    bytes_copied: int
    bytes_spliced: int
    holds: int
    """Times that a stream was left for a moment to gather more bytes."""
    throttles: int
    """Times that a half waited for its bandwidth."""
    put_aside: int
    """Connections that waited for the turn of their source after being accepted."""


@dataclass(frozen=True, slots=True)
class ShedSnapshot:
    """What the workers did about overload, and what the decision about it needs to know of them."""

    idle: int = 0
    """Connections that ended because they were idle."""
    sources: int = 0
    """Connections that were refused because their source has more than its share."""
    accepts: int = 0
    """Pauses of accepting."""
    unused_bytes: int = 0
    """Of the tables of connections, kept for those to come."""
    accepted: int = 0
    pipes: int = 0


@dataclass(frozen=True, slots=True)
class ListenerSnapshot:
    name: str
    active: int
    opened: int
    closed: dict[CloseReason, int]


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """``name`` is "" for connections that ended before a cluster was known."""

    name: str
    active: int
    opened: int
    closed: dict[CloseReason, int]
    bytes_to_upstream: int
    bytes_to_downstream: int
    connect_attempts: int
    connect_failures: int
    connect_seconds_sum: float
    connect_seconds_buckets: tuple[int, ...]
    """Counts per bucket of ``CONNECT_BUCKETS_S`` and +Inf, not cumulative."""
    faults: tuple[int, ...]
    """Injected, by ``Fault``."""
    waiting: int = 0
    """Connections that wait for a place; they are not in ``active``."""
    queued: int = 0
    """Connections that have waited, and for how long together:"""
    queued_seconds: float = 0.0
    retrying: int = 0
    """Connections on an attempt after their first."""
    retries_refused: int = 0
    """By the budget."""


@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    cluster: str
    address: str
    weight: int
    zone: str
    active: int
    opened: int
    connect_failures: int
    bytes_to_upstream: int
    bytes_to_downstream: int
    warming: bool
    """In slow start."""
    failures: dict[str, int]
    """By ``SIGNALS``; counted only where outlier detection is on."""


@dataclass(frozen=True, slots=True)
class TlsSnapshot:
    """Over all workers; sides are "downstream" and "upstream"."""

    handshakes: dict[tuple[str, bool], int]
    """By side and whether the session was resumed."""
    failures: dict[tuple[str, TlsCause], int]
    dry_run_denials: int
    """Connections that passed and that a dry-run policy would have refused."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    generation: int
    workers: tuple[WorkerSnapshot, ...]
    listeners: tuple[ListenerSnapshot, ...]
    clusters: tuple[ClusterSnapshot, ...]
    retired: ClusterSnapshot
    """Sum over clusters that no plan names any more; its name is "(removed)"."""
    retired_listeners: ListenerSnapshot
    plans_alive: int
    tls: TlsSnapshot
    max_connections: int
    rate_overflows: int
    """Connections whose source, workload or identity found no bucket of its own."""
    faults_enabled: bool
    fault_rules: int
    """Configured, in force or not."""


class ConnectionSnapshot(NamedTuple):
    """One live connection. ``state``: "preface" (waits for a PROXY header), "hello" (for the first bytes), "handshake" (TLS with the
    downstream), "dialling" (TLS with the upstream included), "relaying", "resetting", "accepted" (waits for its source's turn),
    "queued" (waits for a place in its cluster) or "departing" (to the process that takes over)."""

    id: str
    """worker.slot.generation: names it for as long as it lives."""
    state: str
    listener: str
    cluster: str
    endpoint: str
    source: str
    destination: str
    """Original destination."""
    age_ms: int
    idle_ms: int
    bytes_to_upstream: int
    bytes_to_downstream: int
    spliced: bool
    downstream_identity: str
    downstream_tls: str
    """"1.3", "1.2", or "" for plaintext."""
    upstream_identity: str
    upstream_tls: str


class ConnectionRecord(NamedTuple):
    """One connection that ended: a line of the access log. Times that were never reached and unknown figures are -1."""

    ended_unix_ms: int
    worker: int
    listener: str
    cluster: str
    endpoint: str
    """Address of the endpoint that was connected, or of the last attempt; "" if none."""
    source: str
    destination: str
    reason: CloseReason
    attempts: int
    errno: int
    connect_us: int
    """Accept to connected."""
    first_byte_us: int
    """Accept to the first byte from upstream."""
    total_us: int
    bytes_to_upstream: int
    bytes_to_downstream: int
    downstream_rtt_us: int
    downstream_retransmits: int
    upstream_rtt_us: int
    upstream_retransmits: int
    downstream_identity: str
    """SPIFFE ID of the peer, or ""."""
    downstream_tls: str
    """"1.3", "1.3 resumed", …, or "" for plaintext."""
    upstream_identity: str
    upstream_tls: str
    tls_cause: TlsCause
    tls_alert: int
    """That the peer sent; 0: none."""
    policy: str
    """The policy that decided, or ""."""
    dry_run_policy: str
    """The dry-run policy that would have refused what passed, or ""."""
    fault: Fault
    """That was injected."""
    queued_ms: int = -1
    """Waited for a place in the cluster; at most 65535."""
