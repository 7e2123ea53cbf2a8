"""Which endpoints of a cluster are ejected, and for how long: decisions, made of counters and a clock that are passed in.

Formulas and defaults are Envoy's (source/common/upstream/outlier_detection_impl.cc), but for what is known to be wrong with them:

* ``max_ejected`` means ``max(1, floor(share x n))`` endpoints. Envoy's 10 % ejects nobody in a cluster of less than ten.
* An ejection never leaves a zone, or the cluster, without an endpoint, and never begins a panic. What is held back by that is looked at
  again at every interval; Envoy's counters fire once, when they equal the threshold.
* A success rate must also be below the mean by a margin. When all others are at 100 % their standard deviation is next to nothing, and
  one failure in a hundred would be an outlier.
* Of several outliers the worst goes first.
* An ejection ends when its time is over, not at the interval after.

The latency detector takes the median and the median absolute deviation (Hampel, JASA 69, 1974), which one slow endpoint can't move,
within a zone: distance is no fault. Means of intervals are smoothed, each weighing as much as all before it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from l4mesh.model import OutlierDetection

JITTER = 0.1
"""Share by up to which an ejection is shortened at random, so that what was ejected together does not return together."""
_ROUNDING = 1e-9


class Detector(StrEnum):
    CONSECUTIVE_FAILURES = "consecutive_failures"
    SUCCESS_RATE = "success_rate"
    FAILURE_PERCENTAGE = "failure_percentage"
    LATENCY = "latency"


class Outcome(StrEnum):
    """What comes of a detection."""

    EJECTED = "ejected"
    NOT_ENFORCED = "not_enforced"
    """``enforce`` says that this one is only to be told."""
    MAX_EJECTED = "max_ejected"
    LAST_OF_ZONE = "last_of_zone"
    PANIC = "panic"
    """Too few endpoints would be left."""


class Counts(NamedTuple):
    """Of one endpoint, since the start of the process, but for the last two."""

    attempts: int = 0
    """Dials that succeeded or failed through the endpoint's doing."""
    failures: int = 0
    connects: int = 0
    connect_ns: int = 0
    """Sum over the dials that succeeded."""
    failed_connects: int = 0
    """In a row, up to now."""
    failed_answers: int = 0
    """Connections in a row that were made and went wrong before an answer."""

    @property
    def in_a_row(self) -> int:
        return max(self.failed_connects, self.failed_answers)


@dataclass(frozen=True, slots=True)
class Detection:
    """An endpoint was found out. ``why`` has the figures; ``until_ms`` and ``times`` are of an ejection, else 0."""

    address: str
    detector: Detector
    outcome: Outcome
    why: str
    until_ms: int = 0
    times: int = 0
    """Ejections that its time was reckoned by, this one included."""


@dataclass(frozen=True, slots=True)
class Ejection:
    """One that is under way."""

    detector: Detector
    why: str
    since_ms: int
    until_ms: int
    """When it may return; later if a probe fails then."""


class Past(NamedTuple):
    """What is known of an endpoint, for the process after this one; its clock may be another."""

    address: str
    times: int
    """Ejections by which the time of the next one is reckoned."""
    ejections: int
    detector: str = ""
    """Of the ejection under way; "" when there is none."""
    why: str = ""
    ago_ms: int = 0
    left_ms: int = 0


@dataclass(slots=True)
class _Endpoint:
    address: str
    zone: str
    counts: Counts
    """At the last interval, or when it returned."""
    latency_ns: float | None = None
    times: int = 0
    ejections: int = 0
    ejection: Ejection | None = None
    in_service_from_ms: int = 0
    noted: dict[Detector, Outcome] = field(default_factory=dict)
    """Detections that led to nothing and still hold: they are told once."""


class _Interval(NamedTuple):
    """What an endpoint in service did in the interval that ends."""

    endpoint: _Endpoint
    attempts: int
    failures: int
    connects: int

    @property
    def success_rate(self) -> float:
        return 1 - self.failures / self.attempts


