"""Picking: shares, smoothness, affinity, bounds. Every generator is seeded; bounds are five sigma or wider."""

from collections import Counter
from itertools import pairwise

import pytest

from l4mesh.policy.plan import pack_ip
from tests.native import probe

ROUND_ROBIN, LEAST, RANDOM, RING, MAGLEV = range(5)
ALL = [ROUND_ROBIN, LEAST, RANDOM, RING, MAGLEV]
NONE, FULL = -1, -2


def endpoints(
    weights: list[int], tiers: list[int] | None = None, warm: list[int] | None = None
) -> list[tuple[bytes, int, int, int, int]]:
    return [
        (pack_ip(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}"), 80, weight, tiers[i] if tiers else 0, warm[i] if warm else 0)
        for i, weight in enumerate(weights)
    ]


@pytest.mark.parametrize("balance", ALL)
@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 2, 5], [100, 1, 50, 0, 256], [3] * 40, [1, 9] * 20])
def test_shares_follow_weights(balance: int, weights: list[int]) -> None:
    picks = 60_000
    counts = probe.Balancer(endpoints(weights), balance, seed=7).count(picks)
    for count, weight in zip(counts, weights, strict=True):
        share = weight / sum(weights)
        sigma = (picks * share * (1 - share)) ** 0.5
        slack = 5 * sigma
        if balance == ROUND_ROBIN:
            slack = len(weights)
        elif balance == RING:
            # 160 points an endpoint place its share within a standard error of about 8 %.
            slack += 0.4 * picks * share
        elif balance == MAGLEV:
            slack += 0.05 * picks * share + picks / 1021
        assert abs(count - picks * share) <= slack + 1, (counts, weights)


def test_round_robin_is_smooth() -> None:
    balancer = probe.Balancer(endpoints([5, 1, 1]), ROUND_ROBIN)
    order = [balancer.pick() for _ in range(700)]
    assert Counter(order) == {0: 500, 1: 100, 2: 100}
    # The heavy one never waits for more than two others, the light ones never come in a row.
    assert max(len(run) for run in "".join(map(str, order)).replace("1", "x").replace("2", "x").split("0")) <= 2
    light = [at for at, index in enumerate(order) if index == 1]
    assert {b - a for a, b in pairwise(light)} == {7}


def test_fresh_workers_do_not_herd() -> None:
    # A thousand workers start at random places of the same plan: no endpoint gets more than its share of first picks.
    import random

    rng = random.Random(3)
    first = Counter(probe.Balancer(endpoints([1] * 10), ROUND_ROBIN, cursor=rng.getrandbits(32)).pick() for _ in range(1000))
    assert max(first.values()) < 150
    assert len(first) == 10


@pytest.mark.parametrize("n", [2, 5, 8])
def test_few_endpoints_are_compared_exactly(n: int) -> None:
    balancer = probe.Balancer(endpoints([1] * n), LEAST)
    for index in range(n):
        balancer.add(index, 10 if index != n - 1 else 9)
    assert {balancer.pick() for _ in range(100)} == {n - 1}


def test_load_follows_weight_when_connections_stay() -> None:
    weights = [1, 2, 4, 1, 8]
    balancer = probe.Balancer(endpoints(weights), LEAST)
    held = Counter()
    for _ in range(1600):
        index = balancer.pick()
        balancer.add(index, 1)
        held[index] += 1
    for index, weight in enumerate(weights):
        assert abs(held[index] - 100 * weight) <= 3


def test_two_choices_keep_the_greatest_load_near_the_mean() -> None:
    balancer = probe.Balancer(endpoints([1] * 500), LEAST, seed=11)
    held = Counter()
    for _ in range(50_000):
        index = balancer.pick()
        balancer.add(index, 1)
        held[index] += 1
    assert max(held.values()) <= 104
    random_held = Counter()
    random_balancer = probe.Balancer(endpoints([1] * 500), RANDOM, seed=11)
    for _ in range(50_000):
        random_held[random_balancer.pick()] += 1
    assert max(random_held.values()) > 125


def moved(balance: int, n: int, gone: int) -> float:
    """Share of the keys of those that stay which change their endpoint when one goes."""
    rows = endpoints([1] * n)
    before = probe.Balancer(rows, balance)
    after = probe.Balancer(rows[:gone] + rows[gone + 1 :], balance)
    changed = kept = 0
    for key in range(20_000):
        old = before.pick(key * 2654435761)
        new = after.pick(key * 2654435761)
        if old == gone:
            continue
        kept += 1
        changed += new != (old if old < gone else old - 1)
    return changed / kept


