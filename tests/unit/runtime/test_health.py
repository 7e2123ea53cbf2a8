"""Health checks with a clock and a wire of the test's own: when endpoints are checked, and what their results come to."""

import asyncio
import itertools
import random
from collections.abc import Callable

import pytest
import uvloop

from l4mesh.config.load import parse_config
from l4mesh.model import Cluster, Config
from l4mesh.runtime.health import STARTS_PER_TURN, UNCHECKED, Health, HealthChecker
from l4mesh.runtime.probes import Done, Probe, Prober, Terms, Unfit
from tests.support.peers import closed_port

LISTENER = 'listeners: [{name: web, bind: "127.0.0.1:0", cluster: web}]\n'
CHECK = "type: tcp, interval: 2s, fast_interval: 500ms, timeout: 1s, rise: 2, fall: 3"


def config(check: str = CHECK, endpoints: int = 1, name: str = "web", more: str = "") -> Config:
    listed = ", ".join(f'"10.0.{i // 250}.{i % 250}:80"' for i in range(endpoints))
    return parse_config(f"{LISTENER}clusters:\n- {{name: {name}, endpoints: [{listed}], health_check: {{{check}}}}}\n{more}".replace(
        "cluster: web}", f"cluster: {name}}}"))  # fmt: skip


def check_of(check: str = CHECK) -> Cluster:
    return config(check).clusters["web"]


