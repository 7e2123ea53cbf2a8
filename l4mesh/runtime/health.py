"""Active health checks: when each endpoint is checked, and what comes of the results.

An endpoint's first check decides by itself; after that ``fall`` failures in a row take it out and ``rise`` successes bring it back, and
while results contradict its state it is checked at ``fast_interval``. Source of the words and of the first check's weight: HAProxy's
``inter``, ``fastinter``, ``rise``, ``fall`` and Envoy's first check. Equal checks of one address are made once, whoever asks for them.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import structlog

from l4mesh.identity.svid import Material
from l4mesh.identity.tls import check_peer, open_context, workload_context
from l4mesh.model import Cluster, Config, Endpoint, HealthCheck, ProxyProtocol
from l4mesh.runtime.probes import Judge, Probe, Prober, Terms, Unfit

TURN_S = 0.01
"""What falls due within it is done in one turn of the loop."""
STARTS_PER_TURN = 64
SOON_S = 0.001
"""Between turns while more is due than one may start: the loop has other work."""
STOOD_STILL_S = 0.1
"""Of lateness, beyond which the endpoints are not to blame that no answer was seen."""
SAY_AGAIN_S = 60.0
AFTER_A_BUG_S = 1.0
"""The loop reports what is raised; the checks go on."""

PASSED, FAILED, NOT_MADE = "passed", "failed", "not_made"
UNCHECKED = "not checked yet"

log = structlog.get_logger()


@dataclass(slots=True)
class Health:
    """What the checks of one endpoint have shown so far."""

    healthy: bool
    since_unix_s: float
    why: str = UNCHECKED
    """"" after a success."""
    decided: bool = False
    contrary: int = 0
    """Results in a row that speak against the state."""

    def note(self, check: HealthCheck, why: str, now_unix_s: float) -> bool:
        """Takes a result, ``why`` being "" for a success. True when the state, or what it rests on, has changed."""
        passed, first = not why, not self.decided
        self.decided = True
        if passed == self.healthy:
            self.contrary = 0
            self.why = why
            return first and not passed
        self.contrary += 1
        if self.contrary < (1 if first else check.rise if passed else check.fall):
            return False
        self.healthy, self.why, self.contrary, self.since_unix_s = passed, why, 0, now_unix_s
        return True

    def wait_s(self, check: HealthCheck, chance: float) -> float:
        """From the start of a check to the next one's; ``chance``: 0 to 1."""
        interval_ms = check.fast_interval_ms if self.contrary else check.interval_ms
        return interval_ms / 1000 * (1 + check.jitter * (2 * chance - 1))


class Past(NamedTuple):
    """What the checks of an endpoint have come to, for the process after this one."""

    address: str
    healthy: bool
    why: str
    since_unix_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """For those who show it."""

    state: str
    """"unchecked", "healthy" or "unhealthy"."""
    since_unix_s: float
    why: str
    check: str


class _Target:
    __slots__ = ("dropped", "health", "probe", "started_s", "users")

    def __init__(self, probe: Probe, health: Health) -> None:
        self.probe = probe
        self.health = health
        self.started_s = 0.0
        self.users: dict[tuple[str, str], _Checked] = {}
        self.dropped = False


@dataclass(slots=True)
class _Checked:
    """A cluster whose endpoints are checked, and what it was made of."""

    model: Cluster
    identity: str
    spared: frozenset[str]
    """Addresses of workloads of this node among the endpoints, which are spared the cluster's TLS."""
    targets: dict[str, _Target] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {PASSED: 0, FAILED: 0, NOT_MADE: 0})


OnVerdict = Callable[[str, str, bool, str], None]
"""Cluster, address, whether it is healthy, and why not. An endpoint of which nothing was said is healthy."""


