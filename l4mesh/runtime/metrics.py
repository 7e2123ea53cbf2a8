"""Counters of the data path as Prometheus metrics, in its text format and in OpenMetrics."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client import exposition as text_format
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from l4mesh import __version__
from l4mesh.errors import CloseReason, Fault
from l4mesh.identity.store import IdentityStatus
from l4mesh.runtime.endpoints import ClusterState, EndpointRegistry
from l4mesh.runtime.health import HealthChecker
from l4mesh.runtime.outlier import OutlierDetector
from l4mesh.runtime.overload import OverloadStatus
from l4mesh.runtime.reload import ReloadStatus
from l4mesh.runtime.renewer import RenewalStatus
from l4mesh.runtime.supervised import Supervision
from l4mesh.snapshot import CONNECT_BUCKETS_S, ClusterSnapshot, EndpointSnapshot, Snapshot, TlsSnapshot
from l4mesh.totals import Count

_BUCKET_NAMES = [f"{bound:g}" for bound in CONNECT_BUCKETS_S] + ["+Inf"]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the figures come from. Each is called once a scrape, off the control loop."""

    snapshot: Callable[[], Snapshot]
    endpoints: Callable[[], list[EndpointSnapshot]]
    reload_status: Callable[[], ReloadStatus]
    identities: Callable[[], list[IdentityStatus]]
    renewals: Callable[[], list[RenewalStatus]]
    access_log_dropped: Callable[[], int]
    loop_lag_s: Callable[[], tuple[float, float]]
    """The last lag and the greatest since the scrape before."""
    registry: EndpointRegistry
    health: HealthChecker
    outliers: OutlierDetector
    supervision: Callable[[], Supervision | None]
    """None: no supervisor has started this process."""
    overload: Callable[[], OverloadStatus]
    inherited: Callable[[], Sequence[Count]]
    """What the control loop of the process before this one has counted."""


def render_metrics(sources: Sources, accept: str) -> tuple[bytes, str]:
    """The body of a scrape and its content type, chosen by the Accept header."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MeshCollector(sources))
    ProcessCollector(registry=registry)
    if "application/openmetrics-text" in accept:
        kind = openmetrics.CONTENT_TYPE_LATEST
    else:
        kind = text_format.CONTENT_TYPE_LATEST
    encode, _ = choose_encoder(kind)
    return encode(registry), kind


def count_control(sources: Sources) -> list[Count]:
    """For the process after this one: the counters that are not the data path's, those of the processes before included."""
    families = _control_metrics(sources, sources.snapshot())
    return [Count(family.name, sample.labels, sample.value) for family in families for sample in family.samples if sample.value]