class Wire(Prober):
    """Endpoints that answer at once, or not at all: ``answer`` gives why not, None for silence, or an exception for trouble of ours."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.mark = 0
        self.busy = False
        self.answer: Callable[[Probe], str | Unfit | None] = lambda probe: ""
        self.begun: list[tuple[float, str]] = []
        self.silent: list[tuple[float, Done]] = []

    def __len__(self) -> int:
        return len(self.silent)

    def begin(self, probe: Probe, deadline_s: float, done: Done) -> None:
        self.begun.append((self._now(), f"{probe.host}:{probe.port}"))
        answer = self.answer(probe)
        if isinstance(answer, Unfit):
            done(None, str(answer))
        elif answer is None:
            self.silent.append((deadline_s, done))
        else:
            done(answer, "")

    def turn(self) -> bool:
        return self.busy

    def expire(self, now_s: float) -> float:
        over = [done for deadline_s, done in self.silent if deadline_s <= now_s]
        self.silent = [one for one in self.silent if one[0] > now_s]
        for done in over:
            done("timeout", "")
        return min((deadline_s for deadline_s, _ in self.silent), default=float("inf"))

    def grant(self, more_s: float) -> None:
        self.silent = [(deadline_s + more_s, done) for deadline_s, done in self.silent]


class World:
    def __init__(self, seed: int = 1, max_under_way: int = 1000) -> None:
        self.now_s = 1000.0
        self.wire = Wire(lambda: self.now_s)
        self.said: list[tuple[float, str, str, bool, str]] = []
        self.chance = random.Random(seed).random
        self.checker = HealthChecker(self.say, dict, max_under_way, lambda: self.now_s, lambda: self.chance(), self.wire)

    def say(self, cluster: str, address: str, healthy: bool, why: str) -> None:
        self.said.append((self.now_s, cluster, address, healthy, why))

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        at_s = self.now_s
        while at_s <= end_s:
            self.now_s = at_s
            at_s = self.checker.turn(at_s)
        self.now_s = end_s

    def states(self) -> list[bool]:
        return [healthy for _, _, _, healthy, _ in self.said]


# -- the state of one endpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts_up", "results", "states"),
    [
        (True, "+", "U"),
        (True, "-", "D"),  # the first check decides
        (False, "+", "U"),
        (False, "-", "D"),
        (True, "+--+--+---", "UUUUUUUUUD"),  # fall in a row
        (True, "-+-++", "DDDDU"),  # rise in a row
        (True, "+---+-++--+---", "UUUDDDDUUUUUUD"),
    ],
)
def test_rise_and_fall(starts_up: bool, results: str, states: str) -> None:
    check = check_of().health_check
    assert check
    health, seen = Health(starts_up, 0.0), ""
    for at, result in enumerate(results, 1):
        before = health.healthy
        changed = health.note(check, "" if result == "+" else "refused", float(at))
        seen += "U" if health.healthy else "D"
        if health.healthy != before:
            assert changed
            assert health.since_unix_s == at
        assert health.why == ("" if health.healthy and health.contrary == 0 else health.why)
    assert seen == states


def test_doubt_is_looked_into_sooner() -> None:
    check = check_of().health_check
    assert check
    health = Health(True, 0.0)
    waits = []
    for why in ("", "x", "x", "x", "x", "", ""):
        health.note(check, why, 0.0)
        waits.append(health.wait_s(check, 0.5))
    assert waits == [2, 0.5, 0.5, 2, 2, 0.5, 2]


@pytest.mark.parametrize(("chance", "wait"), [(0.0, 1.8), (0.5, 2.0), (1.0, 2.2)])
def test_jitter_has_bounds(chance: float, wait: float) -> None:
    check = check_of().health_check
    assert check
    assert Health(True, 0.0).wait_s(check, chance) == pytest.approx(wait)


# -- the schedule -----------------------------------------------------------------------------------------------------------


def test_first_checks_are_spread_over_the_first_interval_and_then_keep_to_it() -> None:
    world = World()
    world.checker.configure(config(endpoints=1000))
    world.run(2.05)
    counts = [sum(1000 + k / 4 <= at < 1000 + (k + 1) / 4 for at, _ in world.wire.begun) for k in range(8)]
    assert all(80 <= count <= 170 for count in counts), counts
    world.run(20)
    by_address: dict[str, list[float]] = {}
    for at, address in world.wire.begun:
        by_address.setdefault(address, []).append(at)
    assert len(by_address) == 1000
    gaps = [b - a for times in by_address.values() for a, b in itertools.pairwise(times)]
    # A turn of the loop is 10 ms.
    assert min(gaps) >= 1.8
    assert max(gaps) <= 2.2 + 0.02
    assert sum(gaps) / len(gaps) == pytest.approx(2.0, rel=0.01)
    assert world.said == []


def test_an_endpoint_that_falls_silent_is_out_after_fall_checks_and_back_after_rise() -> None:
    world = World()
    world.checker.configure(config("interval: 2s, fast_interval: 500ms, timeout: 200ms, jitter: 0%"))
    world.run(3)
    world.wire.answer = lambda probe: None
    silent_at = world.now_s
    world.run(10)
    (at, cluster, address, healthy, why) = world.said[0]
    assert (cluster, address, healthy, why) == ("web", "10.0.0.0:80", False, "timeout")
    # One interval until it is noticed, two more checks in doubt, and the last one's timeout; a turn each.
    assert at - silent_at <= 2 + 2 * 0.5 + 0.2 + 0.04
    verdict = world.checker.verdict("web", address)
    assert verdict
    assert (verdict.state, verdict.why, verdict.check) == ("unhealthy", "timeout", "tcp")
    world.wire.answer = lambda probe: ""
    back_at = world.now_s
    world.run(10)
    assert world.states() == [False, True]
    assert world.said[1][0] - back_at <= 2 + 0.5 + 0.04


@pytest.mark.parametrize("initial", ["up", "down"])
@pytest.mark.parametrize("works", [True, False])
def test_the_first_check_decides(initial: str, works: bool) -> None:
    world = World()
    world.wire.answer = lambda probe: "" if works else "refused"
    world.checker.configure(config(f"{CHECK}, initial: {initial}"))
    told = [(healthy, why) for _, _, _, healthy, why in world.said]
    assert told == ([] if initial == "up" else [(False, "not checked yet")])
    verdict = world.checker.verdict("web", "10.0.0.0:80")
    assert verdict and verdict.state == "unchecked"
    # Who waits to serve is checked sooner.
    world.run(0.52 if initial == "down" else 2.02)
    assert len(world.wire.begun) == 1
    told = [(healthy, why) for _, _, _, healthy, why in world.said]
    expected = {
        ("up", True): [],
        ("up", False): [(False, "refused")],
        ("down", True): [(False, "not checked yet"), (True, "")],
        ("down", False): [(False, "not checked yet"), (False, "refused")],
    }
    assert told == expected[initial, works]


def test_trouble_of_ours_counts_against_nobody() -> None:
    world = World()
    world.checker.configure(config())
    world.run(3)
    world.wire.answer = lambda probe: Unfit("EMFILE (Too many open files)")
    world.run(100)
    assert world.said == []
    ((_, _, counts),) = world.checker.counts()
    assert counts["failed"] == 0
    assert counts["not_made"] >= 40
    world.wire.answer = lambda probe: "refused"
    world.run(10)
    assert world.states() == [False]
    # Neither does it bring back.
    world.wire.answer = lambda probe: Unfit("EMFILE (Too many open files)")
    world.run(100)
    assert world.states() == [False]


def test_a_process_that_stood_still_blames_nobody() -> None:
    world = World()
    world.checker.configure(config("interval: 1s, timeout: 1s, fall: 1, jitter: 0%"))
    world.run(3)
    world.wire.answer = lambda probe: None
    at_s = world.now_s
    while not world.wire.silent:
        world.now_s = at_s
        at_s = world.checker.turn(at_s)
    # The next turn was due at the deadline, and comes a minute later: nobody has looked for an answer meanwhile.
    world.now_s = at_s + 60
    world.checker.turn(at_s)
    assert world.said == []
    assert world.wire.silent
    world.run(2)
    assert world.states() == [False]


def test_answers_that_wait_to_be_read_are_not_late_and_come_before_new_checks() -> None:
    world = World()
    world.chance = lambda: 0.5
    world.checker.configure(config("interval: 1s, timeout: 100ms, fall: 1", endpoints=2))
    world.wire.answer = lambda probe: None
    world.run(0.52)
    assert len(world.wire) == 2
    world.wire.busy = True
    world.run(5)
    assert world.said == []
    assert len(world.wire.begun) == 2
    world.wire.busy = False
    world.run(1)
    assert world.states() == [False, False]
    assert len(world.wire.begun) > 2


def test_checks_at_once_are_bounded_and_nobody_is_left_out() -> None:
    world = World(max_under_way=10)
    world.wire.answer = lambda probe: None
    world.checker.configure(config(f"{CHECK}, fall: 1".replace("fall: 3, ", ""), endpoints=60))
    most = 0
    at_s, end_s = world.now_s, world.now_s + 30
    while at_s <= end_s:
        world.now_s = at_s
        at_s = world.checker.turn(at_s)
        most = max(most, len(world.wire))
    assert most == 10
    assert len({address for _, address in world.wire.begun}) == 60
    assert world.checker.take_late_s() > 1
    assert world.checker.take_late_s() == 0


def test_a_turn_begins_no_more_than_the_loop_has_time_for() -> None:
    world = World()
    world.chance = lambda: 0.0
    world.checker.configure(config(endpoints=500))
    world.checker.turn(world.now_s)
    assert len(world.wire.begun) == STARTS_PER_TURN


def test_an_error_of_ours_does_not_end_the_checks() -> None:
    raised: list[BaseException] = []

    def fail(cluster: str, address: str, healthy: bool, why: str) -> None:
        raise ValueError("a bug")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: raised.append(context["exception"]))
        checker = HealthChecker(fail, dict, 10)
        check = "interval: 20ms, timeout: 1s, fall: 1, jitter: 0%"
        address = f"127.0.0.1:{closed_port()}"
        checker.configure(parse_config(f'{LISTENER}clusters: [{{name: web, endpoints: ["{address}"], health_check: {{{check}}}}}]'))
        checker.start()
        async with asyncio.timeout(10):
            while checker.counts()[0][2]["failed"] < 5:
                await asyncio.sleep(0.005)
        assert checker.counts()[0][2]["not_made"] == 0
        checker.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert [str(error) for error in raised] == ["a bug"]


# -- who shares a check ------------------------------------------------------------------------------------------------------


def test_equal_checks_of_one_address_are_made_once_and_count_for_all() -> None:
    two = f'- {{name: b, endpoints: ["10.0.0.0:80"], health_check: {{{CHECK}}}}}\n'
    other = f'- {{name: c, endpoints: ["10.0.0.0:80"], health_check: {{{CHECK.replace("fall: 3", "fall: 2")}}}}}\n'
    world = World()
    world.wire.answer = lambda probe: "refused"
    world.checker.configure(config(more=two + other))
    world.run(2.02)
    assert len(world.wire.begun) == 2
    assert sorted(cluster for _, cluster, _, _, _ in world.said) == ["b", "c", "web"]
    # One who joins gets what is known, and causes no check of its own.
    world.said.clear()
    world.checker.configure(config(more=two + other + two.replace("name: b", "name: d")))
    assert [(cluster, healthy) for _, cluster, _, healthy, _ in world.said] == [("d", False)]
    begun = len(world.wire.begun)
    world.run(2.3)
    assert len(world.wire.begun) - begun in (2, 3)


def test_checks_with_other_terms_are_others() -> None:
    tls = "tls: {identity: node, peers: ['*']}"
    more = (
        f'- {{name: b, endpoints: ["10.0.0.0:80"], {tls}, health_check: {{type: tls}}}}\n'
        f'- {{name: c, endpoints: ["10.0.0.0:80"], proxy_protocol: v2, health_check: {{type: tls}}}}\n'
        f'- {{name: d, endpoints: ["10.0.0.0:80"], health_check: {{type: tls}}}}\n'
        f'- {{name: e, endpoints: ["10.0.0.0:80"], {tls}, health_check: {{type: http}}}}\n'
        f'- {{name: f, endpoints: ["10.0.0.0:80"], {tls}, health_check: {{type: http, port: 81}}}}\n'
        "identities: [{name: node, certificate: a, private_key: b, trust_bundle: c}]\n"
    )
    world = World()
    seen: dict[tuple[str, int, str], Terms | None] = {}

    def answer(probe: Probe) -> str:
        seen[probe.check.kind, probe.port, probe.header] = probe.terms if probe.check.kind != "tls" else seen.get(
            (probe.check.kind, probe.port, probe.header), probe.terms
        )  # fmt: skip
        return ""

    world.wire.answer = answer
    world.checker.configure(config(more=more))
    world.run(2.02)
    assert len(world.wire.begun) == 6
    mutual = Terms("node", ("*",), False)
    assert seen["http", 80, "off"] == mutual
    assert seen["http", 81, "off"] is None
    assert seen["tls", 80, "v2"] == Terms()
    assert seen["tcp", 80, "off"] is None


@pytest.mark.parametrize(
    ("check", "encrypt_local", "plaintext"),
    [
        ("type: http", "off", True),
        ("type: tls", "off", True),
        ("type: http, port: 81, tls: on", "off", False),
        ("type: http", "on", False),
    ],
)
def test_a_workload_of_this_node_is_checked_in_plaintext_as_it_is_spoken_to(check: str, encrypt_local: str, plaintext: bool) -> None:
    def configured(workloads: str) -> Config:
        tls = f"tls: {{identity: node, peers: ['*'], encrypt_local: {encrypt_local}}}"
        secured = f'- {{name: b, endpoints: ["10.0.0.9:80"], {tls}, health_check: {{{check}, jitter: 0%}}}}\n'
        return config(more=f"{secured}identities: [{{name: node, certificate: a, private_key: b, trust_bundle: c}}]\n{workloads}")

    world = World()
    seen: list[Probe] = []

    def answer(probe: Probe) -> str:
        seen.append(probe)
        return ""

    world.wire.answer = answer
    local = "workloads: [{name: w, addresses: [10.0.0.9]}]\n"
    for workloads, spared in (("", False), (local, plaintext), ("", False)):
        world.checker.configure(configured(workloads))
        seen.clear()
        world.run(2.1)
        assert {probe.terms is None for probe in seen if probe.host == "10.0.0.9"} == {spared}


# -- reload ------------------------------------------------------------------------------------------------------------------


def test_a_reload_leaves_what_it_does_not_change() -> None:
    world = World()
    world.wire.answer = lambda probe: "refused" if probe.host == "10.0.0.1" else ""
    world.checker.configure(config(endpoints=3))
    world.run(3)
    before = world.checker.verdict("web", "10.0.0.1:80")
    assert before and before.state == "unhealthy"
    world.said.clear()
    # One goes and one comes; the others have their states and their times still.
    after = config(endpoints=4)
    trimmed = after.clusters["web"].endpoints[1:]
    world.checker.configure(_with_endpoints(after, trimmed))
    assert world.said == []
    assert world.checker.verdict("web", "10.0.0.1:80") == before
    assert world.checker.verdict("web", "10.0.0.0:80") is None
    begun = len(world.wire.begun)
    world.run(20)
    checked = [address for _, address in world.wire.begun[begun:]]
    assert "10.0.0.0:80" not in checked
    assert all(8 <= checked.count(f"10.0.0.{i}:80") <= 12 for i in (1, 2, 3))


def _with_endpoints(old: Config, endpoints: tuple) -> Config:  # type: ignore[type-arg]
    from dataclasses import replace

    return replace(old, clusters={"web": replace(old.clusters["web"], endpoints=endpoints)})


def test_another_check_begins_with_what_the_one_before_has_found() -> None:
    world = World()
    world.wire.answer = lambda probe: "refused"
    world.checker.configure(config())
    world.run(3)
    before = world.checker.verdict("web", "10.0.0.0:80")
    world.said.clear()
    world.checker.configure(config(CHECK.replace("2s", "10s")))
    assert world.said == []
    assert world.checker.verdict("web", "10.0.0.0:80") == before
    # The new one speaks soon, whatever its interval is.
    begun = len(world.wire.begun)
    world.run(0.52)
    assert len(world.wire.begun) == begun + 1


@pytest.mark.parametrize("initial", ["up", "down"])
def test_another_process_begins_with_what_this_one_has_found(initial: str) -> None:
    check = f"{CHECK}, initial: {initial}"
    old = World()
    old.wire.answer = lambda probe: "refused" if probe.host == "10.0.0.1" else ""
    old.checker.configure(config(check, endpoints=3))
    old.run(10)
    found = old.checker.verdict("web", "10.0.0.1:80")
    assert found

    new = World()
    new.checker.inherit(old.checker.past())
    new.checker.configure(config(check, endpoints=4))
    # The fourth is one that the other process did not have.
    assert [(address, healthy, why) for _, _, address, healthy, why in new.said] == [
        ("10.0.0.1:80", False, "refused"),
        *([("10.0.0.3:80", False, UNCHECKED)] if initial == "down" else []),
    ]
    assert new.checker.verdict("web", "10.0.0.1:80") == found
    # One failure is no longer the first check, which decides by itself.
    new.wire.answer = lambda probe: "refused"
    new.said.clear()
    new.run(0.5)
    assert {address for _, _, address, _, _ in new.said} <= {"10.0.0.3:80"}
    new.run(10)
    assert {address for _, _, address, healthy, _ in new.said if not healthy} >= {"10.0.0.0:80", "10.0.0.2:80"}


def test_endpoints_that_are_no_longer_checked_serve() -> None:
    world = World()
    world.wire.answer = lambda probe: "refused"
    world.checker.configure(config())
    world.run(3)
    begun = len(world.wire.begun)
    unchecked = parse_config(LISTENER + 'clusters: [{name: web, endpoints: ["10.0.0.0:80"]}]')
    world.checker.configure(unchecked)
    assert world.states() == [False, True]
    world.run(20)
    assert len(world.wire.begun) == begun
    assert world.checker.verdict("web", "10.0.0.0:80") is None
    assert world.checker.counts() == []


def test_a_check_that_is_added_takes_nobody_out_before_it_has_looked() -> None:
    world = World()
    world.checker.configure(parse_config(LISTENER + 'clusters: [{name: web, endpoints: ["10.0.0.0:80"]}]'))
    world.checker.configure(config(f"{CHECK}, initial: down", endpoints=2))
    assert [(address, healthy) for _, _, address, healthy, _ in world.said] == [("10.0.0.1:80", False)]


def test_an_answer_to_a_check_that_is_gone_is_nobody_s() -> None:
    world = World()
    world.wire.answer = lambda probe: None
    world.chance = lambda: 0.9
    world.checker.configure(config())
    world.run(2.02)
    assert len(world.wire) == 1
    world.checker.configure(config(name="other", endpoints=0))
    world.run(5)
    assert len(world.wire) == 0
    assert world.said == []


def test_endpoints_that_share_a_check_leave_it_one_by_one() -> None:
    """Two ports of one host, whose health a third one tells."""

    def ports(*numbers: int) -> Config:
        listed = ", ".join(f'"10.0.0.0:{number}"' for number in numbers)
        return parse_config(f"{LISTENER}clusters: [{{name: web, endpoints: [{listed}], health_check: {{{CHECK}, port: 8081}}}}]")

    world = World()
    world.checker.configure(ports(80, 81))
    world.run(2.02)
    world.checker.configure(ports(80))
    before = world.checker.counts()[0][2]["passed"]
    begun = len(world.wire.begun)
    world.run(10)
    assert world.checker.counts()[0][2]["passed"] - before == len(world.wire.begun) - begun
    world.wire.answer = lambda probe: "refused"
    world.run(10)
    assert [(address, healthy) for _, _, address, healthy, _ in world.said] == [("10.0.0.0:80", False)]
    world.checker.configure(config(name="other", endpoints=0))
    begun = len(world.wire.begun)
    world.run(10)
    assert len(world.wire.begun) == begun


def test_clusters_without_checks_cost_nothing() -> None:
    class Untouched(tuple):  # type: ignore[type-arg]
        def __iter__(self) -> object:
            raise AssertionError("somebody walks over the endpoints")

    world = World()
    unchecked = parse_config(LISTENER + 'clusters: [{name: web, endpoints: ["10.0.0.0:80"]}]')
    world.checker.configure(_with_endpoints(unchecked, Untouched()))
    world.checker.configure(_with_endpoints(unchecked, Untouched()))
    assert world.checker.turn(world.now_s) == float("inf")
