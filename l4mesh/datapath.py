"""The only door to the compiled engine: worker threads, plans on the way down, counters and records on the way up.

``apply``, ``snapshot`` and ``endpoints`` may be called from any thread; the rest belongs to the control loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from l4mesh import _fastpath
from l4mesh.errors import CloseReason, Fault, InternalError, TlsCause
from l4mesh.identity.svid import Material
from l4mesh.model import Cluster, Config, Endpoint, Listener, LogWhen, SocketAddress, Workload
from l4mesh.policy.authz import add_policies
from l4mesh.policy.outlier import Counts
from l4mesh.policy.plan import (
    compile_arrivals,
    compile_fault,
    compile_flags,
    compile_listener_tls,
    compile_pattern,
    compile_rates,
    compile_route,
    compile_settings,
    compile_watch,
    endpoint_tier,
    own_addresses,
    pack_ip,
    pack_prefix,
)
from l4mesh.snapshot import (
    CONNECT_BUCKETS_S,
    SIGNALS,
    ClusterSnapshot,
    ConnectionRecord,
    ConnectionSnapshot,
    EndpointSnapshot,
    ListenerSnapshot,
    ShedSnapshot,
    Snapshot,
    TlsSnapshot,
    WorkerSnapshot,
)
from l4mesh.totals import Totals, add

Traveller = tuple[bytes, list[int], str, str, str]
"""A live connection on its way to another process: its state, its descriptors, and the names of its listener, cluster and endpoint ("":
none)."""

RECORDS_AT_ONCE = 512
GATHER_S = 0.02
COLLECT_DEADLINE_S = 10.0
CARRIED_BYTES = _fastpath.carried_size()
"""Of a connection's state as it crosses from one process to another: the same in both, or they can't."""
_STATES = {
    1: "preface", 2: "hello", 3: "handshake", 4: "dialling", 5: "relaying", 6: "resetting", 7: "accepted", 8: "queued", 9: "departing",
}  # fmt: skip
_REASONS = tuple(CloseReason)
_CAUSES = tuple(TlsCause)
ACCEPT_ON, ACCEPT_EMPTY, ACCEPT_OFF = range(3)
_FAULTS = tuple(Fault)
_NO_ALLOW = 0xFFFFFFFF
"""Stands in for the dry-run policy when it is that none of them allows."""
_LOG_WHEN = {LogWhen.NEVER: 0, LogWhen.ERRORS: 1, LogWhen.ALWAYS: 2}
_ERROR_REASONS = sum(1 << reason for reason in CloseReason if reason.is_error)

BoundSockets = Sequence[tuple[SocketAddress, list[int]]]
"""The bound addresses of a listener, each with a socket's descriptor for each worker."""


@dataclass(slots=True)
class _ClusterEntry:
    """A cluster of the current plan: what it was compiled from, so that the next plan can tell whether it changed."""

    model: Cluster
    zone: str
    compiled: _fastpath.Cluster
    endpoints: dict[str, _fastpath.EndpointStat]


@dataclass(slots=True)
class _Removed:
    """What no plan names any more, until its last connection has ended and its records are read.

    The flag says that it had no connection at the tick before.
    """

    compiled: list[_fastpath.Cluster] = field(default_factory=list)
    clusters: list[tuple[str, _fastpath.ClusterStat, bool]] = field(default_factory=list)
    endpoints: dict[tuple[_fastpath.ClusterStat, str], _fastpath.EndpointStat] = field(default_factory=dict)
    listeners: list[tuple[str, _fastpath.ListenerStat, bool]] = field(default_factory=list)