class HealthChecker:
    """Call it on the control loop; ``verdict`` and ``counts`` from any thread.

    ``materials``: identities in use, by name. ``max_under_way``: checks at once, a descriptor each; more wait.
    """

    def __init__(
        self,
        on_verdict: OnVerdict,
        materials: Callable[[], Mapping[str, Material]],
        max_under_way: int,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        prober: Prober | None = None,
    ) -> None:
        self._on_verdict = on_verdict
        self._materials = materials
        self._max_under_way = max_under_way
        self._clock = clock
        self._chance = chance
        self._prober = Prober(self._secure) if prober is None else prober
        self._served: Mapping[str, Cluster] = {}
        self._clusters: dict[str, _Checked] = {}
        self._targets: dict[Probe, _Target] = {}
        self._due: list[tuple[float, int, _Target]] = []
        self._order = 0
        self._deadline_s = float("inf")
        self._turn_at_s = float("inf")
        self._turned_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._contexts: dict[tuple[str, bool], tuple[Material, ssl.SSLContext]] = {}
        self._open = open_context()
        self._said: dict[str, float] = {}
        self._inherited: dict[tuple[str, str], Health] = {}
        self._late_s = 0.0

    # -- what is checked -------------------------------------------------------------------------------------------------

    def inherit(self, pasts: Mapping[str, Sequence[Past]]) -> None:
        """What another process has found, by cluster: the first configuration begins with it."""
        self._inherited = {
            (name, past.address): Health(past.healthy, past.since_unix_s, past.why, decided=True)
            for name, of_cluster in pasts.items()
            for past in of_cluster
        }

    def past(self) -> dict[str, list[Past]]:
        """For the process after this one."""
        return {
            name: [
                Past(address, target.health.healthy, target.health.why, target.health.since_unix_s)
                for address, target in checked.targets.items()
                if target.health.decided
            ]
            for name, checked in self._clusters.items()
        }

    def configure(self, config: Config) -> None:
        """Checks what this configuration says. What it leaves as it was keeps its state and its times."""
        self._prober.mark = config.own_mark
        for name in [name for name in self._clusters if name not in config.clusters]:
            self._drop_targets(self._clusters.pop(name))
        local = frozenset(address for workload in config.workloads for address in workload.addresses)
        for name, cluster in config.clusters.items():
            known = self._clusters.get(name)
            if cluster.health_check is None and known is None:
                continue
            identity = (cluster.tls.identity if cluster.tls else "") or config.node_identity
            spared: frozenset[str] = frozenset()
            if local and cluster.tls and not cluster.tls.encrypt_local:
                spared = local.intersection(endpoint.host for endpoint in cluster.endpoints)
            if known is None or known.model is not cluster or (known.identity, known.spared) != (identity, spared):
                self._configure_cluster(known, _Checked(cluster, identity, spared))
        self._served = config.clusters
        self._inherited = {}
        self._arm()

    def _configure_cluster(self, before: _Checked | None, checked: _Checked) -> None:
        cluster = checked.model
        known = before.targets if before else {}
        # Endpoints that were served before anybody checked them are not taken out by `initial: down`.
        served = {endpoint.address for endpoint in self._served[cluster.name].endpoints} if cluster.name in self._served else set()
        if before:
            checked.counts = before.counts
        if cluster.health_check is None:
            self._clusters.pop(cluster.name, None)
        else:
            self._clusters[cluster.name] = checked
        for endpoint in cluster.endpoints:
            old = known.get(endpoint.address)
            if cluster.health_check is None:
                if old and not old.health.healthy:
                    self._on_verdict(cluster.name, endpoint.address, True, "")
                continue
            probe = _make_probe(checked, cluster.health_check, endpoint)
            health = old.health if old else self._inherited.get((cluster.name, endpoint.address))
            target = self._targets.get(probe) or self._add_target(
                probe, health, up=cluster.health_check.starts_up or endpoint.address in served
            )
            target.users[cluster.name, endpoint.address] = checked
            checked.targets[endpoint.address] = target
            if target.health.healthy != (old.health.healthy if old else True):
                self._on_verdict(cluster.name, endpoint.address, target.health.healthy, target.health.why)
        if before:
            before.targets = {address: target for address, target in known.items() if checked.targets.get(address) is not target}
            self._drop_targets(before)

    def _add_target(self, probe: Probe, before: Health | None, *, up: bool) -> _Target:
        """``before``: of the same endpoint under another check, or in another process; it stands until this one has said something."""
        check = probe.check
        if before:
            health = Health(before.healthy, before.since_unix_s, before.why, before.decided)
        else:
            health = Health(up, time.time())
        target = self._targets[probe] = _Target(probe, health)
        soon = before is not None or not check.starts_up
        # Spread, so that those which came together do not stay together.
        spread_ms = check.fast_interval_ms if soon else check.interval_ms
        self._push(target, self._clock() + spread_ms / 1000 * self._chance())
        return target

    def _drop_targets(self, checked: _Checked) -> None:
        for address, target in checked.targets.items():
            target.users.pop((checked.model.name, address), None)
            if not target.users:
                target.dropped = True
                del self._targets[target.probe]

    # -- when ------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """On the running control loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._prober.fileno(), self._prober.turn)
        self._arm()

    def close(self) -> None:
        if self._loop:
            self._loop.remove_reader(self._prober.fileno())
        if self._timer:
            self._timer.cancel()
        self._loop = None
        self._prober.close()

    def _arm(self) -> None:
        """Sees to it that the next turn is not later than what is due."""
        if self._loop is None:
            return
        due_s = max(self._following_s(), self._turned_s + TURN_S)
        if due_s >= self._turn_at_s:
            return
        if self._timer:
            self._timer.cancel()
        self._set_timer(due_s)

    def _set_timer(self, at_s: float) -> None:
        assert self._loop is not None
        self._turn_at_s = at_s
        self._timer = None if at_s == float("inf") else self._loop.call_later(max(0.0, at_s - self._clock()), self._on_timer)

    def _on_timer(self) -> None:
        # Meanwhile nobody else sets it.
        expected_s, self._turn_at_s = self._turn_at_s, float("-inf")
        at_s = self._clock() + AFTER_A_BUG_S
        try:
            at_s = self.turn(expected_s)
        finally:
            self._set_timer(at_s)

    def _following_s(self) -> float:
        return min(self._due[0][0] if self._due else float("inf"), self._deadline_s)

    def turn(self, expected_s: float) -> float:
        """Does what is due; ``expected_s`` is when this turn was. Gives when the next is."""
        now_s = self._turned_s = self._clock()
        if now_s - expected_s > STOOD_STILL_S:
            more_s = now_s - expected_s + STOOD_STILL_S
            self._prober.grant(more_s)
            self._deadline_s += more_s
        # What has come is looked at before anybody is called late, and before more is asked: when it is too much for us, checks are
        # late, and nobody is blamed.
        if self._prober.turn():
            return now_s + SOON_S
        if now_s >= self._deadline_s:
            self._deadline_s = self._prober.expire(now_s)
        for _ in range(STARTS_PER_TURN):
            if not self._due or self._due[0][0] > now_s:
                break
            if len(self._prober) >= self._max_under_way:
                return now_s + TURN_S
            due_s, _, target = heapq.heappop(self._due)
            if target.dropped:
                continue
            if not target.health.healthy and 2 * len(self._prober) >= self._max_under_way:
                # Those that are down wait for their timeouts: they get half of the places, so that the others are in time.
                self._push(target, now_s + target.probe.check.fast_interval_ms / 1000)
                continue
            self._late_s = max(self._late_s, now_s - due_s)
            self._begin(target, now_s)
        else:
            return now_s + SOON_S
        return max(now_s + TURN_S, self._following_s())

    def _begin(self, target: _Target, now_s: float) -> None:
        target.started_s = now_s
        deadline_s = now_s + target.probe.check.timeout_ms / 1000
        self._deadline_s = min(self._deadline_s, deadline_s)
        self._prober.begin(target.probe, deadline_s, partial(self._done, target))

    def _push(self, target: _Target, due_s: float) -> None:
        self._order += 1
        heapq.heappush(self._due, (due_s, self._order, target))

    # -- what comes of it ------------------------------------------------------------------------------------------------

    def _done(self, target: _Target, why: str | None, trouble: str) -> None:
        if target.dropped:
            return
        check = target.probe.check
        result = NOT_MADE if why is None else FAILED if why else PASSED
        for checked in target.users.values():
            checked.counts[result] += 1
        before_unix_s = target.health.since_unix_s
        changed = why is not None and target.health.note(check, why, time.time())
        self._push(target, max(target.started_s + target.health.wait_s(check, self._chance()), self._clock()))
        self._arm()
        if why is None:
            self._say_not_made(target, trouble)
        elif changed:
            self._tell(target, before_unix_s)

    def _tell(self, target: _Target, before_unix_s: float) -> None:
        health = target.health
        for cluster, address in list(target.users):
            self._on_verdict(cluster, address, health.healthy, health.why)
            if health.healthy:
                lasted_s = round(health.since_unix_s - before_unix_s, 3)
                log.info("endpoint_healthy", cluster=cluster, endpoint=address, check=target.probe.check.kind.value, after_s=lasted_s)
            else:
                log.warning(
                    "endpoint_unhealthy", cluster=cluster, endpoint=address, check=target.probe.check.kind.value, why=health.why
                )

    def _say_not_made(self, target: _Target, trouble: str) -> None:
        """Trouble of ours does not count against the endpoint."""
        now_s = self._clock()
        if self._said.get(trouble, float("-inf")) + SAY_AGAIN_S <= now_s:
            self._said = {text: at_s for text, at_s in self._said.items() if at_s + SAY_AGAIN_S > now_s} | {trouble: now_s}
            cluster, address = next(iter(target.users))
            log.error("health_check_not_made", error=trouble, cluster=cluster, endpoint=address, means="not counted; others may follow")

    def _secure(self, terms: Terms) -> tuple[ssl.SSLContext, Judge | None]:
        """For the prober: what to shake hands with. Raises Unfit."""
        if not terms.identity:
            return self._open, None
        material = self._materials().get(terms.identity)
        if material is None:
            raise Unfit(f"identity {terms.identity} has no certificate yet")
        key = (terms.identity, terms.allow_tls12)
        known = self._contexts.get(key)
        if known is None or known[0] is not material:
            try:
                known = self._contexts[key] = (material, workload_context(material, allow_tls12=terms.allow_tls12))
            except (ssl.SSLError, ValueError) as error:
                raise Unfit(f"identity {terms.identity}: {error}") from None
        return known[1], partial(check_peer, peers=terms.peers, material=material)

    # -- questions -------------------------------------------------------------------------------------------------------

    def verdict(self, cluster: str, address: str) -> Verdict | None:
        """None: it is not checked."""
        checked = self._clusters.get(cluster)
        target = checked.targets.get(address) if checked else None
        if target is None:
            return None
        health = target.health
        state = "unchecked" if not health.decided else "healthy" if health.healthy else "unhealthy"
        return Verdict(state, health.since_unix_s, health.why, target.probe.check.kind.value)

    def counts(self) -> list[tuple[str, str, dict[str, int]]]:
        """Cluster, kind of check, and checks by result."""
        return [
            (name, checked.model.health_check.kind.value, checked.counts)
            for name, checked in self._clusters.copy().items()
            if checked.model.health_check
        ]

    @property
    def under_way(self) -> int:
        return len(self._prober)

    def take_late_s(self) -> float:
        """How late the latest check was begun since this was last asked."""
        late_s, self._late_s = self._late_s, 0.0
        return late_s


def _make_probe(checked: _Checked, check: HealthCheck, endpoint: Endpoint) -> Probe:
    cluster = checked.model
    terms = None
    if check.tls and (check.port or endpoint.host not in checked.spared):
        terms = Terms(checked.identity, cluster.tls.peers, cluster.tls.allow_tls12) if cluster.tls else Terms()
    # Another port is another server: it gets no header that only the endpoint's own expects.
    header = ProxyProtocol.OFF if check.port else cluster.proxy_protocol
    return Probe(check, endpoint.host, check.port or endpoint.port, header, terms)