class MeshCollector(Collector):
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        snapshot = self._sources.snapshot()
        yield from _listener_metrics(snapshot)
        yield from _cluster_metrics(snapshot)
        yield from _endpoint_metrics(self._sources.endpoints(), self._sources.health)
        yield from _state_metrics(self._sources.registry.states())
        yield from _health_metrics(self._sources.health)
        yield from _tls_metrics(snapshot.tls)
        yield from _identity_metrics(self._sources.identities())
        yield from _worker_metrics(snapshot)
        yield from _config_metrics(snapshot, self._sources.reload_status())
        yield from _overload_metrics(self._sources.overload())
        yield from _control_metrics(self._sources, snapshot)
        yield from self._process_metrics(snapshot)

    def _process_metrics(self, snapshot: Snapshot) -> Iterator[Metric]:
        last, greatest = self._sources.loop_lag_s()
        yield _gauge("l4mesh_loop_lag_seconds", "How late the control loop ran its last tick.", last)
        yield _gauge("l4mesh_loop_lag_max_seconds", "The latest tick since the scrape before.", greatest)
        yield _gauge("l4mesh_faults_enabled", "1 while the configuration lets faults be injected.", int(snapshot.faults_enabled))
        yield _gauge("l4mesh_descriptors_open", "Open file descriptors.", len(os.listdir("/proc/self/fd")))
        yield _gauge("l4mesh_descriptors_limit", "RLIMIT_NOFILE.", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        yield _gauge("l4mesh_connections_limit", "Connections at which accepting pauses.", snapshot.max_connections)
        supervision = self._sources.supervision()
        if supervision:
            yield _counter("l4mesh_supervisor_restarts", "Data planes that died and were replaced.", supervision.restarts)
            yield _gauge("l4mesh_redirect_in_place", "1 while the redirect rules are as they should be.", int(supervision.in_place))
            yield _counter("l4mesh_redirect_repairs", "Times that the redirect rules were found changed.", supervision.repairs)
        info = GaugeMetricFamily("l4mesh_build_info", "Always 1; the version is the label.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _control_metrics(sources: Sources, snapshot: Snapshot) -> Iterator[CounterMetricFamily]:
    """The counters that are not the data path's, on top of what the processes before have counted."""
    clusters = {cluster.name for cluster in snapshot.clusters}
    before: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for count in sources.inherited():
        if count.labels.get("cluster") is None or count.labels["cluster"] in clusters:
            before.setdefault(count.metric, {})[tuple(sorted(count.labels.items()))] = count.value
    for family in _count_control(sources, snapshot):
        left = before.get(family.name, {})
        family.samples = [
            sample._replace(value=sample.value + left.pop(tuple(sorted(sample.labels.items())), 0)) for sample in family.samples
        ] + [Sample(f"{family.name}_total", dict(labels), value) for labels, value in left.items()]
        yield family


def _count_control(sources: Sources, snapshot: Snapshot) -> Iterator[CounterMetricFamily]:
    yield _health_metric(sources.health)
    yield _outlier_metric(sources.outliers.totals())
    yield from _identity_counters(sources.identities())
    yield from _renewal_metrics(sources.renewals())
    yield _reload_metric(sources.reload_status())
    yield _shed_metric(sources.overload())
    yield _counter(
        "l4mesh_access_log_dropped", "Lines that were not written because the log is blocked or full.", sources.access_log_dropped()
    )
    yield _counter(
        "l4mesh_rate_overflows", "Connections whose source, workload or identity shared a bucket, the table being full.",
        snapshot.rate_overflows,
    )  # fmt: skip


def _reasons(family: CounterMetricFamily, name: str, closed: Mapping[CloseReason, int]) -> None:
    for reason, count in closed.items():
        family.add_metric([name, reason.label, reason.initiator.value], count)


def _listener_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    opened = CounterMetricFamily("l4mesh_listener_connections_opened", "Connections accepted.", labels=["listener"])
    active = GaugeMetricFamily("l4mesh_listener_connections_active", "Live connections.", labels=["listener"])
    closed = CounterMetricFamily(
        "l4mesh_listener_connections_closed", "Connections ended, by reason.", labels=["listener", "reason", "initiator"]
    )
    for listener in (*snapshot.listeners, snapshot.retired_listeners):
        opened.add_metric([listener.name], listener.opened)
        active.add_metric([listener.name], listener.active)
        _reasons(closed, listener.name, listener.closed)
    yield from (opened, active, closed)


def _cluster_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    opened = CounterMetricFamily("l4mesh_connections_opened", "Connections routed to the cluster.", labels=["cluster"])
    active = GaugeMetricFamily("l4mesh_connections_active", "Live connections.", labels=["cluster"])
    closed = CounterMetricFamily(
        "l4mesh_connections_closed", "Connections ended, by reason.", labels=["cluster", "reason", "initiator"]
    )
    moved = CounterMetricFamily("l4mesh_bytes", "Bytes handed to the receiving socket.", labels=["cluster", "direction"])
    attempts = CounterMetricFamily("l4mesh_connect_attempts", "Dials.", labels=["cluster"])
    failures = CounterMetricFamily("l4mesh_connect_failures", "Dials that the endpoint failed.", labels=["cluster"])
    connect = HistogramMetricFamily("l4mesh_connect_seconds", "Time of dials that succeeded.", labels=["cluster"])
    waiting = GaugeMetricFamily("l4mesh_connections_waiting", "Connections that wait for a place at a limit.", labels=["cluster"])
    queued = CounterMetricFamily("l4mesh_connections_queued", "Connections that have waited for a place.", labels=["cluster"])
    waited = CounterMetricFamily("l4mesh_queue_seconds", "Time that they have waited.", labels=["cluster"])
    retrying = GaugeMetricFamily("l4mesh_connections_retrying", "Connections on an attempt after their first.", labels=["cluster"])
    refused = CounterMetricFamily("l4mesh_retries_refused", "Attempts that the retry budget refused.", labels=["cluster"])
    for cluster in (*snapshot.clusters, snapshot.retired):
        opened.add_metric([cluster.name], cluster.opened)
        active.add_metric([cluster.name], cluster.active)
        waiting.add_metric([cluster.name], cluster.waiting)
        if not cluster.opened:
            continue
        queued.add_metric([cluster.name], cluster.queued)
        waited.add_metric([cluster.name], cluster.queued_seconds)
        retrying.add_metric([cluster.name], cluster.retrying)
        refused.add_metric([cluster.name], cluster.retries_refused)
        _reasons(closed, cluster.name, cluster.closed)
        moved.add_metric([cluster.name, "to_upstream"], cluster.bytes_to_upstream)
        moved.add_metric([cluster.name, "to_downstream"], cluster.bytes_to_downstream)
        attempts.add_metric([cluster.name], cluster.connect_attempts)
        failures.add_metric([cluster.name], cluster.connect_failures)
        connect.add_metric([cluster.name], _buckets(cluster), cluster.connect_seconds_sum)
    yield from (opened, active, closed, moved, attempts, failures, connect, waiting, queued, waited, retrying, refused)
    faults = CounterMetricFamily("l4mesh_faults_injected", "Connections that a fault was injected into.", labels=["cluster", "fault"])
    for cluster in (*snapshot.clusters, snapshot.retired):
        for fault in Fault:
            if cluster.faults[fault]:
                faults.add_metric([cluster.name, fault.label], cluster.faults[fault])
    yield faults


def _buckets(cluster: ClusterSnapshot) -> list[tuple[str, float]]:
    total = 0
    buckets: list[tuple[str, float]] = []
    for name, count in zip(_BUCKET_NAMES, cluster.connect_seconds_buckets, strict=True):
        total += count
        buckets.append((name, total))
    return buckets


def _endpoint_metrics(endpoints: list[EndpointSnapshot], health: HealthChecker) -> Iterator[Metric]:
    labels = ["cluster", "endpoint"]
    active = GaugeMetricFamily("l4mesh_endpoint_connections_active", "Live connections, dials included.", labels=labels)
    opened = CounterMetricFamily("l4mesh_endpoint_connections_opened", "Connections made.", labels=labels)
    failures = CounterMetricFamily("l4mesh_endpoint_connect_failures", "Dials that failed.", labels=labels)
    moved = CounterMetricFamily(
        "l4mesh_endpoint_bytes", "Bytes of connections that ended.", labels=["cluster", "endpoint", "direction"]
    )
    healthy = GaugeMetricFamily("l4mesh_endpoint_healthy", "0 while health checks fail; of endpoints that are checked.", labels=labels)
    wrong = CounterMetricFamily(
        "l4mesh_endpoint_failures", "What outlier detection counts against an endpoint.", labels=["cluster", "endpoint", "signal"]
    )
    for endpoint in endpoints:
        verdict = health.verdict(endpoint.cluster, endpoint.address)
        unhealthy = verdict is not None and verdict.state == "unhealthy"
        if not (endpoint.opened or endpoint.active or endpoint.connect_failures or unhealthy):
            continue
        names = [endpoint.cluster, endpoint.address]
        if verdict:
            healthy.add_metric(names, int(not unhealthy))
        active.add_metric(names, endpoint.active)
        opened.add_metric(names, endpoint.opened)
        failures.add_metric(names, endpoint.connect_failures)
        moved.add_metric([*names, "to_upstream"], endpoint.bytes_to_upstream)
        moved.add_metric([*names, "to_downstream"], endpoint.bytes_to_downstream)
        for signal, count in endpoint.failures.items():
            wrong.add_metric([*names, signal], count)
    yield from (active, opened, failures, moved, healthy, wrong)


def _state_metrics(states: list[ClusterState]) -> Iterator[Metric]:
    out = GaugeMetricFamily("l4mesh_endpoints_out", "Endpoints that take no connections, by cause.", labels=["cluster", "cause"])
    panic = GaugeMetricFamily("l4mesh_cluster_panic", "1 while so few endpoints are left that all serve.", labels=["cluster"])
    for state in states:
        out.add_metric([state.cluster, "ejected"], state.ejected)
        out.add_metric([state.cluster, "unhealthy"], state.unhealthy)
        panic.add_metric([state.cluster], int(state.panic))
    yield from (out, panic)


def _health_metrics(health: HealthChecker) -> Iterator[Metric]:
    yield _gauge("l4mesh_health_checks_under_way", "Health checks begun and not ended.", health.under_way)
    yield _gauge(
        "l4mesh_health_check_late_max_seconds", "How late the latest health check began since the scrape before.", health.take_late_s()
    )


def _health_metric(health: HealthChecker) -> CounterMetricFamily:
    checks = CounterMetricFamily("l4mesh_health_check", "Health checks, by result.", labels=["cluster", "type", "result"])
    for cluster, kind, counts in health.counts():
        for result, count in counts.items():
            checks.add_metric([cluster, kind, result], count)
    return checks


def _outlier_metric(totals: list[tuple[str, str, str, int]]) -> CounterMetricFamily:
    family = CounterMetricFamily(
        "l4mesh_outlier_ejections", "Endpoints found to be outliers, by whether they were ejected or why not.",
        labels=["cluster", "detector", "result"],
    )  # fmt: skip
    for cluster, detector, result, count in totals:
        family.add_metric([cluster, detector, result], count)
    return family


def _worker_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    figures: list[tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str, str, str]] = [
        (GaugeMetricFamily, "worker_connections_active", "Live connections.", "active"),
        (CounterMetricFamily, "worker_connections_accepted", "Connections accepted.", "accepted"),
        (CounterMetricFamily, "accept_pauses", "Times that accepting paused for want of descriptors.", "accept_pauses"),
        (GaugeMetricFamily, "accept_paused", "1 while accepting pauses.", "paused"),
        (CounterMetricFamily, "records_dropped", "Records for the log that found the ring full.", "records_dropped"),
        (GaugeMetricFamily, "pipes_open", "Pipes for splice, in use or pooled.", "pipes"),
        (CounterMetricFamily, "worker_turns", "Turns of the event loop.", "turns"),
        (CounterMetricFamily, "bytes_copied", "Bytes moved through user memory.", "bytes_copied"),
        (CounterMetricFamily, "bytes_spliced", "Bytes moved inside the kernel.", "bytes_spliced"),
        (CounterMetricFamily, "stream_holds", "Times that a stream was left for a moment to gather more bytes.", "holds"),
        (CounterMetricFamily, "accepts_put_aside", "Connections that waited for the turn of their source.", "put_aside"),
        (CounterMetricFamily, "bandwidth_waits", "Times that one direction of a connection waited for its bandwidth.", "throttles"),
    ]
    for kind, name, text, field in figures:
        family = kind(f"l4mesh_{name}", text, labels=["worker"])
        for worker in snapshot.workers:
            family.add_metric([str(worker.worker)], getattr(worker, field))
        yield family


def _tls_metrics(tls: TlsSnapshot) -> Iterator[Metric]:
    handshakes = CounterMetricFamily("l4mesh_tls_handshakes", "Handshakes that succeeded.", labels=["side", "resumed"])
    for (side, resumed), count in tls.handshakes.items():
        handshakes.add_metric([side, str(resumed).lower()], count)
    failures = CounterMetricFamily("l4mesh_tls_failures", "Handshakes and connections that TLS ended.", labels=["side", "cause"])
    for (side, cause), count in tls.failures.items():
        failures.add_metric([side, cause.label], count)
    yield from (handshakes, failures)
    yield _counter(
        "l4mesh_policy_dry_run_denials", "Connections that passed and that a dry-run policy would have refused.", tls.dry_run_denials
    )


def _identity_metrics(identities: list[IdentityStatus]) -> Iterator[Metric]:
    expires = GaugeMetricFamily(
        "l4mesh_identity_expiry_timestamp_seconds", "When the certificate in use ends.", labels=["identity", "spiffe_id"]
    )
    lists = GaugeMetricFamily(
        "l4mesh_identity_crl_next_update_timestamp_seconds", "When the next revocation list is due.", labels=["identity"]
    )
    healthy = GaugeMetricFamily(
        "l4mesh_identity_healthy", "0 while the files can't be used and an older certificate serves, or none.", labels=["identity"]
    )
    for identity in identities:
        if identity.in_use:
            expires.add_metric([identity.name, identity.spiffe_id], identity.expires_unix_s)
        if identity.crl_until_unix_s:
            lists.add_metric([identity.name], identity.crl_until_unix_s)
        healthy.add_metric([identity.name], int(not identity.error))
    yield from (expires, lists, healthy)


def _identity_counters(identities: list[IdentityStatus]) -> Iterator[CounterMetricFamily]:
    loaded = CounterMetricFamily("l4mesh_identity_loads", "Certificates taken into use.", labels=["identity"])
    refused = CounterMetricFamily("l4mesh_identity_refusals", "Files that could not be used.", labels=["identity"])
    for identity in identities:
        loaded.add_metric([identity.name], identity.loaded)
        refused.add_metric([identity.name], identity.refused)
    yield from (loaded, refused)


def _renewal_metrics(renewals: list[RenewalStatus]) -> Iterator[CounterMetricFamily]:
    renewed = CounterMetricFamily("l4mesh_identity_renewals", "Requests to the CA for a certificate.", labels=["identity", "result"])
    fetched = CounterMetricFamily("l4mesh_trust_fetches", "Requests to the CA for bundle and revocation lists.", labels=["result"])
    for renewal in renewals:
        for result, count in (("succeeded", renewal.succeeded), ("failed", renewal.failed)):
            if renewal.name:
                renewed.add_metric([renewal.name, result], count)
            else:
                fetched.add_metric([result], count)
    yield from (renewed, fetched)


def _config_metrics(snapshot: Snapshot, status: ReloadStatus) -> Iterator[Metric]:
    yield _gauge("l4mesh_config_generation", "Generation of the plan in force.", snapshot.generation)
    yield _gauge("l4mesh_config_plans_alive", "Plans in memory; 2 only while one replaces the other.", snapshot.plans_alive)
    yield _gauge("l4mesh_config_last_reload_success", "0 while the files hold a configuration that was refused.",
                 int(status.last_error is None))  # fmt: skip
    yield _gauge("l4mesh_config_loaded_timestamp_seconds", "When the plan in force was loaded.", status.loaded_unix_s)


def _reload_metric(status: ReloadStatus) -> CounterMetricFamily:
    reloads = CounterMetricFamily("l4mesh_config_reloads", "Looks at the files, by result.", labels=["result"])
    for result in ("succeeded", "unchanged", "failed"):
        reloads.add_metric([result], getattr(status, result))
    return reloads


def _overload_metrics(status: OverloadStatus) -> Iterator[Metric]:
    level = GaugeMetricFamily("l4mesh_overload_level", "Step of shedding, 0 (none) to 3, by what is short.", labels=["resource"])
    pressure = GaugeMetricFamily("l4mesh_overload_pressure", "Share of the resource that is in use.", labels=["resource"])
    for one in status.resources:
        level.add_metric([one.name], one.level)
        pressure.add_metric([one.name], one.pressure)
    yield from (level, pressure)


def _shed_metric(status: OverloadStatus) -> CounterMetricFamily:
    shed = CounterMetricFamily(
        "l4mesh_overload_shed", "Idle connections ended, connections refused, pauses of accepting.", labels=["action"]
    )
    for action, count in (
        ("idle_closed", status.shed.idle), ("source_refused", status.shed.sources), ("accept_paused", status.shed.accepts),
    ):  # fmt: skip
        shed.add_metric([action], count)
    return shed