class Datapath:
    """The engine with its workers and the names of what they count.

    ``on_records`` is called on the control loop with batches of connections that ended.
    """

    def __init__(
        self,
        n_workers: int,
        max_descriptors: int,
        on_records: Callable[[list[ConnectionRecord]], None],
        ring_records: int = 8192,
    ) -> None:
        seeds = [int.from_bytes(os.urandom(8), "little") for _ in range(n_workers)]
        # A connection has at least one descriptor, so that no table can outgrow this.
        self._engine = _fastpath.Engine(n_workers, max_descriptors, seeds, ring_records)
        self._n_workers = n_workers
        self._on_records = on_records
        self._lock = threading.Lock()
        self._generation = 0
        self._ids = 0
        self._max_connections = 0
        self._faults_enabled = False
        self._fault_rules = 0
        self._clusters: dict[str, _ClusterEntry] = {}
        self._listeners: dict[str, _fastpath.ListenerStat] = {}
        self._names: dict[int, str] = {0: ""}
        self._removed = _Removed()
        self._retired_clusters = _add_cluster("(removed)", None, None)
        self._retired_listeners = ListenerSnapshot("(removed)", 0, 0, {})
        self._identity_ids: dict[str, int] = {}
        self._policy_ids: dict[str, int] = {}
        self._workload_ids: dict[tuple[str, str], int] = {}
        self._policy_names: dict[int, str] = {0: "", _NO_ALLOW: "(no policy allows)"}
        self._buckets: dict[tuple[str, str], tuple[tuple[int, int], _fastpath.Bucket]] = {}
        self._contexts: dict[str, tuple[tuple[bytes, int], _fastpath.TlsContext]] = {}
        self._trusted: tuple[object, ...] = ()
        self._trust = 0
        self.on_told: Callable[[list[int]], None] = lambda ids: None
        """Called on the control loop with endpoints that have just failed as often in a row as their clusters put up with."""
        self._threads: list[threading.Thread] = []
        self._woken: asyncio.Event | None = None
        self._gathering: asyncio.Handle | None = None
        self._page_locks: list[asyncio.Lock] = []
        self._asked: set[int] = set()
        """Workers that owe an answer to ``connections``."""
        self._handovers: list[_fastpath.Handover] = []
        self._steering = threading.Lock()
        self._inherited: Totals | None = None
        self._inherited_endpoints: dict[tuple[str, str], EndpointSnapshot] = {}
        self._gone: tuple[set[str], set[str], set[tuple[str, str]]] = (set(), set(), set())

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the workers and listens for what they report. Call it on the running control loop."""
        loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._page_locks = [asyncio.Lock() for _ in range(self._n_workers)]
        loop.add_reader(self._engine.fileno(), self._wake)
        for index in range(self._n_workers):
            thread = threading.Thread(target=self._run_worker, args=(index,), name=f"l4mesh-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def watch(self, limit_ms: int, stacks_signal: int) -> None:
        """See ``Engine.watch``; on a thread of the caller's."""
        _name_thread("l4mesh-watchdog")
        self._engine.watch(limit_ms, stacks_signal)

    def end_watch(self) -> None:
        self._engine.end_watch()

    def beat(self) -> None:
        """The control loop has come round."""
        self._engine.beat()

    def rest(self) -> None:
        """The control loop need not come round any more."""
        self._engine.rest()

    def _run_worker(self, index: int) -> None:
        _name_thread(f"l4mesh-{index}")
        # Signals are the control loop's: none may interrupt a worker's system calls.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._engine.run(index)

    def stop(self) -> None:
        """Ends all connections and the workers, and reports their last records. The listening sockets are the caller's."""
        self._engine.stop()
        for thread in self._threads:
            thread.join()
        asyncio.get_running_loop().remove_reader(self._engine.fileno())
        if self._gathering:
            self._gathering.cancel()
        while self._drain_records():
            pass

    # -- plans ---------------------------------------------------------------------------------------------------------

    def apply(
        self,
        config: Config,
        sockets: Mapping[str, BoundSockets],
        own: list[SocketAddress],
        max_connections: int,
        materials: Mapping[str, Material] | None = None,
    ) -> int:
        """Compiles ``config``, publishes it and waits until no worker sees the plan before.

        ``sockets``: by listener's name. ``own``: every address that the process listens on. ``materials``: by identity's name.
        Returns the generation. Endpoint hosts must be IP literals. Raises InternalError when a worker does not come round within
        ten seconds; the new plan is published all the same.
        """
        with self._lock:
            self._collect()
            materials = materials or {}
            self._renew_trust(config, materials)
            entries = {name: self._compile_cluster(cluster, config.node_zone) for name, cluster in config.clusters.items()}
            index = {name: i for i, name in enumerate(entries)}
            plan = _fastpath.Plan(
                self._generation + 1,
                self._n_workers,
                [entry.compiled for entry in entries.values()],
                own_addresses(own),
                max_connections=max_connections,
                max_connections_per_source=config.max_connections_per_source,
                mark=config.own_mark,
                splice=config.splice,
                error_reasons=_ERROR_REASONS,
                log_when=_LOG_WHEN[config.access_log.when],
                log_sample=config.access_log.sample,
                max_handshakes_per_source=config.max_handshakes_per_source,
                trust=self._trust,
                arrival_rates=compile_arrivals(config.rates),
            )
            self._add_trust(plan, config, materials)
            if config.faults_enabled and config.fault_rules:
                plan.set_cluster_faults([[compile_fault(rule) for rule in cluster.faults] for cluster in config.clusters.values()])
            listeners = {
                name: self._add_listener(plan, listener, sockets[name], index, config.faults_enabled)
                for name, listener in config.listeners.items()
            }
            self._engine.publish(plan)
            self._generation += 1
            self._max_connections = max_connections
            self._faults_enabled, self._fault_rules = config.faults_enabled, config.fault_rules
            self._retire(entries, listeners)
            if self._threads:
                self._collect()
            return self._generation

    def _renew_trust(self, config: Config, materials: Mapping[str, Material]) -> None:
        """Notices whether anything has changed that live connections were let in by."""
        revoked = tuple(material.revoked for material in materials.values())
        owners = tuple((workload.addresses, workload.namespace, workload.labels, workload.identity) for workload in config.workloads)
        trusted = (config.policies, owners, revoked, config.node_identity, tuple(m.spiffe_id for m in materials.values()))
        if trusted != self._trusted:
            self._trusted = trusted
            self._trust += 1
        contexts: dict[str, tuple[tuple[bytes, int], _fastpath.TlsContext]] = {}
        for name, material in materials.items():
            # A context of its own for every generation of trust: no session outlives what it was made under.
            key = (material.digest, self._trust)
            known = self._contexts.get(name)
            if known is None or known[0] != key:
                context = _fastpath.TlsContext(
                    random.getrandbits(63), material.spiffe_id, material.certificates, material.private_key, material.trust_bundle
                )
                known = (key, context)
            contexts[name] = known
        self._contexts = contexts

    def _identity_id(self, name: str) -> int:
        """A number that stays with the name: clusters are compiled once, contexts come and go. 0 for ""."""
        return self._identity_ids.setdefault(name, len(self._identity_ids) + 1) if name else 0

    def _workload_id(self, workload: Workload) -> int:
        """A number that stays with the name, by which rates are counted over reloads."""
        return self._workload_ids.setdefault((workload.namespace, workload.name), len(self._workload_ids) + 1)

    def _policy_id(self, name: str) -> int:
        number = self._policy_ids.setdefault(name, len(self._policy_ids) + 1)
        self._policy_names[number] = name
        return number

    def _add_trust(self, plan: _fastpath.Plan, config: Config, materials: Mapping[str, Material]) -> None:
        """Identities, workloads, policies and revocations."""
        ids = {name: self._identity_id(name) for name in config.identities}
        contexts: list[_fastpath.TlsContext | None] = [None] * (len(self._identity_ids) + 1)
        for name, (_, context) in self._contexts.items():
            contexts[ids[name]] = context
        plan.set_contexts(contexts, self._identity_id(config.node_identity))
        revoked = {entry for material in materials.values() for entry in material.revoked}
        plan.set_revoked(sorted(revoked), self._engine.revocation_seed)
        sets = add_policies(plan, config.policies, config.workloads, self._policy_id)
        self._renew_buckets(config.workloads)
        plan.set_workloads(
            [
                (
                    pack_ip(address),
                    self._identity_id(workload.identity or config.node_identity),
                    policies,
                    self._workload_id(workload),
                    self._bucket(workload, "receive"),
                    self._bucket(workload, "send"),
                )
                for workload, policies in zip(config.workloads, sets.of_workload, strict=True)
                for address in workload.addresses
            ]
        )

    def _renew_buckets(self, workloads: Sequence[Workload]) -> None:
        """The bandwidth of workloads, for live connections as well; those that have their first limit in this plan are not found
        by it."""
        before, self._buckets = self._buckets, {}
        for workload in workloads:
            for direction in ("receive", "send"):
                limit = getattr(workload.bandwidth, direction), workload.bandwidth.burst
                if not limit[0]:
                    continue
                key = (workload.name, direction)
                set_to, bucket = before.pop(key, ((0, 0), None))
                bucket = bucket or _fastpath.Bucket()
                if set_to != limit:
                    bucket.set(*limit)
                self._buckets[key] = limit, bucket
        for _, bucket in before.values():
            bucket.set(0, 0)

    def _bucket(self, workload: Workload, direction: str) -> _fastpath.Bucket | None:
        entry = self._buckets.get((workload.name, direction))
        return entry[1] if entry else None

    # -- endpoints, between two plans ----------------------------------------------------------------------------------
    # On the control loop, which must not wait for a plan that is being compiled: no lock. A new plan goes on with the same counters.

    def _endpoint_stat(self, cluster: str, address: str) -> _fastpath.EndpointStat | None:
        entry = self._clusters.get(cluster)
        return entry.endpoints.get(address) if entry else None

    def set_endpoint_out(self, cluster: str, address: str, causes: int) -> bool:
        """Workers pick the endpoint as long as ``causes``, a bit each, is 0. False: there is no such endpoint."""
        stat = self._endpoint_stat(cluster, address)
        if stat is None:
            return False
        stat.out = causes
        if not causes:
            self._engine.offer_places()
        return True

    def warm_endpoint(self, cluster: str, address: str, over_ms: int) -> None:
        """Slow start from now on."""
        stat = self._endpoint_stat(cluster, address)
        if stat is not None:
            now_ms = time.monotonic_ns() // 1_000_000
            stat.warm(now_ms, now_ms + over_ms)

    def close_endpoint(self, cluster: str, address: str, reason: CloseReason, over_ms: int) -> None:
        """Ends its connections, each at a moment of its own within ``over_ms``, and so those that are made yet, until
        ``keep_endpoint``."""
        stat = self._endpoint_stat(cluster, address)
        if stat is not None:
            self._engine.leave([(stat, 1000)], reason, over_ms)

    def keep_endpoint(self, cluster: str, address: str) -> None:
        """Calls ``close_endpoint`` off: connections that have not ended yet, stay."""
        stat = self._endpoint_stat(cluster, address)
        if stat is not None:
            stat.stay()

    def close_all(self, reason: CloseReason, over_ms: int) -> None:
        """Ends every connection, each at a moment of its own within ``over_ms``, and so those that are made yet."""
        self._engine.leave_all(reason, over_ms)

    @property
    def active(self) -> int:
        """Live connections."""
        return self._engine.active

    @property
    def max_connections(self) -> int:
        return self._max_connections

    def shed(self, idle_cap_ms: int, source_share: int, accepts_per_s: int, sweep: bool) -> None:
        """What is done about overload from now on; 0 is off. ``sweep``: end connections that have been idle for longer than
        ``idle_cap_ms``, now. ``source_share``: live connections that one source may have."""
        # A pause is a tenth of a second.
        budget = max(1, accepts_per_s // (10 * self._n_workers)) if accepts_per_s else 0
        self._engine.shed(idle_cap_ms, source_share, budget, sweep)

    def read_shed(self) -> ShedSnapshot:
        shed = [self._engine.read_shed(index) for index in range(self._n_workers)]
        workers = [self._engine.read_worker(index) for index in range(self._n_workers)]
        idle, sources, accepts, unused = map(sum, zip(*shed, strict=True))
        return ShedSnapshot(idle, sources, accepts, unused, sum(worker[1] for worker in workers), sum(worker[5] for worker in workers))

    def measure_sources(self) -> list[tuple[int, int]] | None:
        """(Live connections, sources that have as many), ascending; None while not all connections are counted yet."""
        return self._engine.measure_sources() if self._engine.swept else None

    async def stop_accepting(self) -> None:
        """Accepts what waits in the queues, then no more. The sockets can be closed when this returns."""
        await asyncio.to_thread(self._set_accept_mode, ACCEPT_EMPTY)

    def _set_accept_mode(self, mode: int) -> None:
        self._engine.set_accept_mode(mode)
        _wait_for_workers(lambda: self._engine.accept_mode_seen, "stopped or begun to accept")

    def set_panic(self, cluster: str, panic: bool) -> None:
        """Whether workers pick the cluster's endpoints that are out as well."""
        entry = self._clusters.get(cluster)
        if entry:
            entry.compiled.stat.panic = panic
            self._engine.offer_places()

    def endpoint_ids(self, cluster: str) -> dict[int, str]:
        """By the numbers that ``on_told`` gets."""
        entry = self._clusters.get(cluster)
        return {stat.id: address for address, stat in entry.endpoints.items()} if entry else {}

    def outlier_counts(self, cluster: str) -> dict[str, Counts]:
        """What outlier detection goes by, by address."""
        entry = self._clusters.get(cluster)
        return {address: _count_outlier(stat) for address, stat in entry.endpoints.items()} if entry else {}

    def outlier_count(self, cluster: str, address: str) -> Counts | None:
        """The same of one endpoint. None: there is no such endpoint."""
        stat = self._endpoint_stat(cluster, address)
        return _count_outlier(stat) if stat else None

    def forget_failures(self, cluster: str, address: str) -> None:
        """Failures in a row count from 0 again."""
        stat = self._endpoint_stat(cluster, address)
        if stat is not None:
            stat.forget_failures()

    def wait_until_seen(self) -> None:
        """Waits until every worker serves the current plan. Raises InternalError after ten seconds."""
        with self._lock:
            self._collect()

    def _compile_cluster(self, cluster: Cluster, zone: str) -> _ClusterEntry:
        before = self._clusters.get(cluster.name)
        if before and before.model is cluster and before.zone == zone:
            return before
        stat = before.compiled.stat if before else self._new_cluster_stat(cluster.name)
        known = before.endpoints if before else {}
        now_ms = time.monotonic_ns() // 1_000_000
        endpoints: dict[str, _fastpath.EndpointStat] = {}
        rows = []
        for endpoint in cluster.endpoints:
            address = endpoint.address
            endpoint_stat = known.get(address)
            if endpoint_stat is None:
                endpoint_stat = self._join(stat, address)
                # An endpoint that joins a cluster in service warms up; those that were there from the start don't.
                if before and cluster.slow_start_ms:
                    endpoint_stat.warm(now_ms, now_ms + cluster.slow_start_ms)
            endpoints[address] = endpoint_stat
            tier = endpoint_tier(cluster, endpoint.zone, zone)
            rows.append((pack_ip(endpoint.host), endpoint.port, endpoint.weight, tier, endpoint_stat))
        peers = [compile_pattern(pattern) for pattern in cluster.tls.peers] if cluster.tls else []
        sni = cluster.tls.sni.encode() if cluster.tls else b""
        identity = self._identity_id(cluster.tls.identity) if cluster.tls else 0
        stat.watch(*compile_watch(cluster.outlier_detection))
        compiled = _fastpath.Cluster(stat, rows, peers, sni, **compile_settings(cluster, identity))
        return _ClusterEntry(cluster, zone, compiled, endpoints)

    def _join(self, cluster: _fastpath.ClusterStat, address: str) -> _fastpath.EndpointStat:
        """The counters of an endpoint that joins. One that has been away, as names that flap do to it, goes on with those that its
        connections still count in, or its limit would begin anew beside them; and they need not leave any more."""
        stat = self._removed.endpoints.get((cluster, address))
        if stat is None:
            return _fastpath.EndpointStat(self._new_id())
        stat.out = 0
        stat.stay()
        stat.forget_failures()
        return stat

    def _add_listener(
        self, plan: _fastpath.Plan, listener: Listener, sockets: BoundSockets, index: Mapping[str, int], faults: bool
    ) -> _fastpath.ListenerStat:
        stat = self._listeners.get(listener.name)
        if stat is None:
            stat = _fastpath.ListenerStat(self._new_id(), self._n_workers, listener.name)
            self._names[stat.id] = listener.name
        for bind, fds in sockets:
            plan.add_listener(
                stat,
                fds,
                pack_ip(bind.host),
                bind.port,
                flags=compile_flags(listener),
                default_cluster=index[listener.default] if listener.default else -1,
                max_connections=listener.max_connections,
                proxy_from=[pack_prefix(network) for network in listener.proxy_protocol_from],
                proxy_timeout_ms=listener.proxy_protocol_timeout_ms,
                routes=[compile_route(route, index, faults) for route in listener.routes],
                rates=compile_rates(listener.bandwidth),
                burst=listener.bandwidth.burst,
                arrival_rates=compile_arrivals(listener.rates),
                **compile_listener_tls(listener, self._identity_id(listener.tls.identity)),
            )
        return stat

    def _new_id(self) -> int:
        self._ids += 1
        return self._ids

    def _new_cluster_stat(self, name: str) -> _fastpath.ClusterStat:
        stat = _fastpath.ClusterStat(self._new_id(), self._n_workers, [random.getrandbits(32) for _ in range(self._n_workers)], name)
        self._names[stat.id] = name
        return stat

    def _collect(self) -> None:
        """Waits until the plan before the current one is free: workers come round within a turn."""
        _wait_for_workers(self._engine.collect, "looked at the new plan")

    def _retire(self, entries: dict[str, _ClusterEntry], listeners: dict[str, _fastpath.ListenerStat]) -> None:
        for name, before in self._clusters.items():
            after = entries.get(name)
            if after is before:
                continue
            kept = after.endpoints if after else {}
            self._removed.compiled.append(before.compiled)
            cluster = before.compiled.stat
            for address in kept:
                self._removed.endpoints.pop((cluster, address), None)
            gone = {(cluster, address): stat for address, stat in before.endpoints.items() if kept.get(address) is not stat}
            self._removed.endpoints |= gone
            drain = (after or before).model.drain
            if gone and drain.removed_ms:
                self._engine.leave([(stat, 1000) for stat in gone.values()], CloseReason.ENDPOINT_REMOVED, drain.removed_ms)
            if after and drain.rebalance_ms:
                self._rebalance(before, after)
            if after is None:
                self._removed.clusters.append((name, before.compiled.stat, False))
        for name, listener in self._listeners.items():
            if name not in listeners:
                self._removed.listeners.append((name, listener, False))
        self._note_gone(entries, listeners)
        self._clusters = entries
        self._listeners = listeners

    def _rebalance(self, before: _ClusterEntry, after: _ClusterEntry) -> None:
        """Endpoints have joined: of the others' connections, as many as are above their share end over time and find new places."""
        weights = {endpoint.address: endpoint.weight for endpoint in after.model.endpoints}
        if not sum(weights.values()) or all(address in before.endpoints for address in weights):
            return
        active = {address: stat.active for address, stat in after.endpoints.items()}
        each = sum(active.values()) / sum(weights.values())
        leave = []
        for address, stat in after.endpoints.items():
            excess = active[address] - each * weights[address]
            if excess >= 1:
                # Never all of them: that would mean those to come as well.
                leave.append((stat, min(999, round(1000 * excess / active[address]))))
        if leave:
            self._engine.leave(leave, CloseReason.REBALANCED, after.model.drain.rebalance_ms)

    def tick(self) -> None:
        """Forgets what was removed, has no connection left and nothing more to report. Call it about once a second."""
        # While a plan is compiled this waits for the next tick, not the control loop for the plan.
        if not self._lock.acquire(blocking=False):
            return
        try:
            removed = self._removed
            self._removed = _Removed(
                compiled=[cluster for cluster in removed.compiled if cluster.dials],
                endpoints={key: stat for key, stat in removed.endpoints.items() if stat.in_use},
            )
            # A connection that was routed there and is still in its handshake has yet to be counted.
            awaited = {cluster.stat for cluster in self._removed.compiled}
            for name, stat, was_idle in removed.clusters:
                is_idle = stat not in awaited and not stat.active
                if not (is_idle and was_idle):
                    self._removed.clusters.append((name, stat, is_idle))
                else:
                    self._retired_clusters = _read_cluster("(removed)", self._retired_clusters, stat)
                    del self._names[stat.id]
            for name, listener, was_idle in removed.listeners:
                if listener.active or not was_idle:
                    self._removed.listeners.append((name, listener, not listener.active))
                else:
                    self._retired_listeners = _add_listener(self._retired_listeners, listener.read())
                    del self._names[listener.id]
        finally:
            self._lock.release()

    # -- counters ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        with self._lock:
            clusters = [_add_cluster("", None, self._engine.read_no_cluster())]
            clusters += [_read_cluster(name, None, entry.compiled.stat) for name, entry in self._clusters.items()]
            retired = self._retired_clusters
            for _, stat, _ in self._removed.clusters:
                retired = _read_cluster("(removed)", retired, stat)
            retired_listeners = self._retired_listeners
            for _, listener, _ in self._removed.listeners:
                retired_listeners = _add_listener(retired_listeners, listener.read())
            snapshot = Snapshot(
                generation=self._generation,
                workers=tuple(WorkerSnapshot(index, *self._engine.read_worker(index)) for index in range(self._n_workers)),
                listeners=tuple(_add_listener(ListenerSnapshot(name, 0, 0, {}), stat.read()) for name, stat in self._listeners.items()),
                clusters=tuple(clusters),
                retired=retired,
                retired_listeners=retired_listeners,
                plans_alive=self._engine.plans_alive,
                tls=self._read_tls(),
                max_connections=self._max_connections,
                rate_overflows=self._engine.rate_overflows,
                faults_enabled=self._faults_enabled,
                fault_rules=self._fault_rules,
            )
            return self._inherited.add_to(snapshot, *self._gone[:2]) if self._inherited else snapshot

    def _read_tls(self) -> TlsSnapshot:
        sides = ("downstream", "upstream")
        handshakes: dict[tuple[str, bool], int] = {(side, resumed): 0 for side in sides for resumed in (False, True)}
        failures: dict[tuple[str, TlsCause], int] = {}
        dry_denied = 0
        for index in range(self._n_workers):
            done, failed, dry = self._engine.read_tls(index)
            dry_denied += dry
            for side, of_side, failed_of_side in zip(sides, done, failed, strict=True):
                for resumed in (False, True):
                    handshakes[side, resumed] += of_side[resumed]
                for cause, count in zip(_CAUSES, failed_of_side, strict=True):
                    if count:
                        failures[side, cause] = failures.get((side, cause), 0) + count
        return TlsSnapshot(handshakes, failures, dry_denied)

    def endpoints(self, cluster: str | None = None) -> list[EndpointSnapshot]:
        """The endpoints of one cluster or of all, those of an unknown one being none."""
        now_ms = time.monotonic_ns() // 1_000_000
        with self._lock:
            if cluster is None:
                entries = list(self._clusters.values())
            else:
                entries = [self._clusters[cluster]] if cluster in self._clusters else []
        shown = [_show_endpoint(entry, endpoint, now_ms) for entry in entries for endpoint in entry.model.endpoints]
        if not self._inherited_endpoints:
            return shown
        return [self._add_inherited(endpoint) for endpoint in shown]

    def _add_inherited(self, endpoint: EndpointSnapshot) -> EndpointSnapshot:
        key = endpoint.cluster, endpoint.address
        before = self._inherited_endpoints.get(key)
        return endpoint if before is None or key in self._gone[2] else add(endpoint, before)

    async def connections(self, start: int, limit: int) -> tuple[list[ConnectionSnapshot], int | None]:
        """Up to ``limit`` live connections from the place ``start`` (0 at first) on, and the place of the next or None."""
        shown: list[ConnectionSnapshot] = []
        worker, slot = start >> 32, start & 0xFFFFFFFF
        while worker < self._n_workers and len(shown) < limit:
            views, slot = await self._page(worker, slot, limit - len(shown))
            shown += [self._show_connection(worker, view) for view in views]
            if slot == 0:
                worker += 1
        return shown, (worker << 32 | slot) if worker < self._n_workers else None

    async def _page(self, worker: int, slot: int, limit: int) -> tuple[list[_fastpath.View], int]:
        async with self._page_locks[worker]:
            if worker in self._asked:
                # By one who was cancelled meanwhile.
                await self._take_page(worker)
            self._engine.ask_page(worker, slot, limit)
            self._asked.add(worker)
            return await self._take_page(worker)

    async def _take_page(self, worker: int) -> tuple[list[_fastpath.View], int]:
        while True:
            assert self._woken is not None
            self._woken.clear()
            page = self._engine.take_page(worker)
            if page is not None:
                self._asked.remove(worker)
                return page
            await self._woken.wait()

    def _show_connection(self, worker: int, view: _fastpath.View) -> ConnectionSnapshot:
        slot, generation, state, spliced, listener, cluster, source, destination, endpoint = view[:9]
        age_ms, idle_ms, to_upstream, to_downstream, identity, version, upstream_identity, upstream_version = view[9:]
        return ConnectionSnapshot(
            f"{worker}.{slot}.{generation}", _STATES[state], self._names.get(listener, ""), self._names.get(cluster, ""),
            endpoint, source, destination, age_ms, idle_ms, to_upstream, to_downstream, spliced,
            identity, _show_version(version, resumed=False), upstream_identity, _show_version(upstream_version, resumed=False),
        )  # fmt: skip

    # -- from one process to another -------------------------------------------------------------------------------------

    def leave_accepting(self, to_another: bool) -> None:
        """Leaves it to another process, which has the same listening sockets, to accept; or begins again. Blocks until it is so."""
        self._set_accept_mode(ACCEPT_OFF if to_another else ACCEPT_ON)

    def _steered(self) -> list[_fastpath.Handover]:
        if not self._handovers:
            self._handovers = [_fastpath.Handover(self._engine, index) for index in range(self._n_workers)]
        return self._handovers

    def hand_over(self, deliver: Callable[[int, list[Traveller]], bool]) -> int:
        """Gives every plaintext relayed connection to ``deliver``, some of one worker at a time, and then forgets them: another process
        has them. When it gives False they go on here and no more are given; likewise when it raises, which this passes on. Blocks.
        Returns how many have gone."""
        gone = 0
        for index in range(self._n_workers):
            slot, ended = 0, False
            while not ended:
                with self._steering:
                    count, slot = self._hand_over_some(index, slot, deliver)
                if count < 0:
                    return gone
                gone += count
                ended = slot == 0
        return gone

    def _hand_over_some(self, index: int, slot: int, deliver: Callable[[int, list[Traveller]], bool]) -> tuple[int, int]:
        """How many have gone (-1: they were not taken), and the next slot or 0."""
        handover = self._steered()[index]
        left, following = handover.depart(slot)
        if not left:
            return 0, following
        taken = False
        try:
            taken = deliver(index, [self._name_traveller(traveller) for traveller in left])
        finally:
            handover.settle(not taken)
        return len(left) if taken else -1, following

    def _name_traveller(self, traveller: tuple[bytes, list[int], int, int, str]) -> Traveller:
        state, descriptors, listener, cluster, endpoint = traveller
        return state, descriptors, self._names.get(listener, ""), self._names.get(cluster, ""), endpoint

    def take_in(self, worker: int, travellers: list[Traveller], confirm: Callable[[], None]) -> bool:
        """Goes on with connections of another process. ``confirm`` tells it that they are here, after which nothing can go wrong; when
        it raises they are that one's, and this passes it on. False: no memory for them, and ``confirm`` was not called. Then, and
        after a ValueError, which means that it is not connections that came, the descriptors are the caller's."""
        # What they count in must not be forgotten until they do.
        with self._steering, self._lock:
            handover = self._steered()[worker % self._n_workers]
            counts = [self._counts_of(listener, cluster, endpoint) for _, _, listener, cluster, endpoint in travellers]
            arriving = [(state, fds, *of_one) for (state, fds, *_), of_one in zip(travellers, counts, strict=True)]
            if not handover.arrive(arriving):
                return False
            confirmed = False
            try:
                confirm()
                confirmed = True
            finally:
                handover.settle(confirmed)
        return True

    def _counts_of(
        self, listener: str, cluster: str, endpoint: str
    ) -> tuple[_fastpath.ListenerStat, _fastpath.ClusterStat, _fastpath.EndpointStat | None]:
        """What a connection of these names counts in: where this configuration does not have them, as after a reload that removed
        them."""
        listener_stat = self._listeners.get(listener) or next(
            (stat for name, stat, _ in self._removed.listeners if name == listener), None
        )
        if listener_stat is None:
            listener_stat = _fastpath.ListenerStat(self._new_id(), self._n_workers)
            self._names[listener_stat.id] = listener
            self._removed.listeners.append((listener, listener_stat, False))
        entry = self._clusters.get(cluster)
        cluster_stat = (
            entry.compiled.stat if entry else next((stat for name, stat, _ in self._removed.clusters if name == cluster), None)
        )
        if cluster_stat is None:
            cluster_stat = self._new_cluster_stat(cluster)
            self._removed.clusters.append((cluster, cluster_stat, False))
        endpoint_stat = entry.endpoints.get(endpoint) if entry else None
        if endpoint and endpoint_stat is None:
            key = cluster_stat, endpoint
            endpoint_stat = self._removed.endpoints.setdefault(key, _fastpath.EndpointStat(self._new_id()))
            if entry and entry.model.drain.removed_ms:
                self._engine.leave([(endpoint_stat, 1000)], CloseReason.ENDPOINT_REMOVED, entry.model.drain.removed_ms)
        return listener_stat, cluster_stat, endpoint_stat

    def totals(self) -> Totals:
        """What this process has counted, and those before it."""
        return Totals.of(self.snapshot(), self.endpoints())

    def inherit(self, totals: Totals) -> None:
        """Goes on from what the process before has counted; may be called again with later figures of it."""
        with self._lock:
            self._inherited = totals
            self._inherited_endpoints = {(endpoint.cluster, endpoint.address): endpoint for endpoint in totals.endpoints}
            self._note_gone(self._clusters, self._listeners)

    def inherit_no_more(self) -> None:
        """The process before is gone, and with it what it had live."""
        with self._lock:
            if self._inherited is not None:
                self._inherited = self._inherited.at_rest()
                self._inherited_endpoints = {(endpoint.cluster, endpoint.address): endpoint for endpoint in self._inherited.endpoints}

    def _note_gone(self, clusters: Mapping[str, _ClusterEntry], listeners: Mapping[str, _fastpath.ListenerStat]) -> None:
        """What was counted under a name that the configuration does not have stays with the removed, should the name come back."""
        if self._inherited is None:
            return
        gone_clusters, gone_listeners, gone_endpoints = self._gone
        gone_clusters |= {cluster.name for cluster in self._inherited.clusters if cluster.name and cluster.name not in clusters}
        gone_listeners |= {listener.name for listener in self._inherited.listeners if listener.name not in listeners}
        gone_endpoints |= {
            (cluster, address)
            for cluster, address in self._inherited_endpoints
            if cluster not in clusters or address not in clusters[cluster].endpoints
        }

    # -- records -------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        os.eventfd_read(self._engine.fileno())
        if told := self._engine.take_told():
            self.on_told(told)
        if self._woken is not None:
            self._woken.set()
        if self._gathering is None:
            self._gather()

    def _gather(self) -> None:
        """Reports the records that are there. As long as some come, the next are left to gather for a moment: to be woken for each
        costs ten times as much as to write it."""
        loop = asyncio.get_running_loop()
        taken = self._drain_records()
        if taken == 0 and all(self._engine.park_records(worker) for worker in range(self._n_workers)):
            self._gathering = None
        elif taken >= RECORDS_AT_ONCE:
            # More than one turn of the loop should take.
            self._gathering = loop.call_soon(self._gather)
        else:
            self._gathering = loop.call_later(GATHER_S, self._gather)

    def _drain_records(self) -> int:
        """Reports what waits, a bounded number of each worker, and gives the greatest of these."""
        most = 0
        for worker in range(self._n_workers):
            records = self._engine.take_records(worker, RECORDS_AT_ONCE)
            if records:
                self._on_records([self._name_record(worker, record) for record in records])
            most = max(most, len(records))
        return most

    def _name_record(self, worker: int, record: _fastpath.Record) -> ConnectionRecord:
        ended, listener, cluster, endpoint, source, destination, reason, attempts, errno, connect, first_byte, total = record[:12]
        to_upstream, to_downstream, rtt, retransmits, upstream_rtt, upstream_retransmits = record[12:18]
        identity, version, resumed, upstream_identity, upstream_version, upstream_resumed = record[18:24]
        cause, alert, policy, dry_policy, fault, queued_ms = record[24:]
        return ConnectionRecord(
            ended, worker, self._names.get(listener, ""), self._names.get(cluster, ""), endpoint, source, destination,
            _REASONS[reason], attempts, errno, connect, first_byte, total, to_upstream, to_downstream, rtt, retransmits,
            upstream_rtt, upstream_retransmits, identity, _show_version(version, resumed=resumed), upstream_identity,
            _show_version(upstream_version, resumed=upstream_resumed), _CAUSES[cause], alert, self._policy_names.get(policy, ""),
            self._policy_names.get(dry_policy, ""), _FAULTS[fault], queued_ms,
        )  # fmt: skip


def _name_thread(name: str) -> None:
    """For `ps -L` and `top -H`."""
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)


