"""Outlier detection: the formulas with known figures, then thousands of histories against a plain model."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest

from l4mesh.config.load import parse_config
from l4mesh.model import FailurePercentageDetector, LatencyDetector, OutlierDetection, SuccessRateDetector
from l4mesh.policy.outlier import JITTER, ClusterOutliers, Counts, Detection, Detector, Outcome

NOBODY: frozenset[str] = frozenset()


def settings(text: str = "{}") -> OutlierDetection:
    config = parse_config(
        'listeners: [{name: a, bind: "127.0.0.1:1", cluster: c}]\n'
        f'clusters: [{{name: c, endpoints: ["127.0.0.1:2"], outlier_detection: {text}}}]\n'
    )
    found = config.clusters["c"].outlier_detection
    assert found
    return found


class Fixed:
    """A cluster whose counters a test sets by hand."""

    def __init__(
        self, rules: OutlierDetection, n: int, panic: float = 0.0, zones: str = "", chance: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.rules = rules
        self.now_ms = 0
        self.names = [f"e{i}" for i in range(n)]
        self.counts = dict.fromkeys(self.names, Counts())
        self.cluster = ClusterOutliers(chance)
        self.panic = panic
        self.zones = zones or "z" * n
        self.configure(rules)

    def configure(self, rules: OutlierDetection) -> None:
        self.rules = rules
        rows = [(name, zone, self.counts[name]) for name, zone in zip(self.names, self.zones, strict=False)]
        self.cluster.configure(rules, rows, self.panic, self.now_ms, zones_matter="x" in self.zones)

    def add(self, name: str, attempts: int, failures: int, ms: float = 1) -> None:
        was = self.counts[name]
        made = attempts - failures
        self.counts[name] = Counts(
            was.attempts + attempts, was.failures + failures, was.connects + made, was.connect_ns + round(made * ms * 1e6)
        )

    def fail(self, name: str, in_a_row: int, unhealthy: frozenset[str] = NOBODY) -> list[Detection]:
        self.counts[name] = self.counts[name]._replace(failed_connects=in_a_row)
        return self.cluster.failed(name, self.counts[name], self.now_ms, unhealthy)

    def interval(self, unhealthy: frozenset[str] = NOBODY) -> list[Detection]:
        self.now_ms = max(self.now_ms, self.cluster.interval_ends_ms)
        return self.cluster.end_interval(self.counts, self.now_ms, unhealthy)

    def back(self, name: str) -> None:
        self.counts[name] = self.counts[name]._replace(failed_connects=0, failed_answers=0)
        self.cluster.put_back(name, self.counts[name], self.now_ms)


def outcomes(detections: list[Detection]) -> list[tuple[str, Detector, Outcome]]:
    return [(d.address, d.detector, d.outcome) for d in detections]


def test_five_failures_in_a_row_eject_and_four_do_not() -> None:
    fixed = Fixed(settings(), 3)
    assert fixed.fail("e0", 4) == []
    (found,) = fixed.fail("e0", 5)
    assert (found.outcome, found.until_ms, found.times) == (Outcome.EJECTED, 30_000, 1)
    assert found.why == "dials that failed in a row: 5"
    assert fixed.fail("e0", 6) == []


@pytest.mark.parametrize(
    ("share", "n", "most"),
    [("10%", 3, 1), ("50%", 3, 1), ("50%", 4, 2), ("29%", 100, 29), ("1%", 20, 1), ("100%", 4, 4), ("34%", 3, 1)],
)
def test_max_ejected_is_a_share_rounded_down_and_at_least_one(share: str, n: int, most: int) -> None:
    fixed = Fixed(settings(f"{{max_ejected: {share}}}"), n)
    found = [d.outcome for name in fixed.names for d in fixed.fail(name, 5)]
    # The last of all stays whatever the share.
    assert found.count(Outcome.EJECTED) == min(most, n - 1)
    assert set(found) <= {Outcome.EJECTED, Outcome.MAX_EJECTED, Outcome.PANIC}


def test_what_max_ejected_holds_back_goes_as_soon_as_there_is_room() -> None:
    fixed = Fixed(settings("{max_ejected: 25%, base_ejection: 5s}"), 4)
    assert outcomes(fixed.fail("e0", 5)) == [("e0", Detector.CONSECUTIVE_FAILURES, Outcome.EJECTED)]
    assert outcomes(fixed.fail("e1", 5)) == [("e1", Detector.CONSECUTIVE_FAILURES, Outcome.MAX_EJECTED)]
    assert fixed.interval() == []  # said once
    fixed.back("e0")
    assert outcomes(fixed.interval()) == [("e1", Detector.CONSECUTIVE_FAILURES, Outcome.EJECTED)]


def test_neither_a_zone_nor_the_cluster_is_emptied_and_no_panic_begins() -> None:
    fixed = Fixed(settings("{max_ejected: 100%}"), 4, zones="xxyy")
    assert [d.outcome for name in fixed.names for d in fixed.fail(name, 5)] == [
        Outcome.EJECTED, Outcome.LAST_OF_ZONE, Outcome.EJECTED, Outcome.LAST_OF_ZONE,
    ]  # fmt: skip
    fixed = Fixed(settings("{max_ejected: 100%}"), 4, panic=0.5)
    assert [d.outcome for name in fixed.names for d in fixed.fail(name, 5)] == [Outcome.EJECTED] * 2 + [Outcome.PANIC] * 2
    fixed = Fixed(settings(), 1)
    assert [d.outcome for d in fixed.fail("e0", 5)] == [Outcome.PANIC]


def test_endpoints_that_a_health_check_took_out_do_not_count_as_left() -> None:
    fixed = Fixed(settings("{max_ejected: 100%}"), 3)
    sick = frozenset({"e1", "e2"})
    assert [d.outcome for d in fixed.fail("e0", 5, sick)] == [Outcome.PANIC]
    # One that is out anyway costs nothing.
    assert [d.outcome for d in fixed.fail("e1", 5, sick)] == [Outcome.EJECTED]


def test_ejections_grow_to_a_bound_and_health_shortens_them() -> None:
    fixed = Fixed(settings("{base_ejection: 30s, max_ejection: 100s}"), 3)
    lengths = []
    for _ in range(6):
        (found,) = fixed.fail("e0", 5)
        lengths.append(found.until_ms - fixed.now_ms)
        fixed.now_ms = found.until_ms
        assert fixed.cluster.due(fixed.now_ms - 1) == []
        assert fixed.cluster.due(fixed.now_ms) == ["e0"]
        fixed.back("e0")
    assert lengths == [30_000, 60_000, 90_000, 100_000, 100_000, 100_000]
    fixed.interval()  # it has not been back for a whole interval
    for _ in range(2):
        fixed.interval()
    (found,) = fixed.fail("e0", 5)
    assert found.until_ms - fixed.now_ms == 90_000
    assert fixed.cluster.times_ejected("e0") == 7


def test_jitter_only_shortens() -> None:
    for chance, length in ((0.0, 30_000), (0.5, 28_500), (0.999999, 27_000)):
        fixed = Fixed(settings(), 3, chance=lambda chance=chance: chance)  # type: ignore[misc]
        assert fixed.fail("e0", 5)[0].until_ms == length


def test_success_rate_is_envoys_example() -> None:
    # Envoy's outlier_detection_impl.cc: rates 50, 100, 100, 100, 100 give mean 90, deviation 20 and threshold 52 with 1.9.
    fixed = Fixed(settings("{consecutive_failures: off}"), 5)
    for name in fixed.names:
        fixed.add(name, 100, 50 if name == "e2" else 0)
    (found,) = fixed.interval()
    assert found.address == "e2"
    assert found.why == "success rate 50.0% of 100 is below 52.0% (mean 90.0%)"
    fixed = Fixed(settings("{consecutive_failures: off}"), 5)
    for name in fixed.names:
        fixed.add(name, 100, {"e0": 48, "e1": 47}.get(name, 0))
    assert fixed.interval() == []


def test_a_single_failure_in_a_hundred_is_no_outlier() -> None:
    # By mean and deviation alone it would be: 99 % is below 99.9 % - 1.9 x 0.3 %.
    fixed = Fixed(settings(), 10)
    for name in fixed.names:
        fixed.add(name, 100, int(name == "e0"))
    assert fixed.interval() == []
    fixed = Fixed(settings("{success_rate: {margin: 0%}}"), 10)
    for name in fixed.names:
        fixed.add(name, 100, int(name == "e0"))
    assert [d.address for d in fixed.interval()] == ["e0"]


def test_too_few_connections_or_endpoints_prove_nothing() -> None:
    for n, attempts in ((5, 99), (4, 100)):
        fixed = Fixed(settings("{consecutive_failures: off}"), n)
        for name in fixed.names:
            fixed.add(name, attempts, attempts if name == "e0" else 0)
        assert fixed.interval() == []


def test_failure_percentage_needs_no_others() -> None:
    fixed = Fixed(settings("{success_rate: off, failure_percentage: {threshold: 85%}}"), 2)
    fixed.add("e0", 100, 85)
    fixed.add("e1", 100, 84)
    (found,) = fixed.interval()
    assert (found.address, found.why) == ("e0", "85.0% of 100 connections failed")


def test_latency_is_judged_within_its_zone_and_beyond_a_floor() -> None:
    fixed = Fixed(settings("{latency: {}}"), 8, zones="aaaabbbb")
    for name, ms in zip(fixed.names, (1, 1, 2, 150, 80, 81, 82, 83), strict=True):
        fixed.add(name, 20, 0, ms)
    (found,) = fixed.interval()
    assert (found.address, found.detector) == ("e3", Detector.LATENCY)
    assert found.why == "connects in 150.0 ms, over 101.5 ms (median 1.5 ms)"


def test_of_several_outliers_the_worst_goes_first() -> None:
    fixed = Fixed(settings("{consecutive_failures: off, success_rate: off, failure_percentage: {threshold: 50%}, max_ejected: 30%}"), 5)
    for name, failures in zip(fixed.names, (60, 90, 70, 0, 0), strict=True):
        fixed.add(name, 100, failures)
    assert [(d.address, d.outcome) for d in fixed.interval()] == [
        ("e1", Outcome.EJECTED), ("e2", Outcome.MAX_EJECTED), ("e0", Outcome.MAX_EJECTED),
    ]  # fmt: skip


def test_enforce_is_drawn_once_for_as_long_as_it_holds() -> None:
    draws = iter([0.6, 0.3, 0.0])
    fixed = Fixed(settings("{enforce: 50%}"), 3, chance=lambda: next(draws))
    assert [d.outcome for d in fixed.fail("e0", 5)] == [Outcome.NOT_ENFORCED]
    assert fixed.interval() == []
    fixed.counts["e0"] = Counts()
    fixed.interval()
    assert [d.outcome for d in fixed.fail("e0", 5)] == [Outcome.EJECTED]


def test_a_failed_probe_keeps_an_endpoint_out_for_an_interval() -> None:
    fixed = Fixed(settings(), 3)
    fixed.fail("e0", 5)
    fixed.cluster.postpone("e0", 30_000)
    assert fixed.cluster.due(39_999) == []
    assert fixed.cluster.due(40_000) == ["e0"]
    ejection = fixed.cluster.ejection("e0")
    assert ejection
    assert ejection.since_ms == 0


def test_a_reload_keeps_what_is_known_and_forgets_who_left() -> None:
    fixed = Fixed(settings(), 4)
    fixed.fail("e0", 5)
    fixed.fail("e1", 5)
    fixed.names = ["e0", "e2", "e3", "e4"]
    fixed.counts["e4"] = Counts()
    fixed.configure(replace(fixed.rules, consecutive_failures=3))
    assert fixed.cluster.ejected == ["e0"]
    assert [d.outcome for d in fixed.fail("e4", 3)] == [Outcome.EJECTED]
    assert fixed.fail("e1", 5) == []


# -- a plain model -----------------------------------------------------------------------------------------------------------


class Model:
    """The rules, written down a second time in the plainest way: exact numbers, every question answered from the whole list."""

    def __init__(
        self,
        rules: OutlierDetection,
        names: list[str],
        zones: dict[str, str],
        panic: float,
        zones_matter: bool,
        chance: Callable[[], float],
    ) -> None:
        self.rules, self.names, self.zones, self.panic, self.zones_matter, self.chance = (
            rules,
            names,
            zones,
            panic,
            zones_matter,
            chance,
        )
        self.out: dict[str, int] = {}
        self.times = dict.fromkeys(names, 0)
        self.since = dict.fromkeys(names, 0)
        self.base = dict.fromkeys(names, Counts())
        self.latency: dict[str, Fraction] = {}
        self.said: dict[tuple[str, Detector], Outcome] = {}

    def detect(self, name: str, detector: Detector, now: int, sick: frozenset[str]) -> list[tuple[str, Detector, Outcome, int]]:
        if name in self.out:
            return []
        outcome = self.outcome(name, detector, sick)
        if outcome is Outcome.EJECTED:
            if self.rules.base_ejection_ms * self.times[name] < self.rules.max_ejection_ms:
                self.times[name] += 1
            longest = min(self.rules.base_ejection_ms * self.times[name], self.rules.max_ejection_ms)
            self.out[name] = now + round(longest * (1 - JITTER * self.chance()))
            self.said = {key: value for key, value in self.said.items() if key[0] != name}
            return [(name, detector, outcome, self.out[name])]
        if self.said.get((name, detector)) is outcome:
            return []
        self.said[name, detector] = outcome
        return [(name, detector, outcome, 0)]

    def outcome(self, name: str, detector: Detector, sick: frozenset[str]) -> Outcome:
        before = self.said.get((name, detector))
        if before is Outcome.NOT_ENFORCED:
            return before
        if before is None and self.rules.enforce < 1 and (self.rules.enforce == 0 or self.chance() >= self.rules.enforce):
            return Outcome.NOT_ENFORCED
        n = len(self.names)
        if len(self.out) >= max(1, math.floor(Fraction(self.rules.max_ejected).limit_denominator(1000) * n)):
            return Outcome.MAX_EJECTED
        serving = [other for other in self.names if other not in self.out and other not in sick]
        if name not in serving:
            return Outcome.EJECTED
        if self.zones_matter and [self.zones[other] for other in serving].count(self.zones[name]) == 1:
            return Outcome.LAST_OF_ZONE
        if len(serving) == 1 or len(serving) - 1 < self.panic * n:
            return Outcome.PANIC
        return Outcome.EJECTED

    def failed(self, name: str, counts: Counts, now: int, sick: frozenset[str]) -> list[tuple[str, Detector, Outcome, int]]:
        if not self.rules.consecutive_failures or max(counts.failed_connects, counts.failed_answers) < self.rules.consecutive_failures:
            return []
        return self.detect(name, Detector.CONSECUTIVE_FAILURES, now, sick)

    def interval(self, counts: dict[str, Counts], now: int, sick: frozenset[str]) -> list[tuple[str, Detector, Outcome, int]]:
        delta = {name: tuple(b - a for a, b in zip(self.base[name][:4], counts[name][:4], strict=True)) for name in self.names}
        self.base = dict(counts)
        inside = [name for name in self.names if name not in self.out and delta[name][0]]
        rate = {name: 1 - Fraction(min(delta[name][1], delta[name][0]), delta[name][0]) for name in inside}
        for name in self.names:
            if name not in self.out and delta[name][2]:
                mean = Fraction(delta[name][3], delta[name][2])
                self.latency[name] = (self.latency[name] + mean) / 2 if name in self.latency else mean
        findings: list[tuple[Detector, str]] = []
        if self.rules.consecutive_failures:
            for name in self.names:
                if name not in self.out and max(counts[name][4:]) >= self.rules.consecutive_failures:
                    findings.append((Detector.CONSECUTIVE_FAILURES, name))
        if rule := self.rules.success_rate:
            judged = [name for name in inside if delta[name][0] >= rule.minimum_connections]
            if len(judged) >= rule.minimum_endpoints:
                mean = sum(rate[name] for name in judged) / Fraction(len(judged))
                variance = sum((rate[name] - mean) ** 2 for name in judged) / len(judged)
                for name in sorted(judged, key=lambda name: rate[name]):
                    below = mean - rate[name]
                    # Squared, so that no root need be taken.
                    if (
                        below > Fraction(rule.margin).limit_denominator(1000)
                        and below**2 > Fraction(rule.factor).limit_denominator(1000) ** 2 * variance
                    ):
                        findings.append((Detector.SUCCESS_RATE, name))
        if percentage := self.rules.failure_percentage:
            for name in sorted(inside, key=lambda name: rate[name]):
                if delta[name][0] >= percentage.minimum_connections and 1 - rate[name] >= Fraction(
                    percentage.threshold
                ).limit_denominator(1000):
                    findings.append((Detector.FAILURE_PERCENTAGE, name))
        if rule_ := self.rules.latency:
            slow = []
            for zone in set(self.zones.values()):
                judged = [
                    name
                    for name in inside
                    if self.zones[name] == zone and name in self.latency and delta[name][2] >= rule_.minimum_connections
                ]
                if len(judged) >= rule_.minimum_endpoints:
                    middle = median([self.latency[name] for name in judged])
                    spread = median([abs(self.latency[name] - middle) for name in judged])
                    limit = middle + max(Fraction(rule_.factor).limit_denominator(1000) * spread, rule_.floor * 10**6)
                    slow += [name for name in judged if self.latency[name] > limit + 1]
            # By latency; the order of equals is that of the zones, as they are first met.
            order = list(
                dict.fromkeys(
                    self.zones[name] for name in inside if name in self.latency and delta[name][2] >= rule_.minimum_connections
                )
            )
            slow.sort(key=lambda name: (-self.latency[name], order.index(self.zones[name]), self.names.index(name)))
            findings += [(Detector.LATENCY, name) for name in slow]
        events = [event for detector, name in findings for event in self.detect(name, detector, now, sick)]
        for name in self.names:
            for detector in Detector:
                if (detector, name) not in findings:
                    self.said.pop((name, detector), None)
            if name not in self.out and now - self.since[name] >= self.rules.interval_ms and not any(n == name for _, n in findings):
                self.times[name] = max(0, self.times[name] - 1)
        return events

    def back(self, name: str, counts: Counts, now: int) -> None:
        del self.out[name]
        self.base[name], self.since[name] = counts, now
        self.latency.pop(name, None)
        self.said = {key: value for key, value in self.said.items() if key[0] != name}


def median(values: list[Fraction]) -> Fraction:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def random_rules(rng: random.Random) -> OutlierDetection:
    base = rng.choice([100, 1000, 30_000])
    rules = OutlierDetection(
        consecutive_failures=rng.choice([0, 1, 3, 5, 5]),
        interval_ms=rng.choice([100, 1000, 10_000]),
        base_ejection_ms=base,
        max_ejection_ms=base * rng.choice([1, 2, 5, 10]) + rng.choice([0, 7]),
        max_ejected=rng.choice([0.01, 0.1, 0.25, 0.5, 0.75, 1.0, 0.29]),
        enforce=rng.choice([1.0, 1.0, 1.0, 0.5, 0.0]),
        probe=False,
        connect_failure=True,
        tls_failure=True,
        early_reset_ms=1000,
        no_answer_ms=1000,
        success_rate=SuccessRateDetector(
            rng.choice([0.5, 1.0, 1.9]), rng.choice([0.0, 0.1, 0.25]), rng.choice([3, 5]), rng.choice([1, 20, 100])
        ),
        failure_percentage=FailurePercentageDetector(rng.choice([0.25, 0.5, 0.85]), rng.choice([1, 20])),
        latency=LatencyDetector(rng.choice([1.0, 3.0, 5.0]), rng.choice([1, 50, 100]), rng.choice([3, 5]), rng.choice([1, 10])),
    )
    off = {key: None for key in ("success_rate", "failure_percentage", "latency") if rng.random() < 0.4}
    return replace(rules, **off)  # type: ignore[arg-type]


class Traffic:
    """What the endpoints of a history do: each good, bad, flaky, slow or idle for a while."""

    def __init__(self, rng: random.Random, names: list[str]) -> None:
        self.rng = rng
        self.mood = dict.fromkeys(names, "good")

    def step(self, counts: dict[str, Counts], out: set[str]) -> list[str]:
        """Changes the counters, and gives the endpoints that failed last."""
        failed = []
        for name, was in counts.items():
            if self.rng.random() < 0.1:
                self.mood[name] = self.rng.choice(["good", "good", "good", "bad", "flaky", "slow", "idle", "unanswering"])
            mood = self.mood[name]
            if mood == "idle" or (name in out and self.rng.random() < 0.9):
                continue
            attempts = self.rng.choice([1, 5, 20, 100, 150])
            share = {"bad": 1.0, "flaky": self.rng.choice([0.1, 0.3, 0.6, 0.9]), "unanswering": 1.0}.get(
                mood, self.rng.choice([0, 0, 0.01])
            )
            failures = round(attempts * share)
            late = mood == "unanswering"
            connects = attempts if late else attempts - failures
            ns = connects * self.rng.choice([90, 100, 110]) * 10_000 * (self.rng.choice([60, 200]) if mood == "slow" else 1)
            # A run of failures goes on only through steps that had no success.
            connect_run = (
                was.failed_connects + failures if failures == attempts and not late else 0 if connects else self.rng.randrange(3)
            )
            answer_run = was.failed_answers + failures if late else 0 if attempts > failures else was.failed_answers
            counts[name] = Counts(
                was.attempts + attempts, was.failures + failures, was.connects + connects, was.connect_ns + ns, connect_run, answer_run
            )
            if failures:
                failed.append(name)
        return failed


def run_history(seed: int) -> int:
    """One random history, each decision compared with the model's. Gives the number of ejections."""
    rng = random.Random(seed)
    rules = random_rules(rng)
    n = rng.choice([1, 2, 3, 3, 5, 8, 20])
    names = [f"e{i}" for i in range(n)]
    zones = {name: rng.choice(["a", "b", "c"][: rng.choice([1, 2, 3])]) for name in names}
    panic, zones_matter = rng.choice([0.0, 0.25, 0.5, 0.5]), rng.random() < 0.5
    cluster = ClusterOutliers(random.Random(seed + 1).random)
    cluster.configure(rules, [(name, zones[name], Counts()) for name in names], panic, 0, zones_matter=zones_matter)
    model = Model(rules, names, zones, panic, zones_matter, random.Random(seed + 1).random)
    counts = dict.fromkeys(names, Counts())
    traffic = Traffic(rng, names)
    sick: frozenset[str] = frozenset()
    now = ejections = 0
    step = max(1, rules.interval_ms // rng.choice([1, 2, 5]))
    most = max(1, math.floor(Fraction(rules.max_ejected).limit_denominator(1000) * n))

    def same(got: list[Detection], expected: list[tuple[str, Detector, Outcome, int]]) -> None:
        nonlocal ejections
        assert [(d.address, d.detector, d.outcome, d.until_ms) for d in got] == expected, f"seed {seed} at {now}"
        ejected = [d for d in got if d.outcome is Outcome.EJECTED]
        ejections += len(ejected)
        for found in ejected:
            length = found.until_ms - now
            assert (1 - JITTER) * rules.base_ejection_ms - 1 <= length <= rules.max_ejection_ms
            assert found.times * rules.base_ejection_ms < rules.max_ejection_ms + rules.base_ejection_ms
        assert len(cluster.ejected) <= most
        if ejected:
            serving = [name for name in names if name not in cluster.ejected and name not in sick]
            if any(found.address not in sick for found in ejected):
                assert serving
                assert len(serving) >= panic * n
            if zones_matter:
                for found in ejected:
                    assert found.address in sick or any(zones[name] == zones[found.address] for name in serving)

    for _ in range(rng.choice([10, 30])):
        now += step
        if rng.random() < 0.1:
            sick = frozenset(name for name in names if rng.random() < 0.2)
        for name in traffic.step(counts, set(cluster.ejected)):
            same(cluster.failed(name, counts[name], now, sick), model.failed(name, counts[name], now, sick))
        if now >= cluster.interval_ends_ms:
            same(cluster.end_interval(counts, now, sick), model.interval(counts, now, sick))
        due = cluster.due(now)
        assert due == [name for name in model.out if now >= model.out[name]], f"seed {seed} at {now}"
        for name in due:
            counts[name] = counts[name]._replace(failed_connects=0, failed_answers=0)
            cluster.put_back(name, counts[name], now)
            model.back(name, counts[name], now)
        assert cluster.ejected == list(model.out)
    # Nobody stays out for ever.
    assert cluster.due(now + rules.max_ejection_ms) == cluster.ejected
    return ejections


@pytest.mark.parametrize("part", range(4))
def test_thousands_of_histories_go_as_the_plain_model_says(part: int) -> None:
    ejections = [run_history(seed) for seed in range(part * 1000, part * 1000 + 1000)]
    # The histories are about something.
    assert sum(count > 0 for count in ejections) > 500
    assert sum(ejections) > 2500
