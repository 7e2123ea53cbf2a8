"""From the model to rows of plain numbers and bytes, which is all that the compiled tables take."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TypedDict

from l4mesh.model import (
    ORIGINAL_DESTINATION,
    Balance,
    Bandwidth,
    Capture,
    Cluster,
    Direction,
    FaultRule,
    Listener,
    Network,
    OutlierDetection,
    ProxyProtocol,
    Rates,
    Route,
    SocketAddress,
    TlsMode,
)
from l4mesh.snapshot import SIGNALS

Packed = bytes
"""16 bytes: an IPv6 address, or an IPv4 address in its mapped form."""
Prefix = tuple[Packed, int]
Target = tuple[int, int]
Pattern = tuple[int, bytes]
"""Kind and text: exact, prefix, suffix, any."""
ArrivalRow = tuple[tuple[int, int], ...]
"""(ns between two connections or 0, burst) in all, by source, by workload and by identity."""
FaultRow = tuple[int, int, int, int, int, int, int, list[Prefix]]
"""Kind, half whose bytes are counted, after how many, from ms, to ms, bytes a second, share of 2^32, sources."""
RouteRow = tuple[list[Prefix], list[tuple[int, int]], list[Prefix], list[Pattern], list[Pattern], list[Target], list[FaultRow]]

LISTENER_REDIRECT = 1
LISTENER_TPROXY = 2
LISTENER_PRESERVE_SOURCE = 4
LISTENER_OUTBOUND = 16
EXACT, PREFIX, SUFFIX, ANY = range(4)

_BALANCES = {
    Balance.ROUND_ROBIN: 0,
    Balance.LEAST_CONNECTIONS: 1,
    Balance.RANDOM: 2,
    Balance.SOURCE_HASH: 3,
    Balance.MAGLEV: 4,
}
_TLS_MODES = {TlsMode.OFF: 0, TlsMode.PERMISSIVE: 1, TlsMode.STRICT: 2}
_PROXY_VERSIONS = {ProxyProtocol.OFF: 0, ProxyProtocol.V1: 1, ProxyProtocol.V2: 2}
_MAPPED = b"\0" * 10 + b"\xff\xff"


class ListenerTlsSettings(TypedDict):
    """The arguments of ``Plan.add_listener`` that are about TLS."""

    tls_mode: int
    tls_v12: bool
    resumption: bool
    identity: int
    handshake_ms: int
    close_expired: bool
    strict: list[tuple[int, int]]
    permissive: list[tuple[int, int]]
    plain: list[tuple[int, int]]
    server_first: list[tuple[int, int]]


class ClusterSettings(TypedDict):
    """Settings of a compiled cluster; the names are those of ``cluster_settings_t``."""

    balance: int
    proxy_protocol: int
    original_destination: bool
    tls: bool
    tls_v12: bool
    resumption: bool
    tls_identity: int
    handshake_ms: int
    close_expired: bool
    encrypt_local: bool
    connect_attempts: int
    connect_timeout_ms: int
    connect_budget_ms: int
    idle_timeout_ms: int
    half_closed_timeout_ms: int
    lifetime_ms: int
    lifetime_jitter_permille: int
    max_connections: int
    max_connections_per_endpoint: int
    keepalive_idle_s: int
    keepalive_interval_s: int
    keepalive_count: int
    user_timeout_ms: int
    bounded_load_percent: int
    rates: list[int]
    burst: int
    queue_size: int
    queue_timeout_ms: int
    retry_permille: int
    retry_minimum: int
    backoff_ms: int


def pack_ip(host: str) -> Packed:
    """16 bytes of an IP literal. Raises OSError for anything else."""
    if ":" in host:
        return socket.inet_pton(socket.AF_INET6, host)
    return _MAPPED + socket.inet_pton(socket.AF_INET, host)


def pack_prefix(network: Network) -> Prefix:
    packed = network.network_address.packed
    if len(packed) == 4:
        return _MAPPED + packed, network.prefixlen + 96
    return packed, network.prefixlen


def compile_pattern(text: str) -> Pattern:
    """``exact``, ``prefix*``, ``*suffix`` or ``*``."""
    if text == "*":
        return ANY, b""
    if text.endswith("*"):
        return PREFIX, text[:-1].encode()
    if text.startswith("*"):
        return SUFFIX, text[1:].encode()
    return EXACT, text.encode()


def compile_listener_tls(listener: Listener, identity: int) -> ListenerTlsSettings:
    tls = listener.tls
    by_mode = {mode: [ports for part, its in tls.ports if its == mode for ports in part] for mode in TlsMode}
    return ListenerTlsSettings(
        tls_mode=_TLS_MODES[tls.mode],
        tls_v12=tls.allow_tls12,
        resumption=tls.resumption,
        identity=identity,
        handshake_ms=tls.handshake_timeout_ms,
        close_expired=tls.close_expired,
        strict=by_mode[TlsMode.STRICT],
        permissive=by_mode[TlsMode.PERMISSIVE],
        plain=by_mode[TlsMode.OFF],
        server_first=list(tls.server_first),
    )


def compile_settings(cluster: Cluster, identity: int) -> ClusterSettings:
    """``identity``: id of the one that the cluster's TLS names, or 0."""
    tls = cluster.tls
    return ClusterSettings(
        tls=tls is not None,
        tls_v12=bool(tls and tls.allow_tls12),
        resumption=bool(tls and tls.resumption),
        tls_identity=identity,
        handshake_ms=tls.handshake_timeout_ms if tls else 0,
        close_expired=bool(tls and tls.close_expired),
        encrypt_local=bool(tls and tls.encrypt_local),
        balance=_BALANCES[cluster.balance],
        proxy_protocol=_PROXY_VERSIONS[cluster.proxy_protocol],
        original_destination=cluster.name == ORIGINAL_DESTINATION,
        connect_attempts=cluster.connect_attempts,
        connect_timeout_ms=cluster.connect_timeout_ms,
        connect_budget_ms=cluster.connect_budget_ms,
        idle_timeout_ms=cluster.idle_timeout_ms,
        half_closed_timeout_ms=cluster.half_closed_timeout_ms,
        lifetime_ms=cluster.lifetime_ms,
        lifetime_jitter_permille=round(cluster.lifetime_jitter * 1000),
        max_connections=cluster.max_connections,
        max_connections_per_endpoint=cluster.max_connections_per_endpoint,
        keepalive_idle_s=cluster.keepalive.idle_s,
        keepalive_interval_s=cluster.keepalive.interval_s,
        keepalive_count=cluster.keepalive.count,
        user_timeout_ms=cluster.user_timeout_ms,
        bounded_load_percent=round(cluster.bounded_load * 100),
        queue_size=cluster.queue_size,
        queue_timeout_ms=cluster.queue_timeout_ms,
        retry_permille=round(cluster.retry_share * 1000),
        retry_minimum=cluster.retry_minimum,
        backoff_ms=cluster.backoff_ms,
        rates=compile_rates(cluster.bandwidth),
        burst=cluster.bandwidth.burst,
    )