def _wait_for_workers(have: Callable[[], bool], what: str) -> None:
    """Workers come round within a turn. Raises InternalError when one does not within ten seconds."""
    deadline = time.monotonic() + COLLECT_DEADLINE_S
    while not have():
        if time.monotonic() > deadline:
            raise InternalError(f"a worker has not {what} for ten seconds")
        time.sleep(0.0005)


def openssl_version() -> str:
    """The TLS library in use, as it names itself."""
    return _fastpath.openssl_version()


def _show_version(minor: int, *, resumed: bool) -> str:
    """ "" for plaintext."""
    return f"1.{minor}{' resumed' if resumed else ''}" if minor else ""


def _count_reasons(counts: list[int], before: Mapping[CloseReason, int]) -> dict[CloseReason, int]:
    totals = dict(before)
    for reason, count in zip(_REASONS, counts, strict=True):
        if count:
            totals[reason] = totals.get(reason, 0) + count
    return totals


def _add_cluster(name: str, before: ClusterSnapshot | None, counts: _fastpath.ClusterCounts | None) -> ClusterSnapshot:
    """``counts`` as a snapshot, on top of ``before``."""
    if before is None:
        before = ClusterSnapshot(name, 0, 0, {}, 0, 0, 0, 0, 0.0, (0,) * (len(CONNECT_BUCKETS_S) + 1), (0,) * len(_FAULTS))
    if counts is None:
        return before
    active, opened, closed, to_upstream, to_downstream, attempts, failures, connect_ns, buckets, faults = counts
    return ClusterSnapshot(
        name,
        before.active + active,
        before.opened + opened,
        _count_reasons(closed, before.closed),
        before.bytes_to_upstream + to_upstream,
        before.bytes_to_downstream + to_downstream,
        before.connect_attempts + attempts,
        before.connect_failures + failures,
        before.connect_seconds_sum + connect_ns / 1e9,
        tuple(map(int.__add__, before.connect_seconds_buckets, buckets)),
        tuple(map(int.__add__, before.faults, faults)),
        before.waiting,
        before.queued,
        before.queued_seconds,
        before.retrying,
        before.retries_refused,
    )


