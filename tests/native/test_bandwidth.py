"""Bandwidth, in simulated time: what a limit lets pass, and how those who share one share it."""

import heapq
import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native.probe import Lane, SharedBucket

MS = 1_000_000
START = 10**15
FAST = math.inf
RATES = [10_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 8_000_000_000]


@dataclass
class Stream:
    """A half with something behind it: ``supply`` bytes a second come, of which one read takes ``step`` at most."""

    lane: Lane
    supply: float = FAST
    step: int = 1 << 19
    moved: int = 0
    seen: list[tuple[int, int]] = field(default_factory=list)
    """Time and bytes moved until then."""

    def rate(self, from_s: float, to_s: float) -> float:
        """Bytes a second: without the burst with which somebody has to begin."""
        before = max((moved for now, moved in self.seen if now < START + from_s * 1e9), default=0)
        return (self.moved - before) / (to_s - from_s)

    def turn(self, now: int) -> int:
        """Moves what it may, and gives the time at which to look again."""
        while True:
            waiting = FAST if self.supply == FAST else int(self.supply * (now - START) / 1e9) - self.moved
            if waiting <= 0:
                self.lane.settle(now)
                return now + 2 * MS
            allowed = self.lane.allow(now)
            if not allowed:
                assert self.lane.at_ns > now
                return (self.lane.at_ns // MS + 1) * MS
            count = int(min(allowed, self.step, waiting))
            self.lane.spend(count)
            self.moved += count
            self.seen.append((now, self.moved))


def run(streams: list[Stream], seconds: float, seed: int = 1, late_ms: int = 8) -> None:
    """Every wait ends up to ``late_ms`` late, as on a busy machine."""
    rng = random.Random(seed)
    due = [(START + rng.randrange(MS), number) for number in range(len(streams))]
    heapq.heapify(due)
    while due[0][0] < START + seconds * 1e9:
        now, number = heapq.heappop(due)
        heapq.heappush(due, (streams[number].turn(now) + rng.randrange(late_ms * MS), number))


def fair_shares(demands: list[float], total: float) -> list[float]:
    """Max-min fairness: nobody gets more than is asked for, and what is left over is shared alike."""
    shares = [0.0] * len(demands)
    left = list(range(len(demands)))
    while left:
        share = total / len(left)
        small = [i for i in left if demands[i] <= share]
        for i in small or left:
            shares[i] = min(demands[i], share)
            total -= shares[i]
        left = [i for i in left if small and i not in small]
    return shares


def burst_of(rate: int, quantum: int) -> float:
    return rate * 0.025 + quantum


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_a_rate_is_kept_within_three_percent_and_never_passed(rate: int, shared: bool) -> None:
    bucket = SharedBucket(rate, START)
    stream = Stream(Lane(shared=(bucket,)) if shared else Lane(rate))
    seconds = 4.0
    run([stream], seconds)
    quantum = min(max(rate // (100 if shared else 50), 4096 if shared else 1024), 1 << 20)
    for now, moved in stream.seen:
        assert moved <= rate * (now - START) / 1e9 + burst_of(rate, quantum) + 1
    assert stream.moved == pytest.approx(rate * seconds, rel=0.03)


@pytest.mark.parametrize("rate", [20_000, 5_000_000, 400_000_000])
@pytest.mark.parametrize("seed", range(3))
def test_connections_of_any_speed_share_a_workload_s_rate(rate: int, seed: int) -> None:
    """Some can always move, by large steps or by small ones, some come slowly."""
    rng = random.Random(seed)
    bucket = SharedBucket(rate, START)
    share = rate / 40
    supplies = [FAST] * 20 + [share * rng.choice([0.1, 0.3, 0.6, 0.9, 4.0]) for _ in range(20)]
    streams = [Stream(Lane(shared=(bucket,)), supply, rng.choice([1448, 16_384, 1 << 19])) for supply in supplies]
    seconds = 400.0 if rate < 100_000 else 20.0
    run(streams, seconds, seed)
    for stream, fair in zip(streams, fair_shares(supplies, rate), strict=True):
        assert stream.rate(seconds / 10, seconds) == pytest.approx(fair, rel=0.05)


@pytest.mark.parametrize("factor", [0.02, 0.5, 0.95, 1.05, 3.0, 50.0])
def test_a_limit_of_its_own_costs_a_connection_nothing_of_its_share(factor: float) -> None:
    rate, count = 40_000_000, 30
    bucket = SharedBucket(rate, START)
    own = int(rate / count * factor)
    streams = [Stream(Lane(own, shared=(bucket,))) for _ in range(5)] + [Stream(Lane(shared=(bucket,))) for _ in range(count - 5)]
    run(streams, 20.0)
    for stream, fair in zip(streams, fair_shares([own] * 5 + [FAST] * (count - 5), rate), strict=True):
        assert stream.rate(2, 20) == pytest.approx(fair, rel=0.05)


def test_two_limits_at_once_keep_the_lower_one() -> None:
    slow, fast = SharedBucket(3_000_000, START), SharedBucket(9_000_000, START)
    both = [Stream(Lane(shared=(slow, fast))) for _ in range(2)]
    alone = Stream(Lane(shared=(fast,)))
    run([*both, alone], 10.0)
    assert [stream.moved / 10 for stream in both] == pytest.approx([1_500_000] * 2, rel=0.05)
    assert alone.moved / 10 == pytest.approx(6_000_000, rel=0.05)


@pytest.mark.parametrize("shared", [0, 1, 8], ids=["own", "shared", "by eight"])
def test_a_machine_that_is_too_busy_to_be_in_time_keeps_the_rate(shared: int) -> None:
    bucket = SharedBucket(10_000_000, START)
    streams = [Stream(Lane(shared=(bucket,))) for _ in range(shared)] or [Stream(Lane(10_000_000))]
    run(streams, 10.0, late_ms=200)
    assert sum(stream.rate(1, 10) for stream in streams) == pytest.approx(10_000_000, rel=0.03)


def test_a_pause_saves_up_no_more_than_a_burst() -> None:
    lane = Lane(1_000_000)
    lane.allow(START)
    lane.spend(20_000)
    lane.settle(START)
    now, moved = START + 10 * 10**9, 0
    while allowed := lane.allow(now):
        moved += allowed
        lane.spend(allowed)
    assert moved <= burst_of(1_000_000, 20_000)


@pytest.mark.parametrize(("rate", "burst"), [(1_000_000, 500_000), (1_000_000_000, 20_000_000_000)])
def test_a_burst_passes_at_once_after_a_pause(rate: int, burst: int) -> None:
    lane = Lane(rate, burst)
    now, moved = START, 0
    while allowed := lane.allow(now):
        moved += allowed
        lane.spend(allowed)
    assert moved == pytest.approx(burst, rel=0.05)


@pytest.mark.parametrize(("rate", "count", "most_ms"), [(1_000_000, 6, 60), (100_000_000, 8, 60), (100_000_000, 100, 60)])
def test_a_short_message_does_not_wait_for_many_large_ones(rate: int, count: int, most_ms: int) -> None:
    """One that asks for a byte every 300 ms beside others that always have something to move."""
    bucket = SharedBucket(rate, START)
    streams = [Stream(Lane(shared=(bucket,))) for _ in range(count)]
    run(streams, 2.0)
    lane = Lane(shared=(bucket,))
    lane.allow(START + 2 * 10**9)
    assert lane.at_ns - START - 2 * 10**9 < most_ms * MS


def test_a_new_rate_is_for_those_who_wait_as_well() -> None:
    bucket = SharedBucket(10_000, START)
    lanes = [Lane(shared=(bucket,)) for _ in range(100)]
    for lane in lanes:
        while allowed := lane.allow(START):
            lane.spend(allowed)
    assert max(lane.at_ns for lane in lanes) > START + 30 * 10**9
    bucket.change(100_000_000, START)
    streams = [Stream(lane) for lane in lanes]
    run(streams, 2.0)
    assert sum(stream.moved for stream in streams) == pytest.approx(200_000_000, rel=0.05)
    bucket.change(0, START + 2 * 10**9)
    assert all(lane.allow(START + 2 * 10**9) for lane in lanes)
    for lane in lanes:
        lane.end()
    assert bucket.refs == 1


def test_turns_that_are_not_taken_go_to_the_others() -> None:
    bucket = SharedBucket(1_000_000, START)
    idle = [Lane(shared=(bucket,)) for _ in range(1000)]
    for lane in idle:
        lane.allow(START)
    assert bucket.next_ns > START + 4 * 10**9
    for lane in idle[:500]:
        lane.settle(lane.at_ns)
    for lane in idle[500:]:
        lane.end()
    assert bucket.next_ns < START + 10 * MS
    assert bucket.refs == 501


steps = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, 50 * MS), st.sampled_from([0, 1, 100, 1448, 65_536, 1 << 20]), st.booleans(), st.booleans()
    ),
    min_size=1,
    max_size=200,
)