def compile_rates(bandwidth: Bandwidth) -> list[int]:
    """By half."""
    return [bandwidth.to_upstream, bandwidth.to_downstream]


def compile_fault(rule: FaultRule) -> FaultRow:
    half = 0 if rule.to_upstream else 1
    sources = [pack_prefix(network) for network in rule.sources]
    share = max(1, round(rule.share * 2**32))
    return int(rule.kind), half, rule.after_bytes, rule.from_ms, rule.to_ms, rule.rate, share, sources


def compile_arrivals(rates: Rates) -> ArrivalRow:
    rows = (rates.total, rates.source, rates.workload, rates.identity)
    return tuple((rate.interval_ns, rate.burst) if rate else (0, 1) for rate in rows)


def compile_watch(outlier: OutlierDetection | None) -> tuple[int, int, int, int]:
    """The arguments of ``ClusterStat.watch``."""
    if outlier is None:
        return 0, 0, 0, 0
    signals = (
        int(outlier.connect_failure) << SIGNALS.index("connect_failure")
        | int(outlier.tls_failure) << SIGNALS.index("tls_failure")
        | int(outlier.early_reset_ms > 0) << SIGNALS.index("early_reset")
        | int(outlier.no_answer_ms > 0) << SIGNALS.index("no_answer")
        # Latency alone: dials are timed when there is anything to watch for.
        | 1 << len(SIGNALS)
    )
    return signals, outlier.consecutive_failures, outlier.early_reset_ms, outlier.no_answer_ms


def endpoint_tier(cluster: Cluster, endpoint_zone: str, node_zone: str) -> int:
    """0 for the endpoints that are preferred, 1 for those that a connection spills over to."""
    return int(cluster.zone_preference and bool(node_zone) and endpoint_zone != node_zone)


def compile_route(route: Route, cluster_index: Mapping[str, int], faults: bool) -> RouteRow:
    """``faults``: whether they are in force."""
    return (
        [pack_prefix(network) for network in route.match.destinations],
        list(route.match.ports),
        [pack_prefix(network) for network in route.match.sources],
        [compile_pattern(name) for name in route.match.sni],
        [(EXACT, protocol.encode()) for protocol in route.match.alpn],
        [(cluster_index[name], weight) for name, weight in route.split if weight],
        [compile_fault(rule) for rule in route.faults if faults],
    )


def compile_flags(listener: Listener) -> int:
    flags = {Capture.NONE: 0, Capture.REDIRECT: LISTENER_REDIRECT, Capture.TPROXY: LISTENER_TPROXY}[listener.capture]
    if listener.capture != Capture.NONE and listener.direction == Direction.OUTBOUND:
        flags |= LISTENER_OUTBOUND
    return flags | (LISTENER_PRESERVE_SOURCE if listener.preserve_source else 0)


def own_addresses(binds: list[SocketAddress]) -> list[tuple[Packed, int]]:
    """What we listen on, in the form in which the workers compare a destination with it."""
    return [(pack_ip(bind.host), bind.port) for bind in binds]