def _read_cluster(name: str, before: ClusterSnapshot | None, stat: _fastpath.ClusterStat) -> ClusterSnapshot:
    """All that is counted of a cluster, on top of ``before``."""
    added = _add_cluster(name, before, stat.read())
    waiting, queued, queued_ns, retrying, refused = stat.read_limits()
    return dataclasses.replace(
        added,
        waiting=added.waiting + waiting,
        queued=added.queued + queued,
        queued_seconds=added.queued_seconds + queued_ns / 1e9,
        retrying=added.retrying + retrying,
        retries_refused=added.retries_refused + refused,
    )


def _add_listener(before: ListenerSnapshot, counts: tuple[int, int, list[int]]) -> ListenerSnapshot:
    active, opened, closed = counts
    return ListenerSnapshot(before.name, before.active + active, before.opened + opened, _count_reasons(closed, before.closed))


def _count_outlier(stat: _fastpath.EndpointStat) -> Counts:
    opened, connect_ns, failures, failed_connects, failed_answers = stat.read_outlier()
    before_connect = failures[SIGNALS.index("connect_failure")] + failures[SIGNALS.index("tls_failure")]
    return Counts(opened + before_connect, sum(failures), opened, connect_ns, failed_connects, failed_answers)


def _name_failures(failures: list[int]) -> dict[str, int]:
    return {signal: count for signal, count in zip(SIGNALS, failures, strict=True) if count}