def test_a_ring_moves_only_the_keys_of_the_endpoint_that_goes() -> None:
    assert moved(RING, 20, 7) == 0


def test_maglev_moves_few_other_keys() -> None:
    assert moved(MAGLEV, 20, 7) < 0.03


@pytest.mark.parametrize("balance", [RING, MAGLEV])
def test_the_order_of_endpoints_does_not_matter_to_hashing(balance: int) -> None:
    rows = endpoints([1, 2, 3, 4, 5, 6, 7])
    forward, backward = probe.Balancer(rows, balance), probe.Balancer(rows[::-1], balance)
    assert all(forward.pick(key * 977) == 6 - backward.pick(key * 977) for key in range(5000))


@pytest.mark.parametrize("balance", [RING, MAGLEV])
def test_bounded_loads_hold_even_when_one_source_floods(balance: int) -> None:
    weights = [1, 1, 2, 4]
    balancer = probe.Balancer(endpoints(weights), balance, bounded_load_percent=125)
    held = [0] * 4
    for turn in range(2000):
        index = balancer.pick(12345 if turn % 3 else turn * 7919)
        balancer.add(index, 1)
        held[index] += 1
        assert held[index] <= 1.25 * (turn + 1) * weights[index] / sum(weights) + 1


@pytest.mark.parametrize("balance", ALL)
def test_an_endpoint_that_was_tried_comes_back_only_when_all_were(balance: int) -> None:
    balancer = probe.Balancer(endpoints([1, 200, 3, 1]), balance, seed=5)
    for key in range(200):
        tried: tuple[int, ...] = ()
        for _ in range(4):
            index = balancer.pick(key * 7919, tried)
            assert index not in tried
            tried = (*tried, index)
        assert balancer.pick(key * 7919, tried) in range(4)


@pytest.mark.parametrize("balance", ALL)
@pytest.mark.parametrize("n", [3, 30])
def test_full_endpoints_are_left_out(balance: int, n: int) -> None:
    balancer = probe.Balancer(endpoints([1] * n), balance, max_connections_per_endpoint=2)
    for _ in range(2 * n):
        index = balancer.pick(1)
        assert index >= 0
        balancer.add(index, 1)
    assert balancer.pick(1) == FULL
    balancer.add(2, -1)
    assert balancer.pick(1) == 2


@pytest.mark.parametrize("balance", ALL)
def test_nothing_to_pick_from(balance: int) -> None:
    assert probe.Balancer([], balance).pick() == NONE
    assert probe.Balancer(endpoints([0, 0]), balance).pick() == NONE
    assert probe.Balancer(endpoints([0, 1]), balance).pick() == 1


@pytest.mark.parametrize("balance", ALL)
def test_the_own_zone_first_and_the_others_when_it_is_full(balance: int) -> None:
    balancer = probe.Balancer(endpoints([1] * 4, tiers=[0, 0, 1, 1]), balance, max_connections_per_endpoint=3)
    order = []
    for key in range(12):
        index = balancer.pick(key * 7919)
        balancer.add(index, 1)
        order.append(index)
    assert set(order[:6]) == {0, 1}
    assert set(order[6:]) == {2, 3}
    assert balancer.pick(5, (0, 1)) == FULL


@pytest.mark.parametrize("balance", [ROUND_ROBIN, RANDOM, LEAST])
@pytest.mark.parametrize("n", [4, 20])
def test_a_new_endpoint_warms_up(balance: int, n: int) -> None:
    shares = []
    for now_ms in (1000, 6000, 11_000):
        balancer = probe.Balancer(endpoints([1] * n, warm=[1000] + [0] * (n - 1)), balance, seed=9, slow_start_ms=10_000)
        if balance == LEAST:
            for _ in range(100 * n):
                balancer.add(balancer.pick(now_ms=now_ms), 1)
            counts = Counter()
            for _ in range(100 * n):
                index = balancer.pick(now_ms=now_ms)
                balancer.add(index, 1)
                counts[index] += 1
            shares.append(counts[0] / 100)
        else:
            shares.append(balancer.count(2000 * n, now_ms)[0] / 2000)
    assert shares[0] < 0.25
    assert 0.3 < shares[1] < 0.75
    assert shares[2] > 0.85