class ClusterOutliers:
    """The state of one cluster. Endpoints are those with a weight above 0; times are ms of a clock that never goes back.

    ``chance`` gives random numbers in [0, 1): one for each detection when ``enforce`` leaves a choice, and one for each ejection.
    ``phase``: share of an interval after which the first one ends, so that many clusters are not looked at together.
    """

    def __init__(self, chance: Callable[[], float], phase: float = 1.0) -> None:
        self._chance = chance
        self._phase = phase
        self._endpoints: dict[str, _Endpoint] = {}
        self._ejected: dict[str, _Endpoint] = {}
        self._next_interval_ms = 0
        self._settings: OutlierDetection | None = None
        self._panic_threshold = 0.0
        self._zones_matter = False

    def configure(
        self,
        settings: OutlierDetection,
        endpoints: Iterable[tuple[str, str, Counts]],
        panic_threshold: float,
        now_ms: int,
        *,
        zones_matter: bool,
    ) -> None:
        """At the beginning and after a reload. ``endpoints``: (address, zone, counts); those that stay keep their state.
        ``zones_matter``: connections prefer endpoints by their zone."""
        before = self._endpoints
        self._endpoints = {}
        for address, zone, counts in endpoints:
            known = before.get(address)
            if known:
                known.zone = zone
            self._endpoints[address] = known or _Endpoint(address, zone, counts, in_service_from_ms=now_ms)
        if self._settings is None or self._settings.interval_ms != settings.interval_ms:
            self._next_interval_ms = now_ms + round(settings.interval_ms * self._phase)
        self._ejected = {address: endpoint for address, endpoint in self._endpoints.items() if endpoint.ejection}
        if settings != self._settings:
            # Other rules may do what these left.
            for endpoint in self._endpoints.values():
                endpoint.noted.clear()
        self._settings = settings
        self._panic_threshold = panic_threshold
        self._zones_matter = zones_matter

    # -- questions -----------------------------------------------------------------------------------------------------

    def ejection(self, address: str) -> Ejection | None:
        endpoint = self._endpoints.get(address)
        return endpoint.ejection if endpoint else None

    def times_ejected(self, address: str) -> int:
        endpoint = self._endpoints.get(address)
        return endpoint.ejections if endpoint else 0

    @property
    def ejected(self) -> list[str]:
        """In the order in which they were."""
        return list(self._ejected)

    @property
    def interval_ends_ms(self) -> int:
        return self._next_interval_ms

    @property
    def next_ms(self) -> int:
        """When there is something to do next: an interval ends, or an ejection."""
        return min([self._next_interval_ms, *(e.ejection.until_ms for e in self._ejected.values() if e.ejection)])

    def due(self, now_ms: int) -> list[str]:
        """Endpoints whose ejection is over."""
        return [e.address for e in self._ejected.values() if e.ejection and now_ms >= e.ejection.until_ms]

    def past(self, now_ms: int) -> list[Past]:
        """Of the endpoints that have one."""
        known = []
        for e in self._endpoints.values():
            if e.ejection:
                out = e.ejection
                left_ms = max(0, out.until_ms - now_ms)
                known.append(Past(e.address, e.times, e.ejections, out.detector, out.why, now_ms - out.since_ms, left_ms))
            elif e.ejections:
                known.append(Past(e.address, e.times, e.ejections))
        return known

    # -- what happens --------------------------------------------------------------------------------------------------

    def inherit(self, past: Past, now_ms: int) -> Ejection | None:
        """Another process has had this endpoint before. Gives the ejection that goes on."""
        endpoint = self._endpoints.get(past.address)
        if endpoint is None:
            return None
        endpoint.times, endpoint.ejections = past.times, past.ejections
        # Another version may have detectors of its own.
        if past.detector in list(Detector):
            until_ms = now_ms + min(past.left_ms, self._in_force.max_ejection_ms)
            endpoint.ejection = Ejection(Detector(past.detector), past.why, now_ms - past.ago_ms, until_ms)
            self._ejected[endpoint.address] = endpoint
        return endpoint.ejection

    def failed(self, address: str, counts: Counts, now_ms: int, unhealthy: Set[str]) -> list[Detection]:
        """An endpoint has failed again and again just now. ``unhealthy``: endpoints that take no connections for another reason."""
        endpoint = self._endpoints.get(address)
        detection = self._detect_consecutive(endpoint, counts, now_ms, unhealthy) if endpoint else None
        return [detection] if detection else []

    def end_interval(self, counts: Mapping[str, Counts], now_ms: int, unhealthy: Set[str]) -> list[Detection]:
        """All detectors look at what has happened since the last interval."""
        settings = self._in_force
        self._next_interval_ms = now_ms + settings.interval_ms
        # A reload may have taken an endpoint away already, and not yet from here.
        counts = {e.address: counts.get(e.address, e.counts) for e in self._endpoints.values()}
        intervals = [self._measure(endpoint, counts[endpoint.address]) for endpoint in self._endpoints.values()]
        found: dict[Detector, list[tuple[_Endpoint, str]]] = {
            Detector.SUCCESS_RATE: self._low_success_rates(_in_service(intervals)),
            Detector.FAILURE_PERCENTAGE: self._high_failures(_in_service(intervals)),
            Detector.LATENCY: self._slow(_in_service(intervals)),
        }
        failing = [e for e in self._endpoints.values() if not e.ejection and self._fails_in_a_row(counts[e.address])]
        detections = [self._detect_consecutive(endpoint, counts[endpoint.address], now_ms, unhealthy) for endpoint in failing]
        for detector, outliers in found.items():
            detections += [self._detect(endpoint, detector, why, now_ms, unhealthy) for endpoint, why in outliers]
        troubled = {
            Detector.CONSECUTIVE_FAILURES: {e.address for e in failing},
            **{detector: {endpoint.address for endpoint, _ in outliers} for detector, outliers in found.items()},
        }
        for endpoint in self._endpoints.values():
            self._note_health(endpoint, [d for d, addresses in troubled.items() if endpoint.address in addresses], now_ms)
        return [detection for detection in detections if detection]

    def put_back(self, address: str, counts: Counts, now_ms: int) -> Ejection | None:
        """The endpoint returns; what it did while it was out is forgotten. Gives the ejection that this ends."""
        endpoint = self._endpoints.get(address)
        if endpoint is None or endpoint.ejection is None:
            return None
        ejection, endpoint.ejection = endpoint.ejection, None
        del self._ejected[address]
        endpoint.counts = counts
        endpoint.latency_ns = None
        endpoint.in_service_from_ms = now_ms
        endpoint.noted.clear()
        return ejection

    def postpone(self, address: str, now_ms: int) -> None:
        """A probe has failed: the endpoint stays out for another interval."""
        endpoint = self._endpoints.get(address)
        if endpoint and endpoint.ejection:
            was = endpoint.ejection
            endpoint.ejection = Ejection(was.detector, was.why, was.since_ms, now_ms + self._in_force.interval_ms)

    @property
    def _in_force(self) -> OutlierDetection:
        assert self._settings is not None, "configure() first"
        return self._settings

    # -- detectors -----------------------------------------------------------------------------------------------------

    def _measure(self, endpoint: _Endpoint, counts: Counts) -> _Interval:
        before, endpoint.counts = endpoint.counts, counts
        attempts = counts.attempts - before.attempts
        connects = counts.connects - before.connects
        if connects and not endpoint.ejection:
            mean = (counts.connect_ns - before.connect_ns) / connects
            endpoint.latency_ns = mean if endpoint.latency_ns is None else (endpoint.latency_ns + mean) / 2
        # A failure can be of a connection that was made in the interval before.
        return _Interval(endpoint, attempts, min(attempts, counts.failures - before.failures), connects)

    def _fails_in_a_row(self, counts: Counts) -> bool:
        most = self._in_force.consecutive_failures
        return most > 0 and counts.in_a_row >= most

    def _detect_consecutive(self, endpoint: _Endpoint, counts: Counts, now_ms: int, unhealthy: Set[str]) -> Detection | None:
        if endpoint.ejection or not self._fails_in_a_row(counts):
            return None
        if counts.failed_connects >= counts.failed_answers:
            why = f"dials that failed in a row: {counts.failed_connects}"
        else:
            why = f"connections in a row that ended before an answer: {counts.failed_answers}"
        return self._detect(endpoint, Detector.CONSECUTIVE_FAILURES, why, now_ms, unhealthy)

    def _low_success_rates(self, intervals: Sequence[_Interval]) -> list[tuple[_Endpoint, str]]:
        rule = self._in_force.success_rate
        if rule is None:
            return []
        judged = [one for one in intervals if one.attempts >= rule.minimum_connections]
        if len(judged) < rule.minimum_endpoints:
            return []
        mean = statistics.fmean(one.success_rate for one in judged)
        deviation = statistics.pstdev([one.success_rate for one in judged], mean)
        threshold = mean - max(rule.factor * deviation, rule.margin)
        low = sorted((one for one in judged if one.success_rate < threshold - _ROUNDING), key=lambda one: one.success_rate)
        return [
            (one.endpoint, f"success rate {one.success_rate:.1%} of {one.attempts} is below {threshold:.1%} (mean {mean:.1%})")
            for one in low
        ]

    def _high_failures(self, intervals: Sequence[_Interval]) -> list[tuple[_Endpoint, str]]:
        rule = self._in_force.failure_percentage
        if rule is None:
            return []
        high = [
            one for one in intervals if one.attempts >= rule.minimum_connections and 1 - one.success_rate >= rule.threshold - _ROUNDING
        ]
        high.sort(key=lambda one: one.success_rate)
        return [(one.endpoint, f"{1 - one.success_rate:.1%} of {one.attempts} connections failed") for one in high]

    def _slow(self, intervals: Sequence[_Interval]) -> list[tuple[_Endpoint, str]]:
        rule = self._in_force.latency
        if rule is None:
            return []
        zones: dict[str, list[tuple[float, _Endpoint]]] = {}
        for one in intervals:
            latency = one.endpoint.latency_ns
            if latency is not None and one.connects >= rule.minimum_connections:
                zones.setdefault(one.endpoint.zone, []).append((latency, one.endpoint))
        slow: list[tuple[float, _Endpoint, float, float]] = []
        for judged in zones.values():
            if len(judged) < rule.minimum_endpoints:
                continue
            median = statistics.median(latency for latency, _ in judged)
            deviation = statistics.median(abs(latency - median) for latency, _ in judged)
            threshold = median + max(rule.factor * deviation, rule.floor * 1e6)
            slow += [(latency, endpoint, threshold, median) for latency, endpoint in judged if latency > threshold + 1]
        slow.sort(key=lambda one: -one[0])
        return [
            (endpoint, f"connects in {latency / 1e6:.1f} ms, over {threshold / 1e6:.1f} ms (median {median / 1e6:.1f} ms)")
            for latency, endpoint, threshold, median in slow
        ]

    # -- decisions -----------------------------------------------------------------------------------------------------

    def _detect(self, endpoint: _Endpoint, detector: Detector, why: str, now_ms: int, unhealthy: Set[str]) -> Detection | None:
        """What comes of it. None: that has been said, or it is out by now."""
        if endpoint.ejection:
            return None
        outcome = self._decide(endpoint, detector, unhealthy)
        if outcome is Outcome.EJECTED:
            endpoint.noted.clear()
            self._eject(endpoint, detector, why, now_ms)
            assert endpoint.ejection
            return Detection(endpoint.address, detector, outcome, why, endpoint.ejection.until_ms, endpoint.times)
        if endpoint.noted.get(detector) is outcome:
            return None
        endpoint.noted[detector] = outcome
        return Detection(endpoint.address, detector, outcome, why)

    def _decide(self, endpoint: _Endpoint, detector: Detector, unhealthy: Set[str]) -> Outcome:
        settings = self._in_force
        if endpoint.noted.get(detector) is Outcome.NOT_ENFORCED:
            # Drawn once for as long as it holds.
            return Outcome.NOT_ENFORCED
        if detector not in endpoint.noted and not self._is_enforced(settings.enforce):
            return Outcome.NOT_ENFORCED
        n = len(self._endpoints)
        if len(self._ejected) + 1 > max(1, math.floor(settings.max_ejected * n + _ROUNDING)):
            return Outcome.MAX_EJECTED
        if endpoint.address in unhealthy:
            return Outcome.EJECTED
        left = [
            other
            for other in self._endpoints.values()
            if other is not endpoint and not other.ejection and other.address not in unhealthy
        ]
        if self._zones_matter and all(other.zone != endpoint.zone for other in left):
            return Outcome.LAST_OF_ZONE
        if not left or len(left) < self._panic_threshold * n:
            return Outcome.PANIC
        return Outcome.EJECTED

    def _is_enforced(self, share: float) -> bool:
        return share >= 1 or (share > 0 and self._chance() < share)

    def _eject(self, endpoint: _Endpoint, detector: Detector, why: str, now_ms: int) -> None:
        settings = self._in_force
        if settings.base_ejection_ms * endpoint.times < settings.max_ejection_ms:
            endpoint.times += 1
        endpoint.ejections += 1
        longest = min(settings.base_ejection_ms * endpoint.times, settings.max_ejection_ms)
        self._ejected[endpoint.address] = endpoint
        endpoint.ejection = Ejection(detector, why, now_ms, now_ms + round(longest * (1 - JITTER * self._chance())))

    def _note_health(self, endpoint: _Endpoint, troubles: Sequence[Detector], now_ms: int) -> None:
        """An interval of health, all of it in service and nothing said against the endpoint, makes its next ejection shorter."""
        for detector in [detector for detector in endpoint.noted if detector not in troubles]:
            del endpoint.noted[detector]
        whole = now_ms - endpoint.in_service_from_ms >= self._in_force.interval_ms
        if endpoint.times and whole and not troubles and not endpoint.ejection:
            endpoint.times -= 1


def _in_service(intervals: Sequence[_Interval]) -> list[_Interval]:
    """Those that may be compared: not ejected, and not idle."""
    return [one for one in intervals if not one.endpoint.ejection and one.attempts]