def _show_endpoint(entry: _ClusterEntry, endpoint: Endpoint, now_ms: int) -> EndpointSnapshot:
    address = endpoint.address
    stat = entry.endpoints[address]
    active, opened, failures, to_upstream, to_downstream = stat.read()
    return EndpointSnapshot(
        entry.model.name, address, endpoint.weight, endpoint.zone, active, opened, failures, to_upstream, to_downstream,
        now_ms < stat.warm_until_ms, _name_failures(stat.read_outlier()[2]),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the policies say of one connection. ``policy`` and ``peers`` name the clause that decides; "" and -1: none does."""

    allowed: bool
    policy: str
    peers: int
    dry_run_refuses: str
    """The dry-run policy that would refuse it, or ""."""


def try_material(material: Material) -> None:
    """Raises ValueError when no handshake could be made with it."""
    _fastpath.TlsContext(0, material.spiffe_id, material.certificates, material.private_key, material.trust_bundle)


def judge(config: Config, workload: Workload | None, spiffe_id: str, source: str, port: int) -> Judgement:
    """Asks the compiled policies, as a worker would, about a peer (``spiffe_id`` is "" for plaintext) that connects to a workload of
    this node, or to what is none."""
    plan = _fastpath.Plan(
        1, 1, [], [], max_connections=0, max_connections_per_source=0, mark=0, splice=False, error_reasons=0, log_when=0,
        log_sample=0, max_handshakes_per_source=0, trust=0,
    )  # fmt: skip
    if not config.policies:
        return Judgement(True, "", -1, "")
    sets = add_policies(plan, config.policies, config.workloads, lambda _: 0)
    clauses = [(policy.name, peers) for policy in config.policies for peers in range(len(policy.peers))]
    chosen = sets.default if workload is None else sets.of_workload[config.workloads.index(workload)]
    allowed, would, deny, allow, dry_deny, _ = plan.judge(chosen, spiffe_id.encode(), pack_ip(source), port)
    decides = deny if deny >= 0 else allow
    name, peers = clauses[decides] if decides >= 0 else ("", -1)
    refuses = (clauses[dry_deny][0] if dry_deny >= 0 else "(no policy allows)") if allowed and not would else ""
    return Judgement(allowed, name, peers, refuses)