@pytest.mark.parametrize("n", [4, 20])
def test_a_new_endpoint_warms_up_where_connections_are_few_as_well(n: int) -> None:
    balancer = probe.Balancer(endpoints([1] * n, warm=[1000] + [0] * (n - 1)), LEAST, seed=9, slow_start_ms=10_000)
    shares = [balancer.count(2000 * n, now_ms)[0] / 2000 for now_ms in (1000, 6000, 11_000)]
    assert 0 < shares[0] < 0.25
    assert 0.3 < shares[1] < 0.75
    assert shares[2] > 0.85


@pytest.mark.parametrize("balance", ALL)
@pytest.mark.parametrize("n", [4, 20])
def test_where_all_are_new_one_is_picked(balance: int, n: int) -> None:
    balancer = probe.Balancer(endpoints([1] * n, warm=[1000] * n), balance, seed=9, slow_start_ms=10_000)
    assert {balancer.pick(source * 2654435761, now_ms=1000) for source in range(200 * n)} == set(range(n))


@pytest.mark.parametrize("balance", ALL)
@pytest.mark.parametrize("n", [4, 40])
def test_an_endpoint_that_is_out_is_picked_in_a_panic_only(balance: int, n: int) -> None:
    balancer = probe.Balancer(endpoints([1] * n, tiers=[i % 2 for i in range(n)]), balance, seed=3)
    for index in range(0, n, 2):
        balancer.set_out(index, True)
    counts = balancer.count(200 * n)
    assert [count > 0 for count in counts] == [i % 2 == 1 for i in range(n)]
    balancer.panic = True
    counts = balancer.count(200 * n)
    assert [count > 0 for count in counts] == [i % 2 == 0 for i in range(n)]
    balancer.panic = False
    for index in range(n):
        balancer.set_out(index, True)
    assert balancer.pick(7) == NONE
    balancer.set_out(0, False)
    assert balancer.pick(7) == 0


@pytest.mark.parametrize("balance", [ROUND_ROBIN, RANDOM, LEAST])
def test_the_share_of_endpoints_that_are_out_goes_to_all_others(balance: int) -> None:
    balancer = probe.Balancer(endpoints([1] * 8), balance, seed=3)
    for index in range(3):
        balancer.set_out(index, True)
    assert balancer.count(5000)[3:] == pytest.approx([1000] * 5, rel=0.15)


@pytest.mark.parametrize("balance", ALL)
@pytest.mark.parametrize("n", [6, 40])
def test_a_retry_goes_where_the_last_dial_succeeded(balance: int, n: int) -> None:
    balancer = probe.Balancer(endpoints([1] * n), balance, seed=5)
    for index in range(n - 1):
        balancer.set_failing(index, True)
    assert {balancer.pick(source, (0,)) for source in range(200)} == {n - 1}
    assert len({balancer.pick(source * 2654435761) for source in range(200)}) > 1, "a first attempt may go anywhere"
    # Nobody is left that has not failed: one that was not tried, all the same.
    assert n - 1 not in {balancer.pick(source, (n - 1,)) for source in range(200)}


def test_out_and_full_are_told_apart() -> None:
    balancer = probe.Balancer(endpoints([1, 1, 0]), LEAST, max_connections_per_endpoint=1)
    balancer.add(0, 1)
    balancer.set_out(1, True)
    assert balancer.pick(1) == FULL
    balancer.set_out(0, True)
    assert balancer.pick(1) == NONE


@pytest.mark.parametrize("balance", ALL)
def test_ten_thousand_endpoints(balance: int) -> None:
    balancer = probe.Balancer(endpoints([1] * 10_000), balance)
    counts = balancer.count(100_000)
    assert sum(count > 0 for count in counts) > 9_000
    assert max(counts) < 60


@pytest.mark.parametrize("balance", ALL)
def test_a_small_cluster_is_small(balance: int) -> None:
    size = probe.Balancer(endpoints([1] * 10), balance).size
    assert size < (1100 if balance in (ROUND_ROBIN, LEAST, RANDOM) else 15_000)


@pytest.mark.parametrize("balance", range(5))
def test_the_endpoint_that_failed_last_is_tried_again_last(balance: int) -> None:
    balancer = probe.Balancer(endpoints([1] * 3), balance)
    for tried in ((0, 1, 2), (2, 0, 1), (1, 2, 0, 2)):
        assert all(balancer.pick(source, tried) != tried[-1] for source in range(200))
    for source in range(200):
        assert balancer.pick(source, (0, 1)) == 2