@settings(max_examples=300, deadline=None)
@given(rate=st.integers(1000, 10**10), own=st.sampled_from([0, 1000, 10**6, 10**9]), taken=steps)
def test_no_order_of_events_lets_more_pass(rate: int, own: int, taken: list[tuple[int, int, int, bool, bool]]) -> None:
    """Four halves that move, stop and end whenever they like: of all of them together, and of each by itself."""
    bucket = SharedBucket(rate, START)
    lanes = [Lane(own if number % 2 else 0, shared=(bucket,)) for number in range(4)]
    moved = [0] * 4
    quantum = min(max(rate // 100, 4096), 1 << 20)
    now = START
    for number, passed, count, settle, end in taken:
        now += passed
        lane = lanes[number]
        allowed = lane.allow(now)
        count = min(count, allowed)
        lane.spend(count)
        moved[number] += count
        if settle:
            lane.settle(now)
        # Each of the four may come with one turn that was its own before.
        assert sum(moved) <= rate * (now - START) / 1e9 + burst_of(rate, 5 * quantum) + 1
        if own and number % 2:
            assert moved[number] <= own * (now - START) / 1e9 + own * 0.025 + 2 * quantum
        if end and settle:
            lane.end()
            lanes[number] = Lane(own if number % 2 else 0, shared=(bucket,))
            moved[number] = moved[number] if not own else 0
    for lane in lanes:
        lane.end()
    assert bucket.refs == 1
